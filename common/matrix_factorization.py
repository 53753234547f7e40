"""Noise that is correlated over the rounds, for federations that cannot sample: banded matrix factorisation (DP-FTRL).

What matters of a run is not one round's sum but the sums of all rounds so far. With independent noise their errors add
up; here a part of each round's noise takes back that of the rounds before.

**The mechanism.** Let X be the rounds' exact integer sums, one row a round, and C the banded lower-triangular Toeplitz
matrix with the first `bands` coefficients 1, 1/2, 3/8, ... of the square root of the matrix of prefix sums
(Fichtenberger, Henzinger, Upadhyay 2023, https://arxiv.org/abs/2202.11205; banded: Kalinin and Lampert 2024,
https://arxiv.org/abs/2405.13763). C X + W is made private by independent noise W, and what is released is derived from
it: it estimates X, with noise C^-1 W in place of W.

**Privacy.** Take a user with k rounds t_1 < ... < t_k, at least `bands` rounds apart, and vectors v_i of L2 norm at
most D. Without it C X changes by the sum of C[:, t_i] v_i^T. Column t_i is zero outside rows t_i to t_i + bands - 1, so
these columns have no row in common, are orthogonal, and the change has squared norm
sum |C[:, t_i]|^2 |v_i|^2 <= k n^2 D^2, with n = `column_norm(bands)` (columns near the end are shorter). So W of scale
z n D is one Gaussian mechanism of multiplier z / sqrt(k), whatever path the model took: C is lower-triangular, and the
norms of later changes are bounded beforehand (Denisov et al. 2022, https://arxiv.org/abs/2202.08312). Nothing is
amplified by sampling.

**On the integers.** The coefficients are multiples of 2^-10, so C X is on the lattice of multiples of 2^-10, W is a
discrete Gaussian on it, and C X + W is the discrete Gaussian mechanism. The release is integer:
y_t = nearest((C X + W)_t - sum_{j >= 1} C_j y_{t-j}), a function of C X + W alone, hence post-processing, in exact
integer arithmetic. As nearest(a + i) = nearest(a) + i for integers i, y_t = X_t + n_t with
n_t = nearest(W_t - sum_{j >= 1} C_j n_{t-j}), which needs no X: that is the noise below.

What is not covered: the server sees X. Noise of one round makes no sense for a client alone, so there is no distributed
variant here.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import require
from fedoppu.common.integer_noise import discrete_gaussian

LATTICE_BITS = 10
_UNIT = 1 << LATTICE_BITS
MAX_BANDS = 10_000


def coefficients(bands: int) -> NDArray[np.int64]:
    """First column of C in units of 2^-10: (bands,) int64, from 1024 down.

    Raises:
        UsageError: bands is not between 1 and 10,000.
    """
    require("the bands of correlated noise", bands, 1, MAX_BANDS)
    index = np.arange(1, bands, dtype=np.float64)
    exact = np.cumprod(np.concatenate(([1.0], 1 - 0.5 / index)))
    return np.rint(exact * _UNIT).astype(np.int64)


def column_norm(bands: int) -> float:
    """Largest L2 norm of a column of C: what a vector's sensitivity is multiplied by."""
    return math.sqrt(int((coefficients(bands) ** 2).sum())) / _UNIT


def error_ratio(rounds: int, bands: int) -> float:
    """Mean squared error of the sums of rounds 1 to t, over all t, of that with independent noise of the same z.

    The errors are the row norms of A C^-1, with A the matrix of prefix sums: it is Toeplitz too.
    """
    row_norms = np.cumsum(np.cumsum(_inverse(rounds, bands)) ** 2)
    return float(row_norms.mean() * column_norm(bands) ** 2 / ((rounds + 1) / 2))


def largest_scale(rounds: int, bands: int) -> float:
    """Deviation of the noise of the last of some rounds, the largest, of `scale` (see `correlated_noise`)."""
    return column_norm(bands) * float(np.linalg.norm(_inverse(rounds, bands)))


def _inverse(rounds: int, bands: int) -> NDArray[np.float64]:
    """First column of C^-1, (rounds,)."""
    column = coefficients(bands) / _UNIT
    inverse = np.zeros(rounds)
    inverse[:1] = 1.0
    for t in range(1, rounds):
        past = inverse[max(0, t - bands + 1) : t][::-1]
        inverse[t] = -past @ column[1 : past.size + 1]
    return inverse


def correlated_noise(
    key_of: Callable[[int], bytes], round: int, *, bands: int, scale: float, length: int
) -> NDArray[np.int64]:
    """The noise that is added to the exact sum of one round; made again from the keys after a crash.

    Args:
        key_of: Round, from 1: a 32-byte key that is used for nothing else and does not change when the round is tried
            again.
        round: From 1; the cost grows with it, as all rounds before are made again (see `noise_of_rounds`).
        bands: At most the fewest rounds between two of one member's.
        scale: z * sensitivity, levels; `column_norm` is applied here.
        length: Elements.

    Returns:
        (length,) int64, levels.
    """
    rounds = noise_of_rounds(key_of, bands=bands, scale=scale, length=length)
    return next(islice(rounds, round - 1, None))


def noise_of_rounds(
    key_of: Callable[[int], bytes], *, bands: int, scale: float, length: int
) -> Iterator[NDArray[np.int64]]:
    """The noise of rounds 1, 2, ... in turn; takes bands arrays of memory. The arguments are `correlated_noise`'s."""
    feedback = coefficients(bands)[1:]
    lattice_scale = scale * column_norm(bands) * _UNIT
    recent: deque[NDArray[np.int64]] = deque(maxlen=bands - 1)  # the last round's first
    round = 0
    while True:
        round += 1
        total = discrete_gaussian(key_of(round), lattice_scale, length)
        for coefficient, noise in zip(feedback, recent, strict=False):
            total -= coefficient * noise
        rounded = (total + _UNIT // 2) >> LATTICE_BITS  # to nearest, halves up
        recent.appendleft(rounded)
        yield rounded.copy()
