"""BM25 over one user's history: one retriever for training, evaluation and the daemon.

Causal: the ranking for item i sees the items before i only, with the statistics (idf, average
length) of those items only, as if an index were built for each prefix. `CausalIndex` does that in
one pass over shared postings, and gives the same numbers bit for bit.

Score of a document d of a prefix of N documents, summed over the words t of the query, a repeated
word counting each time (Robertson and Zaragoza 2009, with the idf of Lucene, which is positive
even for one or two documents):

    log(1 + (N - n_t + .5) / (n_t + .5)) * f * (k1 + 1) / (f + k1 * (1 - b + b * |d| / average))

where n_t documents of the prefix hold t, and d holds it f times. Words are the maximal runs of
letters, digits and underscores of the lower-cased text; there is no stemming and no stop list.

Ties, items without any word of the query among them, are broken by recency: the newer item first.
So top-k always has min(k, N) items.

What makes it fast (`simulations/benchmarks/retrieval.py`): the postings of a word in a prefix are
the first ones of all its postings, so nothing is rebuilt, and queries are scored many at a time,
so that no Python runs for a word or a document.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import RetrieverSettings
from fedoppu.common.errors import UsageError

Indices = NDArray[np.int64]
Reals = NDArray[np.float64]

_WORD = re.compile(r"\w+")
# postings and scores of a block of queries: few enough to stay in the cache
BLOCK = 65_536
# up to so many of the best are found one after another, which is faster than sorting
FEW = 16


def words(text: str) -> list[str]:
    """Lower-cased words of a text, in order."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class _Counted:
    """How often each text holds each word; by text, and then in the order of the words' numbers.

    Attributes:
        rows: (entries,) number of the text.
        terms: (entries,) number of the word.
        counts: (entries,) how often, at least once.
    """

    rows: Indices = field(repr=False)
    terms: Indices = field(repr=False)
    counts: Indices = field(repr=False)


@dataclass(frozen=True)
class _Lookups:
    """The words of queries that some document holds which the query may see.

    Attributes:
        starts: (queries + 1,) first lookup of each query, and their number.
        postings: (lookups,) first posting of the word.
        found: (lookups,) number of its postings that the query sees, at least one.
        weights: (lookups,) idf times the word's repetitions in the query.
    """

    starts: Indices = field(repr=False)
    postings: Indices = field(repr=False)
    found: Indices = field(repr=False)
    weights: Reals = field(repr=False)


class CausalIndex:
    """An index of documents in the order of time; immutable.

    Memory is one posting (32 bytes) for each different word of each document, and the texts.
    """

    def __init__(self, documents: Sequence[str], settings: RetrieverSettings) -> None:
        """Builds the postings.

        Args:
            documents: Texts, oldest first; any number, empty texts included.
            settings: k1 and b.
        """
        self._settings = settings
        self._texts = list(documents)
        split = [words(document) for document in documents]
        self._terms = {word: number for number, word in enumerate(_distinct(split))}
        self._lengths = np.array([len(text) for text in split], np.float64)
        self._total_length = np.concatenate([[0.0], np.cumsum(self._lengths)])
        self._counted = self._count(split)
        self._build_postings()

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._texts)

    def _count(self, split: Sequence[Sequence[str]]) -> _Counted:
        """Counts known words; the others cannot match."""
        number = self._terms.get
        terms = np.array([number(word, -1) for text in split for word in text], np.int64)
        rows = np.repeat(np.arange(len(split)), [len(text) for text in split])
        width = max(1, len(self._terms))
        entries, counts = np.unique((rows * width + terms)[terms >= 0], return_counts=True)
        return _Counted(*np.divmod(entries, width), counts)

    def _build_postings(self) -> None:
        """Postings sorted by (term, document): those of a term in a prefix are its first ones."""
        counted, k1, b = self._counted, self._settings.k1, self._settings.b
        keys = counted.terms * len(self) + counted.rows
        order = np.argsort(keys)
        self._keys, self._documents = keys[order], counted.rows[order]
        held = np.bincount(counted.terms, minlength=len(self._terms))
        self._start = np.cumsum(held) - held
        frequencies, lengths = counted.counts[order], self._lengths[self._documents]
        # a gain is peak / (flat + long / average): only the average depends on the prefix
        self._peak = frequencies * (k1 + 1)
        self._flat = frequencies + k1 * (1 - b)
        self._long = k1 * b * lengths

    def top_k(self, query: str, k: int) -> tuple[int, ...]:
        """The k best documents of all, the best first.

        Args:
            query: Any text.
            k: At least 0.

        Returns:
            min(k, number of documents) positions.

        Raises:
            UsageError: k is negative.
        """
        _check(k)
        return _best(self.scores(query)[None], k)[0]

    def scores(self, query: str) -> Reals:
        """Scores of all documents, (num_documents,) float64, at least 0."""
        sizes = np.array([len(self)])
        (block,) = self._scores(self._count([words(query)]), sizes)
        scores: Reals = block[0]
        return scores

    def causal_top_k(self, queries: Sequence[str], k: int) -> list[tuple[int, ...]]:
        """For each document i the k best documents before i for its own query.

        Args:
            queries: (num_documents,) texts: what document i is looked up with.
            k: At least 0.

        Returns:
            (num_documents,) tuples of min(k, i) positions, each less than i.

        Raises:
            UsageError: k is negative, or there is not one query for each document.
        """
        _check(k)
        return [best for block in self._causal_blocks(queries) for best in _best(block, k)]

    def causal_scores(self, queries: Sequence[str]) -> list[Reals]:
        """For each document i the (i,) scores of the documents before it, for its own query.

        Raises:
            UsageError: There is not one query for each document.
        """
        rows = chain.from_iterable(self._causal_blocks(queries))
        return [scores[:size] for size, scores in enumerate(rows)]

    def _causal_blocks(self, queries: Sequence[str]) -> Iterator[Reals]:
        if len(queries) != len(self):
            raise UsageError(
                f"there must be {len(self)} queries, one a document, got {len(queries)}"
            )
        alike = list(queries) == self._texts  # most tasks look an item up with its own text
        counted = self._counted if alike else self._count([words(query) for query in queries])
        yield from self._scores(counted, np.arange(len(self)))

    def _scores(self, queries: _Counted, sizes: Indices) -> Iterator[Reals]:
        """Scores of blocks of queries that follow each other.

        Args:
            queries: Their words.
            sizes: (queries,) ascending: query q sees the first sizes[q] documents.

        Yields:
            (queries of a block, size of the last one) scores; -1 where a query does not see.
        """
        lookups = self._look_up(queries, sizes)
        costs = np.cumsum(sizes) + _sums(lookups.found, lookups.starts)
        start = 0
        while start < len(sizes):
            spent = costs[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(costs, spent + BLOCK, side="right")))
            yield self._score_block(lookups, sizes, slice(start, end))
            start = end

    def _look_up(self, queries: _Counted, sizes: Indices) -> _Lookups:
        first, seen = self._start[queries.terms], sizes[queries.rows]
        found = np.searchsorted(self._keys, queries.terms * len(self) + seen) - first
        kept = found > 0
        rows, first, seen, found = queries.rows[kept], first[kept], seen[kept], found[kept]
        idf: Reals = np.log1p((seen - found + 0.5) / (found + 0.5))
        starts = np.searchsorted(rows, np.arange(len(sizes) + 1))
        return _Lookups(starts, first, found, idf * queries.counts[kept])

    def _score_block(self, lookups: _Lookups, sizes: Indices, block: slice) -> Reals:
        """Sums run in the order of the words' numbers: equal documents get equal bits."""
        seen = sizes[block]
        bounds = lookups.starts[block.start : block.stop + 1]
        part = slice(bounds[0], bounds[-1])
        found, weights = lookups.found[part], lookups.weights[part]
        rows = np.repeat(np.arange(len(seen)), np.diff(bounds))
        offsets = np.cumsum(found) - found
        at = np.repeat(lookups.postings[part] - offsets, found)
        at += np.arange(len(at))
        # documents without words are in no posting, so where there is one the average is not 0
        inverse = seen / np.maximum(self._total_length[seen], 1.0)
        gains = np.repeat(inverse[rows], found)
        gains *= self._long[at]
        gains += self._flat[at]
        np.divide(self._peak[at], gains, out=gains)
        gains *= np.repeat(weights, found)
        cells = np.repeat(rows * seen[-1], found)
        cells += self._documents[at]
        sums = np.bincount(cells, weights=gains, minlength=len(seen) * seen[-1])
        scores: Reals = sums.astype(np.float64, copy=False).reshape(len(seen), -1)
        scores[np.arange(seen[-1]) >= seen[:, None]] = -1.0
        return scores


def _distinct(split: Sequence[Sequence[str]]) -> dict[str, None]:
    return dict.fromkeys(chain.from_iterable(split))


def _sums(values: Indices, starts: Indices) -> Indices:
    """(parts,) sums of all values up to the end of each part."""
    return np.concatenate([[0], np.cumsum(values)])[starts[1:]]


def _check(k: int) -> None:
    if k < 0:
        raise UsageError(f"k must be at least 0, got {k}")


def _best(scores: Reals, k: int) -> list[tuple[int, ...]]:
    """For each row the positions of its k highest scores, the newer first among equal ones.

    Args:
        scores: (rows, documents), -1 where a row does not see the document.
        k: At least 0.

    Returns:
        (rows,) tuples of at most k positions.
    """
    seen = np.minimum((scores >= 0).sum(1), k)
    newest_first = scores[:, ::-1].copy()
    if k <= FEW:
        order = _one_by_one(newest_first, int(seen.max(initial=0)))
    else:
        order = np.argsort(-newest_first, axis=1, kind="stable")
    positions = (scores.shape[1] - 1 - order).tolist()
    return [tuple(row[:count]) for row, count in zip(positions, seen.tolist(), strict=True)]


def _one_by_one(scores: Reals, k: int) -> Indices:
    """(rows, k) positions of the highest scores, the first of equal ones; overwrites them."""
    order = np.zeros((len(scores), k), np.int64)
    rows = np.arange(len(scores))
    for place in range(k):
        order[:, place] = scores.argmax(1)
        scores[rows, order[:, place]] = -1.0
    return order
