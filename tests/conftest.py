"""What the tests of several parts share: no telemetry, no network, and one small random base."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# machines are shared: how long an example takes says nothing; CI draws the same examples each time
settings.register_profile(
    "fedoppu",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("fedoppu")

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)


def _sentences() -> Iterator[str]:
    subjects = ("the small film", "an old article", "this review", "my headline", "a new paper")
    verbs = ("praises", "explains", "rejects", "repeats", "forgets")
    objects = ("the taste of good coffee.", "a war of 1914!", "how cities grow?", "3 of 5 stars:")
    for subject in subjects:
        for verb in verbs:
            for thing in objects:
                yield f"{subject} {verb} {thing}\ncategory: {thing.split()[-1]}"


def _write_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def _write_model(folder: Path, vocab_size: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():  # larger: logits differ clearly
            if parameter.dim() == 2:
                parameter.data.normal_(0.0, 0.08)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama of width 64 with a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    folder.mkdir()
    _write_model(folder, _write_tokenizer(folder))
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one small finished run of the main job; read it, and write nothing into it."""
    from tests.small_run import finish, settings

    return finish(settings(f"out={tmp_path_factory.mktemp('runs') / 'small'}"))
