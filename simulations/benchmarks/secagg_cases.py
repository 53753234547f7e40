"""The cohorts of the secure aggregation benchmark, the same for both sides."""

from dataclasses import dataclass

from fedoppu.common.config import ThresholdSettings
from fedoppu.common.thresholds import plan_thresholds

DROP = 10  # every tenth member sends no vector


@dataclass(frozen=True)
class Case:
    """One cohort and one length of vector.

    Attributes:
        size: Members, n.
        neighbours: Of each, k.
        threshold: Shares that restore a secret, t.
        num_params: Parameters, d.
        corrupt: Members assumed corrupt; with more than none, k and t hold against an active server.
    """

    size: int
    neighbours: int
    threshold: int
    num_params: int
    corrupt: int = 0

    @property
    def name(self) -> str:
        """For a row: n, d, (k, t), and whether the calculator chose them."""
        chosen = " active" if self.corrupt else ""
        kt = f"({self.neighbours}, {self.threshold}{chosen})"
        return f"n={self.size} d={short_count(self.num_params)} {kt}"

    @property
    def gone(self) -> tuple[int, ...]:
        """Members that deal shares and then send no vector: a tenth, evenly spread."""
        return tuple(range(DROP - 1, self.size, DROP))

    @property
    def live(self) -> tuple[int, ...]:
        """The others."""
        gone = set(self.gone)
        return tuple(member for member in range(self.size) if member not in gone)


def semi_honest(size: int, num_params: int) -> Case:
    """The k and t at which the goals are set: t = 2k / 3, which an active server could split."""
    neighbours, threshold = {10: (9, 7), 100: (54, 36), 1000: (68, 46)}[size]
    return Case(size, neighbours, threshold, num_params)


def active(size: int, num_params: int) -> Case:
    """The calculator's k and t where a tenth of the members is corrupt and the server is active."""
    corrupt, floor = size // 10, min(20, size // 5)
    settings = ThresholdSettings(floor=floor, corrupt=corrupt, max_drop=1 / DROP)
    found = plan_thresholds(size, settings)
    return Case(size, found.neighbours, found.threshold, num_params, corrupt)


def short_count(count: int) -> str:
    """1000000 as 1e6; anything else as it is."""
    digits = str(count)
    power = digits.rstrip("0")
    return f"{power}e{len(digits) - len(power)}" if len(digits) > 4 else digits
