"""What can be said of a base before its weights are read: its path, and whether it has a chat template."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedoppu.client.llama import fast_path
from fedoppu.common.base import BaseFacts
from fedoppu.common.errors import BaseModelError, UsageError


def generic_because(facts: BaseFacts) -> str | None:
    """Why training and answering on a base take the generic path, or None if they take the fast one.

    It is the question that the engine asks (`llama.fast_path`), of a model without weights. Only LoRA
    adapters take the fast path.

    Raises:
        BaseModelError: transformers cannot build such a model.
    """
    try:
        config = cast(Any, AutoConfig).from_pretrained(facts.path, local_files_only=True)
        with torch.device("meta"):
            model = cast(Any, AutoModelForCausalLM).from_config(config)
    except Exception as error:  # transformers raises many kinds for what it cannot read
        reason = " ".join(str(error).split())[:300]
        raise BaseModelError(
            f"base {facts.name} cannot be built: {type(error).__name__}: {reason}",
            hint="its config.json must be that of a causal language model of transformers",
        ) from error
    return fast_path(cast(PreTrainedModel, model))


def require_chat_template(facts: BaseFacts) -> None:
    """Finds before any work what the first prompt would: `prompt.style=chat` takes a template.

    Raises:
        UsageError: The base's tokenizer has none.
    """
    if (facts.path / "chat_template.jinja").exists():
        return
    if not _tokenizer_config(facts.path).get("chat_template"):
        raise UsageError(
            f"prompt.style=chat takes a base with a chat template, and {facts.name} has none",
            hint="set prompt.style=plain",
        )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return dict(json.loads(path.read_bytes())) if path.exists() else {}
