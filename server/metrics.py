"""What is recorded of a round: what depends on the settings alone, and apart from it the wall times.

Guarantee: with secure rounds no figure of an update, a weight or a loss is of one client: each is of
the sum. Not covered: who was asked, survived, dropped or was at fault, which names members; and
rounds with plain updates, whose figures are made from single ones.

With differential privacy only noised values come in here: what would be of the exact sum is None.
Where the cohort is drawn by Poisson sampling it stays unpublished, or nothing is amplified: a
record that is published (`RoundRecord.published`) has None for all that names or counts its members,
the number of attempts and bytes among them. Wall times are not covered: how long a round takes tells
how many took part, so with such a cohort they are not kept by stage.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedoppu.common.privacy import PrivacySpent

MEMBERS = ("cohort", "survivors", "aborted")
EPSILONS = ("released", "server", "peers")
ADJACENCIES = {"add_remove": "add or remove one user", "zero_out": "zero out one user"}


@dataclass(frozen=True)
class RoundRecord:
    """One finished round; a function of the settings alone.

    Attributes:
        round: From 1.
        attempt: The one that succeeded, from 0; None where the cohort is not published.
        cohort: Members asked in it, sorted; None likewise.
        survivors: Members whose updates are in the sum, sorted; None likewise.
        drops: Stage: members that gave no usable reply in it, sorted; None likewise.
        bytes_up: Payload of all replies of all attempts; None likewise.
        bytes_down: Payload of all messages of all attempts; None likewise.
        held_out_loss: Mean over the clients that scored the received adapter on their held-out
            items, nats; None where too few could have, and with differential privacy.
        held_out_clients: How many did; None likewise.
        weight: Sum of the clients' weights; None with differential privacy.
        update_norm: L2 norm of the mean update, noise included.
        clipped_share: Share of the coordinates that were clamped to the range; None with
            differential privacy.
        clip: Bound of the L2 norm of an update.
        value_range: Bound of a coordinate.
        next_range: That of the next round.
        model_hash: Digest of the shared adapter after the round.
        liars: Member: what it did wrong; None where the cohort is not published.
        aborted: Why each attempt before this one was given up; None likewise.
        privacy: What all rounds so far have spent; None without differential privacy.
    """

    round: int
    attempt: int | None
    cohort: tuple[int, ...] | None
    survivors: tuple[int, ...] | None
    drops: Mapping[str, tuple[int, ...]] | None
    bytes_up: int | None
    bytes_down: int | None
    held_out_loss: float | None
    held_out_clients: int | None
    weight: float | None
    update_norm: float
    clipped_share: float | None
    clip: float
    value_range: float
    next_range: float
    model_hash: str
    liars: Mapping[int, str] | None = field(default_factory=dict)
    aborted: tuple[str, ...] | None = ()
    privacy: PrivacySpent | None = None

    @property
    def dropped(self) -> int | None:
        """Number of members of the cohort that gave no usable reply at some stage."""
        if self.drops is None:
            return None
        return len({member for members in self.drops.values() for member in members})

    def published(self) -> "RoundRecord":
        """The record without anything that names or counts the members of the cohort."""
        return replace(
            self,
            attempt=None,
            cohort=None,
            survivors=None,
            drops=None,
            bytes_up=None,
            bytes_down=None,
            liars=None,
            aborted=None,
        )

    def as_data(self) -> dict[str, Any]:
        """Plain values for metrics.jsonl, in a fixed order; `kind` tells the lines apart."""
        data: dict[str, Any] = {"kind": "round", **vars(self), "dropped": self.dropped}
        data |= {name: None if data[name] is None else list(data[name]) for name in MEMBERS}
        if self.drops is not None:
            data["drops"] = {stage: list(members) for stage, members in sorted(self.drops.items())}
        if self.liars is not None:
            data["liars"] = {str(member): fault for member, fault in sorted(self.liars.items())}
        if self.privacy is None:
            del data["privacy"]
        else:
            data["privacy"] = privacy_data(self.privacy)
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "RoundRecord":
        """The inverse of `as_data`."""
        values = {name: value for name, value in data.items() if name not in ("kind", "dropped")}
        values |= {name: _tuple(values[name]) for name in MEMBERS}
        if values["drops"] is not None:
            values["drops"] = {stage: tuple(them) for stage, them in values["drops"].items()}
        if values["liars"] is not None:
            values["liars"] = {int(member): fault for member, fault in values["liars"].items()}
        if "privacy" in values:
            values["privacy"] = read_privacy(values["privacy"])
        return cls(**values)


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def privacy_data(spent: PrivacySpent) -> dict[str, Any]:
    """What was spent as JSON has it: an epsilon without a bound is null."""
    data = asdict(spent)
    return data | {name: _finite(data[name]) for name in EPSILONS}


def read_privacy(data: Mapping[str, Any]) -> PrivacySpent:
    """The inverse of `privacy_data`."""
    unbounded = {name: math.inf for name in EPSILONS if data[name] is None}
    return PrivacySpent(**{**data, **unbounded})


def privacy_text(spent: PrivacySpent) -> str:
    """What was spent for people, in one line; epsilons are rounded up."""
    return (
        f"epsilon {rounded_up(spent.released)} (members {rounded_up(spent.peers)}, server "
        f"{rounded_up(spent.server)}; delta {spent.delta:.3g}, {ADJACENCIES[spent.adjacency]})"
    )


def rounded_up(epsilon: float) -> str:
    """Three digits, never less than it is."""
    if epsilon == math.inf:
        return "no bound"
    step = 10.0 ** (math.floor(math.log10(epsilon)) - 2) if epsilon > 0 else 1.0
    return f"{math.ceil(epsilon / step - 1e-9) * step:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class RoundTiming:
    """Wall times of a round; never in `metrics.jsonl`.

    Attributes:
        round: From 1.
        stages: (attempt, stage, seconds), in the order in which they were run; none where the cohort
            is not published.
    """

    round: int
    stages: Sequence[tuple[int, str, float]]

    def as_data(self) -> dict[str, Any]:
        """Plain values for timing.jsonl."""
        rows = [{"attempt": a, "stage": stage, "seconds": s} for a, stage, s in self.stages]
        return {"kind": "round", "round": self.round, "stages": rows}
