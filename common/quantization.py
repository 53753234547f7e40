"""Updates as integers: which word means what, rounding to levels, and the mean of a sum.

A coordinate x in [-value_range, value_range] becomes the level x M / value_range + M with
M = 2^(level_bits - 1) - 1, rounded up or down at random so that its expectation is exact; zero is a
level of its own. Scalars (the weight, the held-out loss, counts) travel in the same vector as limbs
of 8 bits, one element each, so that a server sees their sums alone (rules 10 and 11).

With differential privacy no scalar travels, and each client may have added integer noise: then a total
may also lie outside the levels, by at most `noise_tail`.

Guarantee: no element of a sum of n vectors reaches 2^word_bits (`require_no_overflow`, checked for
the plan before a round), so a sum modulo 2^word_bits is the exact sum; with noise this fails for any
element of the vector with probability below 2^-40.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import EncodingSettings, require
from fedoppu.common.errors import RoundAborted, UsageError
from fedoppu.common.masking import random_words
from fedoppu.common.rotation import rotate_back
from fedoppu.common.rounds import RoundPlan, Words

LIMB_BITS = 8
LIMB_MAX = 2**LIMB_BITS - 1
LOSS_MAX = 16.0  # nats a token; a uniform guess among 2^23 tokens
LOSS_LEVELS = 2**16 - 1
WRAP_BITS = 40  # noise wraps round in any element with probability below 2^-40
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
        """The layout of a plan's vectors; without metrics there are no scalars."""
        metrics = (
            Scalar(WEIGHT, plan.max_weight),
            Scalar(LOSS, LOSS_LEVELS),
            Scalar(LOSS_COUNT, 1),
            Scalar(CLIPPED, plan.num_params),
        )
        scalars = metrics if plan.metrics else ()
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

    With noise: that n (2^level_bits - 1) + 2 `noise_tail` does (rule 10 of the spec of secure aggregation).

    Raises:
        UsageError: It may not; the message names the bound and the remedy.
    """
    most = max(2**plan.level_bits - 1, LIMB_MAX)
    noise = 2 * noise_tail(plan, members) if isinstance(plan, RoundPlan) else 0
    bound = 2**plan.word_bits - 1
    if members * most + noise > bound:
        held = f"which hold sums of at most {bound // most}"
        raise UsageError(
            f"{members} members with {plan.level_bits}-bit levels overflow {plan.word_bits}-bit words, "
            + (
                f"{held}, and with noise up to {noise} of their {bound + 1} values"
                if noise
                else held
            ),
            hint="set encoding.word_bits=32, lower encoding.level_bits, or ask fewer members"
            + (", or lower privacy.noise_multiplier" if noise else ""),
        )


def noise_tail(plan: RoundPlan, members: int) -> int:
    """How far the noise of `members` clients may carry a total, in levels; 0 without noise.

    tau sigma with sigma = sqrt(members) * noise_scale and tau^2 = 2 ln(2^41 num_params): a sum of discrete Gaussians
    is subgaussian (Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010), so P(|noise| > tau sigma) <=
    2 exp(-tau^2 / 2) for one element, and at most 2^-40 over all.
    """
    deviations = math.sqrt(2 * ((WRAP_BITS + 1) * math.log(2) + math.log(plan.num_params)))
    return math.ceil(deviations * math.sqrt(members) * plan.noise_scale)


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
    """The weighted mean update and the metrics of an exact sum, of a plan with metrics.

    With differential privacy there are none: `decode_levels`, the server's noise if any, `mean_of_levels`.

    Args:
        words: (length,) exact sum modulo 2 ** word_bits.
        plan: Of the round.
        survivors: Members whose vectors are in it.
        floor: A loss is published only if so many clients added one; the plan's min_cohort by
            default (rule 11).

    Raises:
        RoundAborted: A total is outside [0, n max], so some client sent what it must not; or the
            vector has another length than the plan's.
        UsageError: The plan has no metrics.
    """
    if not plan.metrics:
        raise UsageError("the plan has no metrics: decode its levels, and divide by a fixed number")
    centred = decode_levels(words, plan, survivors)
    totals = read_scalars(VectorLayout.of(plan), words, survivors=len(survivors))
    weight, losses = totals[WEIGHT], totals[LOSS_COUNT]
    shown = losses >= (plan.min_cohort if floor is None else floor) and losses > 0
    return DecodedSum(
        # each client sent update * weight / max_weight
        mean_update=mean_of_levels(centred, plan, divisor=weight / plan.max_weight),
        total_weight=weight,
        held_out_loss=totals[LOSS] / losses / LOSS_LEVELS * LOSS_MAX if shown else None,
        held_out_clients=losses if shown else 0,
        clipped=totals[CLIPPED],
    )


def decode_levels(words: Words, plan: RoundPlan, survivors: Sequence[int]) -> NDArray[np.int64]:
    """The sum of the clients' coordinates, in levels from the level of zero, still rotated.

    Args:
        words: (length,) exact sum modulo 2 ** word_bits.
        plan: Of the round.
        survivors: Members whose vectors are in it.

    Returns:
        (num_params,) int64, within +- (n M + `noise_tail`).

    Raises:
        RoundAborted: A total is out of that reach, so some client sent what it must not; or the vector has another
            length than the plan's.
    """
    layout, count = VectorLayout.of(plan), len(survivors)
    if words.shape != (layout.length,):
        raise RoundAborted(f"the sum has {words.shape} words, the plan's has ({layout.length},)")
    tail = noise_tail(plan, count)
    # moved up by the tail, modulo 2^word_bits, a total below zero is small and not near the modulus
    totals = (words[: layout.num_params] + layout.dtype.type(tail)).astype(np.int64)
    if totals.size:
        _require_range("coordinate", int(totals.max()) - tail, count * 2 * layout.middle + tail)
    totals -= tail + count * layout.middle
    return totals


def mean_of_levels(
    totals: NDArray[np.int64], plan: RoundPlan, *, divisor: float
) -> NDArray[np.float32]:
    """The mean update of centred totals, rotated back.

    Args:
        totals: (num_params,) int64, of `decode_levels`, with the server's noise if it adds any.
        plan: Of the round.
        divisor: Clients at full weight: the sum of weight / max_weight, or with differential privacy the fixed q N.

    Returns:
        (num_params,) float32; zeros if the divisor is 0.
    """
    if divisor == 0:
        return np.zeros(plan.num_params, np.float32)
    level = plan.value_range / VectorLayout.of(plan).middle
    return rotate_back((totals * (level / divisor)).astype(np.float32), plan.rotation)


def _require_range(name: str, total: int, most: int) -> None:
    if total > most:
        raise RoundAborted(
            f"the total of {name} is {total}, above the {most} that the survivors can reach: "
            "some client sent a value out of range; the sum is discarded"
        )
