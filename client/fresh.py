"""A fresh personal adapter of any kind: a function of the base, the settings and the owner's root."""

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.model import LoadedBase
from fedoppu.common.adapter_kinds import Ia3Spec, PromptSpec, initial_ia3, initial_prompt
from fedoppu.common.adapter_settings import PersonalAdapterSettings
from fedoppu.common.adapters import Adapter, AdapterSpec, initial_adapter
from fedoppu.common.defaults import personal_spec
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness


def fresh_adapter(
    base: LoadedBase,
    settings: PersonalAdapterSettings,
    owner: Randomness,
    *,
    parent: str | None = None,
) -> Adapter:
    """What training of a personal adapter starts from.

    A LoRA and (IA)^3 change nothing yet; virtual tokens begin as embeddings of the base's own.

    Args:
        base: The frozen base.
        settings: Without a null that the kind needs.
        owner: The owner's root.
        parent: Digest of the shared adapter under it.

    Raises:
        BaseModelError: The base lacks a module that the settings name, or has no room.
        UsageError: The text that virtual tokens begin at has no token.
    """
    spec = personal_spec(base.facts, settings)
    if isinstance(spec, PromptSpec):
        tokens = _first_tokens(base, spec.tokens, settings.text, owner)
        return initial_prompt(spec, base.embeddings(tokens), parent=parent)
    if isinstance(spec, Ia3Spec):
        return initial_ia3(spec, parent=parent)
    if isinstance(spec, AdapterSpec):
        return initial_adapter(spec, owner, "personal", parent=parent)
    raise UsageError(f"personal.adapter.kind must be lora, ia3 or prompt, got {settings.kind}")


def _first_tokens(base: LoadedBase, count: int, text: str, owner: Randomness) -> NDArray[np.int64]:
    """The tokens whose embeddings virtual ones begin at: drawn, or a text's, repeated and cut."""
    if not text:
        return owner.stream("adapter", "virtual_tokens").integers(0, base.vocab_size, count)
    tokens = base.tokenizer.encode(text)
    if not tokens:
        raise UsageError(
            "personal.adapter.text must hold at least one token", hint="leave it out to draw tokens"
        )
    return np.resize(np.array(tokens, np.int64), count)
