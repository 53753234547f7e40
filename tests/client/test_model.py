"""A base is found by name, loaded frozen, and its tokenizer reduced to what prompts need."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import LlamaConfig, LlamaForCausalLM

from fedoppu.client import gguf, model
from fedoppu.client.gguf import cache_folder, dequantized
from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.common.errors import BaseModelError, UsageError

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def edited(tiny_base: Path, folder: Path, **changes: object) -> Path:
    """A copy of the base with another tokenizer_config.json; None removes a key."""
    shutil.copytree(tiny_base, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


def with_chat(tiny_base: Path, folder: Path) -> LoadedBase:
    """The base with a chat template whose turns end with a token that is not its eos."""
    edited(tiny_base, folder, chat_template=CHAT)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    end = {"id": len(tokenizer["model"]["vocab"]), "content": "<|end|>"}
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | end)
    file.write_text(json.dumps(tokenizer))
    return load_base(resolve_base(str(folder)))


def test_a_folder_is_resolved_and_loaded_frozen(tiny_base: Path) -> None:
    base = load_base(resolve_base(str(tiny_base)))
    assert (base.facts.name, base.facts.path) == (str(tiny_base), tiny_base)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert base.vocab_size == cast(Any, base.model.config).vocab_size
    assert sum(p.numel() for p in base.model.parameters()) == base.facts.num_parameters


def test_the_linear_layers_of_the_facts_are_those_of_the_model(tiny_base: Path) -> None:
    base = load_base(resolve_base(str(tiny_base)))
    for name, (rows, columns) in base.facts.linear.items():
        module = base.model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear)
        assert (module.out_features, module.in_features) == (rows, columns)


def test_the_base_can_be_loaded_in_bfloat16(tiny_base: Path) -> None:
    base = load_base(resolve_base(str(tiny_base)), dtype="bfloat16")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_pocket_is_the_folder_beside_the_module(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(model.__file__).parent / "pocket" == model.POCKET
    monkeypatch.setattr(model, "POCKET", tiny_base)
    facts = resolve_base("pocket")
    assert (facts.name, facts.path) == ("pocket", tiny_base)
    monkeypatch.setattr(model, "POCKET", tmp_path / "none")
    with pytest.raises(UsageError, match="there is no base pocket"):
        resolve_base("pocket")


def test_what_is_not_there_is_a_usage_error_and_what_is_no_base_a_base_error(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=r"there is no base .*nothing") as missing:
        resolve_base(str(tmp_path / "nothing"))
    assert missing.value.exit_code == 2
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        resolve_base(str(tmp_path))
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(UsageError, match="neither a folder nor a"):
        resolve_base(str(tmp_path / "file.txt"))


def test_a_folder_that_transformers_cannot_load_says_why(tiny_base: Path, tmp_path: Path) -> None:
    folder = edited(tiny_base, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    facts = resolve_base(str(folder))
    with pytest.raises(BaseModelError, match=r"cannot be loaded: .*nonesuch"):
        load_base(facts)


@pytest.mark.parametrize("text", ["", "my headline praises\ncategory: ünï", "a </s> b <pad>"])
def test_text_survives_the_tokenizer_without_becoming_a_command(tiny_base: Path, text: str) -> None:
    tokenizer = load_base(resolve_base(str(tiny_base))).tokenizer
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(tokens)


def test_decoding_leaves_special_tokens_out(tiny_base: Path) -> None:
    tokenizer = load_base(resolve_base(str(tiny_base))).tokenizer
    tokens = tokenizer.encode("my headline")
    assert tokenizer.decode([1, *tokens, tokenizer.eos, tokenizer.pad]) == "my headline"


def test_special_tokens_that_a_base_lacks(tiny_base: Path, tmp_path: Path) -> None:
    plain = load_base(resolve_base(str(tiny_base))).tokenizer
    assert (plain.bos, plain.eos, plain.pad) == (1, 2, 0)
    folder = edited(tiny_base, tmp_path / "lean", bos_token=None, pad_token=None)
    lean = load_base(resolve_base(str(folder))).tokenizer
    assert (lean.bos, lean.eos, lean.pad) == (None, 2, 2)
    folder = edited(tiny_base, tmp_path / "endless", eos_token=None)
    with pytest.raises(BaseModelError, match="has no end token"):
        load_base(resolve_base(str(folder)))


def test_a_chat_model_ends_with_the_token_that_ends_its_turn(
    tiny_base: Path, tmp_path: Path
) -> None:
    tokenizer = with_chat(tiny_base, tmp_path / "chat").tokenizer
    prompt = tokenizer.chat("my headline")
    assert tokenizer.eos not in (2, *tokenizer.encode("<|end|>"))
    assert prompt.count(tokenizer.eos) == 1
    assert tokenizer.decode(prompt) == "<|user|>my headline\n<|assistant|>"


def test_a_base_without_a_chat_template_says_so(tiny_base: Path) -> None:
    tokenizer = load_base(resolve_base(str(tiny_base))).tokenizer
    with pytest.raises(BaseModelError, match="has no chat template"):
        tokenizer.chat("hello")


def write_gguf(file: Path, *, architecture: str = "llama") -> LlamaForCausalLM:
    """A one-layer Llama as GGUF, and the model it was written from."""
    words = ["<unk>", "<s>", "</s>", *(chr(97 + index) for index in range(26)), "▁"]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        source = LlamaForCausalLM(config)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * (len(words) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in source.state_dict().items():
        writer.add_tensor(gguf_name(name), rotated(name, tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source


def rotated(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """GGUF keeps a rotary pair's halves side by side in the query and key weights of a Llama."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    return tensor.view(2, tensor.shape[0] // 2, -1).swapaxes(0, 1).reshape(tensor.shape)


def gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_gguf_file_is_dequantized_once_and_computes_what_it_was_written_from(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_gguf(cached / "m.gguf")
    facts = resolve_base(str(cached / "m.gguf"))
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        found = load_base(facts).model(tokens).logits
        expected = source(tokens).logits
    assert torch.allclose(found, expected, atol=2e-3)
    monkeypatch.setattr(gguf, "_convert", None)  # a second conversion would fail
    assert resolve_base(str(cached / "m.gguf")) == facts


def test_the_hash_of_a_gguf_base_is_that_of_its_file(cached: Path) -> None:
    write_gguf(cached / "m.gguf")
    first = resolve_base(str(cached / "m.gguf"))
    shutil.copy(cached / "m.gguf", cached / "again.gguf")
    assert resolve_base(str(cached / "again.gguf")).hash == first.hash
    data = bytearray((cached / "m.gguf").read_bytes())
    data[-1] ^= 1
    (cached / "m.gguf").write_bytes(data)
    changed = resolve_base(str(cached / "m.gguf"))
    assert changed.hash != first.hash
    assert changed.path != first.path


def test_a_file_that_is_no_gguf_or_of_an_unknown_model_is_refused_and_leaves_nothing(
    cached: Path,
) -> None:
    (cached / "m.gguf").write_bytes(np.arange(40).tobytes())
    with pytest.raises(BaseModelError, match="is not a GGUF file"):
        dequantized(cached / "m.gguf")
    write_gguf(cached / "odd.gguf", architecture="nonesuch")
    with pytest.raises(BaseModelError, match="cannot be dequantized"):
        dequantized(cached / "odd.gguf")
    assert list(cache_folder().rglob("*.safetensors")) == []


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "fedoppu"
