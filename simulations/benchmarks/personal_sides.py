"""Three ways to train one adapter per user, on the same users, steps, clip, rates and fresh adapters.

- `OppuWay`: transformers.Trainer and `get_peft_model` per user, with the arguments of OPPU's code
  (TamSiuhin/OPPU, OPPU.py): bf16 autocast over a float32 base, gradient checkpointing, batches of
  similar length padded to a multiple of 8.
- `LeanLoop`: peft and torch's AdamW without anything around them; adapters are injected once and
  set back for each user; the base in float32 or bfloat16.
- `Ours`: the engine in groups.

What is loaded once is loaded before anything is timed, and nothing is written. A side is held to
the others by `check_alike`.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from fedoppu.client.engine import Engine
from fedoppu.client.jobs import ClientJob, Example, TrainedAdapter
from fedoppu.client.model import Dtype
from fedoppu.client.plans import Plan
from fedoppu.client.training import BatchedTrainer
from fedoppu.common.adapters import AdapterSpec
from fedoppu.common.errors import FedoppuError
from fedoppu.simulations.benchmarks.personal_cases import Case

IGNORED = -100  # label of what is not learnt, to transformers
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """What a side made of one user.

    Attributes:
        id: Of the job.
        vector: (num_params,) float32, the trained adapter.
        steps: Optimiser steps.
    """

    id: str
    vector: NDArray[np.float32] = field(repr=False)
    steps: int


class Side(Protocol):
    """Trains some users."""

    def __call__(self, jobs: Sequence[ClientJob]) -> list[Trained]:
        """One answer for each job, in their order."""


def check_alike(sides: Mapping[str, Sequence[Trained]]) -> None:
    """Checks that all sides took the same steps for the users that they share.

    Raises:
        FedoppuError: One did not, so that their costs cannot be compared.
    """
    steps: dict[str, int] = {}
    for name, trained in sides.items():
        for user in trained:
            if steps.setdefault(user.id, user.steps) != user.steps:
                raise FedoppuError(
                    f"{name} took {user.steps} steps for {user.id}, others {steps[user.id]}"
                )


class Ours:
    """The batched trainer."""

    def __init__(
        self, case: Case, *, dtype: Dtype, group: int, engine: Engine | None = None
    ) -> None:
        """Train in groups of `group` users, by the engine that fits the base if None is given."""
        self._trainer = BatchedTrainer(case.bases[dtype], group=group, engine=engine)
        self._spec = case.spec

    def __call__(self, jobs: Sequence[ClientJob]) -> list[Trained]:
        """One answer for each job, in their order."""
        return [self._trained(answer) for answer in self._trainer.update_many(jobs)]

    def _trained(self, answer: object) -> Trained:
        if not isinstance(answer, TrainedAdapter):
            raise FedoppuError(f"a user was not trained: {answer}")
        return Trained(answer.id, self._spec.flatten(answer.adapter.tensors), answer.steps)


class LeanLoop:
    """One user after another: peft, AdamW, padded batches, the loss of transformers."""

    def __init__(self, case: Case, *, dtype: Dtype) -> None:
        """Inject adapters into a copy of the base, once for all users."""
        self._base, self._spec = case.bases[dtype], case.spec
        with _quiet():
            model = copy.deepcopy(self._base.model)
            self._model = get_peft_model(model, lora_config(case.spec))
        self._model.train()
        self._factors = factors(self._model, case.spec)

    def __call__(self, jobs: Sequence[ClientJob]) -> list[Trained]:
        """One answer for each job, in their order."""
        return [self._train(job) for job in jobs]

    def compute_in_double(self) -> None:
        """Computes in float64 from now on: what float32 rounds."""
        self._model.double()

    def gradient(self, job: ClientJob, examples: Sequence[Example]) -> NDArray[np.float32]:
        """(num_params,) gradient of the mean loss over the answers, at the job's start."""
        set_factors(self._factors, job)
        self._model.zero_grad()
        torch.autograd.backward(self._loss(examples))
        found = {name: value.grad for name, value in self._factors.items()}
        return self._spec.flatten({k: v.numpy() for k, v in found.items() if v is not None})

    def _train(self, job: ClientJob) -> Trained:
        set_factors(self._factors, job)
        plan, parameters = Plan.of(job, self._base), list(self._factors.values())
        optimizer = torch.optim.AdamW(
            parameters, lr=0.0, weight_decay=job.settings.weight_decay, fused=True
        )
        for step in range(plan.steps):
            torch.autograd.backward(self._loss(plan.batch(step)))
            nn.utils.clip_grad_norm_(parameters, job.settings.clip_norm)
            optimizer.param_groups[0]["lr"] = float(plan.rates[step])
            optimizer.step()
            optimizer.zero_grad()
        return Trained(job.id, vector_of(self._factors, self._spec), plan.steps)

    def _loss(self, examples: Sequence[Example]) -> Tensor:
        batch = padded(examples, self._base.tokenizer.pad)
        loss: Tensor = self._model(**batch, use_cache=False).loss
        return loss


class OppuWay:
    """A Trainer and an injected adapter for each user, as OPPU's code does it."""

    def __init__(self, case: Case, *, folder: str) -> None:
        """Prepare a float32 copy of the base, once for all users.

        Args:
            case: The base.
            folder: What the Trainer wants to write to; it writes nothing.
        """
        self._spec, self._folder = case.spec, folder
        self._tokenizer = cast(Any, case.bases["float32"].tokenizer)._tokenizer
        model = cast(Any, copy.deepcopy(case.bases["float32"].model))
        model.config.use_cache = False
        with _quiet():
            model.gradient_checkpointing_enable()
            self._base = cast(Any, prepare_model_for_kbit_training)(model)

    def __call__(self, jobs: Sequence[ClientJob]) -> list[Trained]:
        """One answer for each job, in their order."""
        with _quiet():
            return [self._train(job) for job in jobs]

    def _train(self, job: ClientJob) -> Trained:
        model = get_peft_model(self._base, lora_config(self._spec))
        own = factors(model, self._spec)
        set_factors(own, job)
        trainer = Trainer(
            model=cast(Any, model),
            train_dataset=cast(Any, [_features(example) for example in job.examples]),
            args=_arguments(job, self._folder),
            data_collator=DataCollatorForSeq2Seq(
                self._tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = Trained(job.id, vector_of(own, self._spec), trainer.state.global_step)
        self._base = model.unload()
        return trained


def _arguments(job: ClientJob, folder: str) -> TrainingArguments:
    settings = job.settings
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        optim="adamw_torch",
        num_train_epochs=settings.epochs or 0,
        save_strategy="no",
        logging_strategy="no",
        learning_rate=settings.learning_rate or 0.0,
        weight_decay=settings.weight_decay,
        bf16=True,
        gradient_checkpointing=True,
        max_grad_norm=settings.clip_norm,
        warmup_steps=settings.warmup,
        train_sampling_strategy="group_by_length",
        lr_scheduler_type=settings.schedule,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of transformers about what peft and OPPU's code ask of it are not ours to show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- peft ----------------------------------------------------------------------------------------


def lora_config(spec: AdapterSpec) -> LoraConfig:
    """A spec in peft's words."""
    return LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha),
        target_modules=[target.name for target in spec.targets],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def factors(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Parameter]:
    """The parameters of an injected adapter by our names, in the order of the flat vector."""
    found = {}
    for name in spec.shapes():
        module, _, factor = name.rpartition(".")
        found[name] = model.get_parameter(f"{PEFT_PREFIX}{module}.lora_{factor}.default.weight")
    return found


def set_factors(own: Mapping[str, nn.Parameter], job: ClientJob) -> None:
    """Sets an injected adapter to the start of a job."""
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(job.start.tensors[name]))


def vector_of(own: Mapping[str, nn.Parameter], spec: AdapterSpec) -> NDArray[np.float32]:
    """(num_params,) float32 copy of an injected adapter."""
    return spec.flatten({name: value.detach().float().numpy() for name, value in own.items()})


def padded(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """A batch as transformers takes it: padded on the right, the answers its labels."""
    rows = [np.concatenate([example.prompt, example.answer]) for example in examples]
    shape = (len(rows), max(len(row) for row in rows))
    tokens, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORED, np.int64)
    mask = np.zeros(shape, np.int64)
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        tokens[index, : len(row)], mask[index, : len(row)] = row, 1
        labels[index, len(example.prompt) : len(row)] = example.answer
    arrays = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _features(example: Example) -> dict[str, list[int]]:
    prompt, answer = example.prompt.tolist(), example.answer.tolist()
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * (len(prompt) + len(answer)),
        "labels": [IGNORED] * len(prompt) + answer,
    }
