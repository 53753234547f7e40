"""What the tests of the engine share: a loaded base, random adapters and jobs, and PEFT's own way."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedoppu.client.jobs import ClientJob, Example, Tokens
from fedoppu.client.model import LoadedBase
from fedoppu.common.adapter_kinds import VIRTUAL
from fedoppu.common.adapters import Adapter, AdapterSpec, Spec, initial_adapter
from fedoppu.common.config import TrainingSettings
from fedoppu.common.randomness import Randomness

SETTINGS = TrainingSettings(learning_rate=1e-2, epochs=2, batch_size=4, newest=0)


def spec_of(base: LoadedBase, *targets: str, rank: int = 4, alpha: float = 8.0) -> AdapterSpec:
    return AdapterSpec.from_base(base.facts, targets, rank=rank, alpha=alpha)


def random_adapter(spec: Spec, seed: int, parent: str | None = None) -> Adapter:
    """An adapter that changes something: B is not zero, vectors are not one."""
    draw = np.random.default_rng(seed)
    scales = {"A": (0.0, 0.2), "B": (0.0, 0.1), "l": (1.0, 0.3), VIRTUAL[-1]: (0.0, 0.1)}
    tensors = {
        name: draw.normal(*scales[name[-1]], shape).astype(np.float32)
        for name, shape in spec.shapes().items()
    }
    return Adapter(spec, tensors, parent)


def random_tokens(draw: np.random.Generator, count: int) -> Tokens:
    return draw.integers(3, 300, count).astype(np.int32)


def random_examples(seed: int, count: int) -> list[Example]:
    draw = np.random.default_rng(seed)
    return [
        Example(
            random_tokens(draw, int(draw.integers(2, 40))),
            random_tokens(draw, int(draw.integers(1, 6))),
        )
        for _ in range(count)
    ]


def fresh_job(spec: AdapterSpec, seed: int, count: int, *frozen: Adapter) -> ClientJob:
    """A job of a fresh adapter on `frozen`, with as many random examples."""
    parent = frozen[-1].digest() if frozen else None
    return ClientJob(
        id=f"user{seed}",
        start=initial_adapter(spec, Randomness.from_seed(seed), parent=parent),
        frozen=frozen,
        settings=SETTINGS,
        examples=random_examples(seed, count),
        randomness=Randomness.from_seed(seed),
    )


def merged(base: LoadedBase, adapters: Sequence[Adapter]) -> PreTrainedModel:
    """A copy of the model with adapters merged into its weights."""
    model = copy.deepcopy(base.model)
    for adapter in adapters:
        spec = adapter.spec
        assert isinstance(spec, AdapterSpec)
        for target in spec.targets:
            a, b = (torch.tensor(adapter.tensors[f"{target.name}.{f}"]) for f in "AB")
            module = model.get_submodule(target.name)
            assert isinstance(module, nn.Linear)
            module.weight.data += spec.scale * b @ a
    return model


def row(*parts: Tokens) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)[None])


def movement(job: ClientJob, adapter: Adapter) -> NDArray[np.float32]:
    """(num_params,) trained minus start."""
    flatten = job.start.spec.flatten
    return flatten(adapter.tensors) - flatten(job.start.tensors)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a call could have changed."""
    state: dict[str, object] = {
        name: (parameter.detach().numpy().tobytes(), parameter.requires_grad, parameter.grad)
        for name, parameter in model.named_parameters()
    }
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        state[f"module {name}"] = (type(module), module.training, hooks, sorted(vars(module)))
    return state


def with_settings(job: ClientJob, **changes: object) -> ClientJob:
    return replace(job, settings=replace(job.settings, **changes))  # type: ignore[arg-type]
