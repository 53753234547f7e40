"""GGUF files, the form in which many people already have a model on disk, as transformers folders.

A file is dequantized once by transformers and `gguf` into a cached folder, keyed by the file's
hash. The weights are stored as float16: its rounding (2^-11) is far below that of the quantization
(a 4-bit block has 16 levels), and it takes half the room of float32.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedoppu.common.commit import commit_folder
from fedoppu.common.errors import BaseModelError

MAGIC = b"GGUF"


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/fedoppu, or ~/.cache/fedoppu."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fedoppu"


def dequantized(file: Path) -> Path:
    """The transformers folder of a GGUF file; made at the first call, durable, whole or not at all.

    Raises:
        BaseModelError: It is no GGUF file, or of a model that transformers cannot read.
    """
    folder = cache_folder() / "bases" / f"{file.stem}-{_digest(file)[:16]}"
    if not folder.exists():
        with commit_folder(folder) as temporary:
            _convert(file, temporary)
    return folder


def _digest(file: Path) -> str:
    if not file.is_file():
        raise BaseModelError(f"{file} is not a GGUF file: it is a folder")
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise BaseModelError(f"{file} is not a GGUF file: it does not start with GGUF")
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(file: Path, folder: Path) -> None:
    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(str(file.parent), **source)
        loaded = AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.float32, **source
        )
    except Exception as error:  # transformers raises many kinds for what it does not support
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BaseModelError(
            f"{file} cannot be dequantized: {reason}",
            hint="convert it to a transformers folder and give that as base",
        ) from error
    # the loaded model still calls itself quantized: save the same weights under a plain config
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    plain: Any = type(loaded)(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
