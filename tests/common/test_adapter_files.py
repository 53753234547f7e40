"""An adapter on disk is a PEFT folder that anyone can load, and says what it belongs to."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from fedoppu.common.adapter_files import load_adapter, save_adapter
from fedoppu.common.adapters import Adapter, AdapterSpec, Target
from fedoppu.common.base import read_base
from fedoppu.common.errors import AdapterError

SPEC = AdapterSpec("beef", (Target("a.q_proj", 6, 4), Target("b.v_proj", 3, 5)), rank=2, alpha=4.0)
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "fedoppu.json"]


def random_adapter(spec: AdapterSpec = SPEC, parent: str | None = None) -> Adapter:
    draw = np.random.default_rng(1)
    tensors = {
        name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in spec.shapes().items()
    }
    return Adapter(spec, tensors, parent)


@settings(max_examples=20)
@given(
    rank=st.integers(1, 4),
    alpha=st.one_of(st.integers(1, 32).map(float), st.floats(0.01, 100.0)),
    parent=st.none() | st.just("cafe"),
)
def test_an_adapter_survives_the_disk_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float, parent: str | None
) -> None:
    folder = tmp_path_factory.mktemp("adapters") / "me"
    adapter = random_adapter(replace(SPEC, rank=rank, alpha=alpha), parent)
    save_adapter(folder, adapter, base_name="some base")
    loaded = load_adapter(folder)
    assert (loaded.spec, loaded.parent) == (adapter.spec, adapter.parent)
    assert loaded.digest() == adapter.digest()
    assert sorted(file.name for file in folder.iterdir()) == FILES


def test_saving_replaces_an_adapter_whole(tmp_path: Path) -> None:
    save_adapter(tmp_path / "me", random_adapter(), base_name="x")
    newer = random_adapter(replace(SPEC, rank=1))
    save_adapter(tmp_path / "me", newer, base_name="x")
    assert load_adapter(tmp_path / "me").digest() == newer.digest()
    assert [file.name for file in tmp_path.iterdir()] == ["me"]


def test_a_loaded_adapter_is_refused_on_another_base_or_shared_adapter(tmp_path: Path) -> None:
    save_adapter(tmp_path / "me", random_adapter(parent="cafe"), base_name="x")
    loaded = load_adapter(tmp_path / "me")
    loaded.require(base_hash="beef", parent="cafe")
    with pytest.raises(AdapterError, match="made for base beef, not for feed"):
        loaded.require(base_hash="feed", parent="cafe")
    with pytest.raises(AdapterError, match="trained on shared adapter cafe, not on none"):
        loaded.require(base_hash="beef", parent=None)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_loads_the_folder_and_computes_the_same(tiny_base: Path, tmp_path: Path) -> None:
    spec = AdapterSpec.from_base(read_base(tiny_base), ("all-linear",), rank=3, alpha=6.0)
    adapter = random_adapter(spec)
    save_adapter(tmp_path / "me", adapter, base_name=str(tiny_base))
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    merged: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    for target in spec.targets:
        a, b = (torch.tensor(adapter.tensors[f"{target.name}.{f}"]) for f in "AB")
        merged.get_submodule(target.name).weight.data += spec.scale * b @ a
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = model(tokens).logits
        found = PeftModel.from_pretrained(model, str(tmp_path / "me"))(tokens).logits
        expected = merged(tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - plain).abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_folder_that_peft_made_is_told_from_ours(tiny_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(tiny_base))
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(AdapterError, match=r"has no fedoppu\.json: it was not made by fedoppu"):
        load_adapter(tmp_path / "theirs")


def test_the_model_card_names_base_parent_and_digest(tmp_path: Path) -> None:
    adapter = random_adapter(parent="cafe")
    save_adapter(tmp_path / "me", adapter, base_name="some base")
    card = (tmp_path / "me" / "README.md").read_text()
    assert card.startswith("---\nbase_model: some base\n")
    for words in ("`cafe`", "`beef`", adapter.digest(), "rank 2, alpha 4, 2 adapted matrices"):
        assert words in card


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))

    return change


def edit_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


Q_A = "base_model.model.a.q_proj.lora_A.weight"
Q_B = "base_model.model.a.q_proj.lora_B.weight"
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (edit_tensors(lambda t: {**t, Q_A: t[Q_A] + 1}), "was changed: its digest is"),
    (edit_json("fedoppu.json", digest="00"), "its manifest says 00"),
    (edit_json("fedoppu.json", base_hash="feed"), "was changed: its digest is"),
    (edit_json("fedoppu.json", parent="cafe"), "was changed: its digest is"),
    (edit_json("adapter_config.json", lora_alpha=9), "was changed: its digest is"),
    (edit_json("fedoppu.json", format=2), "has format 2, this version reads 1"),
    (edit_json("fedoppu.json", base_hash=7), "must hold base_hash and parent as text"),
    (edit_json("adapter_config.json", r="2"), "must hold numbers r and lora_alpha"),
    (edit_json("adapter_config.json", r=5), r"must have shape \(5, 4\), got \(2, 4\)"),
    (edit_tensors(lambda t: {k: v for k, v in t.items() if k != Q_B}), r"no tensor a\.q_proj\.B"),
    (edit_tensors(lambda t: {}), "has no tensor at all"),
    (edit_tensors(lambda t: {**t, "odd": t[Q_A]}), "a tensor odd that no LoRA"),
    (edit_tensors(lambda t: {**t, Q_A: t[Q_A].astype("f8")}), "must be a float32 matrix, got f"),
    (write("adapter_model.safetensors", "text"), r"safetensors cannot be read"),
    (write("adapter_config.json", "{"), r"adapter_config\.json cannot be read"),
    (write("fedoppu.json", "[]"), "must hold an object, got a list"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "cannot be read"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be read"),
    (lambda folder: (folder / "fedoppu.json").unlink(), "was not made by fedoppu"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_folder_is_refused_and_says_what_is_wrong(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save_adapter(tmp_path / "me", random_adapter(), base_name="x")
    damage(tmp_path / "me")
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "me")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"there is no adapter folder .*none"):
        load_adapter(tmp_path / "none")
