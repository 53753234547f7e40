"""The rounding range of the next round, from what the sum already says.

The range is public and in the plan. It follows the masked count of clamped coordinates and the sum
itself, never a client's own statistics (spec of secure aggregation, rule 9), and moves by at most
`STEP` a round, because a client bounds how far a plan may be from the last one.

Coordinates are treated as normal, which rotation makes them nearly. If a share p was clamped, the
range was at z(p) standard deviations, and the next one is put at `TARGET` of them. If nothing was
clamped, the range may be too wide: it shrinks to `TARGET` standard deviations of independent
updates with this mean, which are sqrt(n) times as large as the mean's. Updates that agree are
smaller than that, so what remains is a range that is wider than need be, by sqrt(n) at most.
"""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

STEP = 3.9  # largest factor of the change from one round to the next; a client's own bound is 4
TARGET = 6.0  # standard deviations from zero to the range


def next_range(
    value_range: float, clipped_share: float, *, total: NDArray[np.float64], clients: int
) -> float:
    """The range of the next round.

    Args:
        value_range: Of this round.
        clipped_share: Share of all survivors' coordinates that were clamped, 0 to 1.
        total: (num_params,) sum of the released updates.
        clients: Number of survivors, at least 1.

    Returns:
        Between value_range / STEP and value_range * STEP, to three significant digits.
    """
    independent = math.sqrt(float(np.mean(np.square(total))) / clients) if total.size else 0.0
    wanted = value_range
    if clipped_share > 0:
        # at one half and beyond, the range says nothing about the deviation
        deviations = -NormalDist().inv_cdf(min(clipped_share, 0.5) / 2)
        wanted = max(value_range, value_range * TARGET / deviations)
    elif independent > 0:
        wanted = min(value_range, TARGET * independent)
    return _round(min(max(wanted, value_range / STEP), value_range * STEP))


def _round(value: float) -> float:
    """To three significant digits: a plan that is easy to read and the same on every machine."""
    return float(f"{value:.2e}")
