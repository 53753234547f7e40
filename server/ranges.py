"""The rounding range of the next round, from what the sum already says.

The range is public and in the plan. It follows the masked count of clamped coordinates and the sum itself, never a
client's own statistics (spec of secure aggregation, rule 9), and moves by at most `STEP` a round, because a client
bounds how far a plan may be from the last one. With differential privacy there is no count, and the range stays.

Coordinates are treated as normal, which rotation makes them nearly. If a share p was clamped, the range was at z(p)
standard deviations, and the next one is put at `target` of them. If nothing was clamped, the range may be too wide: it
shrinks to `target` standard deviations of independent updates with this mean, which are sqrt(n) times as large as the
mean's. Updates that agree are smaller than that, so what remains is a range that is wider than need be, by sqrt(n) at
most; the rounding errors of n clients average out by as much, so the relative error of the mean is the same.

A few clamped coordinates say little of the others: they are a client's whose update is larger than most. Then the range
widens by no more than `NUDGE` beyond what it was or what the sum calls for, and does not swing.
"""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

STEP = 15.9  # largest factor of the change from one round to the next; a client's own bound is 16
UNEVEN = 1.2  # clients, and parts of a vector, may deviate so much more than the average
FEW = 10  # clamped coordinates over all clients, up to which they tell little
NUDGE = 1.1
_LEAST = 1e-300  # of a share, so that half of it is above zero
_CANDIDATES = np.arange(1.0, 12.0, 0.05)  # standard deviations


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
    independent = math.sqrt(float(np.mean(np.square(total))) / clients) if total.size else 0.0
    by_sum = target(level_bits) * independent
    if clipped_share > 0:
        # 0 if all were clamped: then the range is too narrow by more than a step
        reached = -NormalDist().inv_cdf(min(max(clipped_share, _LEAST), 1.0) / 2)
        wanted = value_range * target(level_bits) / reached if reached > 0 else math.inf
        if clipped_share * clients * total.size <= FEW:
            wanted = min(wanted, NUDGE * max(value_range, by_sum))
    else:
        wanted = min(value_range, by_sum) if by_sum > 0 else value_range
    return _round(min(max(wanted, value_range / STEP), value_range * STEP))


def target(level_bits: int) -> float:
    """Standard deviations from zero to the range, where rounding and clipping errors together are least.

    6.9 for 16-bit levels, 4.4 for 8-bit ones; clipping is that of coordinates which deviate `UNEVEN` times as much.
    """
    errors = [
        rounding_error(float(deviations), level_bits) + clipping_error(float(deviations) / UNEVEN)
        for deviations in _CANDIDATES
    ]
    return float(_CANDIDATES[int(np.argmin(errors))])


def rounding_error(deviations: float, level_bits: int) -> float:
    """Mean square, in variances, of rounding at random with a range of so many standard deviations.

    A sixth of a squared level: the mean of f (1 - f) over the fraction f.
    """
    return float((deviations / ((1 << (level_bits - 1)) - 1)) ** 2 / 6)


def clipping_error(deviations: float) -> float:
    """Mean square of clamping a standard normal coordinate to +- k.

    E max(0, |x| - k)^2 = 2 ((1 + k^2) Q(k) - k phi(k)).
    """
    density = math.exp(-(deviations**2) / 2) / math.sqrt(2 * math.pi)
    beyond = math.erfc(deviations / math.sqrt(2)) / 2
    return max(0.0, 2 * ((1 + deviations**2) * beyond - deviations * density))


def _round(value: float) -> float:
    """To three significant digits: a plan that is easy to read and the same on every machine."""
    return float(f"{value:.2e}")
