"""(IA)^3 and prompt adapters as arrays: what they scale or hold, flat vectors, digests, folders, settings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.adapter_files import load_adapter, save_adapter
from fedoppu.common.adapter_kinds import (
    VIRTUAL,
    Ia3Spec,
    PromptSpec,
    Scaled,
    initial_ia3,
    initial_prompt,
)
from fedoppu.common.adapters import Adapter, AdapterSpec, Spec
from fedoppu.common.base import read_base
from fedoppu.common.config import load_run_config
from fedoppu.common.defaults import federation, personal_settings, personal_spec
from fedoppu.common.errors import AdapterError, UsageError

IA3 = Ia3Spec("beef", (Scaled("a.k_proj", 3), Scaled("a.v_proj", 3)), (Scaled("a.down_proj", 5),))
PROMPT = PromptSpec("beef", 4, 6)
SPECS: list[Spec] = [IA3, PROMPT]


def some(spec: Spec) -> Adapter:
    vector = np.random.default_rng(1).normal(size=spec.num_params()).astype(np.float32)
    return Adapter(spec, spec.unflatten(vector), "cafe")


@given(
    st.lists(st.integers(1, 5), max_size=3),
    st.lists(st.integers(1, 5), max_size=3),
    st.integers(1, 6),
)
def test_flatten_undoes_unflatten(outputs: list[int], inputs: list[int], tokens: int) -> None:
    scaled = [tuple(Scaled(f"m{i}", n) for i, n in enumerate(side)) for side in (outputs, [])]
    fed = tuple(Scaled(f"f{i}", n) for i, n in enumerate(inputs))
    for spec in (Ia3Spec("beef", scaled[0], fed), PromptSpec("beef", tokens, 3)):
        if not spec.num_params():
            continue
        vector = np.arange(spec.num_params(), dtype=np.float32)
        tensors = spec.unflatten(vector)
        assert {name: tensor.shape for name, tensor in tensors.items()} == spec.shapes()
        assert np.array_equal(spec.flatten(tensors), vector)


@pytest.mark.parametrize("spec", SPECS)
def test_a_vector_of_another_length_is_refused(spec: Spec) -> None:
    with pytest.raises(AdapterError, match=r"must have shape \(\d+,\), got \(2,\)"):
        spec.unflatten(np.zeros(2, np.float32))


def test_ia3_scales_outputs_and_the_inputs_of_feedforward_modules(tiny_base: Path) -> None:
    spec = Ia3Spec.from_base(
        read_base(tiny_base), ("k_proj", "v_proj", "down_proj"), feedforward=("down_proj", "x")
    )
    assert {one.name.rsplit(".", 1)[-1]: one.features for one in spec.outputs} == {
        "k_proj": 32,
        "v_proj": 32,
    }
    assert [one.features for one in spec.inputs] == [160, 160]
    assert set(spec.shapes().values()) == {(32, 1), (1, 160)}


def test_fresh_ones_are_one_and_fresh_tokens_are_those_that_were_given() -> None:
    assert set(IA3.flatten(initial_ia3(IA3).tensors)) == {1.0}
    given_tokens = np.arange(24, dtype=np.float32).reshape(4, 6)
    fresh = initial_prompt(PROMPT, given_tokens, parent="cafe")
    assert np.array_equal(fresh.tensors[VIRTUAL], given_tokens)
    assert fresh.parent == "cafe"


def test_the_digest_tells_a_scaled_input_from_a_scaled_output() -> None:
    wide = Ia3Spec("beef", (), (Scaled("a", 2),))
    tall = Ia3Spec("beef", (Scaled("a", 2),), ())
    assert initial_ia3(wide).digest() != initial_ia3(tall).digest()


@pytest.mark.parametrize("spec", SPECS)
def test_an_adapter_survives_the_disk_byte_for_byte(spec: Spec, tmp_path: Path) -> None:
    adapter = some(spec)
    save_adapter(tmp_path / "me", adapter, base_name="some base")
    loaded = load_adapter(tmp_path / "me")
    assert (loaded.spec, loaded.parent, loaded.digest()) == (spec, "cafe", adapter.digest())
    card = (tmp_path / "me" / "README.md").read_text()
    assert f"{spec.num_params()} parameters" in card


DAMAGES: list[tuple[Spec, dict[str, Any], str]] = [
    (IA3, {"peft_type": "VERA"}, "peft_type must be LORA, IA3 or PROMPT_TUNING, got 'VERA'"),
    (IA3, {"feedforward_modules": None}, "must hold a list feedforward_modules"),
    (IA3, {"feedforward_modules": []}, r"a\.down_proj\.l must have shape \(5, 1\), got \(1, 5\)"),
    (PROMPT, {"num_virtual_tokens": "4"}, "must hold numbers num_virtual_tokens and token_dim"),
    (PROMPT, {"num_virtual_tokens": 5}, r"must have shape \(5, 6\), got \(4, 6\)"),
    (PROMPT, {"peft_type": "IA3", "feedforward_modules": []}, "a tensor virtual_tokens that"),
    (IA3, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": 6}, "has no tensor"),
]


@pytest.mark.parametrize(("spec", "changes", "message"), DAMAGES)
def test_a_damaged_configuration_is_refused_and_says_what_is_wrong(
    spec: Spec, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "me", some(spec), base_name="x")
    file = tmp_path / "me" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "me")


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["personal.adapter.tokens=3"], "kind=lora has no tokens, got 3"),
        (["personal.adapter.kind=ia3", "personal.adapter.rank=4"], "kind=ia3 has no rank, got 4"),
        (
            ["personal.adapter.kind=prompt", "personal.adapter.targets=q_proj"],
            "kind=prompt has no targets",
        ),
        (
            ["personal.adapter.tokens=0"],
            "personal.adapter.tokens must be between 1 and 4096, got 0",
        ),
        (["personal.adapter.kind=vera"], "kind must be one of lora, ia3, prompt, got vera"),
        (["shared.adapter.kind=ia3"], "shared.adapter takes no kind, got ia3"),
        (["device=cuda", "engine=ray"], "device=cuda is for engine=local, got engine=ray"),
        (["device=tpu"], "device must be one of auto, cpu, cuda, got tpu"),
    ],
)
def test_what_a_kind_or_a_device_does_not_have_is_refused(
    settings: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_run_config(settings)


def test_the_kind_of_the_personal_adapter_changes_nothing_of_the_federation(
    tiny_base: Path,
) -> None:
    facts = read_base(tiny_base)
    runs = [
        load_run_config([f"personal.adapter.kind={kind}"]) for kind in ("lora", "ia3", "prompt")
    ]
    canonical = {
        federation(
            run, facts, task="LaMP_3", k=0, profile="none", base_users=60, seed=0
        ).canonical()
        for run in runs
    }
    assert len(canonical) == 1
    made = [personal_settings(run, facts, "LaMP_3") for run in runs]
    specs = [personal_spec(facts, one.adapter) for one in made]
    assert [type(spec) for spec in specs] == [AdapterSpec, Ia3Spec, PromptSpec]


@pytest.mark.parametrize(
    ("kind", "parameters", "rate"),
    [("ia3", 10**6, 3e-2), ("ia3", 10**9, 3e-3), ("prompt", 10**6, 3e-2), ("prompt", 10**9, 3e-2)],
)
def test_a_kind_has_a_learning_rate_of_its_own(
    tiny_base: Path, kind: str, parameters: int, rate: float
) -> None:
    facts = replace(read_base(tiny_base), num_parameters=parameters)
    run = load_run_config([f"personal.adapter.kind={kind}"])
    assert personal_settings(run, facts, "LaMP_3").training.learning_rate == rate


def test_a_learning_rate_that_is_set_is_kept(tiny_base: Path) -> None:
    run = load_run_config(["personal.adapter.kind=ia3", "personal.training.learning_rate=0.5"])
    assert personal_settings(run, read_base(tiny_base), "LaMP_3").training.learning_rate == 0.5
    other = replace(run.personal.adapter, targets=("q_proj",))
    spec = personal_spec(read_base(tiny_base), other)
    assert isinstance(spec, Ia3Spec)
    assert not spec.inputs
