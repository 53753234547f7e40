"""The rounding range of the next round, from what the sum already says.

The range is public and in the plan. It follows the masked count of clamped coordinates and the sum itself, never a
client's own statistics (spec of secure aggregation, rule 9), and moves by at most `STEP` a round, because a client
bounds how far a plan may be from the last one. With differential privacy there is no count, and the range stays.

Coordinates are treated as normal, which rotation makes them nearly. If a share p was clamped, the range was at z(p)
standard deviations, and the next one is put at `target` of them. If nothing was clamped, the range may be too wide: it
shrinks to `target` standard deviations of independent updates with this mean, which are sqrt(n) times as large as the
mean's. Updates that agree are smaller than that, so what remains is a range that is wider than need be, by sqrt(n) at
most; the rounding errors of n clients average out by as much, so the relative error of the mean is the same.
"""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

STEP = 15.9  # largest factor of the change from one round to the next; a client's own bound is 16
MARGIN = 1.05  # clients and parts of a vector differ, and clipping hurts sooner than rounding
_CANDIDATES = np.arange(1.0, 10.0, 0.05)  # standard deviations


def next_range(
    value_range: float,
    clipped_share: float,
    *,
    total: NDArray[np.float64],
    clients: int,
    level_bits: int,
) -> float:
    """The range of the next round.

    Args:
        value_range: Of this round.
        clipped_share: Share of all survivors' coordinates that were clamped, 0 to 1.
        total: (num_params,) sum of the released updates; rotated or not, as only its norm is read.
        clients: Number of survivors, at least 1.
        level_bits: Of the plan.

    Returns:
        Between value_range / STEP and value_range * STEP, to three significant digits.
    """
    deviations, wanted = target(level_bits), value_range
    if clipped_share > 0:
        # 0 if all were clamped: then the range is too narrow by more than a step
        reached = -NormalDist().inv_cdf(min(clipped_share, 1.0) / 2)
        wanted = value_range * deviations / reached if reached > 0 else math.inf
    elif total.size:
        independent = math.sqrt(float(np.mean(np.square(total))) / clients)
        wanted = min(value_range, deviations * independent) if independent > 0 else value_range
    return _round(min(max(wanted, value_range / STEP), value_range * STEP))


def target(level_bits: int) -> float:
    """Standard deviations from zero to the range, where rounding and clipping errors together are least.

    6.2 for 16-bit levels, 4.0 for 8-bit ones, a margin included.
    """
    errors = [mean_square_error(float(deviations), level_bits) for deviations in _CANDIDATES]
    return MARGIN * float(_CANDIDATES[int(np.argmin(errors))])


def mean_square_error(deviations: float, level_bits: int) -> float:
    """Of one standard normal coordinate, clamped to +- `deviations` and rounded at random.

    Rounding: a sixth of a squared level (the mean of f (1 - f) over the fraction f). Clipping: E max(0, |x| - k)^2 =
    2 ((1 + k^2) Q(k) - k phi(k)).
    """
    level = deviations / ((1 << (level_bits - 1)) - 1)
    density = math.exp(-(deviations**2) / 2) / math.sqrt(2 * math.pi)
    beyond = math.erfc(deviations / math.sqrt(2)) / 2
    clipping = 2 * ((1 + deviations**2) * beyond - deviations * density)
    return level**2 / 6 + max(0.0, clipping)


def _round(value: float) -> float:
    """To three significant digits: a plan that is easy to read and the same on every machine."""
    return float(f"{value:.2e}")
