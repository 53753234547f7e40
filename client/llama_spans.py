"""Attention of a pass over query trees, without gradients: span by span, nothing padded or gathered.

A span's queries lie back to back and its keys in a few ranges, so its scores are one product over
slices of what the layer computed; only the last keys of a span can be hidden from a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedoppu.client.llama_tree import QueryTree, Range, Span


@dataclass(frozen=True)
class MaskedSpan:
    """A span with what is added to its scores.

    Attributes:
        span: Whose tokens attend.
        mask: (queries, last keys) 0 or -inf, in the base's dtype; None where all see all.
    """

    span: Span
    mask: Tensor | None = field(repr=False)

    @classmethod
    def of(cls, span: Span, *, window: int | None, like: Tensor) -> "MaskedSpan":
        """The mask of a span.

        Args:
            span: The span.
            window: Most tokens that a query sees, itself included; None for all before it.
            like: Any tensor with the dtype and device of the base.
        """
        sees, at = span.sees, span.positions[-len(span.sees) :]
        if window is not None and len(span.positions) > window:
            before = len(span.positions) - sees.shape[1]
            sees = np.pad(sees, ((0, 0), (before, 0)), constant_values=True)
            sees &= span.positions > at[:, None] - window
        hidden = np.flatnonzero(~sees.all(0))
        if not len(hidden):
            return cls(span, None)
        mask = np.where(sees[:, hidden[0] :], 0.0, -np.inf)
        return cls(span, torch.from_numpy(mask).to(like.device, like.dtype))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor) -> None:
        """Writes this span's part of `mixed`; all as in `SpanAttention`."""
        asking = slice(*self.span.queries)
        keys, values = (read(tensor, self.span.keys) for tensor in (key, value))
        _, key_heads, width = key.shape
        # (key heads, queries of all heads that one key head serves, width)
        grouped = query[asking].view(-1, key_heads, query.shape[1] // key_heads, width)
        grouped = grouped.permute(1, 2, 0, 3)
        scores = torch.bmm(grouped.reshape(key_heads, -1, width), keys.permute(1, 2, 0))
        if self.mask is not None:
            rows, columns = self.mask.shape
            scores.view(key_heads, -1, rows, len(keys))[..., -columns:].add_(self.mask)
        found = torch.bmm(torch.softmax(scores, -1), values.transpose(0, 1))
        mixed[asking] = found.view(grouped.shape).permute(2, 0, 1, 3).flatten(1, 2)


@dataclass(frozen=True)
class SpanAttention:
    """Mixes the values of the spans of a pass; a `llama.Attend`.

    Attributes:
        below: Spans of the layers below the last.
        last: Spans of the last one.
        layers: Number of layers.
    """

    below: tuple[MaskedSpan, ...] = field(repr=False)
    last: tuple[MaskedSpan, ...] = field(repr=False)
    layers: int

    @classmethod
    def of(
        cls, tree: QueryTree, *, layers: int, window: int | None, like: Tensor
    ) -> "SpanAttention":
        """Attention over a tree in a base with some layers and a window; see `MaskedSpan.of`."""
        below, last = (
            tuple(MaskedSpan.of(span, window=window, like=like) for span in spans)
            for spans in (tree.spans, tree.last)
        )
        return cls(below, last, layers)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mixes values.

        Args:
            layer: Number of the layer.
            query: (asking, heads, head width), scaled.
            key: (T, key heads, head width).
            value: Like `key`.

        Returns:
            Like `query`.
        """
        mixed = torch.empty_like(query)
        for span in self.last if layer == self.layers - 1 else self.below:
            span.attend(query, key, value, mixed)
        return mixed


def read(tensor: Tensor, places: Sequence[Range]) -> Tensor:
    """(places, ...) some ranges of the first dimension, without a copy where there is one."""
    parts = [tensor[start:end] for start, end in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
