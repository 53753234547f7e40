"""Greedy answers of many rows by a cache of keys and values, one token a row and step.

Rows stay in the order of their stacks of adapters, so that the products of a stack are one. In the
cache their places are another matter: a row that ends gives its place to the last one, so that the
rows that go on lie at its beginning and one row is copied, not all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoppu.client.devices import on_device
from fedoppu.client.jobs import ModelQuery
from fedoppu.client.llama import Attend, LlamaEngine
from fedoppu.client.llama_spans import read
from fedoppu.client.llama_tree import Range, stack_key
from fedoppu.client.multi_lora import Level, only_lora, stack_levels
from fedoppu.common.adapters import Adapter

Indices = NDArray[np.int64]
# memory of the keys and values of the rows that are answered together
CACHE_BYTES = 256e6


def cache_tokens(engine: LlamaEngine) -> int:
    """Tokens of a cache within `CACHE_BYTES`; at least one long text."""
    heads, like = engine.heads, engine.embeddings
    token = 2 * engine.layers * heads.key_heads * engine.head_width * like.dtype.itemsize
    return max(2048, int(CACHE_BYTES / token))


@dataclass(frozen=True)
class Newest:
    """The tokens of one step, one of each row; a `llama.Laid`."""

    tokens: Indices = field(repr=False)
    positions: Indices = field(repr=False)
    outputs: Indices = field(repr=False)


class Cache:
    """Keys and values of rows, (layers, places, key heads, room, head width) each."""

    def __init__(self, engine: LlamaEngine, lengths: Sequence[int], room: int) -> None:
        """Make room for rows.

        Args:
            engine: Whose layers.
            lengths: Tokens of each row's prompt.
            room: Most tokens of a row.
        """
        heads, like = engine.heads, engine.embeddings
        shape = (engine.layers, len(lengths), heads.key_heads, room, engine.head_width)
        # what no row has written is masked, and must be finite all the same
        self._keys, self._values = (like.new_zeros(shape) for _ in range(2))
        self._window = heads.window
        self._lengths = np.array(lengths)
        self._places = np.arange(len(lengths))

    @property
    def lengths(self) -> Indices:
        """(rows,) tokens that are held of each row."""
        return self._lengths[self._places]

    def filled_by(self, attend: Attend, first: int, texts: Sequence[Sequence[Range]]) -> Attend:
        """An attention that keeps the keys and values of prompts.

        Args:
            attend: Mixes the values of the pass.
            first: Row of the first prompt.
            texts: Where in the pass the tokens of each prompt are.
        """

        def keep(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            for row, text in enumerate(texts, first):
                size = int(self._lengths[row])
                self._keys[layer, row, :, :size] = read(key, text).transpose(0, 1)
                self._values[layer, row, :, :size] = read(value, text).transpose(0, 1)
            return attend(layer, query, key, value)

        return keep

    def step(self) -> Attend:
        """The attention of the rows' next tokens, which are kept."""
        device, rows = self._keys.device, len(self._places)
        places = on_device(self._places, device)
        rank = on_device(np.argsort(self._places), device)
        at = on_device(self.lengths, device)
        lengths = self._lengths[:rows]
        mask = self._mask(lengths)
        self._lengths[:rows] += 1

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[places, :, at], values[places, :, at] = key, value
            # all of their room, which the mask hides: a narrower view would be copied
            keys, values = (held[:rows].flatten(0, 1) for held in (keys, values))
            asking = query.index_select(0, rank).view(len(keys), -1, query.shape[-1])
            scores = torch.bmm(asking, keys.transpose(1, 2))
            scores.view(rows, -1, keys.shape[1]).add_(mask)
            mixed = torch.bmm(torch.softmax(scores, -1), values)
            return mixed.view(query.shape).index_select(0, places)

        return attend

    def _mask(self, lengths: Indices) -> Tensor:
        """(rows, 1, room) 0 at the tokens that a row sees, -inf elsewhere."""
        token, newest = np.arange(self._keys.shape[3]), lengths[:, None]
        hidden = token > newest
        if self._window is not None:
            hidden |= token <= newest - self._window
        mask = torch.from_numpy(np.where(hidden, -np.inf, 0.0))[:, None]
        return mask.to(self._keys.device, self._keys.dtype)

    def keep(self, going: Indices) -> None:
        """Goes on with some of the rows, in their order."""
        self._places = self._places[going]
        free = np.setdiff1d(np.arange(len(going)), self._places)
        beyond = np.flatnonzero(self._places >= len(going))
        for row, place in zip(beyond, free.tolist(), strict=True):
            last = int(self._places[row])
            size = int(self._lengths[last])
            for held in (self._keys, self._values):
                held[:, place, :, :size] = held[:, last, :, :size]
            self._lengths[place], self._places[row] = size, place


@dataclass(frozen=True)
class StepAdapters:
    """Adapters of one token a row; `llama.Adapters`.

    Attributes:
        factors: For each adapted module and stack the levels side by side along the rank: A
            transposed, (in, ranks) float32, and B scaled and transposed, (ranks, out) in the
            base's dtype. They are put together once for all steps.
        spans: Stack, and its first and end row, of those that have any.
    """

    factors: Mapping[str, Sequence[tuple[Tensor, Tensor]]] = field(repr=False)
    spans: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, stacks: Sequence[tuple[Adapter, ...]], like: Tensor) -> "StepAdapters":
        """The adapters of stacks with the same specs, on the device and in the dtype of `like`."""
        levels = only_lora(stack_levels(stacks, like.device))
        names = sorted({name for level in levels for name in level.factors})
        return cls({name: _side_by_side(levels, name, like.dtype) for name in names})

    def over(self, stacks: Indices) -> "StepAdapters":
        """The adapters of rows, whose stacks are given in ascending order."""
        found, starts = np.unique(stacks, return_index=True)
        ends = [*starts[1:].tolist(), len(stacks)]
        spans = zip(found.tolist(), starts.tolist(), ends, strict=True)
        return replace(self, spans=tuple(spans))

    def added_to(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """See `llama.Adapters`."""
        if name in self.factors:
            for stack, start, end in self.spans:
                a, b = self.factors[name][stack]
                inner = torch.mm(x[start:end].float(), a)
                output[start:end].addmm_(inner.to(b.dtype), b)
        return output


def _side_by_side(
    levels: Sequence[Level], name: str, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    here = [level for level in levels if name in level.factors]
    found = []
    for stack in range(len(here[0].slots)):
        slots = [int(level.slots[stack]) for level in here]
        pairs = list(zip(here, slots, strict=True))
        a = torch.cat([level.factors[name].a[slot] for level, slot in pairs])
        b = torch.cat([level.factors[name].b[slot] * level.scale for level, slot in pairs], 1)
        found.append((a.t(), b.t().to(dtype).contiguous()))
    return found


class Decoder:
    """The answers of queries that share a cache."""

    def __init__(self, engine: LlamaEngine, queries: Sequence[ModelQuery], *, eos: int) -> None:
        """Make room for the answers; `cache` takes the prompts, `begin` what they predict.

        Args:
            engine: Computes.
            queries: In the order of their stacks, see `llama_tree.in_order`.
            eos: Token that ends an answer.
        """
        lengths = [len(query.prompt) for query in queries]
        most = [query.max_tokens for query in queries]
        room = max(length + answer for length, answer in zip(lengths, most, strict=True)) - 1
        stacks = {stack_key(query): query.adapters for query in queries}
        numbers = {key: number for number, key in enumerate(stacks)}
        self.cache = Cache(engine, lengths, room)
        self._engine = engine
        self._eos = eos
        self._most = most
        self._stacks = np.array([numbers[stack_key(query)] for query in queries])
        self._adapters = StepAdapters.of(list(stacks.values()), engine.embeddings)
        self._answers: list[list[int]] = [[] for _ in queries]
        self._first: list[int] = []

    def begin(self, newest: Tensor) -> None:
        """Takes the (prompts,) first tokens of the next answers."""
        self._first += newest.tolist()

    def finish(self) -> list[tuple[int, ...]]:
        """Goes on until each answer has ended or is as long as it may be."""
        rows, newest = np.arange(len(self._answers)), self._first
        while len(going := self._append(rows, newest)):
            rows, tokens = rows[going], np.array(newest)[going]
            self.cache.keep(going)
            newest = self._step(rows, tokens).tolist()
        return [tuple(answer) for answer in self._answers]

    def _append(self, rows: Indices, newest: Sequence[int]) -> Indices:
        """Adds each row's token to its answer; returns which of the rows go on."""
        going = []
        for place, (row, token) in enumerate(zip(rows.tolist(), newest, strict=True)):
            if token != self._eos:
                self._answers[row].append(token)
                if len(self._answers[row]) < self._most[row]:
                    going.append(place)
        return np.array(going, np.int64)

    def _step(self, rows: Indices, tokens: Indices) -> Tensor:
        """(rows,) the tokens after these."""
        newest = Newest(tokens, self.cache.lengths, np.arange(len(rows)))
        adapters = self._adapters.over(self._stacks[rows])
        hidden = self._engine.hidden(newest, (adapters, adapters), self.cache.step())
        return self._engine.logits(hidden).argmax(-1)
