"""Who is asked in one attempt at a round: a pure function of the server's root, round and attempt.

Speaks of members only, never of Flower's node ids, which are random. A sampler may return any
number of members, none included.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness


class CohortSampler(Protocol):
    """Draws a cohort."""

    def sample(
        self, randomness: Randomness, eligible: Collection[int], *, round: int, attempt: int
    ) -> tuple[int, ...]:
        """Members to ask, sorted; drawn from `eligible`, in whatever order that came."""


@dataclass(frozen=True)
class UniformSampler:
    """A cohort of a fixed size, uniform over those that may be asked.

    Attributes:
        size: Members of a cohort; all that may be asked, if these are fewer.
    """

    size: int

    def __post_init__(self) -> None:
        """Check the size."""
        if self.size < 1:
            raise UsageError(f"cohort must be at least 1, got {self.size}")

    def sample(
        self, randomness: Randomness, eligible: Collection[int], *, round: int, attempt: int
    ) -> tuple[int, ...]:
        """Members to ask, sorted."""
        ordered = sorted(eligible)
        order = randomness.stream("cohort", round, attempt).permutation(len(ordered))
        return tuple(sorted(ordered[index] for index in order[: self.size]))


@dataclass(frozen=True)
class PoissonSampler:
    """Each member by itself with the same chance: the sampling that privacy amplification assumes.

    Attributes:
        rate: Chance of each member, above 0, at most 1.
    """

    rate: float

    def __post_init__(self) -> None:
        """Check the rate."""
        if not 0 < self.rate <= 1:
            raise UsageError(f"the rate must be above 0 and at most 1, got {self.rate}")

    def sample(
        self, randomness: Randomness, eligible: Collection[int], *, round: int, attempt: int
    ) -> tuple[int, ...]:
        """Members to ask, sorted; possibly none."""
        ordered = sorted(eligible)
        draws = randomness.stream("cohort", round, attempt).random(len(ordered))
        return tuple(m for m, draw in zip(ordered, draws, strict=True) if draw < self.rate)


@dataclass(frozen=True)
class CyclicSampler:
    """A cohort of a fixed size from a group whose turn it is, so that nobody is asked again too soon.

    Members are dealt to `separation` groups of nearly equal size, once for the whole run; round r
    draws from group (r - 1) mod separation. So a member takes part in at most one of any
    `separation` rounds in a row, which is what correlated noise assumes.

    Attributes:
        size: Members of a cohort; all of the group that may be asked, if these are fewer.
        separation: Number of groups.
    """

    size: int
    separation: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.size < 1 or self.separation < 1:
            raise UsageError(
                f"cohort and separation must be at least 1, got {self.size} and {self.separation}"
            )

    def sample(
        self, randomness: Randomness, eligible: Collection[int], *, round: int, attempt: int
    ) -> tuple[int, ...]:
        """Members to ask, sorted."""
        turn = (round - 1) % self.separation
        group = [member for member in eligible if self.group(randomness, member) == turn]
        return UniformSampler(self.size).sample(randomness, group, round=round, attempt=attempt)

    def group(self, randomness: Randomness, member: int) -> int:
        """A member's group: blocks of `separation` members in a row are dealt one to each group."""
        block, place = divmod(member, self.separation)
        order = randomness.stream("cohort groups", block).permutation(self.separation)
        return int(order[place])


def sampler_of(config: FederationConfig, members: int) -> CohortSampler:
    """The sampler that a config's privacy assumes.

    Args:
        config: Of the federation.
        members: In the roster.
    """
    privacy = config.privacy
    if privacy.mechanism == "dp_ftrl":
        return CyclicSampler(config.cohort, privacy.separation)
    if privacy.sampling == "poisson":
        return PoissonSampler(config.cohort / members)
    return UniformSampler(config.cohort)
