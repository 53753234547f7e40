"""(IA)^3 adapters of many users in one pass: each row's activations times its own vectors.

Liu et al. 2022 (https://arxiv.org/abs/2205.05638), section 3.3. The adapters lie over everything
else of their stacks: they scale the output of a module and the LoRA under them together, or the
input of both. This is the generic path, by hooks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedoppu.client.devices import on_device
from fedoppu.client.hooks import after, before, linear_module, require_rows

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Scales:
    """(IA)^3 adapters at the top of the stacks of a batch.

    Attributes:
        outputs: Of each module whose output is scaled: (adapters, out) float32.
        inputs: Of each module whose input is scaled: (adapters, in) float32.
        slots: (rows,) which of the adapters each row of the batch uses.
    """

    outputs: Mapping[str, Tensor] = field(repr=False)
    inputs: Mapping[str, Tensor] = field(repr=False)
    slots: Slots

    def take(self, rows: Slots) -> "Scales":
        """The level for some of the rows, or for rows repeated."""
        return replace(self, slots=self.slots[rows])


def scale_modules(model: PreTrainedModel, level: Scales) -> list[RemovableHandle]:
    """Hooks that scale; to be registered after those of whatever is under them.

    Raises:
        BaseModelError: A module is missing, or is no `nn.Linear` over rows of tokens.
    """
    handles: list[RemovableHandle] = []
    for name, vectors in level.inputs.items():
        rows = _Rows(name, vectors, level.slots)
        handles.append(before(linear_module(model, name), rows.scaled))
    for name, vectors in level.outputs.items():
        rows = _Rows(name, vectors, level.slots)
        handles.append(after(linear_module(model, name), rows.scaled_output))
    return handles


@dataclass(frozen=True)
class _Rows:
    """The vectors of one module, (adapters, features), and the rows that use them."""

    name: str
    vectors: Tensor
    slots: Slots

    def scaled(self, x: Tensor) -> Tensor:
        """(rows, tokens, features): float32 products whatever the base computes in."""
        require_rows(self.name, x, len(self.slots))
        own = self.vectors.index_select(0, on_device(self.slots, self.vectors.device))
        return torch.mul(x, own.unsqueeze(1)).to(x.dtype)

    def scaled_output(self, output: Tensor, x: Tensor) -> Tensor:
        """The output of a module, whose input says nothing more."""
        return self.scaled(output)
