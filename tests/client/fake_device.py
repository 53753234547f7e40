"""Trains and scores on a device that there is not, and fails where two tensors of one step are apart.

    python -m tests.client.fake_device BASE KIND...

Fake tensors have shapes and devices and no values; an operation over two devices is refused as CUDA refuses it. A
process of its own, since torch names such a device once. Not covered: generation, whose values decide its shapes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import backend_registration

from fedoppu.client.engine import GenericEngine
from fedoppu.client.jobs import ClientJob, ModelQuery, TrainedAdapter
from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.client.prediction import BatchedPredictor
from fedoppu.client.training import BatchedTrainer
from fedoppu.common.adapter_kinds import Ia3Spec, PromptSpec
from fedoppu.common.adapters import Adapter, AdapterSpec, Spec
from fedoppu.common.config import TrainingSettings
from fedoppu.common.randomness import Randomness
from tests.client.engine import random_adapter, random_examples

NAME = "accel"


@contextmanager
def faking() -> Iterator[FakeTensorMode]:
    """Values that cross to numpy are zeros; they cross from the CPU alone."""
    cast(Any, backend_registration)._setup_privateuseone_for_python_backend(NAME)
    shapes = cast(Any, ShapeEnv)(allow_dynamic_output_shape_ops=True)
    kept = torch.Tensor.numpy

    def numpy(tensor: Tensor) -> Any:
        if tensor.device.type != "cpu":
            raise TypeError(f"a tensor of {tensor.device} cannot become an array")
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    cast(Any, torch.Tensor).numpy = numpy
    try:
        with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        cast(Any, torch.Tensor).numpy = kept


def move(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Every parameter and buffer of a model of one's own to the device that there is not."""

    def moved(tensor: Tensor) -> Tensor:
        there: Tensor = cast(Any, mode).from_tensor(tensor.detach()).to(NAME)
        return there

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(moved(parameter), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = moved(buffer)


def spec_of(base: LoadedBase, kind: str) -> Spec:
    if kind == "prompt":
        return PromptSpec.from_base(base.facts, 5)
    if kind == "ia3":
        targets = ("k_proj", "v_proj", "down_proj")
        return Ia3Spec.from_base(base.facts, targets, feedforward=("down_proj",))
    return AdapterSpec.from_base(base.facts, ("q_proj", "v_proj"), rank=2, alpha=2.0)


def jobs_of(base: LoadedBase, kind: str, shared: Adapter) -> list[ClientJob]:
    settings = TrainingSettings(
        learning_rate=1e-2,
        epochs=2,
        batch_size=2,
        newest=0,
        proximal=0.5,
        dropout=0.1 if kind == "lora" else 0.0,
    )
    starts = [random_adapter(spec_of(base, kind), seed, shared.digest()) for seed in range(3)]
    return [
        ClientJob(
            id=f"user{seed}",
            start=start,
            frozen=(shared,),
            settings=settings,
            examples=random_examples(seed, 2 + seed),
            randomness=Randomness.from_seed(seed),
            held_out=random_examples(9, 2),
            anchor=start,
        )
        for seed, start in enumerate(starts)
    ]


def queries_of(jobs: list[ClientJob]) -> list[ModelQuery]:
    return [
        ModelQuery(
            job.id,
            example.prompt,
            (*job.frozen, job.start),
            labels=(example.answer, example.answer[:1]),
            max_tokens=3,
        )
        for job in jobs
        for example in job.examples
    ]


def answers_of(base: LoadedBase, kind: str, shared: Adapter) -> int:
    """Trains users of one kind by the generic path and by the fastest that there is, and scores; number of answers."""
    jobs, count = jobs_of(base, kind, shared), 0
    for engine in (GenericEngine(base), None):
        trained = list(BatchedTrainer(base, engine=engine).update_many(jobs))
        assert all(isinstance(answer, TrainedAdapter) for answer in trained), trained
        count += len(trained)
    return count + len(list(BatchedPredictor(base).score(queries_of(jobs))))


def main(folder: str, *kinds: str) -> None:
    base = load_base(resolve_base(folder))
    shared = random_adapter(
        AdapterSpec.from_base(base.facts, ("all-linear",), rank=2, alpha=2.0), 1
    )
    with faking() as mode:
        move(base.model, mode)
        counts = [answers_of(base, kind, shared) for kind in kinds]
    assert counts == [15] * len(kinds), counts


if __name__ == "__main__":
    main(*sys.argv[1:])
