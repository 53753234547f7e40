"""Discrete Gaussian noise on the integers, a pure function of a key.

The sampler is algorithm 3 of Canonne, Kamath, Steinke 2020 (https://arxiv.org/abs/2004.00010, section 5.2): a discrete
Laplace variate with scale t = floor(scale) + 1 is accepted with probability exp(-(|y| - scale^2 / t)^2 / (2 scale^2)).
It is vectorised, and the two acceptances (of the Laplace's remainder, and of the Gaussian) are one.

How exact it is. All uniforms have 64 bits and the remainder is exactly uniform; what is rounded are probabilities
exp(-x), in double precision. So the probability of a value z standard deviations from zero is that of the discrete
Gaussian times 1 +- (1 + z^2) 2^-49, plus at most 2^-62 over all values. For a vector of d elements that adds to epsilon
at most d 2^-42 (z up to 8 everywhere; the sum of z^2 is near d), and to delta (1 + e^epsilon) d 2^-62: at d = 1e6 and
epsilon = 8, 2e-7 and 7e-10. No floating-point value of the noise exists, so the attacks on floating-point Gaussians
(Mironov 2012) have nothing to read.

What is not covered: the running time depends on the values (rejection), and so does what a cache shows.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import require
from fedoppu.common.masking import random_words

Uniforms = NDArray[np.uint64]
MAX_SCALE = 2.0**40  # values to 44 scales, and their squares' errors, stay within double precision
_ENDLESS = 1 << 60


def discrete_gaussian(key: bytes, scale: float, length: int) -> NDArray[np.int64]:
    """Samples with P(x) proportional to exp(-x^2 / (2 scale^2)) over the integers.

    Args:
        key: 32 bytes, used for nothing else; the samples are a function of it, driven by AES-256-CTR.
        scale: Standard deviation parameter, levels, 0 to 2^40. The true standard deviation is a little less: by 2 %
            at a scale of 0.3, by less than 1e-6 from 1 on.
        length: Number of samples.

    Returns:
        (length,) int64; zeros if scale is 0.

    Raises:
        UsageError: The scale is negative, not finite or above 2^40.
    """
    require("the scale of discrete Gaussian noise", scale, 0.0, MAX_SCALE)
    samples = np.zeros(length, np.int64)
    if scale == 0.0:
        return samples
    filled = 0
    for batch in _accepted(key, scale):
        count = min(batch.size, length - filled)
        samples[filled : filled + count] = batch[:count]
        filled += count
        if filled == length:
            break
    return samples


def _accepted(key: bytes, scale: float) -> Iterator[NDArray[np.int64]]:
    """Endless batches of samples, each of one chunk of proposals (about half are accepted)."""
    uniforms: Iterator[Uniforms] = random_words(key, "<u8", _ENDLESS)
    for first in uniforms:
        yield _propose(first, next(uniforms), next(uniforms), scale)


def _propose(first: Uniforms, second: Uniforms, third: Uniforms, scale: float) -> NDArray[np.int64]:
    """Accepted ones among the proposals that three uniforms of 64 bits make each.

    |y| = remainder + t * quotient, where the remainder is uniform below t (to be accepted with probability
    exp(-remainder / t)) and the quotient geometric with ratio 1/e: together a geometric variate with ratio exp(-1/t).
    """
    steps = int(scale) + 1
    negative = (first & np.uint64(1)).astype(np.bool_)
    draw = first >> np.uint64(1)
    remainder = draw % np.uint64(steps)
    fair = draw < np.uint64(
        (1 << 63) // steps * steps
    )  # whole turns only: no remainder is likelier
    size = remainder.astype(np.float64)
    exponent = size / steps
    size += steps * np.floor(-np.log((second.astype(np.float64) + 1.0) * 2.0**-64))
    exponent += ((size - scale * scale / steps) / scale) ** 2 / 2
    accepted = third.astype(np.float64) < np.exp(-exponent) * 2.0**64
    accepted &= fair & ~(negative & (size == 0.0))  # zero has one sign
    values = size[accepted].astype(np.int64)
    return np.where(negative[accepted], -values, values)
