"""The fast path of the predictor: trees lose and mix nothing, and answers are those of peft."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model

from fedoppu.client.engine import takes_fast_path
from fedoppu.client.inference import GenericInference, Inferences
from fedoppu.client.jobs import ModelQuery, Tokens
from fedoppu.client.llama import LlamaEngine
from fedoppu.client.llama_decoding import Cache, cache_tokens
from fedoppu.client.llama_inference import LlamaInference
from fedoppu.client.llama_tree import (
    MIN_SHARED,
    LabelTree,
    QueryTree,
    Span,
    grow,
    in_order,
    split_queries,
)
from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.common.adapters import Adapter, AdapterSpec
from tests.client.engine import merged, random_adapter, random_tokens, row, snapshot, spec_of
from tests.client.test_llama import FAMILIES, loaded

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedBase:
    return loaded(FAMILIES[request.param](), tiny_base, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> LoadedBase:
    return load_base(resolve_base(str(tiny_base)))


def some_stacks(base: LoadedBase, *, users: int = 3) -> list[tuple[Adapter, ...]]:
    """Of users with a shared and an own adapter each."""
    shared = random_adapter(spec_of(base, "all-linear"), 1)
    spec = spec_of(base, "q_proj", "v_proj", rank=2, alpha=2.0)
    return [(shared, random_adapter(spec, 2 + user, shared.digest())) for user in range(users)]


def some_queries(stacks: Sequence[tuple[Adapter, ...]], seed: int, count: int) -> list[ModelQuery]:
    """Prompts that begin with nothing, an instruction, or that and a profile; some twice."""
    draw = np.random.default_rng(seed)
    instruction, profile = random_tokens(draw, 30), random_tokens(draw, 20)
    heads = (instruction[:0], instruction, np.concatenate([instruction, profile]))
    labels = some_labels(draw)
    queries = [
        ModelQuery(
            id=f"query{index}",
            prompt=np.concatenate([heads[index % 3], random_tokens(draw, int(size))]),
            adapters=stacks[int(draw.integers(len(stacks)))],
            labels=labels if index % 4 else some_labels(draw),
            max_tokens=int(draw.integers(1, 12)),
        )
        for index, size in enumerate(draw.integers(1, 40, count))
    ]
    return [*queries, replace(queries[0], id="again"), replace(queries[-1], labels=labels[:1])]


def some_labels(draw: np.random.Generator) -> tuple[Tokens, ...]:
    first = random_tokens(draw, 5)
    others = [random_tokens(draw, int(draw.integers(1, 6))) for _ in range(4)]
    return (first, np.append(first[:3], 7).astype(np.int32), first[:1], first, *others)


def fast(base: LoadedBase, batch_tokens: int | None = None) -> LlamaInference:
    engine = LlamaEngine(base.model)
    return LlamaInference(engine, eos=base.tokenizer.eos, batch_tokens=batch_tokens)


def scores(inference: LlamaInference, queries: Sequence[ModelQuery]) -> list[NDArray[np.float64]]:
    found = dict(inference.score(queries))
    return [found[index] for index in range(len(queries))]


# --- scores and answers --------------------------------------------------------------------------


def with_peft(base: LoadedBase, stack: tuple[Adapter, ...]) -> PeftModel:
    """The top adapter as peft computes it, on the others merged."""
    spec = stack[-1].spec
    assert isinstance(spec, AdapterSpec)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha),
        target_modules=[target.name for target in spec.targets],
    )
    model = get_peft_model(merged(base, stack[:-1]), config)
    for name, values in stack[-1].tensors.items():
        module, _, factor = name.rpartition(".")
        parameter = model.get_parameter(f"base_model.model.{module}.lora_{factor}.default.weight")
        parameter.data.copy_(torch.from_numpy(values))
    model.train(False)
    return model


@pytest.mark.parametrize("batch_tokens", [None, 90, 1])
def test_scores_equal_those_of_peft_one_query_and_label_at_a_time(
    base: LoadedBase, batch_tokens: int | None
) -> None:
    stacks = some_stacks(base)
    models = {id(stack[-1]): with_peft(base, stack) for stack in stacks}
    queries = some_queries(stacks, 0, 12)
    for query, found in zip(queries, scores(fast(base, batch_tokens), queries), strict=True):
        model = models[id(query.adapters[-1])]
        for label, score in zip(query.labels, found, strict=True):
            with torch.no_grad():
                logits = model(row(query.prompt, label)).logits[0, len(query.prompt) - 1 : -1]
            chosen = torch.log_softmax(logits, -1)[torch.arange(len(label)), label.astype(np.int64)]
            assert score == pytest.approx(float(chosen.double().sum()), abs=3e-5)


@settings(max_examples=20)
@given(
    st.integers(0, 10**6), st.integers(1, 14), st.integers(1, 4), st.sampled_from([30, 150, None])
)
def test_scores_and_answers_equal_those_of_the_generic_path(
    tiny: LoadedBase, seed: int, count: int, users: int, batch_tokens: int | None
) -> None:
    generic, ours = GenericInference(tiny, 4096), fast(tiny, batch_tokens)
    queries = some_queries(some_stacks(tiny, users=users), seed, count)
    expected = dict(generic.score(queries))
    for index, found in enumerate(scores(ours, queries)):
        assert np.allclose(found, expected[index], rtol=0, atol=3e-5)
    assert dict(ours.generate(queries)) == dict(generic.generate(queries))


def test_answers_of_every_family_equal_those_of_the_generic_path(base: LoadedBase) -> None:
    queries = [replace(query, max_tokens=15) for query in some_queries(some_stacks(base), 1, 9)]
    queries += [replace(queries[0], max_tokens=1)]
    found = dict(fast(base).generate(queries))
    assert found == dict(GenericInference(base, 4096).generate(queries))
    assert {len(answer) for answer in found.values()} > {1}


def test_who_shares_the_pass_changes_rounding_alone_and_the_same_queries_give_the_same_bytes(
    base: LoadedBase,
) -> None:
    queries = some_queries(some_stacks(base), 2, 9)
    inference, before = fast(base), snapshot(base.model)
    together = scores(inference, queries)
    assert [a.tobytes() for a in together] == [a.tobytes() for a in scores(fast(base), queries)]
    for query, found in zip(queries, together, strict=True):
        assert np.allclose(found, scores(inference, [query])[0], rtol=0, atol=3e-5)
    assert snapshot(base.model) == before


def test_a_stack_takes_the_fast_path_where_training_does(tiny: LoadedBase) -> None:
    spec = spec_of(tiny, "q_proj")
    assert takes_fast_path(tiny, (spec,))
    assert isinstance(Inferences(tiny, None).of((spec,)), LlamaInference)


# --- trees ---------------------------------------------------------------------------------------


def plain(prompts: Sequence[Tokens], labels: Sequence[Tokens] = ()) -> list[ModelQuery]:
    """Queries of no adapter, in order."""
    queries = [ModelQuery(str(index), prompt, ()) for index, prompt in enumerate(prompts)]
    queries = [replace(query, labels=tuple(labels)) for query in queries]
    return [queries[index] for index in in_order(queries)]


def tree_of(queries: Sequence[ModelQuery]) -> QueryTree:
    return grow(queries, [LabelTree.of(query.labels) for query in queries])


def tokens(*values: int) -> Tokens:
    return np.array(values, np.int32)


texts = st.lists(
    st.builds(
        lambda head, size, seed: np.concatenate(
            [np.arange(head), np.random.default_rng(seed).integers(0, 3, size)]
        ).astype(np.int32),
        st.sampled_from([0, 20, 150, 300]),
        st.integers(1, 200),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


def seen_by(span: Span, laid: QueryTree, asking: int) -> list[int]:
    """Tokens that one query of a span sees, itself last."""
    keys = np.concatenate([np.arange(*places) for places in span.keys])
    before = len(keys) - span.sees.shape[1]
    seen = np.concatenate([keys[:before], keys[before:][span.sees[asking]]])
    assert np.array_equal(span.positions, laid.positions[keys])
    own = keys[len(keys) - len(span.sees) + asking]
    return [*laid.tokens[seen[seen != own]].tolist(), int(laid.tokens[own])]


@settings(max_examples=40)
@given(texts, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=5))
def test_every_token_sees_the_text_before_it_and_nothing_else(
    prompts: list[Tokens], labels: list[list[int]]
) -> None:
    queries = plain(prompts, [tokens(*label) for label in labels])
    laid = tree_of(queries)
    wanted = {
        tuple([*query.prompt.tolist(), *label[:-1].tolist()][:end])
        for query in queries
        for label in (*query.labels, tokens(0))
        for end in range(1, len(query.prompt) + len(label))
    }
    covered = np.zeros(len(laid.tokens), int)
    found = set()
    for span in laid.spans:
        assert len(span.sees) == span.queries[1] - span.queries[0] <= 128
        covered[slice(*span.queries)] += 1
        found |= {tuple(seen_by(span, laid, asking)) for asking in range(len(span.sees))}
    assert covered.tolist() == [1] * len(laid.tokens)
    assert found == wanted


@given(texts)
def test_the_last_layer_asks_at_the_end_of_each_prompt_and_after_each_token_of_a_label(
    prompts: list[Tokens],
) -> None:
    queries = plain(prompts, [tokens(1, 2, 3), tokens(1, 2, 4), tokens(5)])
    laid = tree_of(queries)
    for query, root, span, text in zip(queries, laid.roots, laid.last, laid.texts, strict=True):
        start, end = span.queries
        assert (root, end - start) == (start, 3)
        assert laid.tokens[laid.outputs[start:end]].tolist() == [query.prompt[-1], 1, 2]
        ends = [seen_by(span, laid, asking) for asking in range(3)]
        prompt = query.prompt.tolist()
        assert ends == [prompt, [*prompt, 1], [*prompt, 1, 2]]
        assert np.concatenate([laid.tokens[a:b] for a, b in text]).tolist() == prompt
    assert laid.output_starts.tolist() == [0, 3 * len(queries)]


def test_what_prompts_begin_with_is_laid_out_once_on_every_level() -> None:
    head, profile = np.arange(100, dtype=np.int32), np.arange(200, 240, dtype=np.int32)
    with_profile = [tokens(*head, *profile, 1, 2), tokens(*head, *profile, 3)]
    laid = tree_of(plain([*with_profile, tokens(*head, 4)]))
    assert len(laid.tokens) == 100 + 40 + 2 + 1 + 1
    short = [np.append(head[: MIN_SHARED - 1], end).astype(np.int32) for end in (1, 2)]
    assert len(tree_of(plain(short)).tokens) == 2 * MIN_SHARED


def test_adapters_are_never_shared_with_another_stack(tiny: LoadedBase) -> None:
    (one, other) = some_stacks(tiny, users=2)
    prompt = np.arange(40, dtype=np.int32)
    queries = [ModelQuery(str(i), prompt, stack) for i, stack in enumerate((one, other, one))]
    order = in_order(queries)
    assert order == [0, 2, 1]
    laid = tree_of([queries[index] for index in order])
    assert laid.starts.tolist() == [0, 41, 81]


@given(texts, st.integers(1, 900))
def test_passes_hold_what_they_may_and_every_query_once(prompts: list[Tokens], most: int) -> None:
    queries = plain(prompts, [tokens(1, 2)])
    trees = [LabelTree.of(query.labels) for query in queries]
    ranges = list(split_queries(queries, trees, most))
    assert [index for a, b in ranges for index in range(a, b)] == list(range(len(queries)))
    for start, end in ranges:
        size = len(grow(queries[start:end], trees[start:end]).tokens)
        assert end - start == 1 or size <= most
        if end < len(queries):  # the next one would have been too many
            assert len(grow(queries[start : end + 1], trees[start : end + 1]).tokens) > most


def test_labels_that_begin_alike_share_nodes() -> None:
    tree = LabelTree.of([tokens(5, 6, 2), tokens(5, 7, 2), tokens(5, 2), tokens(2)])
    assert tree.tokens.tolist() == [5, 6, 7]
    assert tree.depths.tolist() == [0, 1, 2, 2]
    assert tree.sources.tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 0]
    assert tree.targets.tolist() == [5, 6, 2, 5, 7, 2, 5, 2, 2]
    assert tree.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]


# --- the cache -----------------------------------------------------------------------------------


def test_a_row_that_ends_gives_its_place_to_the_last_one(tiny: LoadedBase) -> None:
    engine = LlamaEngine(tiny.model)
    cache, held = Cache(engine, [3, 1, 4, 2], 6), torch.arange(10.0)
    keys = held[:, None, None].expand(-1, engine.heads.key_heads, engine.head_width)
    attend = cache.filled_by(
        lambda *_: held, 0, [((0, 3),), ((3, 4),), ((4, 6), (6, 8)), ((8, 10),)]
    )
    for layer in range(engine.layers):
        attend(layer, held, keys, keys)
    cache.keep(np.array([1, 2, 3]))
    cache.keep(np.array([1, 2]))
    assert cache.lengths.tolist() == [4, 2]
    found = [cache._keys[-1, place, 0, :4, 0].tolist() for place in cache._places]
    assert found[0] == [4, 5, 6, 7]
    assert found[1][:2] == [8, 9]
    assert sorted(cache._places.tolist()) == [0, 1]


def test_a_large_base_answers_fewer_rows_at_once(tiny: LoadedBase) -> None:
    engine = LlamaEngine(tiny.model)
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, key heads, head width, bytes
    assert cache_tokens(engine) == int(256e6 / token)
