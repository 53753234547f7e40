"""Loading a base: from a name to its facts, and from the facts to a model that nobody changes.

Nothing here reaches the network: a base is the embedded one, a folder, or a GGUF file on this
machine. A `LoadedBase` is immutable by contract: trainer, predictor and a serving daemon share it,
and adapters are arguments of a call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from fedoppu.client.devices import CPU, as_array, on_device
from fedoppu.client.gguf import dequantized
from fedoppu.common.base import BaseFacts, read_base
from fedoppu.common.errors import BaseModelError, UsageError

Dtype = Literal["float32", "bfloat16"]
POCKET = Path(__file__).parent / "pocket"
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# in bf16 on a CPU, scaled_dot_product_attention is 2-5 times slower than attention written out
ATTENTION: dict[Dtype, str] = {"float32": "sdpa", "bfloat16": "eager"}


class BaseTokenizer:
    """A base's tokenizer, reduced to what prompts and decoding need.

    Attributes:
        bos: Token that begins a text, or None if the base has none.
        eos: Token that ends an answer: for a chat model the one that ends the assistant's turn.
        pad: Token that fills a batch; the end token where the base has none.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        """Wrap a transformers tokenizer.

        Args:
            tokenizer: Any transformers tokenizer.
            name: Of the base, for messages.

        Raises:
            BaseModelError: It has no end token, so an answer could never end.
        """
        self._tokenizer = tokenizer
        self._name = name
        eos = self._end_of_turn() if tokenizer.chat_template else tokenizer.eos_token_id
        if eos is None:
            raise BaseModelError(
                f"the tokenizer of base {name} has no end token",
                hint="set eos_token in its tokenizer_config.json",
            )
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int = int(eos)
        pad = tokenizer.pad_token_id
        self.pad: int = self.eos if pad is None else int(pad)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens; one that the text spells out stays text."""
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def chat(self, user_text: str) -> list[int]:
        """Token ids of a user's turn in the base's chat template, up to where the answer starts.

        Raises:
            BaseModelError: The base has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise BaseModelError(
                f"base {self._name} has no chat template", hint="set prompt.style=plain"
            )
        return self._render([{"role": "user", "content": user_text}], prompt=True)

    def _render(self, turns: list[dict[str, str]], *, prompt: bool) -> list[int]:
        rendered = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=prompt, return_dict=True
        )
        return list(rendered["input_ids"])

    def _end_of_turn(self) -> int | None:
        """The first special token after an assistant's answer in the chat template."""
        user = {"role": "user", "content": "a"}
        start = len(self._render([user], prompt=True))
        turn = self._render([user, {"role": "assistant", "content": "a"}], prompt=False)[start:]
        added = self._tokenizer.added_tokens_decoder
        special = {token for token, kind in added.items() if kind.special}
        eos: int | None = self._tokenizer.eos_token_id
        return next((token for token in turn if token in special), eos)


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base in memory.

    Attributes:
        facts: What it is.
        model: In eval mode, no parameter requires a gradient; never modified afterwards.
        tokenizer: Its tokenizer.
    """

    facts: BaseFacts
    model: PreTrainedModel = field(repr=False)
    tokenizer: BaseTokenizer = field(repr=False)

    @property
    def device(self) -> torch.device:
        """Where it computes: every tensor of a step lies there."""
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids are below it."""
        return int(cast(Any, self.model).get_input_embeddings().weight.shape[0])

    def embeddings(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(tokens, width) float32 input embeddings of some tokens."""
        table = cast(Any, self.model).get_input_embeddings()
        with torch.no_grad():
            found = table(on_device(tokens, self.device))
        rows: NDArray[np.float32] = as_array(found.float())
        return rows


def resolve_base(name: str) -> BaseFacts:
    """Finds a base and reads its facts; nothing is loaded.

    Args:
        name: "pocket" (the embedded base), a transformers folder, or a .gguf file.

    Raises:
        UsageError: There is no such folder or file.
        BaseModelError: It is there, and is not a base.
    """
    if name == "pocket":
        return read_base(_existing(POCKET, name), name=name)
    path = _existing(Path(name).expanduser(), name)
    if path.suffix == ".gguf":
        return read_base(dequantized(path), name=name, hash_of=path)
    if not path.is_dir():
        raise UsageError(f"base {name} is neither a folder nor a .gguf file", hint=_BASE_HINT)
    return read_base(path, name=name)


_BASE_HINT = "base= takes pocket, a transformers folder, or a .gguf file"


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise UsageError(f"there is no base {name}: no such file or folder", hint=_BASE_HINT)
    return path


def load_base(
    facts: BaseFacts, *, dtype: Dtype = "float32", device: torch.device = CPU
) -> LoadedBase:
    """Loads a base for inference and for training adapters on it.

    Args:
        facts: From `resolve_base`.
        dtype: Of the products with the frozen base; adapters are float32 in any case.
        device: Where it computes, as `devices.chosen_device` finds it.

    Raises:
        BaseModelError: transformers cannot load the folder; the message says why.
    """
    try:
        with _quiet():
            tokenizer = cast(Any, AutoTokenizer).from_pretrained(facts.path, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                facts.path,
                dtype=DTYPES[dtype],
                local_files_only=True,
                attn_implementation=ATTENTION[dtype] if device == CPU else "sdpa",
            )
    except Exception as error:  # transformers raises many kinds for what it cannot read
        reason = " ".join(str(error).split())[:300]
        raise BaseModelError(
            f"base {facts.name} cannot be loaded: {type(error).__name__}: {reason}",
            hint="its files must be those of one model, as save_pretrained writes them",
        ) from error
    cast(Any, model).to(device).requires_grad_(False).train(False)
    return LoadedBase(facts, model, BaseTokenizer(tokenizer, name=facts.name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading draws no progress bars of its own for the time of the block."""
    bars = cast(Any, logging)
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
