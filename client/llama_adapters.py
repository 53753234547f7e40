"""The adapters of a packed pass: for each module the stacked factors and where they apply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedoppu.client.llama_ops import adapt
from fedoppu.client.multi_lora import Level, pick, side_by_side

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class PackedAdapters:
    """Levels of adapters over rows of tokens that lie back to back.

    Attributes:
        levels: From the lowest to the highest; all have one slot for each row.
        starts: (rows + 1,) first token of each row, and the number of tokens.
        chosen: (T,) where dropout masks are taken: the tokens that this pass is about, or None
            for all tokens. There are none for padding, which comes behind these.
    """

    levels: Sequence[Level]
    starts: Indices = field(repr=False)
    chosen: Tensor | None = field(repr=False, default=None)

    def at(self, chosen: Tensor, starts: Indices) -> "PackedAdapters":
        """The same adapters over some of the tokens, laid out by `starts`."""
        return replace(self, chosen=chosen, starts=starts)

    def added_to(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """The product of a module with its adapters' parts.

        Args:
            output: (T, out) of the frozen product, of no one else's use; changed in place.
            x: (T, in) its input.
            name: Of the module.
        """
        here = [level for level in self.levels if name in level.factors]
        plain = [level for level in here if level.dropout is None]
        if plain:
            output = self._add(output, x, plain, name)
        for level in here:
            if level.dropout is not None:
                kept = self._mask(level.dropout, name, len(x))
                output = self._add(output, x.float() * kept, [level], name)
        return output

    def _add(self, output: Tensor, x: Tensor, levels: Sequence[Level], name: str) -> Tensor:
        """Levels side by side along the rank, so that each user costs two small products."""
        first, spans = self._runs(levels)
        a = [pick(level.factors[name].a, level.slots[first]) for level in levels]
        b = [pick(level.factors[name].b, level.slots[first]) * level.scale for level in levels]
        return adapt(output, x, side_by_side(a, 1), side_by_side(b, 2), spans)

    def _mask(self, dropout: Callable[[str], Tensor], name: str, rows: int) -> Tensor:
        """(rows, in) of the tokens that this pass is about; those of padding are dropped."""
        mask = dropout(name)
        if self.chosen is not None:
            mask = mask.index_select(0, self.chosen)
        return functional.pad(mask, (0, 0, 0, rows - len(mask)))

    def _runs(self, levels: Sequence[Level]) -> tuple[Indices, tuple[int, ...]]:
        """First rows of runs of rows with the same adapters, and where their tokens begin."""
        slots = np.stack([level.slots for level in levels], axis=1)
        changes = np.flatnonzero((slots[1:] != slots[:-1]).any(axis=1)) + 1
        first = np.concatenate([np.zeros(1, np.int64), changes])
        return first, (*self.starts[first].tolist(), int(self.starts[-1]))
