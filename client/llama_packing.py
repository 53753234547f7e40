"""Rows of many users back to back, without padding; what a user's rows begin with only once.

A user's rows of one step usually begin with the same instruction. Those tokens have the same
activations in each of its rows, so they are computed once and every row sees them; their gradients
are the sums over the rows, which is what autograd over the unshared rows would add up to. Of LaMP
prompts this saves 45 % of the tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.batches import Row
from fedoppu.client.llama_attention import Indices, Stretch

# Queries that are attended together, cut where a text has multiples of it before them: below the
# diagonal no key is scored in vain, and rows of any length have stretches of the same few shapes.
# With the rounding of shapes, 1.3-1.45 times as fast as cuts of 128 from a row's own begin.
MAX_QUERIES = 64
# a shorter prefix is not worth the additional group of queries
MIN_SHARED = 16


@dataclass(frozen=True)
class Packed:
    """One pass over some rows.

    Attributes:
        tokens: (T,) int64.
        positions: (T,) of each token in its own text.
        starts: (rows + 1,) first token of each row, and T; a shared prefix belongs to the first
            of its user's rows.
        outputs: (outputs,) tokens at which the answers are predicted, ascending.
        output_starts: (rows + 1,) first output of each row, and their number.
        stretches: What is attended together in the layers below the last.
        last: The same of the last layer, where only `outputs` ask.
    """

    tokens: Indices = field(repr=False)
    positions: Indices = field(repr=False)
    starts: Indices = field(repr=False)
    outputs: Indices = field(repr=False)
    output_starts: Indices = field(repr=False)
    stretches: tuple[Stretch, ...] = field(repr=False)
    last: tuple[Stretch, ...] = field(repr=False)


def split_rows(rows: Sequence[Row], most: int) -> Iterator[list[int]]:
    """Cuts rows, in their order, into passes of at most `most` tokens; at least one row each.

    A user's rows stay together where they fit, so that their prefix is shared.
    """
    taken: list[int] = []
    used = 0
    for _, members in groupby(range(len(rows)), key=lambda index: rows[index].owner):
        own = list(members)
        total = sum(rows[index].length for index in own)
        if taken and used + total > most:
            yield taken
            taken, used = [], 0
        for index in own:
            if taken and used + rows[index].length > most:
                yield taken
                taken, used = [], 0
            taken.append(index)
            used += rows[index].length
    if taken:
        yield taken


def pack_rows(rows: Sequence[Row], *, share: bool) -> Packed:
    """Lays rows out one after another.

    Args:
        rows: Those of one user follow each other.
        share: Whether a prefix that all rows of a user have is computed once.
    """
    layout = _Layout()
    for _, members in groupby(rows, key=lambda row: row.owner):
        own = list(members)
        layout.add(own, common_prefix(own) if share else 0)
    return layout.packed()


def common_prefix(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with and at which none predicts; 0 where too few to share."""
    if len(rows) == 1:
        return 0
    shared = min(len(row.example.prompt) for row in rows) - 1
    first = rows[0].example.prompt
    for row in rows[1:]:
        differs = np.flatnonzero(row.example.prompt[:shared] != first[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared if shared >= MIN_SHARED else 0


def filled(packed: Packed) -> Packed:
    """A pass with a row of padding behind the others, so that few numbers of tokens ever occur.

    In bf16 the first product of a shape costs .3-.6 ms more than the next, since its kernel is
    made then. No other row sees the padding, and no adapter applies to it.
    """
    tokens, outputs = len(packed.tokens), len(packed.outputs)
    asking = _rounded_up(outputs) - outputs
    own = np.arange(tokens, _rounded_up(tokens + asking))
    return replace(
        packed,
        tokens=np.concatenate([packed.tokens, np.zeros_like(own)]),
        positions=np.concatenate([packed.positions, own - tokens]),
        outputs=np.concatenate([packed.outputs, own[:asking]]),
        stretches=(*packed.stretches, *_cut(own, own)),
        last=(*packed.last, *_cut(own[:asking], own[:asking])),
    )


def _rounded_up(count: int) -> int:
    """To a multiple of 16, or of a sixty-fourth of the power of two below it."""
    grain = max(16, 1 << max(0, count.bit_length() - 7))
    return -(-count // grain) * grain


def _cut(queries: Indices, keys: Indices) -> Iterator[Stretch]:
    """Cuts queries at the end of `keys` into stretches that see no later key."""
    before, start = len(keys) - len(queries), 0
    while start < len(queries):
        place = before + start
        end = min(start + MAX_QUERIES - place % MAX_QUERIES, len(queries))
        yield Stretch(queries[start:end], keys[: before + end])
        start = end


class _Layout:
    """Collects the tokens of one user after another."""

    def __init__(self) -> None:
        self._end = 0
        self._tokens: list[NDArray[np.int32]] = []
        self._positions: list[Indices] = []
        self._starts: list[int] = []
        self._outputs: list[Indices] = []
        self._stretches: list[Stretch] = []
        self._last: list[Stretch] = []

    def add(self, rows: Sequence[Row], shared: int) -> None:
        """Adds a user's rows, whose first `shared` tokens are the same."""
        self._starts.append(self._end)
        prefix = self._take(rows[0].example.prompt[:shared], 0)
        if shared:
            self._stretches += _cut(prefix, prefix)
        for index, row in enumerate(rows):
            if index:
                self._starts.append(self._end)
            example = row.example
            own = self._take(np.concatenate([example.prompt[shared:], example.answer[:-1]]), shared)
            keys = np.concatenate([prefix, own])
            outputs = own[len(example.prompt) - shared - 1 :]
            self._outputs.append(outputs)
            self._stretches += _cut(own, keys)
            self._last.append(Stretch(outputs, keys))

    def _take(self, tokens: NDArray[np.int32], position: int) -> Indices:
        places = np.arange(self._end, self._end + len(tokens))
        self._tokens.append(tokens)
        self._positions.append(np.arange(position, position + len(tokens)))
        self._end += len(tokens)
        return places

    def packed(self) -> Packed:
        """The pass over all that was added."""
        counts = [len(outputs) for outputs in self._outputs]
        return Packed(
            tokens=np.concatenate(self._tokens).astype(np.int64),
            positions=np.concatenate(self._positions),
            starts=np.array([*self._starts, self._end]),
            outputs=np.concatenate(self._outputs),
            output_starts=np.cumsum([0, *counts]),
            stretches=tuple(self._stretches),
            last=tuple(self._last),
        )
