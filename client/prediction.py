"""The predictor: label log-likelihoods and greedy answers for mixed users in one batch.

Queries whose stacks have the same specs share a pass, whoever's adapters they are; rows are sorted
by length, so that little is padded. Scores are exact: each is the sum over all tokens of a label.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.batches import MAX_TOKENS, check_tokens, split_by_length
from fedoppu.client.generation import generate_batch
from fedoppu.client.jobs import ModelQuery
from fedoppu.client.label_scores import input_length, score_batch
from fedoppu.client.model import LoadedBase
from fedoppu.client.multi_lora import check_stack
from fedoppu.client.virtual_tokens import query_after_virtual
from fedoppu.common.adapters import Adapter, Spec
from fedoppu.common.config import require
from fedoppu.common.errors import DataError, UsageError

# queries that are sorted by length together: answers come in the order of the queries
WINDOW = 512


class BatchedPredictor:
    """Answers queries of many users on one frozen base; a `jobs.Predictor`."""

    def __init__(self, base: LoadedBase, *, batch_tokens: int = MAX_TOKENS) -> None:
        """Answer with `base`, which is never changed.

        Args:
            base: A loaded base, shared with whoever else uses it.
            batch_tokens: Most tokens of one pass, padding included; bounds the memory.

        Raises:
            UsageError: `batch_tokens` is smaller than 1.
        """
        require("batch_tokens", batch_tokens, 1)
        self._base = base
        self._batch_tokens = batch_tokens

    def score(self, queries: Sequence[ModelQuery]) -> Iterator[NDArray[np.float64]]:
        """For each query the (num_labels,) log-likelihoods of its labels, nats, in order.

        Raises:
            AdapterError: An adapter does not fit the base or the adapter under it.
            DataError: A query has no labels, or a prompt or label that the base cannot take.
        """
        for window in self._windows(queries):
            for query in window:
                self._check_labels(query)
            lengths = [input_length(query) for query in window]
            scores: dict[int, NDArray[np.float64]] = {}
            for batch in self._batches(window, lengths):
                found = score_batch(self._base, [window[index] for index in batch])
                scores.update(zip(batch, found, strict=True))
            yield from (scores[index] for index in range(len(window)))

    def generate(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, ...]]:
        """For each query the greedy answer's token ids, without the end token, in order.

        Raises:
            AdapterError: An adapter does not fit the base or the adapter under it.
            DataError: A prompt with its answer is longer than the base can take.
        """
        for window in self._windows(queries):
            for query in window:
                self._check_answer(query)
            lengths = [len(query.prompt) + query.max_tokens for query in window]
            answers: dict[int, tuple[int, ...]] = {}
            for batch in self._batches(window, lengths):
                found = generate_batch(self._base, [window[index] for index in batch])
                answers.update(zip(batch, found, strict=True))
            yield from (answers[index] for index in range(len(window)))

    def _windows(self, queries: Sequence[ModelQuery]) -> Iterator[Sequence[ModelQuery]]:
        checked: dict[tuple[int, ...], tuple[Adapter, ...]] = {}
        for start in range(0, len(queries), WINDOW):
            window = queries[start : start + WINDOW]
            for query in window:
                key = tuple(id(adapter) for adapter in query.adapters)
                if key not in checked:  # holding the stack keeps its ids from being used again
                    check_stack(query.adapters, self._base.facts.hash)
                    checked[key] = query.adapters
                self._check(f"the prompt of query {query.id}", query.prompt)
            yield [query_after_virtual(query) for query in window]

    def _batches(self, window: Sequence[ModelQuery], lengths: Sequence[int]) -> Iterator[list[int]]:
        alike: dict[tuple[Spec, ...], list[int]] = {}
        for index, query in enumerate(window):
            alike.setdefault(tuple(a.spec for a in query.adapters), []).append(index)
        for members in alike.values():
            chosen = [lengths[index] for index in members]
            for batch in split_by_length(chosen, max_tokens=self._batch_tokens):
                yield [members[index] for index in batch]

    def _check(self, name: str, tokens: NDArray[np.int32]) -> None:
        limit = self._base.facts.max_tokens
        check_tokens(name, tokens, vocab=self._base.vocab_size, max_tokens=limit)

    def _check_labels(self, query: ModelQuery) -> None:
        if not query.labels:
            raise DataError(f"query {query.id} has no labels to score")
        for index, label in enumerate(query.labels):
            self._check(f"label {index} of query {query.id}", label)
        self._check_length(query, max(len(label) for label in query.labels))

    def _check_answer(self, query: ModelQuery) -> None:
        if query.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, got {query.max_tokens}")
        self._check_length(query, query.max_tokens)

    def _check_length(self, query: ModelQuery, answer: int) -> None:
        limit = self._base.facts.max_tokens
        if len(query.prompt) + answer > limit:
            raise DataError(
                f"query {query.id} has {len(query.prompt)} tokens and an answer of {answer};"
                f" the base takes {limit}",
                hint="lower prompt.text_tokens, prompt.retrieved_tokens, k or answer_tokens",
            )
