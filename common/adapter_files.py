"""Adapters on disk: a standard PEFT folder, and beside it a manifest of what it belongs to.

    adapter_config.json        what `peft.PeftModel.from_pretrained` reads
    adapter_model.safetensors  the tensors, float32, named as PEFT names them
    README.md                  a model card
    fedoppu.json               base hash, parent and digest: what PEFT's format cannot say

Not covered: secrecy. An adapter of one person's history is personal data; a device encrypts it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedoppu.common.adapters import Adapter
from fedoppu.common.commit import commit_folder
from fedoppu.common.errors import AdapterError
from fedoppu.common.peft_format import (
    CONFIG,
    WEIGHTS,
    described,
    own_name,
    peft_config,
    peft_name,
    read_spec,
)

MANIFEST = "fedoppu.json"
FORMAT = 1

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [{tag}, peft, fedoppu]
---
# {title} of {base}

- {shape}, {parameters} parameters
- base hash `{base_hash}`
- trained on top of: {parent}
- digest `{digest}`

It was trained with fedoppu. An adapter may reveal what it was trained on: treat one that was
trained on a person's history as that person's data.

`peft.PeftModel.from_pretrained` loads it; an adapter that was trained on top of another one needs
that one under it.
"""


def save_adapter(folder: Path, adapter: Adapter, *, base_name: str) -> None:
    """Writes an adapter as a PEFT folder, whole or not at all; an existing folder is replaced.

    Args:
        folder: Where to.
        adapter: What.
        base_name: Name or path of its base, for PEFT and for the model card.
    """
    digest = adapter.digest()
    with commit_folder(folder) as temporary:
        tensors = {
            peft_name(name): np.ascontiguousarray(adapter.tensors[name], np.float32)
            for name in adapter.spec.shapes()
        }
        # save_file has errors of its own for a full disk
        (temporary / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        _write_json(temporary / CONFIG, peft_config(adapter.spec, base_name))
        manifest = {
            "format": FORMAT,
            "base": base_name,
            "base_hash": adapter.spec.base_hash,
            "parent": adapter.parent,
            "digest": digest,
        }
        _write_json(temporary / MANIFEST, manifest)
        card = _card(adapter, base_name, digest)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def load_adapter(folder: Path) -> Adapter:
    """Reads an adapter that `save_adapter` wrote; `Adapter.require` then checks where it fits.

    Raises:
        AdapterError: A file is missing, malformed or was changed, or the folder is someone else's;
            the message says which.
    """
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}")
    if not (folder / MANIFEST).exists():
        raise AdapterError(
            f"{folder} has no {MANIFEST}: it was not made by fedoppu, so its base is not known",
            hint="train an adapter on this base instead",
        )
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise AdapterError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}"
        )
    base_hash, parent = manifest.get("base_hash"), manifest.get("parent")
    if not isinstance(base_hash, str) or not isinstance(parent, str | None):
        raise AdapterError(f"{folder / MANIFEST} must hold base_hash and parent as text")
    config, tensors = _read_json(folder / CONFIG), _read_tensors(folder / WEIGHTS)
    adapter = Adapter(read_spec(folder, base_hash, config, tensors=tensors), tensors, parent)
    if adapter.digest() != manifest.get("digest"):
        raise AdapterError(
            f"{folder} was changed: its digest is {adapter.digest()[:12]}, its manifest says"
            f" {str(manifest.get('digest'))[:12]}",
            hint="restore the folder or train the adapter again",
        )
    return adapter


def _card(adapter: Adapter, base_name: str, digest: str) -> str:
    title, tag, shape = described(adapter.spec)
    return _CARD.format(
        base=base_name,
        title=title,
        tag=tag,
        shape=shape,
        parameters=adapter.spec.num_params(),
        base_hash=adapter.spec.base_hash,
        parent=f"adapter `{adapter.parent}`" if adapter.parent else "the base alone",
        digest=digest,
    )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{file} must hold an object, got a {type(content).__name__}")
    return content


def _read_tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    try:
        loaded = load_file(file)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    for name, tensor in loaded.items():
        if tensor.dtype != np.float32 or tensor.ndim != 2:
            raise AdapterError(f"{file}: {name} must be a float32 matrix, got {tensor.dtype}")
    return {own_name(file, name): tensor for name, tensor in loaded.items()}
