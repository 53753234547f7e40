"""AdamW for many users at once: one row of a matrix for each user's trainable factors.

No loop over users or tensors: every operation is on (users, num_params). Rows never mix, so each
user's result is what AdamW alone would give.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoppu.client.devices import CPU, on_device
from fedoppu.common.adapters import Adapter, Factor
from fedoppu.common.config import TrainingSettings

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def learning_rates(settings: TrainingSettings, steps: int) -> NDArray[np.float64]:
    """Learning rate of each step, (steps,): up from 0 during the warm-up, then as scheduled.

    The first step of a warm-up has rate 0 and a linear schedule would reach 0 one step after the
    last, as in transformers' schedules.
    """
    step = np.arange(steps)
    warm = int(np.ceil(settings.warmup * steps))
    rising = step / max(1, warm)
    constant = settings.schedule == "constant"
    falling = np.ones(steps) if constant else (steps - step) / max(1, steps - warm)
    return float(settings.learning_rate or 0.0) * np.where(step < warm, rising, falling)


@dataclass(frozen=True)
class UserRules:
    """How each user's row moves; (users, 1) float32 each.

    Attributes:
        decay: Weight decay.
        clip: Bound of the L2 norm of the gradient.
        proximal: Weight of the pull towards the anchor.
        anchor: (users, num_params), or None if nobody has one.
    """

    decay: Tensor
    clip: Tensor
    proximal: Tensor
    anchor: Tensor | None = field(repr=False)


class UserAdamW:
    """AdamW with decoupled decay (Loshchilov and Hutter 2019, algorithm 2), a row for each user.

    Attributes:
        values: (users, num_params) float32, the trainable factors.
        gradients: (users, num_params) float32; zero after each step.
    """

    def __init__(self, starts: NDArray[np.float32], rules: UserRules) -> None:
        """Begin at `starts`, (users, num_params), on the device of the rules."""
        self.values = on_device(starts.copy(), rules.decay.device)
        self.gradients = torch.zeros_like(self.values)
        self._first = torch.zeros_like(self.values)
        self._second = torch.zeros_like(self.values)
        self._rules = rules

    def step(self, active: int, step: int, rates: NDArray[np.float64]) -> None:
        """Moves the first `active` rows; the others stay byte for byte.

        Args:
            active: Number of users that are not finished.
            step: Index of the step, the same for all of them; corrects Adam's bias.
            rates: (active,) learning rates.
        """
        value, gradient = self.values[:active], self.gradients[:active]
        first, second = self._first[:active], self._second[:active]
        rate = on_device(rates.astype(np.float32), value.device).unsqueeze(1)
        self._pull(active)
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient.mul_((self._rules.clip[:active] / (norm + 1e-6)).clamp_(max=1.0))
        value.mul_(1.0 - rate * self._rules.decay[:active])
        first.lerp_(gradient, 1.0 - BETA1)
        second.mul_(BETA2).addcmul_(gradient, gradient, value=1.0 - BETA2)
        correction1 = 1.0 - BETA1 ** (step + 1)
        correction2 = 1.0 - BETA2 ** (step + 1)
        scaled = second.sqrt().div_(correction2**0.5).add_(EPSILON)
        value.sub_((first / scaled).mul_(rate / correction1))
        gradient.zero_()

    def _pull(self, active: int) -> None:
        """Adds the gradient of proximal / 2 * ||values - anchor||^2 (FedProx, equation 2)."""
        if self._rules.anchor is not None:
            distance = self.values[:active] - self._rules.anchor[:active]
            self.gradients[:active].add_(distance.mul_(self._rules.proximal[:active]))


def user_rules(
    settings: Sequence[TrainingSettings],
    anchors: Sequence[Adapter | None],
    starts: Sequence[Adapter],
    *,
    factors: tuple[Factor, ...],
    device: torch.device = CPU,
) -> UserRules:
    """The rules of a group; a user without an anchor or with weight 0 is not pulled."""
    pulled = [s.proximal > 0.0 and a is not None for s, a in zip(settings, anchors, strict=True)]
    held = [a or start for a, start in zip(anchors, starts, strict=True)]
    flat = np.stack([a.spec.flatten(a.tensors, factors) for a in held]) if any(pulled) else None
    weights = [s.proximal * on for s, on in zip(settings, pulled, strict=True)]
    return UserRules(
        decay=_column([s.weight_decay for s in settings], device),
        clip=_column([s.clip_norm for s in settings], device),
        proximal=_column(weights, device),
        anchor=None if flat is None else on_device(flat, device),
    )


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return on_device(np.array(values, np.float32), device).unsqueeze(1)
