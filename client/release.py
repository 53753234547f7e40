"""The one door out: a `LocalUpdate` becomes the integers that are masked.

Nothing else may build a message from model data; the one exception is `train.plain`, research only,
which takes of this module the clip alone.

The steps, in this order and nothing after them: clip the L2 norm, scale by weight / max_weight,
clamp to the range, round at random, wrap. A rotation belongs between clip and scale; integer noise
between round and wrap.

Guarantees: a client's update has L2 norm at most plan.clip (to float32 precision) before it is
scaled down, whatever its data; every word is within what the plan's overflow bound assumes; the
weight, the loss and the counts travel nowhere else. The unit of privacy is the user: one vector a
round.
Not guaranteed: anything about the sum. It is exact, and without noise a sum of few leaks.
"""

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.jobs import LocalUpdate
from fedoppu.common.errors import ClientFailed, ProtocolError, RefusedByPolicy
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
from fedoppu.common.rounds import RoundPlan, Words

Vector = NDArray[np.float32]


def release(update: LocalUpdate, plan: RoundPlan, dither: Randomness) -> Words:
    """Turns an update into the (length,) words of the plan's layout.

    Args:
        update: Of this plan's attempt.
        plan: The attempt's plan.
        dither: Root of the rounding: the run's in a simulation, the vault's on a device. The stream
            is AES-CTR under a key for this context, so that no two attempts share one.

    Raises:
        ProtocolError: The update was made for another context or has another length.
        ClientFailed: The update or the loss is not finite.
        RefusedByPolicy: The plan asks for noise, which this door cannot add.
    """
    _require_fit(update, plan)
    weight = min(update.weight, plan.max_weight)
    clipped = clip(update.vector, plan.clip)
    scaled = scale(clipped, weight, plan.max_weight)
    clamped, beyond = clamp(scaled, plan.value_range)
    layout = VectorLayout.of(plan)
    key = dither.secret("dither", plan.context)
    levels = round_to_levels(clamped, layout, key=key)
    scalars = write_scalars(layout, {WEIGHT: weight, CLIPPED: beyond, **_loss(update)})
    return np.concatenate([levels, scalars])


def clip(vector: Vector, bound: float) -> Vector:
    """Scales a vector down to an L2 norm of at most `bound`; a shorter one stays as it is."""
    norm = float(np.sqrt(np.sum(np.square(vector, dtype=np.float64))))
    return vector if norm <= bound else (vector * (bound / norm)).astype(np.float32)


def scale(vector: Vector, weight: int, max_weight: int) -> Vector:
    """The vector times weight / max_weight, which is at most one; zeros for weight zero."""
    return vector if weight == max_weight else vector * np.float32(weight / max_weight)


def clamp(vector: Vector, bound: float) -> tuple[Vector, int]:
    """Each coordinate within +- bound, and how many were not."""
    beyond = int(np.count_nonzero(np.abs(vector) > bound))
    return (np.clip(vector, -bound, bound) if beyond else vector), beyond


def _loss(update: LocalUpdate) -> dict[str, int]:
    """The clipped loss in fixed point and that one was added; zeros for a client that has none."""
    if update.held_out_loss is None:
        return {LOSS: 0, LOSS_COUNT: 0}
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
    if plan.noise_scale != 0:
        raise RefusedByPolicy(
            f"the plan asks for noise of scale {plan.noise_scale:g}, which this client cannot add"
        )
    if update.weight < 0:
        raise ProtocolError(f"an update's weight must be at least 0, got {update.weight}")
    loss = update.held_out_loss
    if not np.isfinite(update.vector).all() or (loss is not None and not np.isfinite(loss)):
        raise ClientFailed(
            "the update or its held-out loss is not finite: training diverged",
            hint="lower shared.training.learning_rate or clip_norm",
        )
