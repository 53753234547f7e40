"""Updates as integers: which word means what, rounding to levels, and the mean of a sum.

A coordinate x in [-value_range, value_range] becomes the level x M / value_range + M with
M = 2^(level_bits - 1) - 1, rounded up or down at random so that its expectation is exact; zero is a
level of its own. Scalars (the weight, the held-out loss, counts) travel in the same vector as limbs
of 8 bits, one element each, so that a server sees their sums alone (rules 10 and 11).

Guarantee: no element of a sum of n vectors reaches 2^word_bits (`require_no_overflow`, checked for
the plan before a round), so a sum modulo 2^word_bits is the exact sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import EncodingSettings, require
from fedoppu.common.errors import RoundAborted, UsageError
from fedoppu.common.masking import random_words
from fedoppu.common.rounds import RoundPlan, Words

LIMB_BITS = 8
LIMB_MAX = 2**LIMB_BITS - 1
LOSS_MAX = 16.0  # nats a token; a uniform guess among 2^23 tokens
LOSS_LEVELS = 2**16 - 1
WEIGHT, LOSS, LOSS_COUNT, CLIPPED = "weight", "held_out_loss", "held_out_count", "clipped"


@dataclass(frozen=True)
class Scalar:
    """A whole number that travels beside the parameters: 0 to `maximum` for one client."""

    name: str
    maximum: int

    @property
    def limbs(self) -> int:
        """Elements that it takes, the least significant first."""
        return max(1, -(-self.maximum.bit_length() // LIMB_BITS))


@dataclass(frozen=True)
class VectorLayout:
    """What the words of a vector mean.

    Attributes:
        num_params: Parameters, first in the vector.
        scalars: After them, in this order.
        word_bits: 16 or 32.
        level_bits: A coordinate has 2 ** level_bits - 1 levels, so that zero is one.
        value_range: Bound of a coordinate.
    """

    num_params: int
    scalars: tuple[Scalar, ...]
    word_bits: int
    level_bits: int
    value_range: float

    @classmethod
    def of(cls, plan: RoundPlan) -> "VectorLayout":
        """The layout of a plan's vectors."""
        scalars = (
            Scalar(WEIGHT, plan.max_weight),
            Scalar(LOSS, LOSS_LEVELS),
            Scalar(LOSS_COUNT, 1),
            Scalar(CLIPPED, plan.num_params),
        )
        return cls(plan.num_params, scalars, plan.word_bits, plan.level_bits, plan.value_range)

    @property
    def length(self) -> int:
        """Words in a vector."""
        return self.num_params + sum(scalar.limbs for scalar in self.scalars)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Type of a word."""
        return np.dtype(np.uint16 if self.word_bits == 16 else np.uint32)

    @property
    def middle(self) -> int:
        """The level of zero, M; levels are 0 to 2 M."""
        return (1 << (self.level_bits - 1)) - 1


@dataclass(frozen=True)
class DecodedSum:
    """What a round's sum says.

    Attributes:
        mean_update: (num_params,) float32, the weighted mean; zeros if the total weight is zero.
        total_weight: Sum of the weights, each at most max_weight.
        held_out_loss: Mean over clients of their clipped mean losses, nats; None if too few
            have one.
        held_out_clients: Clients that added a loss; 0 where the loss is None.
        clipped: Coordinates beyond the range, over all clients.
    """

    mean_update: NDArray[np.float32] = field(repr=False)
    total_weight: int
    held_out_loss: float | None
    held_out_clients: int
    clipped: int


def require_no_overflow(plan: RoundPlan | EncodingSettings, members: int) -> None:
    """Checks that the sum of `members` vectors stays below 2^word_bits in each element.

    Raises:
        UsageError: It may not; the message names the bound and the remedy.
    """
    most = max(2**plan.level_bits - 1, LIMB_MAX)
    fits = (2**plan.word_bits - 1) // most
    if members > fits:
        raise UsageError(
            f"{members} members with {plan.level_bits}-bit levels overflow {plan.word_bits}-bit "
            f"words, which hold sums of at most {fits}",
            hint="set encoding.word_bits=32, lower encoding.level_bits, or ask fewer members",
        )


def round_to_levels(values: NDArray[np.float32], layout: VectorLayout, *, key: bytes) -> Words:
    """Stochastic rounding of clamped coordinates to levels.

    Args:
        values: (num_params,) float32, within +- value_range.
        layout: Of the vector.
        key: 32 bytes; the dither is its AES-CTR stream, used for nothing else.

    Returns:
        (num_params,) words, 0 to 2 M.
    """
    levels = np.empty(values.shape, layout.dtype)
    scale = layout.middle / layout.value_range
    start = 0
    for dither in random_words(key, "<u4", values.size):
        chunk = slice(start, start + dither.size)
        exact = np.multiply(values[chunk], scale, dtype=np.float64)
        exact += dither * 2.0**-32
        exact += layout.middle
        # Truncation is the floor, as nothing here is below zero; the dither is below one.
        levels[chunk] = exact.clip(0, 2 * layout.middle, out=exact)
        start += dither.size
    return levels


def write_scalars(layout: VectorLayout, values: Mapping[str, int]) -> Words:
    """The scalars' limbs, in the order of the layout.

    Raises:
        UsageError: A value is not between 0 and its maximum.
    """
    limbs: list[int] = []
    for scalar in layout.scalars:
        value = values[scalar.name]
        require(scalar.name, value, 0, scalar.maximum)
        limbs += [(value >> (LIMB_BITS * limb)) & LIMB_MAX for limb in range(scalar.limbs)]
    return np.array(limbs, layout.dtype)


def read_scalars(layout: VectorLayout, words: Words, *, survivors: int) -> dict[str, int]:
    """Totals of the scalars over `survivors` clients.

    Raises:
        RoundAborted: A total is above survivors * maximum: some client sent what it must not.
    """
    totals: dict[str, int] = {}
    start = layout.num_params
    for scalar in layout.scalars:
        limbs = [int(word) for word in words[start : start + scalar.limbs]]
        totals[scalar.name] = sum(value << (LIMB_BITS * limb) for limb, value in enumerate(limbs))
        _require_range(scalar.name, totals[scalar.name], survivors * scalar.maximum)
        start += scalar.limbs
    return totals


def decode_sum(
    words: Words, plan: RoundPlan, survivors: Sequence[int], *, floor: int | None = None
) -> DecodedSum:
    """The weighted mean update and the metrics of a sum.

    Args:
        words: (length,) exact sum modulo 2 ** word_bits.
        plan: Of the round.
        survivors: Members whose vectors are in it.
        floor: A loss is published only if so many clients added one; the plan's min_cohort by
            default (rule 11).

    Raises:
        RoundAborted: A total is outside [0, n max], so some client sent what it must not; or the
            vector has another length than the plan's.
    """
    layout, count = VectorLayout.of(plan), len(survivors)
    if words.shape != (layout.length,):
        raise RoundAborted(f"the sum has {words.shape} words, the plan's has ({layout.length},)")
    levels = words[: layout.num_params]
    if levels.size:
        _require_range("coordinate", int(levels.max()), count * 2 * layout.middle)
    totals = read_scalars(layout, words, survivors=count)
    weight, losses = totals[WEIGHT], totals[LOSS_COUNT]
    shown = losses >= (plan.min_cohort if floor is None else floor) and losses > 0
    return DecodedSum(
        mean_update=_mean(levels, layout, count, max_weight=plan.max_weight, total=weight),
        total_weight=weight,
        held_out_loss=totals[LOSS] / losses / LOSS_LEVELS * LOSS_MAX if shown else None,
        held_out_clients=losses if shown else 0,
        clipped=totals[CLIPPED],
    )


def _mean(
    levels: Words, layout: VectorLayout, count: int, *, max_weight: int, total: int
) -> NDArray[np.float32]:
    """Each client sent update * weight / max_weight; the mean divides by the sum of the weights."""
    if total == 0:
        return np.zeros(layout.num_params, np.float32)
    centred = levels.astype(np.float64) - count * layout.middle
    centred *= layout.value_range / layout.middle * max_weight / total
    return centred.astype(np.float32)


def _require_range(name: str, total: int, most: int) -> None:
    if total > most:
        raise RoundAborted(
            f"the total of {name} is {total}, above the {most} that the survivors can reach: "
            "some client sent a value out of range; the sum is discarded"
        )
