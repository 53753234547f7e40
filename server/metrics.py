"""What is recorded of a round: what depends on the settings alone, and apart from it the wall times.

Guarantee: with secure rounds no figure of an update, a weight or a loss is of one client: each is of
the sum. Not covered: who was asked, survived, dropped or was at fault, which names members; and
rounds with plain updates, whose figures are made from single ones. With differential privacy only
noised values may come in here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RoundRecord:
    """One finished round; a function of the settings alone.

    Attributes:
        round: From 1.
        attempt: The one that succeeded, from 0.
        cohort: Members asked in it, sorted.
        survivors: Members whose updates are in the sum, sorted.
        drops: Stage: members that gave no usable reply in it, sorted.
        bytes_up: Payload of all replies of all attempts.
        bytes_down: Payload of all messages of all attempts.
        held_out_loss: Mean over the clients that scored the received adapter on their held-out
            items, nats; None where too few could have.
        held_out_clients: How many did; None likewise.
        weight: Sum of the clients' weights.
        update_norm: L2 norm of the mean update.
        clipped_share: Share of the coordinates that were clamped to the range.
        clip: Bound of the L2 norm of an update.
        value_range: Bound of a coordinate.
        next_range: That of the next round.
        model_hash: Digest of the shared adapter after the round.
        liars: Member: what it did wrong.
        aborted: Why each attempt before this one was given up.
    """

    round: int
    attempt: int
    cohort: tuple[int, ...]
    survivors: tuple[int, ...]
    drops: Mapping[str, tuple[int, ...]]
    bytes_up: int
    bytes_down: int
    held_out_loss: float | None
    held_out_clients: int | None
    weight: float
    update_norm: float
    clipped_share: float
    clip: float
    value_range: float
    next_range: float
    model_hash: str
    liars: Mapping[int, str] = field(default_factory=dict)
    aborted: tuple[str, ...] = ()

    @property
    def dropped(self) -> int:
        """Number of members of the cohort that gave no usable reply at some stage."""
        return len({member for members in self.drops.values() for member in members})

    def as_data(self) -> dict[str, Any]:
        """Plain values for metrics.jsonl, in a fixed order; `kind` tells the lines apart."""
        data: dict[str, Any] = {"kind": "round", **vars(self), "dropped": self.dropped}
        data |= {name: list(data[name]) for name in ("cohort", "survivors", "aborted")}
        data["drops"] = {stage: list(members) for stage, members in sorted(self.drops.items())}
        data["liars"] = {str(member): fault for member, fault in sorted(self.liars.items())}
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "RoundRecord":
        """The inverse of `as_data`."""
        values = {name: value for name, value in data.items() if name not in ("kind", "dropped")}
        values |= {name: tuple(values[name]) for name in ("cohort", "survivors", "aborted")}
        values["drops"] = {stage: tuple(members) for stage, members in values["drops"].items()}
        values["liars"] = {int(member): fault for member, fault in values["liars"].items()}
        return cls(**values)


@dataclass(frozen=True)
class RoundTiming:
    """Wall times of a round; never in `metrics.jsonl`.

    Attributes:
        round: From 1.
        stages: (attempt, stage, seconds), in the order in which they were run.
    """

    round: int
    stages: Sequence[tuple[int, str, float]]

    def as_data(self) -> dict[str, Any]:
        """Plain values for timing.jsonl."""
        rows = [{"attempt": a, "stage": stage, "seconds": s} for a, stage, s in self.stages]
        return {"kind": "round", "round": self.round, "stages": rows}
