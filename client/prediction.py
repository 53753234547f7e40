"""The predictor: label log-likelihoods and greedy answers for mixed users in one batch.

Queries whose stacks have the same specs share a pass, whoever's adapters they are (`inference` says
how). Scores are exact: each is the sum over all tokens of a label. The same queries in the same order
give the same bytes; another set of queries may change how products are rounded: of labels with 28
nats, by at most 6e-6 in float32 and .11 in bfloat16, where 99 of 100 moved by less than .06.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.batches import check_tokens
from fedoppu.client.inference import Inference, Inferences
from fedoppu.client.jobs import ModelQuery
from fedoppu.client.model import LoadedBase
from fedoppu.client.multi_lora import check_stack
from fedoppu.client.virtual_tokens import query_after_virtual
from fedoppu.common.adapters import Adapter, Spec
from fedoppu.common.config import require
from fedoppu.common.errors import DataError, UsageError

# queries that are laid out together: answers come in the order of the queries
WINDOW = 512

T = TypeVar("T")


class BatchedPredictor:
    """Answers queries of many users on one frozen base; a `jobs.Predictor`."""

    def __init__(self, base: LoadedBase, *, batch_tokens: int | None = None) -> None:
        """Answer with `base`, which is never changed.

        Args:
            base: A loaded base, shared with whoever else uses it.
            batch_tokens: Most tokens of one pass, padding included, and of what answers keep of
                their texts; bounds the memory. None for what suits the base.

        Raises:
            UsageError: `batch_tokens` is smaller than 1.
        """
        if batch_tokens is not None:
            require("batch_tokens", batch_tokens, 1)
        self._base = base
        self._inferences = Inferences(base, batch_tokens)

    def score(self, queries: Sequence[ModelQuery]) -> Iterator[NDArray[np.float64]]:
        """For each query the (num_labels,) log-likelihoods of its labels, nats, in order.

        Raises:
            AdapterError: An adapter does not fit the base or the adapter under it.
            DataError: A query has no labels, or a prompt or label that the base cannot take.
        """
        for window in self._windows(queries):
            for query in window:
                self._check_labels(query)
            yield from self._answered(window, lambda inference, part: inference.score(part))

    def generate(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, ...]]:
        """For each query the greedy answer's token ids, without the end token, in order.

        Raises:
            AdapterError: An adapter does not fit the base or the adapter under it.
            DataError: A prompt with its answer is longer than the base can take.
        """
        for window in self._windows(queries):
            for query in window:
                self._check_answer(query)
            yield from self._answered(window, lambda inference, part: inference.generate(part))

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

    def _answered(
        self,
        window: Sequence[ModelQuery],
        answer: Callable[[Inference, Sequence[ModelQuery]], Iterator[tuple[int, T]]],
    ) -> Iterator[T]:
        """The answers of a window, in its order."""
        alike: dict[tuple[Spec, ...], list[int]] = {}
        for index, query in enumerate(window):
            alike.setdefault(tuple(a.spec for a in query.adapters), []).append(index)
        answers: dict[int, T] = {}
        for specs, members in alike.items():
            part = [window[index] for index in members]
            found = answer(self._inferences.of(specs), part)
            answers.update((members[index], value) for index, value in found)
        yield from (answers[index] for index in range(len(window)))

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
