"""What pfl and Flower train with: one peft model, and AdamW with the settings of the case."""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from peft import get_peft_model
from torch import Tensor, nn

from fedoppu.simulations.benchmarks.personal_sides import IGNORED, factors, lora_config, vector_of
from fedoppu.simulations.benchmarks.shared_cases import Case, Vector


class PeftModel(nn.Module):
    """A peft model over a copy of the base: what both other sides train.

    Attributes:
        factors: The trained parameters by our names, in the order of the flat vector.
    """

    def __init__(self, case: Case) -> None:
        """Inject an adapter with the values of the case's start."""
        super().__init__()
        self.model = get_peft_model(copy.deepcopy(case.base.model), lora_config(case.spec))
        self.model.train()
        self.factors = factors(self.model, case.spec)
        self._case = case
        self.reset()

    def reset(self) -> None:
        """Sets the adapter to the start."""
        with torch.no_grad():
            for name, parameter in self.factors.items():
                parameter.copy_(torch.from_numpy(self._case.start.tensors[name]))

    def vector(self) -> Vector:
        """(num_params,) float32 copy of the adapter."""
        return vector_of(self.factors, self._case.spec)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean loss over the learnt tokens of some rows, as transformers has it."""
        labels = rows.clone()
        labels[:, : -self._case.work.answer] = IGNORED
        # the last token is only predicted, so it need not go through the base
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        flat = logits.float().flatten(0, 1)
        return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORED)

    def metrics(self, rows: Tensor) -> dict[str, float]:
        """Pfl asks for it; nothing is evaluated."""
        return {}


def adamw(parameters: Sequence[nn.Parameter], case: Case) -> torch.optim.Optimizer:
    """The optimizer of one user's round."""
    settings = case.work.settings()
    return torch.optim.AdamW(
        parameters,
        lr=cast(float, settings.learning_rate),
        weight_decay=settings.weight_decay,
        fused=True,
    )
