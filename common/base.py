"""Facts of a base model, read from its files without torch: its hash and its linear layers.

Base hash = SHA-256 over config, tokenizer and the sorted (name, dtype, shape, bytes) of the tensors; for a GGUF file,
of the file itself (design decision 12). Two folders with the same hash compute the same.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedoppu.common.errors import BaseModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
NOT_ADAPTED = ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out")


@dataclass(frozen=True)
class BaseFacts:
    """What must be known of a base before it is loaded.

    Attributes:
        name: What the user called it: "pocket", a folder, a GGUF file.
        path: The transformers folder that holds it.
        hash: Base hash, hex.
        num_parameters: Number of its parameters.
        max_tokens: Longest context it was made for, tokens.
        linear: Module name of each linear layer that can be adapted: (out_features, in_features).
        width: Of an input embedding; 0 if none of the tensors has the name of one.
    """

    name: str
    path: Path
    hash: str
    num_parameters: int
    max_tokens: int
    linear: Mapping[str, tuple[int, int]]
    width: int = 0


def read_base(path: Path, *, name: str = "", hash_of: Path | None = None) -> BaseFacts:
    """Reads the facts of a transformers folder with safetensors.

    Args:
        path: The folder.
        name: What the user called it; the path by default.
        hash_of: The GGUF file that the folder was made from, if any: then its bytes are the hash.

    Raises:
        BaseModelError: A file is missing or not what it should be; the message names it.
    """
    config = _read_json(path / "config.json")
    headers = {file: _header(file) for file in _safetensors(path)}
    tensors = {
        key: tuple(entry["shape"])
        for header, _ in headers.values()
        for key, entry in header.items()
    }
    linear = {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in sorted(tensors.items())
        if key.endswith(".weight") and len(shape) == 2 and key.split(".")[-2] not in NOT_ADAPTED
    }
    digest = _file_hash(hash_of) if hash_of else _folder_hash(path, headers)
    count = sum(_size(shape) for shape in tensors.values())
    return BaseFacts(
        name or str(path),
        path,
        digest,
        count,
        _max_tokens(config, path),
        linear,
        _width(tensors),
    )


def _width(tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Of the input embedding: the first tensor that has the name of one."""
    names = {f"{name}.weight" for name in EMBEDDINGS}
    shapes = [
        shape for key, shape in sorted(tensors.items()) if ".".join(key.split(".")[-2:]) in names
    ]
    return shapes[0][1] if shapes else 0


def _max_tokens(config: Mapping[str, Any], path: Path) -> int:
    value = config.get("max_position_embeddings", 1024)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BaseModelError(
            f"{path / 'config.json'}: max_position_embeddings must be a positive whole number, "
            f"got {value!r}"
        )
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"base {path.parent} has no {path.name}", hint="base= takes a transformers folder"
        ) from None
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BaseModelError(f"{path} must hold an object, got a {type(content).__name__}")
    return content


def _safetensors(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise BaseModelError(
            f"base {path} has no .safetensors file", hint="convert it with save_pretrained"
        )
    return files


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file without its metadata, and where its tensors start, bytes."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= file.stat().st_size else None
        if not isinstance(header, dict):
            raise ValueError("no header")
    except (ValueError, struct.error) as error:
        raise BaseModelError(f"{file} is not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def _size(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _folder_hash(path: Path, headers: Mapping[Path, tuple[dict[str, Any], int]]) -> str:
    digest = hashlib.sha256(json.dumps(_read_json(path / "config.json"), sort_keys=True).encode())
    for name in TOKENIZER_FILES:
        digest.update((path / name).read_bytes() if (path / name).exists() else b"")
    located = sorted((key, file) for file, (header, _) in headers.items() for key in header)
    for key, file in located:
        header, start = headers[file]
        digest.update(f"{key} {header[key]['dtype']} {header[key]['shape']}".encode())
        for block in _blocks(file, start, header[key]["data_offsets"]):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path, start: int, offsets: list[int]) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start + offsets[0])
        left = offsets[1] - offsets[0]
        while left > 0:
            block = stream.read(min(left, 1 << 22))
            if not block:
                raise BaseModelError(f"{file} is cut short: {left} bytes of a tensor are missing")
            yield block
            left -= len(block)


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
