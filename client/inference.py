"""The seam between the predictor and how a base answers: the fast path or the generic one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.batches import MAX_TOKENS, split_by_length
from fedoppu.client.engine import takes_fast_path
from fedoppu.client.generation import generate_batch
from fedoppu.client.jobs import ModelQuery
from fedoppu.client.label_scores import input_length, score_batch
from fedoppu.client.llama import LlamaEngine
from fedoppu.client.llama_inference import LlamaInference
from fedoppu.client.model import LoadedBase
from fedoppu.common.adapters import Spec

T = TypeVar("T")


class Inference(Protocol):
    """How a base answers queries whose stacks of adapters have the same specs, in any order."""

    def score(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Of each query its index and the (num_labels,) log-likelihoods of its labels, nats."""

    def generate(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Of each query its index and the tokens of its greedy answer, without the end token."""


class Inferences:
    """The ways in which one base answers, each made once."""

    def __init__(self, base: LoadedBase, batch_tokens: int | None) -> None:
        """Answer with `base`, which is never changed.

        Args:
            base: The base.
            batch_tokens: Most tokens of one pass; None for what suits the path.
        """
        self._base = base
        self._generic = GenericInference(base, batch_tokens or MAX_TOKENS)
        self._fast = (
            LlamaInference(
                LlamaEngine(base.model), eos=base.tokenizer.eos, batch_tokens=batch_tokens
            )
            if takes_fast_path(base, ())
            else None
        )

    def of(self, stack: Sequence[Spec]) -> Inference:
        """The fastest way that takes a stack of adapters."""
        fast = self._fast if takes_fast_path(self._base, stack) else None
        return fast or self._generic


class GenericInference:
    """Any transformers causal LM: padded rows, adapters added by hooks."""

    def __init__(self, base: LoadedBase, batch_tokens: int) -> None:
        """Answer with `base` in batches of at most `batch_tokens` tokens, padding included."""
        self._base = base
        self._batch_tokens = batch_tokens

    def score(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Queries of similar length share a batch."""
        return self._in_batches(score_batch, queries, [input_length(query) for query in queries])

    def generate(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Queries of similar length share a batch."""
        lengths = [len(query.prompt) + query.max_tokens for query in queries]
        return self._in_batches(generate_batch, queries, lengths)

    def _in_batches(
        self,
        answer: Callable[[LoadedBase, Sequence[ModelQuery]], list[T]],
        queries: Sequence[ModelQuery],
        lengths: Sequence[int],
    ) -> Iterator[tuple[int, T]]:
        for batch in split_by_length(lengths, max_tokens=self._batch_tokens):
            found = answer(self._base, [queries[index] for index in batch])
            yield from zip(batch, found, strict=True)
