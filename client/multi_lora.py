"""Adapters of many users in one pass over the frozen base.

A `Level` holds the adapters of several users at one level of their stacks, stacked as
A (adapters, rank, in) and B (adapters, out, rank) for each adapted matrix, and says which of them
each row of a batch uses. Inside `adapted`, scale * (x A^T) B^T is added to the output of the
adapted `nn.Linear` modules (Hu et al. 2021, section 4.1) by hooks that live for the time of one
call: nothing is injected into the model, its parameters and classes are never touched, and the
hooks act only in the thread that made the call, so that a daemon can answer from the same model
while it trains.

This is the generic path: any transformers causal LM whose targets are `nn.Linear`. What it does for
(IA)^3 is in `scales`, for prompt tuning in `virtual_tokens`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedoppu.client.devices import CPU, on_device
from fedoppu.client.hooks import after, before, linear_module, require_rows
from fedoppu.client.scales import Scales, scale_modules
from fedoppu.client.virtual_tokens import VirtualTokens, embed_virtual
from fedoppu.common.adapter_kinds import VIRTUAL, Ia3Spec, PromptSpec
from fedoppu.common.adapters import Adapter, AdapterSpec, Spec
from fedoppu.common.errors import AdapterError, BaseModelError

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Factors:
    """Stacked factors of one adapted matrix.

    Attributes:
        a: (adapters, rank, in) float32.
        b: (adapters, out, rank) float32.
    """

    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)


@dataclass(frozen=True)
class Level:
    """Adapters at one level of the stacks of a batch, all of one shape.

    Attributes:
        factors: Of each adapted module, by its name in the base.
        scale: Factor of B A.
        slots: (rows,) which of the adapters each row of the batch uses.
        dropout: Gives for a module's name the (rows, tokens, in) factor of the adapters' input.
    """

    factors: Mapping[str, Factors]
    scale: float
    slots: Slots
    dropout: Callable[[str], Tensor] | None = None

    def take(self, rows: Slots) -> "Level":
        """The level for some of the rows, or for rows repeated."""
        return replace(self, slots=self.slots[rows])


AnyLevel = Level | Scales | VirtualTokens


def only_lora(levels: Sequence[AnyLevel]) -> list[Level]:
    """The levels, for what computes with LoRA adapters alone.

    Raises:
        AdapterError: A level is of another kind.
    """
    loras = [level for level in levels if isinstance(level, Level)]
    if len(loras) < len(levels):
        raise AdapterError("only LoRA adapters are computed here: take the generic path")
    return loras


@dataclass(frozen=True)
class Outputs:
    """Positions of a batch at which logits are wanted.

    Attributes:
        rows: (outputs,) row of each.
        positions: (outputs,) position in its row.
    """

    rows: Tensor
    positions: Tensor


def check_stack(adapters: Sequence[Adapter], base_hash: str) -> None:
    """Checks that a stack fits: each adapter's base, its tensors, and that its parent is below it.

    Raises:
        AdapterError: An adapter was made for another base or on another adapter, is malformed, or
            lies on one that is no LoRA.
    """
    parent: str | None = None
    for place, adapter in enumerate(adapters):
        if place + 1 < len(adapters) and not isinstance(adapter.spec, AdapterSpec):
            raise AdapterError(
                f"a stack has an adapter of kind {adapter.spec.identity} under another one",
                hint="only LoRA adapters can have adapters on top of them",
            )
        adapter.require(base_hash=base_hash, parent=parent)
        for name, shape in adapter.spec.shapes().items():
            found = adapter.tensors[name].shape if name in adapter.tensors else "none"
            if found != shape:
                raise AdapterError(f"adapter tensor {name} must have shape {shape}, got {found}")
        parent = adapter.digest()


def stack_levels(
    stacks: Sequence[tuple[Adapter, ...]], device: torch.device = CPU
) -> tuple[AnyLevel, ...]:
    """Stacks the frozen adapters of rows whose stacks have the same specs, level by level.

    Args:
        stacks: Of each row; an adapter that several rows share is held once.
        device: Of the base.
    """
    return tuple(_stack_level(adapters, device) for adapters in zip(*stacks, strict=True))


def _stack_level(adapters: Sequence[Adapter], device: torch.device) -> AnyLevel:
    stacked, slots = stack_tensors(adapters, device)
    return level_of(adapters[0].spec, stacked, slots)


def stack_tensors(
    adapters: Sequence[Adapter], device: torch.device
) -> tuple[dict[str, Tensor], Slots]:
    """The tensors of rows' adapters of one spec; an adapter that several rows share is held once.

    Returns:
        By name (adapters, ...) float32, and for each row which of the adapters is its own.
    """
    distinct = {id(adapter): adapter for adapter in adapters}
    slot = {key: index for index, key in enumerate(distinct)}
    arrays = {
        name: np.stack([adapter.tensors[name] for adapter in distinct.values()])
        for name in adapters[0].spec.shapes()
    }
    stacked = {
        name: on_device(array.astype(np.float32, copy=False), device)
        for name, array in arrays.items()
    }
    return stacked, np.array([slot[id(adapter)] for adapter in adapters])


def level_of(spec: Spec, stacked: Mapping[str, Tensor], slots: Slots) -> AnyLevel:
    """A level of adapters of one spec.

    Args:
        spec: Of all of them.
        stacked: By the spec's names, (adapters, ...).
        slots: (rows,) which of the adapters each row uses.
    """
    if isinstance(spec, PromptSpec):
        return VirtualTokens(stacked[VIRTUAL], slots)
    if isinstance(spec, Ia3Spec):
        outputs, inputs = (
            {one.name: stacked[f"{one.name}.l"].flatten(1) for one in scaled}
            for scaled in (spec.outputs, spec.inputs)
        )
        return Scales(outputs, inputs, slots)
    if not isinstance(spec, AdapterSpec):
        raise AdapterError(f"a {type(spec).__name__} is no kind of adapter")
    factors = {
        target.name: Factors(stacked[f"{target.name}.A"], stacked[f"{target.name}.B"])
        for target in spec.targets
    }
    return Level(factors, spec.scale, slots)


@contextmanager
def adapted(model: PreTrainedModel, levels: Sequence[AnyLevel]) -> Iterator[None]:
    """Inside the block, in this thread, the model computes with the adapters of `levels`.

    Args:
        model: Left exactly as it was when the block ends, also by an exception.
        levels: From the lowest to the highest; all have one slot for each row of the batch.

    Raises:
        BaseModelError: An adapted module is missing, or is no `nn.Linear` over rows of tokens.
    """
    handles: list[RemovableHandle] = []
    loras = [level for level in levels if isinstance(level, Level)]
    try:
        for name in sorted({name for level in loras for name in level.factors}):
            delta = _Delta.of(name, [level for level in loras if name in level.factors])
            handles.append(after(linear_module(model, name), delta.added_to))
        for level in levels:
            if isinstance(level, Scales):
                handles += scale_modules(model, level)
            elif isinstance(level, VirtualTokens):
                handles += embed_virtual(model, level)
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_at(
    model: PreTrainedModel,
    tokens: Tensor,
    outputs: Outputs,
    *,
    levels: Sequence[AnyLevel] = (),
    layout: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Runs the base under adapters and the output head at the wanted positions alone.

    Args:
        model: The frozen base.
        tokens: (rows, length) int64, padded on the right; negative where they are virtual.
        outputs: Where logits are wanted.
        levels: Adapters; none for the base itself.
        layout: attention_mask and position_ids of rows that are not plain causal text.

    Returns:
        (outputs, vocabulary) float32 logits.
    """
    head = cast(Any, model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise BaseModelError(f"a {type(model).__name__} has no output head")
    handle = before(head, lambda x: x[outputs.rows, outputs.positions].unsqueeze(0))
    try:
        with adapted(model, levels):
            result = model(input_ids=tokens, use_cache=False, **(layout or {}))
    finally:
        handle.remove()
    logits: Tensor = result.logits[0]
    return logits.float()


def _block_starts(levels: Sequence[Level]) -> Slots:
    """First rows of equally long runs of rows with the same adapters; every row if there are none.

    Rows of one user that follow each other are one block, so that their products are one.
    """
    slots = np.stack([level.slots for level in levels], axis=1)
    changes = np.flatnonzero((slots[1:] != slots[:-1]).any(axis=1)) + 1
    starts = np.concatenate([[0], changes])
    lengths = np.diff(np.append(starts, len(slots)))
    return starts if (lengths == lengths[0]).all() else np.arange(len(slots))


def pick(stacked: Tensor, slots: Slots) -> Tensor:
    """The adapters of some blocks, (blocks, ...), without a copy where it can be avoided."""
    if len(stacked) == 1:  # one for all, as the frozen A of a federation's users
        return stacked.expand(len(slots), -1, -1)
    if np.array_equal(slots, np.arange(len(stacked))):
        return stacked
    return stacked.index_select(0, on_device(slots, stacked.device))


@dataclass(frozen=True)
class _Delta:
    """What is added to one module's output: the levels side by side along the rank.

    Attributes:
        name: Of the module.
        rows: Rows of the batch.
        inputs: For each dropout (None: the plain input) the (blocks, ranks, in) factors A.
        b: (blocks, out, all ranks), in the order of `inputs`.
        scales: (all ranks,), or None where all are 1.
    """

    name: str
    rows: int
    inputs: tuple[tuple[Callable[[str], Tensor] | None, Tensor], ...]
    b: Tensor
    scales: Tensor | None

    @classmethod
    def of(cls, name: str, levels: Sequence[Level]) -> "_Delta":
        """Puts the levels that adapt a module side by side; those with dropout come last."""
        starts = _block_starts(levels)
        plain = [level for level in levels if level.dropout is None]
        dropped = [level for level in levels if level.dropout is not None]
        a = [pick(level.factors[name].a, level.slots[starts]) for level in (*plain, *dropped)]
        b = [pick(level.factors[name].b, level.slots[starts]) for level in (*plain, *dropped)]
        inputs = [
            (level.dropout, part) for level, part in zip(dropped, a[len(plain) :], strict=True)
        ]
        if plain:
            inputs.insert(0, (None, side_by_side(a[: len(plain)], 1)))
        ranks = [part.shape[1] for part in a]
        scales = np.repeat([level.scale for level in (*plain, *dropped)], ranks)
        return cls(
            name=name,
            rows=len(levels[0].slots),
            inputs=tuple(inputs),
            b=side_by_side(b, 2),
            scales=None if (scales == 1.0).all() else on_device(scales, b[0].device).float(),
        )

    def added_to(self, output: Tensor, x: Tensor) -> Tensor:
        """The output of the module for input x (rows, tokens, in), with the adapters' part."""
        require_rows(self.name, x, self.rows)
        blocks = len(self.b)
        inner = side_by_side([self._inner(x, dropout, a) for dropout, a in self.inputs], 2)
        if self.scales is not None:
            inner = inner * self.scales
        if output.dtype == torch.float32:
            flat = output.reshape(blocks, -1, output.shape[-1])
            return torch.baddbmm(flat, inner, self.b.transpose(1, 2)).view(output.shape)
        delta = torch.bmm(inner, self.b.transpose(1, 2)).view(output.shape)
        return output + delta.to(output.dtype)

    def _inner(self, x: Tensor, dropout: Callable[[str], Tensor] | None, a: Tensor) -> Tensor:
        x = x.float()
        if dropout is not None:
            x = x * dropout(self.name)
        return torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.transpose(1, 2))


def side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """The tensors along a dimension, without a copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
