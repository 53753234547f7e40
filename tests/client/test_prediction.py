"""Scores and answers of mixed users equal those of each query alone on a merged model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fedoppu.client.jobs import ModelQuery, Tokens
from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.client.prediction import BatchedPredictor
from fedoppu.common.adapters import Adapter
from fedoppu.common.errors import AdapterError, DataError, UsageError
from tests.client.engine import merged, random_adapter, random_tokens, row, snapshot, spec_of


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> LoadedBase:
    return load_base(resolve_base(str(tiny_base)))


@pytest.fixture(scope="module")
def queries(base: LoadedBase) -> list[ModelQuery]:
    """Of users with and without adapters, with labels of 1 to 5 tokens that share beginnings."""
    shared = random_adapter(spec_of(base, "all-linear"), 1)
    spec = spec_of(base, "q_proj", "v_proj", rank=2, alpha=2.0)
    own = [random_adapter(spec, seed, shared.digest()) for seed in (2, 3, 4)]
    stacks: list[tuple[Adapter, ...]] = [(), (shared,), *((shared, adapter) for adapter in own)]
    draw = np.random.default_rng(0)
    return [
        ModelQuery(
            id=f"query{index}",
            prompt=random_tokens(draw, int(draw.integers(1, 40))),
            adapters=stacks[index % len(stacks)],
            labels=some_labels(draw),
            max_tokens=int(draw.integers(1, 12)),
        )
        for index in range(23)
    ]


def some_labels(draw: np.random.Generator) -> tuple[Tokens, ...]:
    first = random_tokens(draw, 5)
    others = [random_tokens(draw, int(draw.integers(1, 6))) for _ in range(4)]
    return (first, np.append(first[:3], 7).astype(np.int32), first[:1], *others)


def naive_scores(model: PreTrainedModel, query: ModelQuery) -> NDArray[np.float64]:
    found = []
    for label in query.labels:
        with torch.no_grad():
            logits = model(row(query.prompt, label)).logits[0, len(query.prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1)[torch.arange(len(label)), label.astype(np.int64)]
        found.append(float(chosen.double().sum()))
    return np.array(found)


def naive_answer(base: LoadedBase, query: ModelQuery) -> tuple[int, ...]:
    model = merged(base, query.adapters)
    tokens = row(query.prompt)
    output = cast(Any, model).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=query.max_tokens,
        do_sample=False,
    )
    return until_end(output[0, len(query.prompt) :].tolist(), base.tokenizer.eos)


def until_end(tokens: list[int], eos: int) -> tuple[int, ...]:
    return tuple(tokens[: tokens.index(eos)] if eos in tokens else tokens)


def ending_at(base: LoadedBase, eos: int) -> LoadedBase:
    """The same base, ending its answers at another token."""
    tokenizer = load_base(base.facts).tokenizer
    tokenizer.eos = eos
    return replace(base, tokenizer=tokenizer)


@pytest.mark.parametrize("batch_tokens", [4096, 120, 1])
def test_scores_equal_those_of_full_sequences(
    base: LoadedBase, queries: list[ModelQuery], batch_tokens: int
) -> None:
    found = BatchedPredictor(base, batch_tokens=batch_tokens).score(queries)
    for query, scores in zip(queries, found, strict=True):
        expected = naive_scores(merged(base, query.adapters), query)
        assert scores.dtype == np.float64
        assert np.allclose(scores, expected, atol=1e-4)


def test_scores_do_not_depend_on_who_shares_the_batch(
    base: LoadedBase, queries: list[ModelQuery]
) -> None:
    predictor = BatchedPredictor(base)
    together = list(predictor.score(queries))
    for query, scores in zip(queries, together, strict=True):
        (alone,) = predictor.score([query])
        assert np.allclose(scores, alone, atol=1e-4)


def test_the_same_queries_give_the_same_bytes(base: LoadedBase, queries: list[ModelQuery]) -> None:
    first, again = (
        [scores.tobytes() for scores in BatchedPredictor(base).score(queries)] for _ in range(2)
    )
    assert first == again


def test_greedy_answers_equal_those_of_transformers_on_a_merged_model(
    base: LoadedBase, queries: list[ModelQuery]
) -> None:
    found = BatchedPredictor(base).generate(queries)
    for query, answer in zip(queries, found, strict=True):
        assert answer == naive_answer(base, query)


def test_a_row_stops_at_its_end_token_and_the_others_go_on(
    base: LoadedBase, queries: list[ModelQuery]
) -> None:
    long = [replace(query, max_tokens=20) for query in queries]
    full = [list(answer) for answer in BatchedPredictor(ending_at(base, -1)).generate(long)]
    eos = full[0][4]
    cut = list(BatchedPredictor(ending_at(base, eos)).generate(long))
    assert {len(answer) for answer in full} == {20}
    assert cut == [until_end(answer, eos) for answer in full]
    assert {len(answer) == 20 for answer in cut} == {True, False}


def test_more_queries_than_a_window_are_answered_in_order(
    base: LoadedBase, queries: list[ModelQuery], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(BatchedPredictor(base).score(queries))
    monkeypatch.setattr("fedoppu.client.prediction.WINDOW", 5)
    windowed = list(BatchedPredictor(base).score(queries))
    assert len(windowed) == len(queries)
    for first, second in zip(whole, windowed, strict=True):
        assert np.allclose(first, second, atol=1e-4)


def test_the_model_is_as_before(base: LoadedBase, queries: list[ModelQuery]) -> None:
    before = snapshot(base.model)
    list(BatchedPredictor(base).score(queries[:5]))
    list(BatchedPredictor(base).generate(queries[:5]))
    assert snapshot(base.model) == before


def test_another_architecture_with_biases_and_untied_head_is_scored_and_answers(
    base: LoadedBase, queries: list[ModelQuery]
) -> None:
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Qwen2ForCausalLM(config).requires_grad_(False).train(False)
    other = replace(base, model=model)
    plain = [replace(query, adapters=()) for query in queries[:6]]
    predictor = BatchedPredictor(other)
    for query, scores in zip(plain, predictor.score(plain), strict=True):
        assert np.allclose(scores, naive_scores(model, query), atol=1e-4)
    for query, answer in zip(plain, predictor.generate(plain), strict=True):
        assert answer == naive_answer(other, query)


def test_a_bfloat16_base_ranks_labels_as_the_float32_one(
    tiny_base: Path, queries: list[ModelQuery]
) -> None:
    half = load_base(resolve_base(str(tiny_base)), dtype="bfloat16")
    full = load_base(resolve_base(str(tiny_base)))
    pairs = zip(
        BatchedPredictor(full).score(queries), BatchedPredictor(half).score(queries), strict=True
    )
    for expected, found in pairs:
        assert np.allclose(found, expected, rtol=0.05, atol=0.3)


def refused(query: ModelQuery, **changes: object) -> list[ModelQuery]:
    return [query, replace(query, id="bad", **changes)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "query bad has no labels"),
        ({"labels": (np.zeros(0, np.int32),)}, "label 0 of query bad must have 1 to 512"),
        ({"prompt": np.zeros(0, np.int32)}, "the prompt of query bad must have 1 to 512"),
        ({"prompt": np.full(3, 9999, np.int32)}, "query bad has a token outside"),
        ({"prompt": np.full(510, 5, np.int32)}, "query bad has 510 tokens and an answer of 5"),
    ],
)
def test_a_query_that_cannot_be_scored_is_named(
    base: LoadedBase, queries: list[ModelQuery], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        list(BatchedPredictor(base).score(refused(queries[0], **changes)))


def test_an_answer_that_does_not_fit_is_refused(
    base: LoadedBase, queries: list[ModelQuery]
) -> None:
    predictor = BatchedPredictor(base)
    with pytest.raises(DataError, match=r"query bad has .* tokens and an answer of 512"):
        list(predictor.generate(refused(queries[0], max_tokens=512)))
    with pytest.raises(UsageError, match="max_tokens must be at least 1, got 0"):
        list(predictor.generate(refused(queries[0], max_tokens=0)))


def test_an_adapter_of_another_base_or_shared_adapter_is_refused(
    base: LoadedBase, queries: list[ModelQuery]
) -> None:
    foreign = random_adapter(replace(spec_of(base, "q_proj"), base_hash="feed"), 1)
    orphan = queries[2].adapters[1:]
    for stack in ((foreign,), orphan):
        with pytest.raises(AdapterError, match=r"was made for base feed|not on none"):
            list(BatchedPredictor(base).score(refused(queries[0], adapters=stack)))


def test_a_batch_must_hold_a_token(base: LoadedBase) -> None:
    with pytest.raises(UsageError, match="batch_tokens must be at least 1, got 0"):
        BatchedPredictor(base, batch_tokens=0)


def test_no_queries_give_no_answers(base: LoadedBase) -> None:
    nothing: Sequence[ModelQuery] = ()
    assert list(BatchedPredictor(base).score(nothing)) == []
    assert list(BatchedPredictor(base).generate(nothing)) == []
