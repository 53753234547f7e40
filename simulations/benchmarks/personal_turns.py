"""Many sides of one measurement by turns, A B C A B C, and rows of their rates."""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.meters import cpu_seconds

# of the issue: the worst pair reaches at least this share of the goal
LOW_SHARE = 0.95


@dataclass(frozen=True)
class Turns:
    """What the sides did in each round.

    Attributes:
        rates: Name of a side: users a CPU second in each round.
        loads: Processes that wanted to run, at the end of each round: the machine's own average.
    """

    rates: Mapping[str, Sequence[float]] = field(repr=False)
    loads: Sequence[float] = ()

    def alone(self, name: str, side: str) -> Row:
        """One side by itself."""
        rates = self.rates[side]
        note = f"{len(rates)} runs; {spread(rates)}"
        return Row(name, median(rates), kind="rate", unit="users/s", note=note)

    def row(self, name: str, *, ours: str, theirs: str, goal: float | None = None) -> Row:
        """One side against another: medians, and the least ratio of any round."""
        mine, other = self.rates[ours], self.rates[theirs]
        return Row(
            name,
            median(mine),
            median(other),
            kind="rate",
            goal=goal,
            unit="users/s",
            low=min(a / b for a, b in zip(mine, other, strict=True)),
            low_share=None if goal is None else LOW_SHARE,
            note=(
                f"{len(mine)} pairs; ours {spread(mine)}, theirs {spread(other)}, "
                f"load {spread(self.loads)}"
            ),
        )


def spread(values: Sequence[float]) -> str:
    """Least and most."""
    return f"{min(values):.3g}-{max(values):.3g}"


def silent(line: str) -> None:
    """Tells nobody."""


def take_turns(
    sides: Mapping[str, Callable[[int], int]],
    rounds: int,
    *,
    tell: Callable[[str], None] = silent,
) -> Turns:
    """Measures all sides once a round, in their order.

    Args:
        sides: Name: takes the index of a round, trains some users and returns how many.
        rounds: How often.
        tell: Called after each round with its rates in one line.

    Raises:
        UsageError: There is no round.
    """
    if rounds < 1:
        raise UsageError(f"pairs must be at least 1, got {rounds}")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    loads = []
    for index in range(rounds):
        for name, side in sides.items():
            gc.collect()
            rates[name].append(_rate(side, index))
        loads.append(os.getloadavg()[0])
        found = "; ".join(f"{name} {rate[-1]:.3g}" for name, rate in rates.items())
        tell(f"round {index + 1} of {rounds}, users/s: {found}")
    return Turns(rates, loads)


def _rate(side: Callable[[int], int], index: int) -> float:
    counted: list[int] = []
    seconds = cpu_seconds(lambda: counted.append(side(index)))
    return counted[0] / max(seconds, 1e-9)
