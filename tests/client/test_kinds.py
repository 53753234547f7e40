"""(IA)^3 and prompt tuning equal peft: trained by many users in one pass, scored, generated, on disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedoppu.client.engine import Engine, GenericEngine, takes_fast_path
from fedoppu.client.fresh import fresh_adapter
from fedoppu.client.jobs import ClientFailure, ClientJob, ModelQuery, TrainedAdapter
from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.client.multi_lora import check_stack, only_lora, stack_levels
from fedoppu.client.prediction import BatchedPredictor
from fedoppu.client.training import BatchedTrainer
from fedoppu.common.adapter_files import load_adapter, save_adapter
from fedoppu.common.adapter_kinds import Ia3Spec, PromptSpec, initial_ia3
from fedoppu.common.adapter_settings import AdapterKind, PersonalAdapterSettings
from fedoppu.common.adapters import Adapter, Spec
from fedoppu.common.errors import AdapterError, BaseModelError, DataError, UsageError
from fedoppu.common.randomness import Randomness
from tests.client.engine import (
    SETTINGS,
    random_adapter,
    random_examples,
    random_tokens,
    row,
    snapshot,
    spec_of,
    with_settings,
)
from tests.client.peft_loop import PeftUser, bulk_distance, distance
from tests.client.test_training import gradients_of_one_step

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
COUNTS = (5, 13, 1)
KINDS: tuple[AdapterKind, ...] = ("ia3", "prompt")
SCALED = ("k_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> LoadedBase:
    return load_base(resolve_base(str(tiny_base)))


@pytest.fixture(scope="module")
def shared(base: LoadedBase) -> Adapter:
    return random_adapter(spec_of(base, "all-linear"), 1)


def spec_of_kind(base: LoadedBase, kind: AdapterKind, *targets: str) -> Spec:
    if kind == "prompt":
        return PromptSpec.from_base(base.facts, 7)
    return Ia3Spec.from_base(base.facts, targets or SCALED, feedforward=("down_proj", "up_proj"))


def job_of(spec: Spec, seed: int, count: int, *frozen: Adapter) -> ClientJob:
    """A job that starts at an adapter which changes something."""
    return ClientJob(
        id=f"user{seed}",
        start=random_adapter(spec, seed, frozen[-1].digest() if frozen else None),
        frozen=frozen,
        settings=SETTINGS,
        examples=random_examples(seed, count),
        randomness=Randomness.from_seed(seed),
    )


def train(
    base: LoadedBase, jobs: Sequence[ClientJob], engine: Engine | None = None
) -> list[TrainedAdapter]:
    answers = list(BatchedTrainer(base, engine=engine).update_many(jobs))
    assert all(isinstance(answer, TrainedAdapter) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, TrainedAdapter)]


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_user_of_a_group_ends_where_peft_alone_does(
    base: LoadedBase, shared: Adapter, kind: AdapterKind, layers: int
) -> None:
    """With a shared LoRA under it, peft's base has that LoRA merged into its weights."""
    spec = spec_of_kind(base, kind)
    jobs = [
        with_settings(job_of(spec, seed, count, *(shared,)[:layers]), clip_norm=0.3 + seed)
        for seed, count in enumerate(COUNTS)
    ]
    before = snapshot(base.model)
    found, generic = train(base, jobs), train(base, jobs, GenericEngine(base))
    assert snapshot(base.model) == before
    for job, *both in zip(jobs, found, generic, strict=True):
        alone = PeftUser(base, job).train()
        for trained in both:
            assert trained.adapter.parent == job.start.parent
            assert bulk_distance(job, trained.adapter, alone) <= 2e-4
            assert distance(job, trained.adapter, alone) <= 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "bound"), [(0, 1e-6), (1, 3e-6)])
def test_gradients_of_one_step_equal_those_of_autograd_through_peft(
    base: LoadedBase, shared: Adapter, kind: AdapterKind, layers: int, bound: float
) -> None:
    spec = spec_of_kind(base, kind, "all-linear")
    jobs = [job_of(spec, seed, 4, *(shared,)[:layers]) for seed in range(3)]
    for job, found in zip(jobs, gradients_of_one_step(base, jobs), strict=True):
        user = PeftUser(base, job)
        torch.autograd.backward(user.loss(job.examples))
        gradients = {
            name: p.grad.float().numpy()
            for name, p in user.parameters.items()
            if p.grad is not None
        }
        expected = spec.flatten(gradients)
        assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


def test_users_of_all_kinds_are_answered_in_their_order(base: LoadedBase, shared: Adapter) -> None:
    specs = [spec_of(base, "q_proj"), *(spec_of_kind(base, kind) for kind in KINDS)] * 2
    jobs = [job_of(spec, seed, 3, shared) for seed, spec in enumerate(specs)]
    for job, found in zip(jobs, train(base, jobs), strict=True):
        assert found.id == job.id
        assert bulk_distance(job, found.adapter, PeftUser(base, job).train()) <= 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_is_that_of_the_start(base: LoadedBase, kind: AdapterKind) -> None:
    held_out = random_examples(9, 3)
    job = replace(job_of(spec_of_kind(base, kind), 0, 2), held_out=held_out)
    (found,) = train(base, [job])
    user = PeftUser(base, job)
    expected = np.mean([float(user.loss([example]).detach()) for example in held_out])
    assert found.held_out_loss == pytest.approx(expected, abs=1e-5)


def test_virtual_tokens_count_as_tokens_of_a_pass(base: LoadedBase) -> None:
    job = with_settings(job_of(spec_of_kind(base, "prompt"), 0, 1), epochs=1)
    (found,) = train(base, [job])
    (example,) = job.examples
    assert found.tokens == 7 + len(example.prompt) + len(example.answer) - 1


def refused(base: LoadedBase, shared: Adapter) -> dict[str, tuple[ClientJob, str]]:
    ia3, prompt = (job_of(spec_of_kind(base, kind), 0, 2) for kind in KINDS)
    long = replace(ia3.examples[0], prompt=np.full(505, 5, np.int32))
    on_top = job_of(spec_of(base, "q_proj"), 1, 2, ia3.start)
    return {
        "factors": (replace(ia3, trainable=("B",)), "kind ia3 has no factors"),
        "dropout": (
            with_settings(prompt, dropout=0.5),
            "dropout must be 0 for kind prompt, got 0.5",
        ),
        "no room": (replace(prompt, examples=[long]), "7 of them virtual, the base takes 512"),
        "under another": (on_top, "a stack has an adapter of kind ia3 under another one"),
        "parent": (replace(prompt, frozen=(shared,)), "trained on shared adapter none"),
    }


@pytest.mark.parametrize("case", range(5))
def test_a_job_that_a_kind_cannot_do_says_why(base: LoadedBase, shared: Adapter, case: int) -> None:
    job, message = list(refused(base, shared).values())[case]
    (answer,) = BatchedTrainer(base).update_many([job])
    assert isinstance(answer, ClientFailure)
    assert message in answer.message


# --- answering -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def queries(base: LoadedBase, shared: Adapter) -> list[ModelQuery]:
    """Of users of all kinds, on the shared adapter and on the base alone."""
    specs = [spec_of(base, "q_proj"), *(spec_of_kind(base, kind) for kind in KINDS)]
    digest = shared.digest()
    stacks: list[tuple[Adapter, ...]] = [
        (),
        *((random_adapter(spec, seed),) for seed, spec in enumerate(specs)),
        *((shared, random_adapter(spec, seed, digest)) for seed in (5, 6) for spec in specs),
    ]
    draw = np.random.default_rng(0)
    return [
        ModelQuery(
            id=f"query{index}",
            prompt=random_tokens(draw, int(draw.integers(1, 30))),
            adapters=stacks[index % len(stacks)],
            labels=tuple(random_tokens(draw, int(draw.integers(1, 5))) for _ in range(4)),
            max_tokens=int(draw.integers(1, 9)),
        )
        for index in range(2 * len(stacks))
    ]


def peft_model_of(base: LoadedBase, query: ModelQuery) -> Any:
    if not query.adapters:
        return base.model
    job = ClientJob(
        query.id,
        query.adapters[-1],
        query.adapters[:-1],
        SETTINGS,
        (),
        Randomness.from_seed(0),
    )
    return PeftUser(base, job, torch.float32).model


def test_scores_and_answers_of_mixed_kinds_equal_those_of_peft(
    base: LoadedBase, queries: list[ModelQuery]
) -> None:
    predictor = BatchedPredictor(base)
    answers = zip(queries, predictor.score(queries), predictor.generate(queries), strict=True)
    for query, scores, answer in answers:
        model = peft_model_of(base, query)
        with torch.no_grad():
            for label, score in zip(query.labels, scores, strict=True):
                logits = model(row(query.prompt, label)).logits[0, -1 - len(label) : -1]
                chosen = torch.log_softmax(logits, -1)[range(len(label)), label.tolist()]
                assert float(chosen.sum()) == pytest.approx(score, abs=2e-4)
            written: list[int] = []
            while len(written) < query.max_tokens:
                logits = model(row(query.prompt, np.array(written, np.int32))).logits[0, -1]
                newest = int(logits.argmax())
                if newest == base.tokenizer.eos:
                    break
                written.append(newest)
        assert answer == tuple(written)


def test_an_answer_that_has_no_room_beside_virtual_tokens_is_refused(base: LoadedBase) -> None:
    own = random_adapter(spec_of_kind(base, "prompt"), 1)
    query = ModelQuery("long", np.full(500, 5, np.int32), (own,), max_tokens=6)
    with pytest.raises(DataError, match="query long has 507 tokens and an answer of 6"):
        list(BatchedPredictor(base).generate([query]))


def test_a_virtual_token_in_a_text_is_refused(base: LoadedBase) -> None:
    own = random_adapter(spec_of_kind(base, "prompt"), 1)
    query = ModelQuery("odd", np.array([5, -1], np.int32), (own,))
    with pytest.raises(DataError, match="query odd has a token outside"):
        list(BatchedPredictor(base).generate([query]))


def test_every_kind_moves_the_logits(base: LoadedBase, queries: list[ModelQuery]) -> None:
    plain = [replace(query, adapters=()) for query in queries]
    predictor = BatchedPredictor(base)
    pairs = zip(queries, predictor.score(queries), predictor.score(plain), strict=True)
    for query, with_adapters, without in pairs:
        assert bool(query.adapters) == bool(np.abs(with_adapters - without).max() > 1e-2)


# --- on disk, and where they start ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_folder_and_computes_the_same(
    base: LoadedBase, tiny_base: Path, tmp_path: Path, kind: AdapterKind
) -> None:
    adapter = random_adapter(spec_of_kind(base, kind), 3)
    save_adapter(tmp_path / "me", adapter, base_name=str(tiny_base))
    loaded = load_adapter(tmp_path / "me")
    assert (loaded.spec, loaded.digest()) == (adapter.spec, adapter.digest())
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), str(tmp_path / "me")
    )
    draw = np.random.default_rng(1)
    label = random_tokens(draw, 3)
    query = ModelQuery("q", random_tokens(draw, 20), (loaded,), labels=(label,))
    (scores,) = BatchedPredictor(base).score([query])
    with torch.no_grad():
        logits = cast(Any, model)(row(query.prompt, label)).logits[0, -4:-1]
    chosen = torch.log_softmax(logits, -1)[range(3), label.tolist()]
    assert float(chosen.sum()) == pytest.approx(scores[0], abs=2e-4)


def fresh(base: LoadedBase, seed: int, **settings: Any) -> Adapter:
    made = PersonalAdapterSettings(**settings)
    return fresh_adapter(base, made, Randomness.from_seed(seed))


def test_a_fresh_ia3_adapter_changes_nothing(base: LoadedBase) -> None:
    own = fresh(base, 0, kind="ia3", targets=SCALED)
    assert {float(value) for tensor in own.tensors.values() for value in tensor.flat} == {1.0}
    label = np.array([7], np.int32)
    query = ModelQuery("q", np.array([5, 6], np.int32), (own,), labels=(label,))
    predictor = BatchedPredictor(base)
    (scores,) = predictor.score([query])
    (plain,) = predictor.score([replace(query, adapters=())])
    assert np.allclose(scores, plain, atol=1e-5)


def test_virtual_tokens_begin_as_embeddings_that_the_owners_root_draws(base: LoadedBase) -> None:
    first, again, other = (fresh(base, seed, kind="prompt", tokens=9) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    table = cast(Any, base.model).get_input_embeddings().weight.numpy()
    for vector in first.tensors["virtual_tokens"]:
        assert (np.abs(table - vector).max(1) == 0).any()


def test_virtual_tokens_can_begin_as_a_text_repeated_and_cut(base: LoadedBase) -> None:
    tokens = base.tokenizer.encode("the category of this")
    own = fresh(base, 0, kind="prompt", tokens=len(tokens) + 2, text="the category of this")
    expected = base.embeddings(np.array([*tokens, *tokens[:2]]))
    assert np.array_equal(own.tensors["virtual_tokens"], expected)


def test_a_text_without_a_token_is_refused(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.tokenizer, "encode", lambda text: [])
    with pytest.raises(UsageError, match="text must hold at least one token"):
        fresh(base, 0, kind="prompt", text=" ")


def test_a_base_without_room_or_known_width_takes_no_virtual_tokens(base: LoadedBase) -> None:
    with pytest.raises(BaseModelError, match="takes 512 tokens, which leaves no room beside 512"):
        PromptSpec.from_base(base.facts, 512)
    with pytest.raises(BaseModelError, match=r"width of the embeddings of base .* is not known"):
        PromptSpec.from_base(replace(base.facts, width=0), 4)


def test_a_kind_that_is_none_is_refused(base: LoadedBase, shared: Adapter) -> None:
    ia3 = initial_ia3(cast(Ia3Spec, spec_of_kind(base, "ia3")), parent=shared.digest())
    check_stack((shared, ia3), base.facts.hash)
    with pytest.raises(AdapterError, match="only LoRA adapters are computed here"):
        only_lora(stack_levels([(shared, ia3)]))
    assert takes_fast_path(base, (shared.spec,))
