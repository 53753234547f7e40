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
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import RetrieverSettings
from fedoppu.common.errors import UsageError

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-cased words of a text, in order."""
    return _WORD.findall(text.lower())


class CausalIndex:
    """An index of documents in the order of time; immutable.

    Memory is one posting (16 bytes) for each different word of each document.
    """

    def __init__(self, documents: Sequence[str], settings: RetrieverSettings) -> None:
        """Builds the postings.

        Args:
            documents: Texts, oldest first; any number, empty texts included.
            settings: k1 and b.
        """
        self._settings = settings
        counts = [Counter(words(document)) for document in documents]
        self._terms: dict[str, int] = {}
        for count in counts:
            for word in count:
                self._terms.setdefault(word, len(self._terms))
        self._doc_terms = [_ids(self._terms, count) for count in counts]
        self._lengths = np.array([count.total() for count in counts], dtype=np.float64)
        self._total_length = np.concatenate([[0.0], np.cumsum(self._lengths)])
        self._build_postings(counts)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._lengths)

    def _build_postings(self, counts: Sequence[Counter[str]]) -> None:
        """Postings sorted by (term, document): those of a term in a prefix are contiguous."""
        terms = np.concatenate([np.zeros(0, np.int64), *self._doc_terms])
        sizes = [len(ids) for ids in self._doc_terms]
        documents = np.repeat(np.arange(len(counts), dtype=np.int64), sizes)
        frequencies = np.array([f for count in counts for f in count.values()], dtype=np.float64)
        order = np.argsort(terms, kind="stable")
        self._documents = documents[order]
        self._frequencies = frequencies[order]
        self._frequency = np.bincount(terms, minlength=len(self._terms))
        self._start = np.cumsum(self._frequency) - self._frequency

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
        return _best(self.scores(query), k) if k else ()

    def scores(self, query: str) -> NDArray[np.float64]:
        """Scores of all documents, (num_documents,) float64, at least 0."""
        return self._scores(self._known(query), len(self), self._frequency)

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
        if k == 0:
            self._check_queries(queries)
            return [()] * len(self)
        return [_best(scores, k) for scores in self.causal_scores(queries)]

    def causal_scores(self, queries: Sequence[str]) -> list[NDArray[np.float64]]:
        """For each document i the (i,) scores of the documents before it, for its own query.

        Raises:
            UsageError: There is not one query for each document.
        """
        self._check_queries(queries)
        frequency = np.zeros_like(self._frequency)  # of each term in the documents before i
        results = []
        for i, query in enumerate(queries):
            results.append(self._scores(self._known(query), i, frequency))
            frequency[self._doc_terms[i]] += 1
        return results

    def _check_queries(self, queries: Sequence[str]) -> None:
        if len(queries) != len(self):
            raise UsageError(
                f"there must be {len(self)} queries, one a document, got {len(queries)}"
            )

    def _known(self, query: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids and counts of those words of the query that some document holds, in their order."""
        count = Counter(word for word in words(query) if word in self._terms)
        return _ids(self._terms, count), np.array(list(count.values()), dtype=np.float64)

    def _scores(
        self,
        query: tuple[NDArray[np.int64], NDArray[np.float64]],
        size: int,
        frequency: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Scores of the first `size` documents; `frequency` counts them by term.

        Sums run in the order of the query's words, so that equal documents get equal bits.
        """
        terms, repeats = query
        found = frequency[terms]
        terms, repeats, found = terms[found > 0], repeats[found > 0], found[found > 0]
        if not len(terms):
            return np.zeros(size)
        weights = repeats * np.log1p((size - found + 0.5) / (found + 0.5))
        offsets = np.cumsum(found) - found
        at = np.arange(found.sum()) + np.repeat(self._start[terms] - offsets, found)
        documents, f = self._documents[at], self._frequencies[at]
        k1, b = self._settings.k1, self._settings.b
        average = self._total_length[size] / size
        norms = k1 * (1 - b + b * self._lengths[:size] / average)
        gains = np.repeat(weights, found) * (f * (k1 + 1) / (f + norms[documents]))
        return np.bincount(documents, weights=gains, minlength=size).astype(np.float64, copy=False)


def _ids(terms: dict[str, int], count: Counter[str]) -> NDArray[np.int64]:
    return np.fromiter((terms[word] for word in count), dtype=np.int64, count=len(count))


def _check(k: int) -> None:
    if k < 0:
        raise UsageError(f"k must be at least 0, got {k}")


def _best(scores: NDArray[np.float64], k: int) -> tuple[int, ...]:
    """Positions of the k highest scores, the highest first, the newer first among equal ones."""
    newest_first = -scores[::-1]
    if k < len(scores):
        bound = np.partition(newest_first, k - 1)[k - 1]
        candidates = np.flatnonzero(newest_first <= bound)
    else:
        candidates = np.arange(len(scores))
    order = candidates[np.argsort(newest_first[candidates], kind="stable")][:k]
    return tuple((len(scores) - 1 - order).tolist())
