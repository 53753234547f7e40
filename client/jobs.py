"""What the trainer is asked and what it answers: plain data, the same for both phases and every baseline.

None of these types has a wire form. Only a member's runtime makes a `LocalUpdate` of a `TrainedAdapter`, and only
`client/release.py` turns that into something that can be sent (save for `train.plain`, which is for research only).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.adapters import BOTH, Adapter, Factor
from fedoppu.common.config import TrainingSettings
from fedoppu.common.randomness import Randomness

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """A prompt and its answer as token ids; the loss is on the answer alone.

    Attributes:
        prompt: (prompt_tokens,) int32, the beginning-of-text token included.
        answer: (answer_tokens,) int32, at least one token, the end token included.
    """

    prompt: Tokens = field(repr=False)
    answer: Tokens = field(repr=False)


@dataclass(frozen=True)
class ClientJob:
    """One adapter to train.

    Attributes:
        id: Names the result.
        start: The adapter that training starts from.
        frozen: Adapters under it that stay as they are, each applied with its own scale.
        settings: Optimiser, schedule, epochs, batch, clip; no field of it is None.
        trainable: Factors that move; the others stay byte for byte.
        examples: In the order of time; the order of the steps is drawn from `randomness`.
        held_out: Scored on what was received, before any step (a federated validation loss).
        anchor: Adapter that a proximal term pulls towards, or None.
        randomness: Of the order of the examples and of dropout.
    """

    id: str
    start: Adapter
    frozen: tuple[Adapter, ...]
    settings: TrainingSettings
    examples: Sequence[Example]
    randomness: Randomness
    trainable: tuple[Factor, ...] = BOTH
    held_out: Sequence[Example] = ()
    anchor: Adapter | None = None


@dataclass(frozen=True)
class TrainedAdapter:
    """The answer to a job.

    Attributes:
        id: Of the job.
        adapter: The trained adapter; its parent is the start's.
        examples: Number of examples it was trained on.
        steps: Optimiser steps.
        tokens: Tokens that went forward and backward.
        train_loss: Mean loss per answer token over the last epoch, nats; NaN without examples.
        held_out_loss: Loss per answer token of each held-out example under the start, averaged, nats;
            None without any.
    """

    id: str
    adapter: Adapter
    examples: int
    steps: int
    tokens: int
    train_loss: float
    held_out_loss: float | None


@dataclass(frozen=True)
class ClientFailure:
    """An exception in one job; the other jobs of the group are answered all the same.

    Attributes:
        id: Of the job.
        message: One line: the error and the innermost frame of our code.
    """

    id: str
    message: str


@dataclass(frozen=True)
class Progress:
    """How far a group of jobs is: optimiser steps done, of all."""

    done: int
    total: int


class LocalTrainer(Protocol):
    """Trains many adapters; pure: the same jobs give the same bytes, whoever runs them."""

    def update_many(
        self,
        jobs: Sequence[ClientJob],
        on_progress: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[TrainedAdapter | ClientFailure]:
        """Trains each job's adapter; answers in the order of the jobs.

        It ends early, without the answers that are left, when `should_stop()` turns true.
        """


@dataclass(frozen=True)
class ModelQuery:
    """One question to the model under a stack of adapters; mixed users share a batch.

    Attributes:
        id: Names the answer.
        prompt: (prompt_tokens,) int32.
        adapters: Stack of adapters, each applied with its own scale.
        labels: Token ids of each label, end token included, for `score`.
        max_tokens: Longest answer, for `generate`.
    """

    id: str
    prompt: Tokens = field(repr=False)
    adapters: tuple[Adapter, ...]
    labels: tuple[Tokens, ...] = ()
    max_tokens: int = 32


class Predictor(Protocol):
    """Answers queries; evaluation, controls, baselines and the daemon use nothing else."""

    def score(self, queries: Sequence[ModelQuery]) -> Iterator[NDArray[np.float64]]:
        """For each query the (num_labels,) log-likelihoods of its labels, nats, in the order of the queries."""

    def generate(self, queries: Sequence[ModelQuery]) -> Iterator[tuple[int, ...]]:
        """For each query the greedy answer's token ids, without the end token, in the order of the queries."""


@dataclass(frozen=True)
class LocalUpdate:
    """A client's part of one attempt at one round, before release. It has no wire form.

    Attributes:
        context: Hash of the round's plan: binds it to (federation, round, attempt).
        vector: (num_params,) float32, trained minus received, of the factors that travel.
        weight: Number of examples, at least 0.
        held_out_loss: Mean loss on the held-out items, nats, or None if there are fewer than four.
    """

    context: bytes
    vector: NDArray[np.float32] = field(repr=False)
    weight: int
    held_out_loss: float | None = None
