"""Stacked adapters compute what merged ones do, and leave the model as it was."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.client.multi_lora import (
    Level,
    Outputs,
    adapted,
    check_stack,
    logits_at,
    only_lora,
    stack_levels,
)
from fedoppu.common.adapters import Adapter, initial_adapter
from fedoppu.common.errors import AdapterError, BaseModelError
from fedoppu.common.randomness import Randomness
from tests.client.engine import merged, random_adapter, snapshot, spec_of


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> LoadedBase:
    return load_base(resolve_base(str(tiny_base)))


@pytest.fixture(scope="module")
def shared(base: LoadedBase) -> Adapter:
    return random_adapter(spec_of(base, "all-linear"), 1)


def stacked(stacks: Sequence[tuple[Adapter, ...]]) -> tuple[Level, ...]:
    return tuple(only_lora(stack_levels(stacks)))


def personal(base: LoadedBase, shared: Adapter, seed: int) -> Adapter:
    spec = spec_of(base, "q_proj", "v_proj", "down_proj", rank=3, alpha=3.0)
    return random_adapter(spec, seed, shared.digest())


def some_rows(count: int, length: int = 11) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(3, 300, (count, length)))


def last_logits(base: LoadedBase, tokens: Tensor, levels: tuple[Level, ...]) -> Tensor:
    every = Outputs(torch.arange(len(tokens)), torch.full((len(tokens),), tokens.shape[1] - 1))
    with torch.no_grad():
        return logits_at(base.model, tokens, every, levels=levels)


@pytest.mark.parametrize(
    "owners", [[0, 0, 1, 1], [0, 1, 1, 1, 2], [0, 0, 0], [2, 1, 0], [1, 1, 0, 2, 2, 1]]
)
def test_stacked_adapters_equal_merged_ones_whatever_the_order_of_the_rows(
    base: LoadedBase, shared: Adapter, owners: list[int]
) -> None:
    users = [personal(base, shared, seed) for seed in range(3)]
    tokens = some_rows(len(owners))
    found = last_logits(base, tokens, stacked([(shared, users[o]) for o in owners]))
    for row, owner in enumerate(owners):
        with torch.no_grad():
            expected = merged(base, (shared, users[owner]))(tokens[row : row + 1]).logits[0, -1]
        assert torch.allclose(found[row], expected, atol=1e-5)


def test_the_adapters_make_a_clear_difference(base: LoadedBase, shared: Adapter) -> None:
    tokens = some_rows(2)
    plain = last_logits(base, tokens, ())
    users = [personal(base, shared, seed) for seed in (1, 2)]
    first, second = (last_logits(base, tokens, stacked([(shared, u)] * 2)) for u in users)
    assert (first - plain).abs().max() > 0.1
    assert (first - second).abs().max() > 0.1


def test_an_empty_stack_is_the_base(base: LoadedBase) -> None:
    tokens = some_rows(3)
    with torch.no_grad():
        expected = base.model(tokens).logits[:, -1]
    assert torch.allclose(last_logits(base, tokens, stacked([(), (), ()])), expected, atol=1e-6)


def test_a_fresh_adapter_gives_exactly_the_logits_without_it(
    base: LoadedBase, shared: Adapter
) -> None:
    spec = spec_of(base, "q_proj", "v_proj")
    fresh = [
        initial_adapter(spec, Randomness.from_seed(seed), parent=shared.digest()) for seed in (1, 2)
    ]
    tokens = some_rows(2)
    with_fresh = last_logits(base, tokens, stacked([(shared, own) for own in fresh]))
    assert torch.equal(with_fresh, last_logits(base, tokens, stacked([(shared,)] * 2)))


def test_logits_are_those_of_the_wanted_positions(base: LoadedBase, shared: Adapter) -> None:
    tokens = some_rows(2)
    wanted = Outputs(torch.tensor([1, 0, 0]), torch.tensor([3, 0, 7]))
    levels = stacked([(shared,)] * 2)
    with torch.no_grad():
        found = logits_at(base.model, tokens, wanted, levels=levels)
        everywhere = merged(base, (shared,))(tokens).logits
    assert torch.allclose(found, everywhere[wanted.rows, wanted.positions], atol=1e-5)


def test_the_model_is_as_before_after_a_call_and_after_an_exception(
    base: LoadedBase, shared: Adapter
) -> None:
    before = snapshot(base.model)
    last_logits(base, some_rows(2), stacked([(shared,)] * 2))
    assert snapshot(base.model) == before
    with pytest.raises(IndexError):
        last_logits(base, torch.full((2, 4), 10_000), stacked([(shared,)] * 2))
    assert snapshot(base.model) == before


def test_another_thread_meets_the_base_alone(base: LoadedBase, shared: Adapter) -> None:
    tokens = some_rows(1)
    plain = last_logits(base, tokens, ())
    seen: list[Tensor] = []
    with adapted(base.model, stacked([(shared,)])):
        other = threading.Thread(target=lambda: seen.append(last_logits(base, tokens, ())))
        other.start()
        other.join()
    assert torch.equal(seen[0], plain)


def test_dropout_scales_the_input_of_its_own_level_alone(base: LoadedBase, shared: Adapter) -> None:
    own = personal(base, shared, 5)
    lower, upper = stacked([(shared, own)] * 2)
    widths = {name: factors.a.shape[-1] for name, factors in upper.factors.items()}
    doubled = Level(
        upper.factors,
        upper.scale,
        upper.slots,
        dropout=lambda name: torch.full((2, 11, widths[name]), 2.0),
    )
    halved = Level(upper.factors, upper.scale * 2, upper.slots)
    tokens = some_rows(2)
    found = last_logits(base, tokens, (lower, doubled))
    assert torch.allclose(found, last_logits(base, tokens, (lower, halved)), atol=1e-5)


def test_adapters_stay_float32_on_a_bfloat16_base(tiny_base: Path, shared: Adapter) -> None:
    half = load_base(resolve_base(str(tiny_base)), dtype="bfloat16")
    tokens = some_rows(2)
    found = last_logits(half, tokens, stacked([(shared,)] * 2))
    full = load_base(resolve_base(str(tiny_base)))
    expected = last_logits(full, tokens, stacked([(shared,)] * 2))
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99


def test_a_stack_is_refused_when_an_adapter_is_of_another_base(base: LoadedBase) -> None:
    other = random_adapter(spec_of(base, "q_proj"), 1)
    with pytest.raises(AdapterError, match=r"was made for base .*, not for feed"):
        check_stack((other,), "feed")


def test_a_stack_is_refused_when_an_adapter_is_on_another_shared_one(
    base: LoadedBase, shared: Adapter
) -> None:
    own = personal(base, shared, 1)
    another = random_adapter(spec_of(base, "all-linear"), 2)
    check_stack((shared, own), base.facts.hash)
    with pytest.raises(AdapterError, match="was trained on shared adapter"):
        check_stack((another, own), base.facts.hash)
    with pytest.raises(AdapterError, match="not on none"):
        check_stack((own,), base.facts.hash)


def test_a_stack_is_refused_when_a_tensor_has_the_wrong_shape_or_is_missing(
    base: LoadedBase,
) -> None:
    good = random_adapter(spec_of(base, "q_proj"), 1)
    name = next(iter(good.tensors))
    for tensors in (
        {**good.tensors, name: np.zeros((1, 2), np.float32)},
        {k: v for k, v in good.tensors.items() if k != name},
    ):
        with pytest.raises(AdapterError, match=r"must have shape \(4, 64\), got"):
            check_stack((Adapter(good.spec, tensors),), base.facts.hash)


def test_a_module_that_is_missing_or_not_linear_is_refused(base: LoadedBase) -> None:
    level = stacked([(random_adapter(spec_of(base, "q_proj"), 1),)])[0]
    factors = next(iter(level.factors.values()))
    for name, message in (("model.nothing", "has no module"), ("model.norm", "only nn.Linear")):
        with (
            pytest.raises(BaseModelError, match=message),
            adapted(base.model, [Level({name: factors}, 1.0, level.slots)]),
        ):
            pass
    assert not any(module._forward_hooks for module in base.model.modules())


def test_a_model_whose_layers_do_not_see_rows_of_tokens_is_refused(base: LoadedBase) -> None:
    level = stacked([(random_adapter(spec_of(base, "q_proj"), 1),)] * 3)[0]
    with pytest.raises(BaseModelError, match="cannot be adapted"):
        last_logits(base, some_rows(2), (level,))


def test_a_convolution_in_place_of_a_linear_layer_is_refused(base: LoadedBase) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    level = stacked([(random_adapter(spec_of(base, "q_proj"), 1),)])[0]
    factors = {"transformer.h.0.attn.c_attn": next(iter(level.factors.values()))}
    with (
        pytest.raises(BaseModelError, match="is a Conv1D"),
        adapted(model, [Level(factors, 1.0, level.slots)]),
    ):
        pass


def test_a_model_without_an_output_head_is_refused(base: LoadedBase) -> None:
    backbone = base.model.get_submodule("model")
    assert isinstance(backbone, nn.Module)
    with pytest.raises(BaseModelError, match="has no output head"):
        logits_at(
            backbone,  # type: ignore[arg-type]
            some_rows(1),
            Outputs(torch.tensor([0]), torch.tensor([0])),
        )
