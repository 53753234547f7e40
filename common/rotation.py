"""A public random rotation of an update, so that no coordinate stands out when it is rounded.

One rounding range holds for the whole vector, so the rotation must spread energy over all of it, whether large
coordinates are scattered, periodic, or lie together as layers do. It is a composition of orthogonal maps, so the vector
never grows (rule 12 of the protocol's specification).

W is the largest power of two that fits, up to 2^16; R is the least power of two with R W >= 8 num_params, or the
largest that fits; C = num_params // R.

1. Across: the vector as R rows of C; random signs, then a Hadamard transform of each column. Where R C < num_params,
   the same for the last columns (as many as coordinates are left over, at most all) of R rows laid at the vector's end.
2. Along: random signs, then a Hadamard transform of each window of W; the last window overlaps the one before.

Signs are bits of the seed's AES-256-CTR stream, in this order, row by row.

After the first, a coordinate's energy lies in R places that are C apart; after the second it is spread over every
window that holds some of them. As R W >= 8 num_params where the vector allows it, the expected energy of a coordinate
is at most about (1 + 2 C / W) of the mean, whatever the vector.

Guarantees: the L2 norm is kept to float32 precision; the bytes are the same on every machine, as nothing but IEEE
additions, subtractions and a product with a power of 2 ** -.5 for each transform touches a coordinate, in fixed order.
Not guaranteed: any privacy. The seed is public, and the rotation can be undone by anyone.

Method: randomized Hadamard transform as in Suresh et al. 2017 (https://arxiv.org/abs/1611.00429, section 3), and for
secure aggregation Kairouz et al. 2021 (https://arxiv.org/abs/2102.06387, section 4).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import ProtocolError
from fedoppu.common.masking import random_words
from fedoppu.common.randomness import Randomness

SEED_BYTES = 32
WINDOW = 1 << 16  # floats: two buffers of it stay in a second-level cache
PANEL = 1 << 16  # floats of the columns that are transformed at once
SPREAD = 8  # R W in lengths of the vector
_SIGN_BIT = 31

Vector = NDArray[np.float32]


def rotation_seed(config: FederationConfig, round: int) -> str:
    """Hex of a round's 32-byte rotation seed, from the federation's public seed; empty without rotation."""
    if not config.encoding.rotation:
        return ""
    # noise that is correlated over the rounds cancels in one basis only
    where = 0 if config.privacy.mechanism == "dp_ftrl" else round
    return Randomness.from_seed(config.public_seed).secret("rotation", where).hex()


def rotate(vector: Vector, seed: str) -> Vector:
    """The rotated vector.

    Args:
        vector: (num_params,) float32, finite, num_params at least 1; it is not changed.
        seed: Hex of 32 bytes; empty for no rotation.

    Returns:
        (num_params,) float32 of the same L2 norm; the vector itself for an empty seed.

    Raises:
        ProtocolError: The seed has another length.
    """
    if not seed:
        return vector
    turned = np.array(vector, np.float32)
    for step in _schedule(turned, seed):
        _flip(step)
        _transform(step)
    return turned


def rotate_back(vector: Vector, seed: str) -> Vector:
    """The inverse of `rotate`, with the same arguments; the sum of rotated vectors is rotated back as one vector."""
    if not seed:
        return vector
    turned = np.array(vector, np.float32)
    for step in reversed(_schedule(turned, seed)):
        _transform(step)
        _flip(step)
    return turned


@dataclass(frozen=True)
class _Step:
    """Random signs and a Hadamard transform, in place.

    Attributes:
        view: (rows, columns) of the vector; rows is a power of two, and columns too for a window.
        flips: (rows, columns), 1 where a sign is flipped.
        window: Whether the view is one window; else each column is transformed by itself.
    """

    view: Vector
    flips: NDArray[np.uint8]
    window: bool


def _schedule(vector: Vector, seed: str) -> list[_Step]:
    """All steps. The seed's bits go to the views in order, and row by row in each."""
    views = [(view, False) for view in _across(vector)] + [(view, True) for view in _along(vector)]
    bits, used, steps = _bits(seed, sum(view.size for view, _ in views)), 0, []
    for view, window in views:
        flips = bits[used : used + view.size].reshape(view.shape)
        used += view.size
        rows, columns = view.shape
        width = (
            columns if window else max(16, PANEL // rows)
        )  # by itself, so in parts for the cache
        for start in range(0, columns, width):
            panel = np.s_[:, start : start + width]
            steps.append(_Step(view[panel], flips[panel], window))
    return steps


def _bits(seed: str, count: int) -> NDArray[np.uint8]:
    """The first bits of the seed's AES-256-CTR stream, the least significant of a byte first."""
    key = bytes.fromhex(seed)
    if len(key) != SEED_BYTES:
        raise ProtocolError(f"a rotation seed must have {SEED_BYTES} bytes, got {len(key)}")
    words = np.concatenate(list(random_words(key, "<u4", -(-count // 32))))
    return np.unpackbits(words.view(np.uint8), count=count, bitorder="little")


def _across(vector: Vector) -> list[Vector]:
    """R rows from the start of the vector, and the last columns of R rows to its end, where R does not divide it."""
    rows = _rows(vector.size)
    columns, left = divmod(vector.size, rows)
    whole = [vector[: rows * columns].reshape(rows, columns)]
    last = vector[left:].reshape(rows, columns)[:, max(0, columns - left) :]
    return [*whole, last] if left else whole


def _along(vector: Vector) -> list[Vector]:
    """Windows of W, the last to the end of the vector, each as a matrix about as high as wide."""
    window = _window(vector.size)
    rows = 1 << (window.bit_length() // 2)
    starts = [*range(0, vector.size - window, window), vector.size - window]
    return [vector[start : start + window].reshape(rows, window // rows) for start in starts]


def _window(size: int) -> int:
    """W: the largest power of two that fits, up to WINDOW."""
    return min(WINDOW, 1 << (size.bit_length() - 1))


def _rows(size: int) -> int:
    """R: the least power of two with R W >= SPREAD * size, or the largest that fits."""
    enough = 1 << (-(-SPREAD * size // _window(size)) - 1).bit_length()
    return min(enough, 1 << (size.bit_length() - 1))


def _flip(step: _Step) -> None:
    words = step.view.view(np.uint32)
    words ^= step.flips.astype(np.uint32) << _SIGN_BIT


def _transform(step: _Step) -> None:
    """The orthonormal Hadamard transform of a step, which is its own inverse."""
    done = _butterflies(np.array(step.view, order="C"))
    if step.window:
        # the other axis: of the transpose, so that the inner loops run over contiguous memory
        done = _butterflies(np.ascontiguousarray(done.T)).T
    length = step.view.size if step.window else step.view.shape[0]
    np.multiply(done, np.float32(length**-0.5), out=step.view)


def _butterflies(values: Vector) -> Vector:
    """The Hadamard transform of each column, without its factor; `values` is overwritten.

    In Sylvester's order: first the sums and differences of neighbouring rows, then of those two apart, and so on.
    """
    rows, columns = values.shape
    other, half = np.empty_like(values), 1
    while half < rows:
        shape = (rows // (2 * half), 2, half * columns)
        old, new = values.reshape(shape), other.reshape(shape)
        np.add(old[:, 0], old[:, 1], out=new[:, 0])
        np.subtract(old[:, 0], old[:, 1], out=new[:, 1])
        values, other, half = other, values, 2 * half
    return values
