"""Label scores and greedy answers on a Llama-shaped base: the fast path of the predictor.

What makes it fast, each exact:

1. Queries lie back to back as trees (`llama_tree`): what the prompts of one stack of adapters begin
   with is computed once, each prompt once for all of its labels, and what labels begin with once.
2. In the last layer only tokens at which something is predicted ask and go through the MLP. Logits
   are computed there alone, a few rows at a time; a label's token costs one of them and one sum.
3. Attention without padding or gradients, span by span (`llama_spans`).
4. Answers go on from the prompts' keys and values; what has ended costs nothing more
   (`llama_decoding`).

Queries in one pass do not see each other, but the rounding of products depends on how many rows
they have: with other batch mates a score differs by that (`prediction` has figures).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoppu.client.batches import split_by_length
from fedoppu.client.devices import as_array, on_device
from fedoppu.client.jobs import ModelQuery
from fedoppu.client.llama import Attend, LlamaEngine
from fedoppu.client.llama_adapters import PackedAdapters
from fedoppu.client.llama_decoding import Decoder, cache_tokens
from fedoppu.client.llama_spans import SpanAttention
from fedoppu.client.llama_tree import LabelTree, QueryTree, grow, in_order, split_queries, stack_key
from fedoppu.client.multi_lora import only_lora, stack_levels

# tokens of a pass: with 4096 house took 25 ms a query, 27 with 2048, 25 with 8192
PASS_TOKENS = 4096
# logits that are held at once
LOGITS = 1 << 21


class LlamaInference:
    """Answers queries on one Llama-shaped base; an `inference.Inference`."""

    def __init__(self, engine: LlamaEngine, *, eos: int, batch_tokens: int | None) -> None:
        """Answer with the base of an engine.

        Args:
            engine: Computes.
            eos: Token that ends an answer.
            batch_tokens: Most tokens of one pass and of one cache; None for what suits the base.
        """
        self._engine = engine
        self._eos = eos
        self._pass_tokens = batch_tokens or PASS_TOKENS
        self._cache_tokens = batch_tokens or cache_tokens(engine)

    def score(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Passes over queries that begin alike; see `inference.Inference`."""
        order = in_order(queries)
        ordered = [queries[index] for index in order]
        trees = _label_trees(ordered)
        for start, end in split_queries(ordered, trees, self._pass_tokens):
            found = self._score(ordered[start:end], trees[start:end])
            yield from zip(order[start:end], found, strict=True)

    def generate(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Batches of similar length; see `inference.Inference`."""
        lengths = [len(query.prompt) + query.max_tokens - 1 for query in queries]
        for batch in split_by_length(
            lengths, pass_cost=self._cache_tokens // 4, max_tokens=self._cache_tokens
        ):
            chosen = [queries[index] for index in batch]
            order = in_order(chosen)
            answers = self._generate([chosen[index] for index in order])
            yield from zip([batch[index] for index in order], answers, strict=True)

    def _score(
        self, queries: Sequence[ModelQuery], trees: Sequence[LabelTree]
    ) -> list[NDArray[np.float64]]:
        laid = grow(queries, trees)
        pairs = list(zip(laid.roots, trees, strict=True))
        sources = np.concatenate([root + tree.sources for root, tree in pairs])
        targets = np.concatenate([tree.targets for tree in trees])
        with torch.no_grad():
            hidden = self._hidden(laid, queries, self._attention(laid))
            found = self._log_likelihoods(hidden, sources, targets)
        ends = np.cumsum([len(tree.sources) for tree in trees])[:-1]
        return [
            np.bincount(tree.labels, weights=part, minlength=len(query.labels)).astype(np.float64)
            for tree, part, query in zip(trees, np.split(found, ends), queries, strict=True)
        ]

    def _generate(self, queries: Sequence[ModelQuery]) -> list[tuple[int, ...]]:
        """The answers of queries in order, which share a cache."""
        decoder = Decoder(self._engine, queries, eos=self._eos)
        trees = [LabelTree.of(())] * len(queries)
        with torch.no_grad():
            for start, end in split_queries(queries, trees, self._pass_tokens):
                part = queries[start:end]
                laid = grow(part, trees[start:end])
                attend = decoder.cache.filled_by(self._attention(laid), start, laid.texts)
                decoder.begin(self._engine.logits(self._hidden(laid, part, attend)).argmax(-1))
            return decoder.finish()

    def _attention(self, laid: QueryTree) -> Attend:
        engine = self._engine
        return SpanAttention.of(
            laid, layers=engine.layers, window=engine.heads.window, like=engine.embeddings
        )

    def _hidden(self, laid: QueryTree, queries: Sequence[ModelQuery], attend: Attend) -> Tensor:
        """(outputs, width) what the output head reads."""
        stacks = {stack_key(query): query.adapters for query in queries}
        levels = only_lora(stack_levels(list(stacks.values()), self._engine.embeddings.device))
        everywhere = PackedAdapters(levels, laid.starts)
        outputs = on_device(laid.outputs, self._engine.embeddings.device)
        asking = everywhere.at(outputs, laid.output_starts)
        return self._engine.hidden(laid, (everywhere, asking), attend)

    def _log_likelihoods(
        self, hidden: Tensor, sources: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(label tokens,) log-likelihoods, nats: each target's at its row of `hidden`."""
        found = np.empty(len(sources))
        order = np.argsort(sources, kind="stable")
        rows = max(1, LOGITS // len(self._engine.embeddings))
        for start in range(0, len(hidden), rows):
            logits = self._engine.logits(hidden[start : start + rows])
            first, last = np.searchsorted(sources[order], [start, start + rows])
            here = order[first:last]
            at, chosen = (
                on_device(places, logits.device)
                for places in (sources[here] - start, targets[here])
            )
            found[here] = as_array((logits[at, chosen] - torch.logsumexp(logits, -1)[at]).double())
        return found


def _label_trees(queries: Sequence[ModelQuery]) -> list[LabelTree]:
    """Of each query; those with the same labels share one."""
    trees: dict[tuple[bytes, ...], LabelTree] = {}
    found = []
    for query in queries:
        key = tuple(label.tobytes() for label in query.labels)
        if key not in trees:
            trees[key] = LabelTree.of(query.labels)
        found.append(trees[key])
    return found
