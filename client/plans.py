"""Jobs that were checked, and what each of their steps does."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.batches import check_examples
from fedoppu.client.jobs import ClientJob, Example
from fedoppu.client.model import LoadedBase
from fedoppu.client.multi_lora import check_stack
from fedoppu.client.optimizer import learning_rates
from fedoppu.client.virtual_tokens import examples_after_virtual, virtual_count
from fedoppu.common.adapters import BOTH, AdapterSpec
from fedoppu.common.config import TrainingSettings
from fedoppu.common.errors import AdapterError, UsageError


@dataclass(frozen=True)
class Plan:
    """A job that was checked, and what each of its steps does.

    Attributes:
        job: The job, its held-out examples after their virtual tokens.
        examples: Those it is trained on, oldest first, after their virtual tokens.
        order: (epochs, examples) the order of the examples in each epoch.
        rates: (steps,) learning rates.
    """

    job: ClientJob
    examples: Sequence[Example] = field(repr=False)
    order: NDArray[np.int64] = field(repr=False)
    rates: NDArray[np.float64] = field(repr=False)

    @classmethod
    def of(cls, job: ClientJob, base: LoadedBase) -> "Plan":
        """Checks a job.

        Raises:
            AdapterError: Start, frozen adapters or anchor do not fit the base or each other, or factors
                are asked for of an adapter that has none.
            DataError: An example cannot be learnt from.
            UsageError: A setting was left unresolved, a proximal term has no anchor, or dropout is
                asked for of what has none.
        """
        settings = _resolved(job.settings)
        check_stack((*job.frozen, job.start), base.facts.hash)
        _check_anchor(job)
        _check_kind(job)
        virtual = virtual_count(job.start.spec)
        examples = job.examples[-(settings.newest or 0) :]
        for rows in (examples, job.held_out):
            check_examples(
                rows,
                vocab=base.vocab_size,
                max_tokens=base.facts.max_tokens,
                virtual=virtual,
            )
        examples = examples_after_virtual(examples, virtual)
        job = replace(job, held_out=examples_after_virtual(job.held_out, virtual))
        epochs = settings.epochs or 0
        draws = (job.randomness.stream("order", epoch) for epoch in range(epochs))
        order = np.array([draw.permutation(len(examples)) for draw in draws], np.int64)
        steps = epochs * -(-len(examples) // settings.batch_size)
        return cls(job, examples, order, learning_rates(settings, steps))

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.rates)

    def batch(self, step: int) -> list[Example]:
        """The examples of one step; the last batch of an epoch may be smaller."""
        size = self.job.settings.batch_size
        epoch, batch = divmod(step, -(-len(self.examples) // size))
        return [self.examples[i] for i in self.order[epoch][batch * size : (batch + 1) * size]]

    def in_last_epoch(self, step: int) -> bool:
        """Whether the step belongs to the last pass over the examples."""
        return step >= self.steps - self.steps // len(self.order)


def planned_steps(job: ClientJob) -> int:
    """Optimiser steps that a job will take, known without looking at its examples."""
    settings = job.settings
    used = min(len(job.examples), settings.newest or len(job.examples))
    return (settings.epochs or 0) * -(-used // settings.batch_size)


def _resolved(settings: TrainingSettings) -> TrainingSettings:
    values = {
        "learning_rate": settings.learning_rate,
        "epochs": settings.epochs,
        "newest": settings.newest,
    }
    for name, value in values.items():
        if value is None:
            raise UsageError(f"training.{name} must be set before a job runs, got null")
    return settings


def _check_anchor(job: ClientJob) -> None:
    if job.settings.proximal > 0.0 and job.anchor is None:
        raise UsageError("training.proximal needs an anchor adapter, got none")
    if job.anchor is not None and job.anchor.spec != job.start.spec:
        raise AdapterError("the anchor of a proximal term must have the spec of the start adapter")


def _check_kind(job: ClientJob) -> None:
    """What only a LoRA has: factors to choose from, and dropout of its input."""
    spec = job.start.spec
    if isinstance(spec, AdapterSpec):
        return
    if job.trainable != BOTH:
        raise AdapterError(
            f"an adapter of kind {spec.identity} has no factors to choose from,"
            f" got trainable {', '.join(job.trainable)}"
        )
    if job.settings.dropout:
        raise UsageError(
            f"training.dropout must be 0 for kind {spec.identity}, got {job.settings.dropout:g}"
        )
