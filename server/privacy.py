"""Differential privacy on the server: the noise in a sum, what a round costs, when a run must stop.

The unit of privacy is the user: one client is one user, with one clipped vector of weight 1 a round.

Guaranteed, by a server that runs this, for the config's mechanism:

- The noise is added to the integer sum, in the memory that holds it, before anything else reads it:
  the range check of the decoder, records, logs, files and the next model see the noised sum alone.
  What is durable before that is masked (server/rounds.py).
- The mean divides by the expected number of clients, never by the survivors.
- Noise is a function of the server's own root and of what it is added to: the same sum gets the same
  noise after a crash, so that two releases cannot be averaged; and no two sums share one (their
  difference would be exact). Context and survivors name a sum; a round of dp_ftrl is named by run,
  config and round, because its noise enters later rounds too.
- central, and dp_ftrl: discrete Gaussian noise of z sensitivities. distributed: clients add the
  noise; with Poisson sampling the server tops it up to a variance that is the same in every round,
  because the variance would tell how many took part.

Not guaranteed: anything against the server itself in the central modes, where it holds the exact sum
in memory for a moment; and in a simulation, whose root is its seed: whoever knows the seed can take
the noise off again.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.agreed import agreed_noise
from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import ProtocolError, RoundAborted
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.matrix_factorization import largest_scale, noise_of_rounds
from fedoppu.common.privacy import (
    Participation,
    PrivacySpent,
    affordable,
    require_scales,
    sensitivity,
    server_noise,
    spent,
    steady_ratio,
    top_up,
)
from fedoppu.common.quantization import decode_levels, mean_of_levels, require_no_overflow
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import RoundPlan, SumReady
from fedoppu.server.attempt import Outcome, decode_exactly
from fedoppu.server.charges import Charge

Noise = NDArray[np.int64]


class PrivacyMechanism(Protocol):
    """What differential privacy does to a round, on the server's side."""

    def complete(self, plan: RoundPlan, asked: int) -> RoundPlan:
        """The plan with its noise scale, after a check that a sum over `asked` members fits its words.

        Raises:
            UsageError: It does not, or the noise is too small to be accounted for.
        """

    def decode(self, ready: SumReady, plan: RoundPlan) -> Outcome:
        """Adds the server's noise to the sum, in place, and decodes what that gives.

        Raises:
            RoundAborted: A total is out of the survivors' reach.
            ProtocolError: The same, where no other attempt may be made.
        """

    def affords(self, charges: Sequence[Charge]) -> bool:
        """Whether these attempts together are within the budget."""

    def spent(self, charges: Sequence[Charge]) -> PrivacySpent | None:
        """What these attempts cost together; None where there is no mechanism."""


@dataclass(frozen=True)
class NoPrivacy:
    """Exact sums, which cost nothing because nothing is promised."""

    def complete(self, plan: RoundPlan, asked: int) -> RoundPlan:
        """The plan as it is.

        Raises:
            UsageError: A sum over `asked` members may overflow its words.
        """
        require_no_overflow(plan, asked)
        return plan

    def decode(self, ready: SumReady, plan: RoundPlan) -> Outcome:
        """The weighted mean."""
        return decode_exactly(ready, plan)

    def affords(self, charges: Sequence[Charge]) -> bool:
        """Always."""
        return True

    def spent(self, charges: Sequence[Charge]) -> PrivacySpent | None:
        """No figure."""
        return None


@dataclass(frozen=True)
class GaussianPrivacy:
    """The mechanisms central, distributed and dp_ftrl.

    Attributes:
        config: Of the federation, with its noise multiplier.
        randomness: The server's own root.
        members: In the roster.
        tape: Noise of dp_ftrl.
    """

    config: FederationConfig
    randomness: Randomness
    members: int
    tape: "NoiseTape" = field(default_factory=lambda: NoiseTape(), repr=False)

    # --- the plan --------------------------------------------------------------------------------

    def complete(self, plan: RoundPlan, asked: int) -> RoundPlan:
        """The plan with its noise scale.

        Raises:
            UsageError: A sum over `asked` members may overflow its words, or the noise is too small.
        """
        complete = replace(plan, noise_scale=agreed_noise(self.config, plan))
        total = self._total_scale(complete, asked)
        require_scales(total, complete.noise_scale or math.inf)
        require_no_overflow(_spread(complete, total, asked), asked)
        return complete

    # --- the sum ---------------------------------------------------------------------------------

    def decode(self, ready: SumReady, plan: RoundPlan) -> Outcome:
        """The noised sum over the expected number of clients.

        Raises:
            RoundAborted: A noised total is out of the survivors' reach.
            ProtocolError: The same in dp_ftrl, whose round has noise for one sum.
        """
        survivors = ready.survivors
        noise = self._noise(plan, survivors)
        np.add(ready.words, noise.astype(ready.words.dtype), out=ready.words)
        # from here on there is no exact sum any more
        levels = self._levels(ready, plan)
        return Outcome(
            mean=mean_of_levels(levels, plan, divisor=float(self.config.cohort)),
            weight=None,
            held_out_loss=None,
            held_out_clients=None,
            clipped=None,
            survivors=survivors,
            liars=ready.liars,
        )

    def _levels(self, noised: SumReady, plan: RoundPlan) -> Noise:
        count = len(noised.survivors)
        bounds = _spread(plan, self._total_scale(plan, count), count)
        try:
            return decode_levels(noised.words, bounds, noised.survivors)
        except RoundAborted:  # its message has a figure, which no release accounts for
            what = (
                f"round {plan.round} attempt {plan.attempt}: a noised total is out of the survivors' "
                "reach, so some client sent what it must not; the sum is discarded"
            )
            if self.config.privacy.mechanism != "dp_ftrl":
                raise RoundAborted(what) from None
            # another attempt's sum would get the same noise, and this one told something of it
            raise ProtocolError(
                what, hint="the run ends here: a round of dp_ftrl has one noise, for one sum"
            ) from None

    def _noise(self, plan: RoundPlan, survivors: Sequence[int]) -> Noise:
        """(num_params,) of the server's own noise, levels."""
        privacy, scale = self.config.privacy, self._own_scale(plan, len(survivors))
        if privacy.mechanism == "dp_ftrl":
            keys = self.randomness.child("server noise", plan.run_id, plan.config_hash)
            return self.tape.noise(plan, keys, bands=privacy.separation, scale=scale)
        members = ",".join(map(str, survivors))
        key = self.randomness.secret("server noise", plan.context, members)
        return discrete_gaussian(key, scale, plan.num_params)

    def _own_scale(self, plan: RoundPlan, survivors: int) -> float:
        """Of the noise that the server makes, levels; in dp_ftrl before it is correlated."""
        privacy = self.config.privacy
        if self._steady:
            return top_up(self._steady_scale(plan), plan.noise_scale, survivors)
        if privacy.mechanism == "dp_ftrl":
            return (privacy.noise_multiplier or 0.0) * sensitivity(plan)
        return server_noise(privacy, sensitivity(plan))

    def _total_scale(self, plan: RoundPlan, survivors: int) -> float:
        """Of all noise in a sum, levels."""
        own, privacy = self._own_scale(plan, survivors), self.config.privacy
        if privacy.mechanism == "dp_ftrl":
            own *= largest_scale(plan.round, privacy.separation)
        return math.sqrt(own**2 + survivors * plan.noise_scale**2)

    # --- distributed noise under Poisson sampling ------------------------------------------------

    @property
    def _steady(self) -> bool:
        privacy = self.config.privacy
        return privacy.mechanism == "distributed" and privacy.sampling == "poisson"

    def _steady_scale(self, plan: RoundPlan) -> float:
        """A scale that the noise of no cohort's clients exceeds, whatever its size, levels."""
        ratio = steady_ratio(self.config.thresholds, self.members)
        return (self.config.privacy.noise_multiplier or 0.0) * sensitivity(plan) * math.sqrt(ratio)

    # --- the budget ------------------------------------------------------------------------------

    def affords(self, charges: Sequence[Charge]) -> bool:
        """Whether these attempts are within the config's epsilon; always, if it has none."""
        part = participation(self.config, self.members, charges)
        return affordable(self.config.privacy, part, steady=self._steady)

    def spent(self, charges: Sequence[Charge]) -> PrivacySpent:
        """What these attempts cost together."""
        part = participation(self.config, self.members, charges)
        return spent(self.config.privacy, part, steady=self._steady)


class NoiseTape:
    """The correlated noise of a run's rounds, one after the other; a resumed run makes it again.

    It holds noise, which is a function of the server's root, and nothing else.
    """

    def __init__(self) -> None:
        """Before the first round."""
        self._round = 0
        self._rounds: Iterator[Noise] = iter(())
        self._noise: Noise = np.zeros(0, np.int64)

    def noise(self, plan: RoundPlan, keys: Randomness, *, bands: int, scale: float) -> Noise:
        """(num_params,) noise of the plan's round, levels; the same however often it is asked for.

        Args:
            plan: Of the round.
            keys: Root of the run's noise.
            bands: Rounds over which it is correlated.
            scale: z * sensitivity, levels; the same in all rounds.
        """
        if plan.round < self._round or self._round == 0:
            self._round = 0
            self._rounds = noise_of_rounds(
                lambda number: keys.secret("round", number),
                bands=bands,
                scale=scale,
                length=plan.num_params,
            )
        while self._round < plan.round:
            self._noise = next(self._rounds)
            self._round += 1
        return self._noise


def participation(
    config: FederationConfig, members: int, charges: Sequence[Charge]
) -> Participation:
    """Who takes part in some attempts, and how often at most.

    In dp_ftrl members take turns: one is asked only in rounds that are equal modulo `separation`.
    A roster that grows lowers the rate of what comes, and not of what was.

    Args:
        config: Of the federation.
        members: In the roster now.
        charges: The attempts.
    """
    turns = Counter(charge.round % config.privacy.separation for charge in charges)
    sizes = [members, *(charge.members for charge in charges)]
    return Participation(
        members=max(sizes),
        cohort=config.cohort,
        floor=config.thresholds.least,
        rounds=len(charges),
        most=max(turns.values(), default=0),
        fewest=min(sizes),
    )


def privacy_of(config: FederationConfig, randomness: Randomness, members: int) -> PrivacyMechanism:
    """The mechanism of a config.

    Args:
        config: Of the federation.
        randomness: The server's own root.
        members: In the roster.
    """
    if config.privacy.mechanism == "none":
        return NoPrivacy()
    return GaussianPrivacy(config, randomness, members)


def _spread(plan: RoundPlan, total: float, clients: int) -> RoundPlan:
    """The plan as if its clients alone made noise of scale `total`: the decoder's bounds follow from that."""
    return replace(plan, noise_scale=total / math.sqrt(max(clients, 1)))
