"""Adapters on disk: a standard PEFT folder, and beside it a manifest of what it belongs to.

    adapter_config.json        what `peft.PeftModel.from_pretrained` reads
    adapter_model.safetensors  the factors, float32, named as PEFT names them
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
from safetensors.numpy import load_file, save_file

from fedoppu.common.adapters import Adapter, AdapterSpec, Target
from fedoppu.common.commit import commit_folder
from fedoppu.common.errors import AdapterError

MANIFEST = "fedoppu.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FORMAT = 1
_PREFIX = "base_model.model."
_SUFFIX = {"A": ".lora_A.weight", "B": ".lora_B.weight"}

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, peft, fedoppu]
---
# A LoRA adapter of {base}

- rank {rank}, alpha {alpha:g}, {count} adapted matrices, {parameters} parameters
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
    digest, spec = adapter.digest(), adapter.spec
    if not isinstance(spec, AdapterSpec):
        raise AdapterError(f"an {spec.identity} adapter cannot be saved")
    with commit_folder(folder) as temporary:
        tensors = {
            _peft_name(name): np.ascontiguousarray(adapter.tensors[name], np.float32)
            for name in adapter.spec.shapes()
        }
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        _write_json(temporary / CONFIG, _peft_config(spec, base_name))
        manifest = {
            "format": FORMAT,
            "base": base_name,
            "base_hash": adapter.spec.base_hash,
            "parent": adapter.parent,
            "digest": digest,
        }
        _write_json(temporary / MANIFEST, manifest)
        card = _card(adapter, spec, base_name, digest)
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
    tensors = _read_tensors(folder / WEIGHTS)
    adapter = Adapter(_spec(folder, base_hash, tensors), tensors, parent)
    if adapter.digest() != manifest.get("digest"):
        raise AdapterError(
            f"{folder} was changed: its digest is {adapter.digest()[:12]}, its manifest says"
            f" {str(manifest.get('digest'))[:12]}",
            hint="restore the folder or train the adapter again",
        )
    return adapter


def _peft_name(name: str) -> str:
    module, _, factor = name.rpartition(".")
    return f"{_PREFIX}{module}{_SUFFIX[factor]}"


def _own_name(file: Path, name: str) -> str:
    for factor, suffix in _SUFFIX.items():
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return f"{name.removeprefix(_PREFIX).removesuffix(suffix)}.{factor}"
    raise AdapterError(f"{file} has a tensor {name} that is no factor of a LoRA adapter")


def _peft_config(spec: AdapterSpec, base_name: str) -> dict[str, Any]:
    whole = float(spec.alpha).is_integer()
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(spec.alpha) if whole else spec.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": [target.name for target in spec.targets],
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def _card(adapter: Adapter, spec: AdapterSpec, base_name: str, digest: str) -> str:
    return _CARD.format(
        base=base_name,
        rank=spec.rank,
        alpha=spec.alpha,
        count=len(spec.targets),
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
    return {_own_name(file, name): tensor for name, tensor in loaded.items()}


def _spec(folder: Path, base_hash: str, tensors: Mapping[str, NDArray[np.float32]]) -> AdapterSpec:
    """The spec that the tensors and PEFT's configuration agree on."""
    config = _read_json(folder / CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise AdapterError(f"{folder / CONFIG} must hold numbers r and lora_alpha")
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    missing = [f"{m}.{f}" for m in modules for f in _SUFFIX if f"{m}.{f}" not in tensors]
    if missing or not modules:
        raise AdapterError(f"{folder / WEIGHTS} has no tensor {', '.join(missing) or 'at all'}")
    targets = tuple(
        Target(module, tensors[f"{module}.B"].shape[0], tensors[f"{module}.A"].shape[1])
        for module in modules
    )
    spec = AdapterSpec(base_hash, targets, rank, float(alpha))
    for name, shape in spec.shapes().items():
        if tensors[name].shape != shape:
            raise AdapterError(
                f"{folder / WEIGHTS}: {name} must have shape {shape}, got {tensors[name].shape}"
            )
    return spec
