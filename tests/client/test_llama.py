"""The fast path computes what the model itself does, for each family, whatever is packed together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedoppu.client.batches import Row
from fedoppu.client.engine import Engine, GenericEngine, engine_for
from fedoppu.client.group import Group
from fedoppu.client.jobs import ClientJob, Example, TrainedAdapter
from fedoppu.client.llama import LlamaEngine, fast_path, pass_tokens
from fedoppu.client.llama_attention import HeadShape, Stretch, attention_plan, gather_sum
from fedoppu.client.llama_packing import Packed, filled, pack_rows, split_rows
from fedoppu.client.model import DTYPES, LoadedBase, load_base, resolve_base
from fedoppu.client.plans import Plan
from fedoppu.client.training import BatchedTrainer
from fedoppu.common.adapters import Adapter, Factor
from tests.client.engine import (
    fresh_job,
    movement,
    random_adapter,
    random_examples,
    random_tokens,
    snapshot,
    spec_of,
    with_settings,
)
from tests.client.peft_loop import PeftUser, bulk_distance, distance

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SIZES = {
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes))  # type: ignore[arg-type]


def mistral(**changes: object) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, **changes))  # type: ignore[arg-type]


def qwen2(**changes: object) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **changes))  # type: ignore[arg-type]


FAMILIES = {
    "llama": lambda: llama(num_key_value_heads=4, head_dim=12),
    "llama, grouped heads, wide heads, biases, scaled rotary, tied": lambda: llama(
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "mistral with a short window": lambda: mistral(
        num_key_value_heads=1, head_dim=12, sliding_window=7
    ),
    "qwen2": lambda: qwen2(num_key_value_heads=2, tie_word_embeddings=False),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedBase:
    return loaded(FAMILIES[request.param](), tiny_base, tmp_path_factory.mktemp("family"))


def loaded(model: PreTrainedModel, tiny_base: Path, folder: Path) -> LoadedBase:
    """The model with random weights and biases and the tokenizer of the tiny base."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        mean = 0.0 if parameter.dim() == 2 else 1.0
        parameter.data.normal_(mean, 0.1, generator=generator)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_base / name).read_bytes())
    return load_base(resolve_base(str(folder)))


def some_examples(seed: int, count: int) -> list[Example]:
    """Prompts that begin with the same tokens, as those of one task do; but not of every user."""
    draw = np.random.default_rng(seed)
    starts = [random_tokens(draw, 30) for _ in range(count)]
    return [
        replace(example, prompt=np.concatenate([starts[seed % 2 * index], example.prompt]))
        for index, example in enumerate(random_examples(seed, count))
    ]


def some_jobs(base: LoadedBase, *targets: str, frozen: Sequence[Adapter] = ()) -> list[ClientJob]:
    """Unequal histories; those of two users share a prefix."""
    spec = spec_of(base, *targets)
    jobs = []
    for seed, count in enumerate((5, 9, 1, 4)):
        job = fresh_job(spec, seed, count, *frozen)
        start = random_adapter(spec, 20 + seed, job.start.parent)
        jobs.append(replace(job, start=start, examples=some_examples(seed, count)))
    return jobs


def gradients(engine: Engine, plans: Sequence[Plan]) -> list[NDArray[np.float32]]:
    """Of each user in one step, before clipping, as the optimiser gets them."""
    group = Group(engine, plans)
    seen: dict[str, NDArray[np.float32]] = {}
    take = group._optimizer.step

    def record(active: int, step: int, rates: NDArray[np.float64]) -> None:
        found = group._optimizer.gradients.numpy().copy()
        seen.update({plan.job.id: row for plan, row in zip(group.plans, found, strict=True)})
        take(active, step, rates)

    group._optimizer.step = record  # type: ignore[method-assign]
    group.step(0)
    return [seen[plan.job.id] for plan in plans]


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",), ("down_proj",)])
def test_gradients_of_one_step_equal_those_of_autograd_through_peft(
    base: LoadedBase, targets: tuple[str, ...]
) -> None:
    plans = [Plan.of(job, base) for job in some_jobs(base, *targets)]
    generic = gradients(GenericEngine(base), plans)
    for plan, found, other in zip(
        plans, gradients(LlamaEngine(base.model), plans), generic, strict=True
    ):
        user = PeftUser(base, plan.job)
        torch.autograd.backward(user.loss(plan.batch(0)))
        expected = plan.job.start.spec.flatten(
            {n: p.grad.float().numpy() for n, p in user.parameters.items() if p.grad is not None}
        )
        # autograd's own rounding is at 1e-6 for some weights: there ours is held to the same order
        assert relative(found, expected) <= max(1e-6, 1.5 * relative(other, expected))
        assert relative(found, other) <= 2e-6


def trained(base: LoadedBase, engine: Engine, jobs: Sequence[ClientJob]) -> list[Adapter]:
    answers = list(BatchedTrainer(base, engine=engine).update_many(jobs))
    assert all(isinstance(answer, TrainedAdapter) for answer in answers), answers
    return [answer.adapter for answer in answers if isinstance(answer, TrainedAdapter)]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_users_end_where_peft_and_the_generic_path_do(
    base: LoadedBase, targets: tuple[str, ...]
) -> None:
    shared = random_adapter(spec_of(base, "all-linear"), 1)
    jobs = some_jobs(base, *targets, frozen=(shared,))
    generic = trained(base, GenericEngine(base), jobs)
    for job, found, other in zip(
        jobs, trained(base, LlamaEngine(base.model), jobs), generic, strict=True
    ):
        assert bulk_distance(job, found, PeftUser(base, job).train()) <= 2e-4
        assert bulk_distance(job, found, other) <= 2e-4


def test_with_dropout_users_end_where_the_generic_path_does_with_the_same_masks(
    base: LoadedBase,
) -> None:
    jobs = [
        with_settings(job, dropout=0.3 * (index % 2))
        for index, job in enumerate(some_jobs(base, "all-linear"))
    ]
    without = trained(
        base, LlamaEngine(base.model), [with_settings(job, dropout=0.0) for job in jobs]
    )
    generic = trained(base, GenericEngine(base), jobs)
    found = trained(base, LlamaEngine(base.model), jobs)
    for index, job in enumerate(jobs):
        assert bulk_distance(job, found[index], generic[index]) <= 2e-4
        assert (bulk_distance(job, found[index], without[index]) > 1e-2) == bool(index % 2)


@pytest.mark.parametrize("trainable", [("A",), ("B",)])
def test_one_factor_alone_ends_where_the_generic_path_does(
    base: LoadedBase, trainable: tuple[Factor, ...]
) -> None:
    jobs = [replace(job, trainable=trainable) for job in some_jobs(base, "q_proj", "o_proj")]
    generic = trained(base, GenericEngine(base), jobs)
    for job, found, other in zip(
        jobs, trained(base, LlamaEngine(base.model), jobs), generic, strict=True
    ):
        assert bulk_distance(job, found, other) <= 2e-4


def test_a_bfloat16_base_moves_adapters_as_a_float32_one_does() -> None:
    """On trained weights: those of a random model leave gradients that are mostly rounding."""
    full, half = (load_base(resolve_base("pocket"), dtype=dtype) for dtype in DTYPES)
    spec = spec_of(full, "q_proj", "v_proj")
    jobs = [with_settings(fresh_job(spec, seed, 12), learning_rate=1e-3) for seed in range(3)]
    wide = trained(full, LlamaEngine(full.model), jobs)
    for job, found, expected in zip(
        jobs, trained(half, LlamaEngine(half.model), jobs), wide, strict=True
    ):
        one, other = movement(job, found), movement(job, expected)
        assert one @ other >= 0.99 * np.linalg.norm(one) * np.linalg.norm(other)


def lamp_like(seed: int, count: int) -> list[Example]:
    """Prompts and answers as long as LaMP's, with a common instruction of 100 tokens."""
    draw = np.random.default_rng(seed)
    instruction = draw.integers(3, 2000, 100).astype(np.int32)
    lengths = np.clip(draw.normal(120, 60, count), 13, 270).astype(int)
    return [
        Example(
            np.concatenate([instruction, draw.integers(3, 2000, length).astype(np.int32)]),
            draw.integers(3, 2000, int(draw.integers(1, 7))).astype(np.int32),
        )
        for length in lengths
    ]


@pytest.mark.slow
def test_on_prompts_like_lamps_the_whole_movement_is_that_of_peft() -> None:
    """No coordinate left out: of a trained base few gradients are within rounding of zero."""
    full = load_base(resolve_base("pocket"))
    spec = spec_of(full, "q_proj", "v_proj", rank=8)
    jobs = [
        with_settings(
            replace(fresh_job(spec, seed, 1), examples=lamp_like(seed, 6)), learning_rate=1e-4
        )
        for seed in range(3)
    ]
    for job, found in zip(jobs, trained(full, LlamaEngine(full.model), jobs), strict=True):
        assert distance(job, found, PeftUser(full, job, torch.float32).train()) <= 2e-4


def test_the_model_is_as_before_and_the_same_jobs_give_the_same_bytes(base: LoadedBase) -> None:
    before = snapshot(base.model)
    jobs = some_jobs(base, "all-linear")
    first, again = (
        [adapter.digest() for adapter in trained(base, engine_for(base), jobs)] for _ in range(2)
    )
    assert first == again
    assert snapshot(base.model) == before


def kept_bytes(base: LoadedBase, job: ClientJob, *, checkpointing: bool) -> int:
    """Bytes that autograd holds for backwards while a user is trained, each tensor once."""
    saved: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        list(BatchedTrainer(base, checkpointing=checkpointing).update_many([job]))
    return sum(saved.values())


def test_checkpointing_gives_the_same_bits(base: LoadedBase) -> None:
    shared = random_adapter(spec_of(base, "all-linear"), 1)
    jobs = [
        with_settings(job, dropout=0.3 * (index % 2))
        for index, job in enumerate(some_jobs(base, "all-linear", frozen=(shared,)))
    ]
    keeping, anew = (
        [adapter.digest() for adapter in trained(base, engine, jobs)]
        for engine in (LlamaEngine(base.model), LlamaEngine(base.model, checkpointing=True))
    )
    assert keeping == anew


def test_checkpointing_keeps_less_for_the_backward(base: LoadedBase) -> None:
    """What it keeps of a layer is its input, which no hook sees: one tensor of fifteen or more."""
    job = with_settings(fresh_job(spec_of(base, "q_proj"), 0, 3), epochs=1)
    keeping, anew = (kept_bytes(base, job, checkpointing=on) for on in (False, True))
    assert 0 < anew < keeping / 4


def with_odd_layer() -> PreTrainedModel:
    model = llama()
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.up_proj = torch.nn.Identity()
    return model


REFUSED = {
    "GPT2LMHeadModel is not one": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    ),
    "rotary positions are dynamic": lambda: llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "activation is gelu": lambda: llama(hidden_act="gelu"),
    "different attention windows": lambda: qwen2(
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "not plain ones": with_odd_layer,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_that_the_fast_path_would_get_wrong_is_left_to_the_generic_one(
    reason: str,
) -> None:
    assert reason in str(fast_path(REFUSED[reason]()))


def test_a_model_of_the_families_takes_the_fast_path(base: LoadedBase) -> None:
    assert fast_path(base.model) is None
    assert isinstance(engine_for(base), LlamaEngine)


def packed(prefixes: Sequence[Sequence[int]], *, share: bool = True) -> Packed:
    """Rows of one user whose prompts begin as given, each with a token of its own behind."""
    rows = [
        Row(0, Example(np.array([*prefix, 200 + i], np.int32), np.array([7, 8], np.int32)), i)
        for i, prefix in enumerate(prefixes)
    ]
    return pack_rows(rows, share=share)


def test_what_all_rows_of_a_user_begin_with_is_laid_out_once() -> None:
    start = list(range(10, 50))
    found = packed([start, start, start])
    assert len(found.tokens) == len(start) + 3 * 2
    assert found.tokens.tolist() == [*start, *(t for i in range(3) for t in (200 + i, 7))]
    assert found.positions.tolist() == [*range(40), *[40, 41] * 3]
    assert found.tokens[found.outputs].tolist() == [200, 7, 201, 7, 202, 7]
    assert found.starts.tolist() == [0, 42, 44, 46]
    for stretch, own in zip(found.last, ([200, 7], [201, 7], [202, 7]), strict=True):
        assert found.tokens[stretch.keys].tolist() == [*start, *own]


@pytest.mark.parametrize("share", [True, False])
def test_a_prefix_that_is_short_or_not_wanted_is_not_shared(share: bool) -> None:
    start = list(range(10, 50 if not share else 20))
    assert len(packed([start, start], share=share).tokens) == 2 * (len(start) + 2)


def test_the_token_that_predicts_an_answer_is_never_shared() -> None:
    """Two rows that are the same but for their answers."""
    prompt = np.arange(10, 40, dtype=np.int32)
    rows = [Row(0, Example(prompt, np.array([i], np.int32)), i) for i in range(2)]
    found = pack_rows(rows, share=True)
    assert len(found.tokens) == 29 + 2
    assert found.tokens[found.outputs].tolist() == [39, 39]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=12))
def test_every_query_and_key_of_a_plan_is_found_where_its_group_put_it(
    shapes: list[tuple[int, int]],
) -> None:
    stretches, positions, end = [], [], 0
    for own, before in shapes:
        keys = np.arange(end, end + own + before)
        stretches.append(Stretch(keys[before:], keys))
        positions.append(np.arange(own + before))
        end += own + before
    heads = HeadShape(heads=4, key_heads=2)
    plan = attention_plan(stretches, np.concatenate(positions), heads, dtype=torch.float32)
    asked = sum(own for own, _ in shapes) * 4
    for group in plan.groups:
        assert group.shape[1] & (group.shape[1] - 1) == 0
        assert (group.shape[3] % 16, group.shape[4] % 32) == (0, 0)
    queries = torch.cat([group.queries for group in plan.groups])
    assert torch.equal(queries[plan.found], torch.arange(asked))
    once = torch.ones(sum(len(group.keys) for group in plan.groups), 1)
    assert torch.equal(gather_sum(once, plan), torch.ones(end * 2, 1))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_padding_makes_few_numbers_of_tokens_of_many_and_nobody_sees_it(count: int) -> None:
    plain = packed([list(range(10, 50))] * count)
    found = filled(plain)
    tokens, outputs = len(plain.tokens), len(plain.outputs)
    assert (len(found.tokens) % 16, len(found.outputs) % 16) == (0, 0)
    assert found.tokens[:tokens].tolist() == plain.tokens.tolist()
    assert found.outputs[:outputs].tolist() == plain.outputs.tolist()
    assert len(set(found.outputs)) == len(found.outputs)
    for stretches, before in ((found.stretches, plain.stretches), (found.last, plain.last)):
        assert stretches[: len(before)] == before
        assert all(stretch.keys.min() >= tokens for stretch in stretches[len(before) :])


def test_a_pass_of_many_tokens_is_padded_by_a_thirty_second_at_most() -> None:
    rows = [Row(0, Example(np.full(700, 9, np.int32), np.array([5], np.int32)))] * 9
    assert len(filled(pack_rows(rows, share=False)).tokens) == 6336


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60)), max_size=12), st.integers(1, 90))
def test_rows_are_cut_into_passes_in_their_order(shapes: list[tuple[int, int]], most: int) -> None:
    answer = np.array([5], np.int32)
    rows = [
        Row(owner, Example(np.full(length, 9, np.int32), answer))
        for owner, length in sorted(shapes)
    ]
    passes = list(split_rows(rows, most))
    assert [index for taken in passes for index in taken] == list(range(len(rows)))
    for taken in passes:
        assert len(taken) == 1 or sum(rows[index].length for index in taken) <= most


def test_a_pass_of_a_large_base_has_fewer_tokens() -> None:
    assert pass_tokens(llama()) == 8192
    large = {**SIZES, "hidden_size": 128, "intermediate_size": 6000, "num_hidden_layers": 3}
    assert 1024 < pass_tokens(LlamaForCausalLM(LlamaConfig(**large))) < 8192  # type: ignore[arg-type]
