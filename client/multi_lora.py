"""Adapters of many users in one pass over the frozen base.

A `Level` holds the adapters of several users at one level of their stacks, stacked as
A (adapters, rank, in) and B (adapters, out, rank) for each adapted matrix, and says which of them
each row of a batch uses. Inside `adapted`, scale * (x A^T) B^T is added to the output of the
adapted `nn.Linear` modules (Hu et al. 2021, section 4.1) by hooks that live for the time of one
call: nothing is injected into the model, its parameters and classes are never touched, and the
hooks act only in the thread that made the call, so that a daemon can answer from the same model
while it trains.

This is the generic path: any transformers causal LM whose targets are `nn.Linear`.
"""

import threading
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

from fedoppu.common.adapters import Adapter
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
        AdapterError: An adapter was made for another base or on another adapter, or is malformed.
    """
    parent: str | None = None
    for adapter in adapters:
        adapter.require(base_hash=base_hash, parent=parent)
        for name, shape in adapter.spec.shapes().items():
            found = adapter.tensors[name].shape if name in adapter.tensors else "none"
            if found != shape:
                raise AdapterError(f"adapter tensor {name} must have shape {shape}, got {found}")
        parent = adapter.digest()


def stack_levels(stacks: Sequence[tuple[Adapter, ...]]) -> tuple[Level, ...]:
    """Stacks the frozen adapters of rows whose stacks have the same specs, level by level.

    Args:
        stacks: Of each row; an adapter that several rows share is held once.
    """
    return tuple(_stack_level(adapters) for adapters in zip(*stacks, strict=True))


def _stack_level(adapters: Sequence[Adapter]) -> Level:
    distinct = {id(adapter): adapter for adapter in adapters}
    slot = {key: index for index, key in enumerate(distinct)}
    spec = adapters[0].spec
    factors = {
        target.name: Factors(
            _stack([adapter.tensors[f"{target.name}.A"] for adapter in distinct.values()]),
            _stack([adapter.tensors[f"{target.name}.B"] for adapter in distinct.values()]),
        )
        for target in spec.targets
    }
    return Level(factors, spec.scale, np.array([slot[id(adapter)] for adapter in adapters]))


def _stack(arrays: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False))


@contextmanager
def adapted(model: PreTrainedModel, levels: Sequence[Level]) -> Iterator[None]:
    """Inside the block, in this thread, the model computes with the adapters of `levels`.

    Args:
        model: Left exactly as it was when the block ends, also by an exception.
        levels: From the lowest to the highest; all have one slot for each row of the batch.

    Raises:
        BaseModelError: An adapted module is missing, or is no `nn.Linear` over rows of tokens.
    """
    handles: list[RemovableHandle] = []
    try:
        for name in sorted({name for level in levels for name in level.factors}):
            delta = _Delta.of(name, [level for level in levels if name in level.factors])
            handles.append(_linear(model, name).register_forward_hook(_delta_hook(delta)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_at(
    model: PreTrainedModel,
    tokens: Tensor,
    outputs: Outputs,
    *,
    levels: Sequence[Level] = (),
    layout: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Runs the base under adapters and the output head at the wanted positions alone.

    Args:
        model: The frozen base.
        tokens: (rows, length) int64, padded on the right.
        outputs: Where logits are wanted.
        levels: Adapters; none for the base itself.
        layout: attention_mask and position_ids of rows that are not plain causal text.

    Returns:
        (outputs, vocabulary) float32 logits.
    """
    head = cast(Any, model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise BaseModelError(f"a {type(model).__name__} has no output head")
    owner = threading.get_ident()

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != owner:
            return None
        return (args[0][outputs.rows, outputs.positions].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        with adapted(model, levels):
            result = model(input_ids=tokens, use_cache=False, **(layout or {}))
    finally:
        handle.remove()
    logits: Tensor = result.logits[0]
    return logits.float()


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise BaseModelError(f"a {type(model).__name__} has no module {name}") from None
    if not isinstance(module, nn.Linear):
        raise BaseModelError(
            f"module {name} is a {type(module).__name__}; only nn.Linear can be adapted",
            hint="choose other targets or another base",
        )
    return module


def _block_starts(levels: Sequence[Level]) -> Slots:
    """First rows of equally long runs of rows with the same adapters; every row if there are none.

    Rows of one user that follow each other are one block, so that their products are one.
    """
    slots = np.stack([level.slots for level in levels], axis=1)
    changes = np.flatnonzero((slots[1:] != slots[:-1]).any(axis=1)) + 1
    starts = np.concatenate([[0], changes])
    lengths = np.diff(np.append(starts, len(slots)))
    return starts if (lengths == lengths[0]).all() else np.arange(len(slots))


def _pick(stacked: Tensor, slots: Slots) -> Tensor:
    """The adapters of some blocks, (blocks, ...), without a copy where it can be avoided."""
    if len(stacked) == 1:
        return stacked.expand(len(slots), -1, -1)
    if np.array_equal(slots, np.arange(len(stacked))):
        return stacked
    return stacked[torch.from_numpy(slots)]


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
        a = [_pick(level.factors[name].a, level.slots[starts]) for level in (*plain, *dropped)]
        b = [_pick(level.factors[name].b, level.slots[starts]) for level in (*plain, *dropped)]
        inputs = [
            (level.dropout, part) for level, part in zip(dropped, a[len(plain) :], strict=True)
        ]
        if plain:
            inputs.insert(0, (None, _cat(a[: len(plain)], 1)))
        ranks = [part.shape[1] for part in a]
        scales = np.repeat([level.scale for level in (*plain, *dropped)], ranks)
        return cls(
            name=name,
            rows=len(levels[0].slots),
            inputs=tuple(inputs),
            b=_cat(b, 2),
            scales=None if (scales == 1.0).all() else torch.from_numpy(scales).float(),
        )

    def added_to(self, output: Tensor, x: Tensor) -> Tensor:
        """The output of the module for input x (rows, tokens, in), with the adapters' part."""
        if x.dim() != 3 or x.shape[0] != self.rows:
            raise BaseModelError(
                f"module {self.name} got an input of shape {tuple(x.shape)}, not (rows, tokens,"
                " features): it cannot be adapted",
                hint="choose other targets",
            )
        blocks = len(self.b)
        inner = _cat([self._inner(x, dropout, a) for dropout, a in self.inputs], 2)
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


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _delta_hook(delta: _Delta) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
    owner = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return delta.added_to(output, args[0]) if threading.get_ident() == owner else None

    return hook
