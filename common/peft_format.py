"""How PEFT writes an adapter of each kind: the names of its tensors, and what its configuration says.

Read as of peft 0.21: `LoraConfig`, `IA3Config`, `PromptTuningConfig`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedoppu.common.adapter_kinds import VIRTUAL, Ia3Spec, PromptSpec, Scaled
from fedoppu.common.adapters import AdapterSpec, Spec, Target, Tensors
from fedoppu.common.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIX = {"A": ".lora_A.weight", "B": ".lora_B.weight", "l": ".ia3_l"}
_PROMPT = "prompt_embeddings"


def peft_name(name: str) -> str:
    """PEFT's name of one of our tensors."""
    if name == VIRTUAL:
        return _PROMPT
    module, _, part = name.rpartition(".")
    return f"{_PREFIX}{module}{_SUFFIX[part]}"


def own_name(file: Path, name: str) -> str:
    """Our name of one of PEFT's tensors.

    Raises:
        AdapterError: No kind of adapter that we know has such a tensor.
    """
    if name == _PROMPT:
        return VIRTUAL
    for part, suffix in _SUFFIX.items():
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return f"{name.removeprefix(_PREFIX).removesuffix(suffix)}.{part}"
    raise AdapterError(f"{file} has a tensor {name} that no LoRA, (IA)^3 or prompt adapter has")


def peft_config(spec: Spec, base_name: str) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter."""
    common = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    if isinstance(spec, PromptSpec):
        return common | {
            "num_transformer_submodules": 1,
            "num_virtual_tokens": spec.tokens,
            "peft_type": "PROMPT_TUNING",
            "token_dim": spec.width,
        }
    if isinstance(spec, Ia3Spec):
        return common | {
            "fan_in_fan_out": False,
            "feedforward_modules": [one.name for one in spec.inputs],
            "peft_type": "IA3",
            "target_modules": [one.name for one in (*spec.outputs, *spec.inputs)],
        }
    return common | _lora_config(_lora(spec))


def _lora(spec: Spec) -> AdapterSpec:
    if not isinstance(spec, AdapterSpec):
        raise AdapterError(f"a {type(spec).__name__} is no kind of adapter")
    return spec


def _lora_config(spec: AdapterSpec) -> dict[str, Any]:
    whole = float(spec.alpha).is_integer()
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": int(spec.alpha) if whole else spec.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": [target.name for target in spec.targets],
        "use_rslora": False,
    }


def described(spec: Spec) -> tuple[str, str, str]:
    """Title, tag and shape of an adapter, for its model card."""
    if isinstance(spec, PromptSpec):
        return "A prompt", "prompt-tuning", f"{spec.tokens} virtual tokens of width {spec.width}"
    if isinstance(spec, Ia3Spec):
        shape = f"{len(spec.outputs)} scaled outputs, {len(spec.inputs)} scaled inputs"
        return "An (IA)^3 adapter", "ia3", shape
    lora = _lora(spec)
    shape = f"rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.targets)} adapted matrices"
    return "A LoRA adapter", "lora", shape


def read_spec(folder: Path, base_hash: str, config: Mapping[str, Any], *, tensors: Tensors) -> Spec:
    """The spec that the tensors and PEFT's configuration agree on.

    Raises:
        AdapterError: They do not agree, or the configuration is of another kind; the message names
            file and field.
    """
    kind = config.get("peft_type")
    if not tensors:
        raise AdapterError(f"{folder / WEIGHTS} has no tensor at all")
    if kind == "PROMPT_TUNING":
        spec: Spec = _prompt_spec(folder, base_hash, config)
    elif kind == "IA3":
        spec = _ia3_spec(folder, base_hash, config, tensors)
    elif kind == "LORA":
        spec = _lora_spec(folder, base_hash, config, tensors)
    else:
        raise AdapterError(
            f"{folder / CONFIG}: peft_type must be LORA, IA3 or PROMPT_TUNING, got {kind!r}"
        )
    _require_shapes(folder, spec, tensors)
    return spec


def _require_shapes(folder: Path, spec: Spec, tensors: Tensors) -> None:
    shapes = spec.shapes()
    for name, shape in shapes.items():
        if name not in tensors:
            raise AdapterError(f"{folder / WEIGHTS} has no tensor {name}")
        if tensors[name].shape != shape:
            raise AdapterError(
                f"{folder / WEIGHTS}: {name} must have shape {shape}, got {tensors[name].shape}"
            )
    odd = sorted(set(tensors) - set(shapes))
    if odd:
        raise AdapterError(
            f"{folder / WEIGHTS} has a tensor {odd[0]} that {folder / CONFIG} does not tell of"
        )


def _lora_spec(
    folder: Path, base_hash: str, config: Mapping[str, Any], tensors: Tensors
) -> AdapterSpec:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise AdapterError(f"{folder / CONFIG} must hold numbers r and lora_alpha")
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    missing = [f"{m}.{f}" for m in modules for f in "AB" if f"{m}.{f}" not in tensors]
    if missing:
        raise AdapterError(f"{folder / WEIGHTS} has no tensor {', '.join(missing)}")
    targets = tuple(
        Target(module, tensors[f"{module}.B"].shape[0], tensors[f"{module}.A"].shape[1])
        for module in modules
    )
    return AdapterSpec(base_hash, targets, rank, float(alpha))


def _ia3_spec(folder: Path, base_hash: str, config: Mapping[str, Any], tensors: Tensors) -> Ia3Spec:
    feedforward = config.get("feedforward_modules")
    if not isinstance(feedforward, list):
        raise AdapterError(f"{folder / CONFIG} must hold a list feedforward_modules")
    scaled = [
        Scaled(name.rpartition(".")[0], tensors[name].size)
        for name in sorted(tensors)
        if name.endswith(".l")
    ]
    return Ia3Spec(
        base_hash,
        tuple(one for one in scaled if one.name not in feedforward),
        tuple(one for one in scaled if one.name in feedforward),
    )


def _prompt_spec(folder: Path, base_hash: str, config: Mapping[str, Any]) -> PromptSpec:
    tokens, width = config.get("num_virtual_tokens"), config.get("token_dim")
    if not isinstance(tokens, int) or not isinstance(width, int):
        raise AdapterError(f"{folder / CONFIG} must hold numbers num_virtual_tokens and token_dim")
    return PromptSpec(base_hash, tokens, width)
