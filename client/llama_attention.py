"""Which queries see which keys when the rows of many users lie back to back.

Queries of several rows are attended in one product when their lengths are similar; a group's
queries and keys are gathered by index, so that a prefix which a user's rows share is one stretch of
tokens that each of those rows points at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedoppu.client.devices import CPU, on_device

Indices = NDArray[np.int64]

# what one more group costs, and the largest group that stays in the cache, in scores of one head
GROUP_COST = 16_000
MAX_SCORES = 200_000
# Lengths are rounded up and a group has a power of two of stretches, so that few shapes ever occur:
# in bf16 the first product of a shape costs .3-.6 ms more than the next, for its kernel is made
# then. A softmax over a multiple of 32 scores is also 1.8-2.5 times as fast as over any other.
QUERY_GRAIN, KEY_GRAIN = 16, 32


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of a base.

    Attributes:
        heads: Query heads.
        key_heads: Key and value heads; each serves heads / key_heads query heads.
        window: Most tokens that a query sees, itself included; None for all before it.
    """

    heads: int
    key_heads: int
    window: int | None = None


@dataclass(frozen=True)
class Stretch:
    """Tokens of one row that are attended together.

    Attributes:
        queries: (queries,) tokens that ask, at the end of `keys` or among them.
        keys: (keys,) tokens that they may see, in the order of their positions.
    """

    queries: Indices = field(repr=False)
    keys: Indices = field(repr=False)


@dataclass(frozen=True)
class AttentionGroup:
    """Stretches whose scores are one product.

    Attributes:
        queries: (key heads * stretches * heads per key head * longest,) rows of the queries.
        keys: (key heads * stretches * most keys,) rows of the keys.
        padding: Which of `queries` are padding.
        mask: (stretches, 1, longest, most keys), 0 where a query sees a key, -inf elsewhere.
        shape: Of the scores: (key heads, stretches, heads per key head, longest, most keys).
    """

    queries: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    padding: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    shape: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Products of the group: key heads times stretches."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class AttentionPlan:
    """How the tokens of a pass are attended.

    Attributes:
        groups: Their outputs follow each other.
        found: (queries * heads,) where among the groups' outputs each query's is.
        uses: Where among the groups' keys each key is, key by key.
        bags: (keys * key heads,) where in `uses` each key's begin.
    """

    groups: tuple[AttentionGroup, ...]
    found: Tensor = field(repr=False)
    uses: Tensor = field(repr=False)
    bags: Tensor = field(repr=False)


def gather_sum(parts: Tensor, plan: AttentionPlan) -> Tensor:
    """(keys * key heads, width) sums over each key's uses.

    An embedding bag is this sum in one call: 6-16 times as fast as `index_add_` on a CPU.
    """
    return functional.embedding_bag(plan.uses, parts, plan.bags, mode="sum")


def split_stretches(stretches: Sequence[Stretch]) -> list[list[Stretch]]:
    """Cuts stretches into groups at the least cost: scores with padding plus `GROUP_COST` each.

    Sorted by length the best groups are runs, found by dynamic programming; each has a power of two
    of stretches.
    """
    order = sorted(stretches, key=lambda stretch: (len(stretch.keys), len(stretch.queries)))
    keys = _rounded(np.array([len(stretch.keys) for stretch in order]), KEY_GRAIN).tolist()
    longest = _longest(_rounded(np.array([len(stretch.queries) for stretch in order]), QUERY_GRAIN))
    best, cut = [0], [0]
    for end in range(1, len(order) + 1):
        options = []
        for power in range(end.bit_length()):
            start = end - (1 << power)
            scores = (1 << power) * longest[power][start] * keys[end - 1]
            if power == 0 or scores <= MAX_SCORES:
                options.append((best[start] + scores + GROUP_COST, start))
        cost, start = min(options)
        best.append(cost)
        cut.append(start)
    groups: list[list[Stretch]] = []
    end = len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def _longest(queries: Indices) -> list[list[int]]:
    """For each power of two the most queries of as many neighbours, by the first of them."""
    found = [queries]
    while 2 << len(found) - 1 <= len(queries):
        width = 1 << len(found) - 1
        found.append(np.maximum(found[-1][:-width], found[-1][width:]))
    return [most.tolist() for most in found]


def attention_plan(
    stretches: Sequence[Stretch],
    positions: Indices,
    heads: HeadShape,
    *,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> AttentionPlan:
    """Plans the attention of stretches.

    Args:
        stretches: Each query is in one of them; queries are numbered in the order of their tokens.
        positions: (T,) of each token in its own text.
        heads: Of the base.
        dtype: Of the scores.
        device: Of the base.
    """
    asking = np.sort(np.concatenate([stretch.queries for stretch in stretches]))
    number = np.zeros(len(positions), np.int64)
    number[asking] = np.arange(len(asking))
    builder = _Builder(heads, number, positions.astype(np.int32), device=device)
    groups = tuple(builder.group(members, dtype) for members in split_stretches(stretches))
    found, uses, bags = builder.tables(len(asking))
    return AttentionPlan(groups, found, uses, bags)


class _Builder:
    """Gathers where each query and key ends up in the groups."""

    def __init__(
        self,
        heads: HeadShape,
        number: Indices,
        positions: NDArray[np.int32],
        *,
        device: torch.device,
    ) -> None:
        self._heads, self._number, self._positions = heads, number, positions
        self._device = device
        self._query_end = self._key_end = 0
        self._found: list[tuple[Indices, Indices]] = []
        self._uses: list[tuple[Indices, Indices]] = []

    def group(self, members: Sequence[Stretch], dtype: torch.dtype) -> AttentionGroup:
        """One group: padding repeats a stretch's last token, which changes no sum (mask, zeros)."""
        queries, asks = _padded([stretch.queries for stretch in members], QUERY_GRAIN)
        keys, holds = _padded([stretch.keys for stretch in members], KEY_GRAIN)
        at, seen = self._positions[queries][:, :, None], self._positions[keys][:, None, :]
        hidden = (seen > at) | ~holds[:, None, :]
        if self._heads.window is not None:
            hidden |= seen <= at - self._heads.window
        shared = self._heads.heads // self._heads.key_heads
        head = np.arange(self._heads.key_heads)[:, None, None]
        rows = self._number[queries][None, :, None, :] * self._heads.heads
        rows = rows + (head * shared)[..., None] + np.arange(shared)[None, None, :, None]
        columns = keys[None] * self._heads.key_heads + head
        self._place(rows, columns, asks, holds)
        padding = np.flatnonzero(np.broadcast_to(~asks[None, :, None, :], rows.shape))
        unseen = on_device(hidden[:, None], self._device)
        return AttentionGroup(
            queries=on_device(rows.reshape(-1), self._device),
            keys=on_device(columns.reshape(-1), self._device),
            padding=on_device(padding, self._device),
            mask=torch.zeros(unseen.shape, dtype=dtype, device=self._device).masked_fill_(
                unseen, -torch.inf
            ),
            shape=(*rows.shape, keys.shape[1]),
        )

    def _place(
        self, rows: Indices, columns: Indices, asks: NDArray[np.bool_], holds: NDArray[np.bool_]
    ) -> None:
        real = np.flatnonzero(np.broadcast_to(asks[None, :, None, :], rows.shape))
        self._found.append((rows.reshape(-1)[real], real + self._query_end))
        self._query_end += rows.size
        real = np.flatnonzero(np.broadcast_to(holds[None], columns.shape))
        self._uses.append((columns.reshape(-1)[real], real + self._key_end))
        self._key_end += columns.size

    def tables(self, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """`found`, `uses` and `bags` of the plan."""
        found = np.zeros(queries * self._heads.heads, np.int64)
        for rows, places in self._found:
            found[rows] = places
        keys = np.concatenate([columns for columns, _ in self._uses])
        places = np.concatenate([places for _, places in self._uses])
        counts = np.bincount(keys, minlength=len(self._positions) * self._heads.key_heads)
        uses = places[np.argsort(keys, kind="stable")]
        bags = np.cumsum(counts) - counts
        device = self._device
        return on_device(found, device), on_device(uses, device), on_device(bags, device)


def _rounded(lengths: Indices, grain: int) -> Indices:
    return -(-lengths // grain) * grain


def _padded(parts: Sequence[Indices], grain: int) -> tuple[Indices, NDArray[np.bool_]]:
    """(parts, longest) with each part's last index repeated, and which of them are real."""
    lengths = np.array([len(part) for part in parts])
    column = np.arange(_rounded(lengths, grain).max())
    flat, starts = np.concatenate(parts), np.cumsum(lengths) - lengths
    places = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
    return flat[places], column < lengths[:, None]
