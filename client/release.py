"""The one door out: a `LocalUpdate` becomes the integers that are masked.

Nothing else may build a message from model data; the one exception is `train.plain`, research only,
which takes of this module the clip alone.

The steps, in this order and nothing after them: clip the L2 norm, rotate, scale by weight / max_weight, clamp to the
range, round at random, add integer noise, wrap.

Guarantees: a client's update has L2 norm at most plan.clip (to float32 precision) before it is rotated and scaled down,
whatever its data; every word is within what the plan's overflow bound assumes; the weight, the loss and the counts
travel nowhere else. With differential privacy (a plan without metrics): every element is inside the one clipped vector,
its weight is one or zero, and the L2 norm of its *integers*, counted from the level of zero, is at most
`sensitivity(plan)`; where the plan has a noise scale, each coordinate carries discrete Gaussian noise of it, under a
key that the server does not have. The unit of privacy is the user: one vector a round.
Not guaranteed: anything about a sum without noise. It is exact, and a sum of few leaks.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.jobs import LocalUpdate
from fedoppu.common.errors import ClientFailed, ProtocolError, RefusedByPolicy
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.privacy import sensitivity
from fedoppu.common.quantization import (
    CLIPPED,
    LOSS,
    LOSS_COUNT,
    LOSS_LEVELS,
    LOSS_MAX,
    WEIGHT,
    VectorLayout,
    round_to_levels,
    write_scalars,
)
from fedoppu.common.randomness import Randomness
from fedoppu.common.rotation import rotate
from fedoppu.common.rounds import RoundPlan, Words

Vector = NDArray[np.float32]
DIVERGED = "lower shared.training.learning_rate or clip_norm"
_CHUNK = 1 << 15
_NORM_ERROR = 2.0**-40  # relative, far above that of `_norm`


def release(update: LocalUpdate, plan: RoundPlan, dither: Randomness) -> Words:
    """Turns an update into the (length,) words of the plan's layout.

    Args:
        update: Of this plan's attempt.
        plan: The attempt's plan.
        dither: Root of rounding and noise, which the server must not be able to guess: the run's in a simulation, a
            secret of the vault on a device. Both are AES-CTR streams under keys for this context, so that no two
            attempts share one.

    Raises:
        ProtocolError: The update was made for another context or has another length.
        ClientFailed: The update is not finite, or a loss that would travel.
        RefusedByPolicy: The plan is private, but has weights or metrics, which would lie outside of the one clipped
            vector.
    """
    _require_fit(update, plan)
    _require_one_vector(plan)
    weight, layout = min(update.weight, plan.max_weight), VectorLayout.of(plan)
    rotated = rotate(clip(update.vector, plan.clip), plan.rotation)
    clamped, beyond = clamp(scale(rotated, weight, plan.max_weight), plan.value_range)
    levels = round_to_levels(clamped, layout, key=dither.secret("dither", plan.context))
    if plan.metrics:
        scalars = {WEIGHT: weight, CLIPPED: beyond, **_loss(update)}
        return np.concatenate([levels, write_scalars(layout, scalars)])
    shorten(levels, layout.middle, sensitivity(plan))
    key = dither.secret("noise", plan.context)
    # modulo 2^word_bits, noise below zero too
    levels += discrete_gaussian(key, plan.noise_scale, plan.num_params).astype(layout.dtype)
    return levels


def clip(vector: Vector, bound: float) -> Vector:
    """Scales a vector down to an L2 norm of at most `bound`, to float32 precision; a shorter one stays as it is.

    Raises:
        ClientFailed: A coordinate is not finite.
    """
    norm = _norm(vector)
    if not math.isfinite(norm):  # squares of finite float32 do not overflow float64
        raise ClientFailed("the update is not finite: training diverged", hint=DIVERGED)
    return vector if norm <= bound else vector * np.float32(bound / norm)


def scale(vector: Vector, weight: int, max_weight: int) -> Vector:
    """The vector times weight / max_weight, which is at most one; zeros for weight zero."""
    return vector if weight == max_weight else vector * np.float32(weight / max_weight)


def clamp(vector: Vector, bound: float) -> tuple[Vector, int]:
    """Each coordinate within +- bound, and how many were not."""
    beyond = int(np.count_nonzero(np.abs(vector) > bound))
    return (np.clip(vector, -bound, bound) if beyond else vector), beyond


def shorten(levels: Words, middle: int, bound: float) -> None:
    """Moves levels toward zero, in place, until their L2 norm, counted from `middle`, is at most `bound`.

    The norm was bounded before rotation and rounding, in floating point; noise is scaled to the integers, which must
    hold the bound exactly. So the limit is less than the bound by more than the error of this norm.
    """
    limit = bound * (1 - _NORM_ERROR)
    norm = _norm(levels, middle)
    if norm > limit:
        centred = (levels.astype(np.float64) - middle) * (limit / norm * (1 - _NORM_ERROR))
        levels[:] = np.trunc(centred) + middle


def _norm(values: NDArray[np.generic], zero: int = 0) -> float:
    """L2 norm of values - zero in double precision, in chunks that a cache holds."""
    chunks = (values[start : start + _CHUNK] for start in range(0, values.size, _CHUNK))
    centred = (chunk.astype(np.float64) - zero for chunk in chunks)
    return math.sqrt(math.fsum(np.square(chunk, out=chunk).sum() for chunk in centred))


def _loss(update: LocalUpdate) -> dict[str, int]:
    """The clipped loss in fixed point and that one was added; zeros for a client that has none."""
    if update.held_out_loss is None:
        return {LOSS: 0, LOSS_COUNT: 0}
    if not math.isfinite(update.held_out_loss):
        raise ClientFailed("the held-out loss is not finite: training diverged", hint=DIVERGED)
    share = min(max(update.held_out_loss, 0.0), LOSS_MAX) / LOSS_MAX
    return {LOSS: round(share * LOSS_LEVELS), LOSS_COUNT: 1}


def _require_fit(update: LocalUpdate, plan: RoundPlan) -> None:
    if update.context != plan.context:
        raise ProtocolError(
            f"the update was made for context {update.context.hex()[:12]}, not for "
            f"{plan.context.hex()[:12]}: an update is released for its own attempt alone"
        )
    if update.vector.shape != (plan.num_params,):
        raise ProtocolError(
            f"the update must have shape ({plan.num_params},), got {update.vector.shape}"
        )
    if update.weight < 0:
        raise ProtocolError(f"an update's weight must be at least 0, got {update.weight}")


def _require_one_vector(plan: RoundPlan) -> None:
    """With differential privacy nothing travels outside of the one clipped, noised vector (rule 14)."""
    if plan.noise_scale != 0 and plan.metrics:
        raise RefusedByPolicy(
            f"the plan asks for noise of scale {plan.noise_scale:g} beside metrics without any"
        )
    if not plan.metrics and plan.max_weight != 1:
        raise RefusedByPolicy(
            f"the plan has no metrics, so every client weighs the same, but its max_weight is {plan.max_weight}"
        )
