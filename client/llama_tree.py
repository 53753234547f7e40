"""Queries of many users as trees, so that what texts begin with is computed once.

The prompts of one stack of adapters are a tree: those that begin alike, with an instruction or a
profile, share that stretch of tokens. Behind the last token of each prompt its labels are a tree
too: a label of n tokens is predicted at that token and after each of its first n - 1 tokens, and
labels that begin alike share those. Every token sees those that it follows in its own text, so the
scores are those of each query and label alone. Of LaMP prompts with 15 labels, two queries a user,
this leaves one token in thirteen of the full sequences.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.jobs import ModelQuery, Tokens

Indices = NDArray[np.int64]
# places from a first to before a last one
Range = tuple[int, int]

# queries that are attended together: below the diagonal no key is scored in vain
MAX_QUERIES = 128
# a shorter common beginning is not worth the additional products
MIN_SHARED = 16


@dataclass(frozen=True)
class LabelTree:
    """Labels of one query; its root is the last token of the prompt, the only node without labels.

    Attributes:
        tokens: (nodes - 1,) int32, of the nodes below the root.
        depths: (nodes,) tokens between the root and each node; 0 for the root.
        sees: (nodes, nodes) whether a node, by row, sees another: itself and those it follows.
        sources: (label tokens,) node at which each token of each label is predicted.
        targets: (label tokens,) that token.
        labels: (label tokens,) its label.
    """

    tokens: Tokens = field(repr=False)
    depths: Indices = field(repr=False)
    sees: NDArray[np.bool_] = field(repr=False)
    sources: Indices = field(repr=False)
    targets: Indices = field(repr=False)
    labels: Indices = field(repr=False)

    @classmethod
    def of(cls, labels: Sequence[Tokens]) -> "LabelTree":
        """Labels that begin alike share nodes."""
        nodes: dict[tuple[int, int], int] = {}
        sources: list[int] = []
        for label in labels:
            node = 0
            for token in label[:-1].tolist():
                sources.append(node)
                node = nodes.setdefault((node, token), len(nodes) + 1)
            sources.append(node)
        parents = np.array([0, *(parent for parent, _ in nodes)])
        sees = np.eye(len(parents), dtype=bool)
        for node in range(1, len(parents)):  # a parent comes before its nodes
            sees[node] |= sees[parents[node]]
        lengths = [len(label) for label in labels]
        return cls(
            tokens=np.array([token for _, token in nodes], np.int32),
            depths=sees.sum(1) - 1,
            sees=sees,
            sources=np.array(sources, np.int64),
            targets=np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64),
            labels=np.repeat(np.arange(len(labels)), lengths),
        )


@dataclass(frozen=True)
class Span:
    """Tokens that ask together.

    Attributes:
        queries: Places of those that ask.
        keys: Places of the keys, in the order of their text; the last ones are those of `queries`.
        positions: (keys,) of the keys in their text.
        sees: (queries, last keys) which of the last keys each query sees; all see those before.
    """

    queries: Range
    keys: tuple[Range, ...]
    positions: Indices = field(repr=False)
    sees: NDArray[np.bool_] = field(repr=False)


@dataclass(frozen=True)
class QueryTree:
    """One pass over some queries; a `llama.Laid`.

    Attributes:
        tokens: (T,) int64.
        positions: (T,) of each token in its own text.
        outputs: (outputs,) tokens at which something is predicted: of each query the nodes of its
            labels, root first.
        starts: (stacks + 1,) first token of each stack of adapters, and T.
        output_starts: (stacks + 1,) first output of each stack, and their number.
        roots: (queries,) output of the last token of each query's prompt.
        texts: For each query the places of its prompt.
        spans: What is attended together in the layers below the last.
        last: The same of the last layer, where only `outputs` ask, numbered as such.
    """

    tokens: Indices = field(repr=False)
    positions: Indices = field(repr=False)
    outputs: Indices = field(repr=False)
    starts: Indices = field(repr=False)
    output_starts: Indices = field(repr=False)
    roots: Indices = field(repr=False)
    texts: tuple[tuple[Range, ...], ...] = field(repr=False)
    spans: tuple[Span, ...] = field(repr=False)
    last: tuple[Span, ...] = field(repr=False)


def in_order(queries: Sequence[ModelQuery]) -> list[int]:
    """The queries stack by stack, those whose prompts begin alike beside each other."""
    stacks: dict[tuple[int, ...], int] = {}
    owners = [stacks.setdefault(stack_key(query), len(stacks)) for query in queries]
    # big-endian bytes are in the order of the tokens
    prompts = [query.prompt.astype(">i4").tobytes() for query in queries]
    return sorted(range(len(queries)), key=lambda index: (owners[index], prompts[index]))


def stack_key(query: ModelQuery) -> tuple[int, ...]:
    """Two queries of one call have the same adapters if their keys are the same."""
    return tuple(id(adapter) for adapter in query.adapters)


def split_queries(
    queries: Sequence[ModelQuery], trees: Sequence[LabelTree], most: int
) -> Iterator[Range]:
    """Cuts queries `in_order` into passes of at most `most` tokens; at least one query each.

    Args:
        queries: In their order.
        trees: Of their labels.
        most: Tokens of a pass.
    """
    start = used = 0
    for index, (query, tree) in enumerate(zip(queries, trees, strict=True)):
        own = len(query.prompt) + len(tree.tokens)
        if index > start and used + own - _shared(queries[index - 1], query) > most:
            yield start, index
            start, used = index, 0
        used += own - (_shared(queries[index - 1], query) if index > start else 0)
    if queries:
        yield start, len(queries)


def _shared(one: ModelQuery, other: ModelQuery) -> int:
    """Tokens that the second of two queries in order need not compute."""
    if stack_key(one) != stack_key(other):
        return 0
    common = _common(one.prompt[:-1], other.prompt[:-1])
    return common if common >= MIN_SHARED else 0


def _common(one: Tokens, other: Tokens) -> int:
    """Tokens that two texts begin with."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most


def grow(queries: Sequence[ModelQuery], trees: Sequence[LabelTree]) -> QueryTree:
    """Lays queries out, stack by stack.

    Args:
        queries: `in_order`.
        trees: Of their labels.
    """
    builder = _Builder()
    members = [_Member(query.prompt, tree) for query, tree in zip(queries, trees, strict=True)]
    owners = [stack_key(query) for query in queries]
    for _, own in groupby(range(len(queries)), key=lambda index: owners[index]):
        builder.add_stack([members[index] for index in own])
    return builder.tree()


@dataclass(frozen=True)
class _Member:
    """One query of a tree; its stem is the prompt without the last token, the labels' root."""

    prompt: Tokens
    labels: LabelTree

    @property
    def stem(self) -> Tokens:
        return self.prompt[:-1]

    def next(self, depth: int) -> int:
        """The token of the stem at a depth; -1 where it has ended."""
        return int(self.prompt[depth]) if depth < len(self.prompt) - 1 else -1


class _Builder:
    """Collects the tokens of one stack after another."""

    def __init__(self) -> None:
        self._end = self._outputs = 0
        self._tokens: list[Tokens] = []
        self._positions: list[Indices] = []
        self._starts: list[int] = []
        self._output_starts: list[int] = []
        self._roots: list[int] = []
        self._asking: list[Range] = []
        self._texts: list[tuple[Range, ...]] = []
        self._spans: list[Span] = []
        self._last: list[Span] = []

    def add_stack(self, members: Sequence[_Member]) -> None:
        """Adds the queries of one stack of adapters."""
        self._starts.append(self._end)
        self._output_starts.append(self._outputs)
        self._grow(members, 0, ())

    def _grow(self, members: Sequence[_Member], depth: int, before: tuple[Range, ...]) -> None:
        """Adds queries in order that have their first `depth` tokens, at `before`, in common."""
        shared = _common(members[0].stem, members[-1].stem)
        if len(members) > 1 and shared - depth >= MIN_SHARED:
            before = self._stem(members[0].stem[depth:shared], depth, before)
            depth = shared
        for token, group in groupby(members, key=lambda member: member.next(shared)):
            alike = list(group)
            if token >= 0 and len(alike) > 1:
                self._grow(alike, depth, before)
                continue
            for member in alike:
                self._leaf(member, depth, before)

    def _stem(self, tokens: Tokens, depth: int, before: tuple[Range, ...]) -> tuple[Range, ...]:
        """Adds a stretch of text that queries share; returns where it and what precedes it are."""
        start = self._take(tokens, depth + np.arange(len(tokens)))
        return self._attend(start, before, np.tri(len(tokens), dtype=bool))

    def _leaf(self, member: _Member, depth: int, before: tuple[Range, ...]) -> None:
        """Adds the rest of a prompt and its labels."""
        tree, own = member.labels, member.prompt[depth:]
        stem, end = len(own) - 1, len(member.prompt) - 1 + tree.depths
        positions = np.concatenate([depth + np.arange(stem), end])
        start = self._take(np.concatenate([own, tree.tokens]), positions)
        sees = np.tri(len(positions), dtype=bool)
        sees[stem:, stem:] = tree.sees
        keys = self._attend(start, before, sees)
        first, size = self._outputs, len(tree.depths)
        everything = np.concatenate([np.arange(depth), positions])
        self._last.append(Span((first, first + size), keys, everything, tree.sees))
        self._asking.append((start + stem, self._end))
        self._texts.append(_joined(before, (start, start + stem + 1)))
        self._roots.append(first)
        self._outputs += size

    def _attend(
        self, start: int, before: tuple[Range, ...], sees: NDArray[np.bool_]
    ) -> tuple[Range, ...]:
        """Cuts what begins at `start` into spans of similar size; returns all places of its text."""
        size = self._end - start
        depth = sum(end - begin for begin, end in before)
        positions = np.concatenate([np.arange(depth), *self._positions[-1:]])
        for first, last in pairwise(np.linspace(0, size, -(-size // MAX_QUERIES) + 1, dtype=int)):
            self._spans.append(
                Span(
                    queries=(start + first, start + last),
                    keys=_joined(before, (start, start + last)),
                    positions=positions[: depth + last],
                    sees=sees[first:last, :last],
                )
            )
        return _joined(before, (start, self._end))

    def _take(self, tokens: Tokens, positions: Indices) -> int:
        start = self._end
        self._tokens.append(tokens)
        self._positions.append(positions)
        self._end += len(tokens)
        return start

    def tree(self) -> QueryTree:
        """The pass over all that was added."""
        return QueryTree(
            tokens=np.concatenate(self._tokens).astype(np.int64),
            positions=np.concatenate(self._positions),
            outputs=np.concatenate([np.arange(*places) for places in self._asking]),
            starts=np.array([*self._starts, self._end]),
            output_starts=np.array([*self._output_starts, self._outputs]),
            roots=np.array(self._roots),
            texts=tuple(self._texts),
            spans=tuple(self._spans),
            last=tuple(self._last),
        )


def _joined(before: tuple[Range, ...], after: Range) -> tuple[Range, ...]:
    """Places in order; those that lie back to back are one range, which is read without a copy."""
    if after[0] == after[1]:
        return before
    if before and before[-1][1] == after[0]:
        return (*before[:-1], (before[-1][0], after[1]))
    return (*before, after)
