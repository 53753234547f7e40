"""The seam between a group of users and how a base computes: the fast path or the generic one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedoppu.client.batches import Row, TokenBatch, pack
from fedoppu.client.devices import on_device
from fedoppu.client.llama import LlamaEngine, fast_path
from fedoppu.client.model import LoadedBase
from fedoppu.client.multi_lora import AnyLevel, logits_at
from fedoppu.common.adapters import AdapterSpec, Spec


class Pass(Protocol):
    """Some rows that go through the base together."""

    @property
    def picked(self) -> NDArray[np.int64]:
        """(rows,) index of each row among those that were given."""

    @property
    def sources(self) -> NDArray[np.int64]:
        """(outputs,) index of the row of each answer token."""

    def spread(self, parts: Sequence[NDArray[np.float32]]) -> Tensor:
        """Lays out what each row has for each of its tokens as the levels' dropout wants it."""

    def losses(self, levels: Sequence[AnyLevel]) -> Tensor:
        """(outputs,) float32 losses of the answer tokens, nats; the levels have a slot a row."""


class Engine(Protocol):
    """How a base computes the losses of many users' rows, differentiable by their adapters."""

    def passes(self, rows: Sequence[Row], *, share: bool) -> Sequence[Pass]:
        """Cuts rows into passes; those of one user follow each other.

        Args:
            rows: Of one step.
            share: Whether what a user's rows begin with may be computed once; not so where each
                row drops its own inputs.
        """


def takes_fast_path(base: LoadedBase, stack: Sequence[Spec]) -> bool:
    """Whether a stack of adapters on a base takes the fast path; what does not takes the generic one.

    Training and answering ask here, and nowhere else.

    Args:
        base: `llama.fast_path` says why one does not.
        stack: Specs from the lowest adapter to the highest.
    """
    return fast_path(base.model) is None and all(isinstance(one, AdapterSpec) for one in stack)


class Engines:
    """The engines of one base, each made once."""

    def __init__(self, base: LoadedBase, *, checkpointing: bool = False) -> None:
        """Compute with a base.

        Args:
            base: Never changed.
            checkpointing: Whether a backward computes each layer anew instead of keeping it: less
                memory, more time, the same bits (`llama`). The generic path does not: there it
                is a mode of the model, which other users of the base would be in too.
        """
        self._base = base
        self._generic = GenericEngine(base)
        fast = takes_fast_path(base, ())
        self._fast = LlamaEngine(base.model, checkpointing=checkpointing) if fast else None

    def of(self, stack: Sequence[Spec]) -> Engine:
        """The fastest engine that takes a stack of adapters."""
        fast = self._fast if takes_fast_path(self._base, stack) else None
        return fast or self._generic


def engine_for(base: LoadedBase) -> Engine:
    """The fastest engine of a base for LoRA adapters."""
    return Engines(base).of(())


class GenericEngine:
    """Any transformers causal LM: padded rows, adapters added by hooks, autograd."""

    def __init__(self, base: LoadedBase) -> None:
        """Compute with `base`, which is never changed."""
        self._base = base

    def passes(self, rows: Sequence[Row], *, share: bool) -> "list[PaddedPass]":
        """Rows of similar length, padded; prefixes are never shared."""
        packed = pack(rows, pad=self._base.tokenizer.pad, device=self._base.device)
        return [PaddedPass(self._base, batch) for batch in packed]


@dataclass(frozen=True)
class PaddedPass:
    """Rows in one pass of the generic path."""

    base: LoadedBase = field(repr=False)
    batch: TokenBatch

    @property
    def picked(self) -> NDArray[np.int64]:
        """(rows,) index of each row among those that were given."""
        return self.batch.picked

    @property
    def sources(self) -> NDArray[np.int64]:
        """(outputs,) index of the row of each answer token."""
        return self.batch.sources

    def spread(self, parts: Sequence[NDArray[np.float32]]) -> Tensor:
        """(rows, tokens, width); what padding has is never used."""
        laid = np.ones((*self.batch.tokens.shape, parts[0].shape[1]), np.float32)
        for row, part in zip(laid, parts, strict=True):
            row[: len(part)] = part
        return on_device(laid, self.base.device)

    def losses(self, levels: Sequence[AnyLevel]) -> Tensor:
        """(outputs,) float32 losses of the answer tokens, nats."""
        batch = self.batch
        logits = logits_at(self.base.model, batch.tokens, batch.outputs, levels=levels)
        return functional.cross_entropy(logits, batch.targets, reduction="none")
