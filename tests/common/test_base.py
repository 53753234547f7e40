"""Facts of a base are read from its files alone, and its hash binds whatever it computes with."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from fedoppu.common.base import read_base
from fedoppu.common.errors import BaseModelError


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_facts_of_a_folder(tiny_base: Path) -> None:
    facts = read_base(tiny_base, name="tiny")
    assert (facts.name, facts.path, facts.max_tokens) == ("tiny", tiny_base, 512)
    weights = load_file(tiny_base / "model.safetensors")
    assert facts.num_parameters == sum(weight.size for weight in weights.values())
    assert facts.linear["model.layers.1.mlp.down_proj"] == (64, 160)
    assert len(facts.linear) == 14
    assert read_base(tiny_base).name == str(tiny_base)


def test_the_hash_of_a_copy_is_the_same_whatever_else_lies_beside_it(
    tiny_base: Path, folder: Path
) -> None:
    (folder / "notes.txt").write_text("nothing of the model")
    assert read_base(folder).hash == read_base(tiny_base).hash


def test_the_hash_does_not_depend_on_how_the_tensors_are_spread_over_files(
    tiny_base: Path, folder: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, folder / "b.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, folder / "a.safetensors")
    assert read_base(folder).hash == read_base(tiny_base).hash


def test_the_hash_changes_with_the_config_the_tokenizer_and_each_bit_of_the_weights(
    tiny_base: Path, folder: Path
) -> None:
    hashes = {read_base(tiny_base).hash}
    edit(folder / "config.json", rms_norm_eps=1e-3)
    hashes.add(read_base(folder).hash)
    edit(folder / "tokenizer_config.json", model_max_length=9)
    hashes.add(read_base(folder).hash)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    hashes.add(read_base(folder).hash)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    hashes.add(read_base(folder).hash)
    assert len(hashes) == 5


def test_the_hash_may_be_that_of_the_file_that_a_folder_was_made_from(
    tiny_base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert read_base(tiny_base, hash_of=file).hash == expected


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"has no \.safetensors file"):
        read_base(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        read_base(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "must hold an object, got a list")]
)
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=message):
        read_base(folder)


@pytest.mark.parametrize(
    "data", [b"", b"abc", struct.pack("<Q", 10**12), struct.pack("<Q", 2) + b"[]", b"\0" * 64]
)
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(BaseModelError, match="is not a safetensors file"):
        read_base(folder)


def test_weights_that_are_cut_short_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BaseModelError, match="is cut short: 5 bytes"):
        read_base(folder)
