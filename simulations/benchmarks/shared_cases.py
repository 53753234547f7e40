"""What the shared phase is measured on: one small base, users with random rows, federated averaging.

All sides train the same LoRA (both factors) from the same start on the same examples in the same
order with AdamW, the same clip and rate, and the server takes the mean of what they made of it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaConfig

from fedoppu.client.jobs import ClientJob, Example
from fedoppu.client.model import Dtype, LoadedBase, load_base, resolve_base
from fedoppu.common.adapters import Adapter, AdapterSpec, initial_adapter
from fedoppu.common.config import TrainingSettings
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.benchmarks.personal_cases import write_llama

Vector = NDArray[np.float32]
TARGETS = ("q_proj", "v_proj")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 1152
FIRST_WORD = 3  # tokens below it are special ones


@dataclass(frozen=True)
class Work:
    """What one user does in one round.

    Attributes:
        tokens: That go through the base for one example.
        batch: Examples a step.
        steps: Of one round, one epoch.
        answer: Tokens of each example that are learnt: all of them, or a few at its end.
        dtype: Of the frozen base on all sides.
    """

    tokens: int
    batch: int
    steps: int
    answer: int
    dtype: Dtype = "float32"

    @property
    def name(self) -> str:
        """For a row."""
        learnt = "all" if self.answer == self.tokens else str(self.answer)
        shape = f"{self.batch} x {self.tokens} tokens x {self.steps} steps"
        return f"{shape}, {learnt} learnt, {self.dtype}"

    def settings(self) -> TrainingSettings:
        """AdamW at a constant rate."""
        return TrainingSettings(
            learning_rate=1e-3,
            epochs=1,
            batch_size=self.batch,
            schedule="constant",
            newest=0,
        )

    def as_text(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Work":
        """What `as_text` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Case:
    """A base and what its users do; the same in every process that opens it.

    Attributes:
        base: Loaded once; never changed.
        spec: Of the shared adapter.
        start: The shared adapter before the first round.
    """

    base: LoadedBase = field(repr=False)
    work: Work
    spec: AdapterSpec = field(repr=False)
    start: Adapter = field(repr=False)

    @classmethod
    def open(cls, folder: Path, work: Work) -> "Case":
        """Loads the base that `write_base` wrote."""
        base = load_base(resolve_base(str(folder)), dtype=work.dtype)
        spec = AdapterSpec.from_base(base.facts, TARGETS, rank=8, alpha=8.0)
        return cls(base, work, spec, initial_adapter(spec, Randomness.from_seed(0)))

    def job(self, user: int, start: Adapter) -> ClientJob:
        """What a user trains in one round, from `start`."""
        return ClientJob(
            id=f"user {user}",
            start=start,
            frozen=(),
            settings=self.work.settings(),
            examples=self._examples(user),
            randomness=Randomness.from_seed(user),
        )

    def ordered(self, user: int) -> list[Example]:
        """A user's examples in the order in which every side trains on them."""
        examples = self._examples(user)
        order = Randomness.from_seed(user).stream("order", 0).permutation(len(examples))
        return [examples[index] for index in order]

    def rows(self, user: int) -> NDArray[np.int64]:
        """(examples, tokens + 1) the same as rows of one length; the last tokens are the answer."""
        ordered = self.ordered(user)
        rows = [np.concatenate([example.prompt, example.answer]) for example in ordered]
        return np.stack(rows).astype(np.int64)

    def adapter(self, vector: Vector) -> Adapter:
        """A shared adapter of its flat vector."""
        return Adapter(self.spec, self.spec.unflatten(vector), self.start.parent)

    def vector(self, adapter: Adapter) -> Vector:
        """(num_params,) float32."""
        return self.spec.flatten(adapter.tensors)

    def _examples(self, user: int) -> list[Example]:
        work, draw = self.work, np.random.default_rng(user)
        shape = (work.batch * work.steps, work.tokens + 1)
        rows = draw.integers(FIRST_WORD, VOCABULARY, shape).astype(np.int32)
        cut = work.tokens + 1 - work.answer
        return [Example(row[:cut], row[cut:]) for row in rows]


def write_base(folder: Path) -> int:
    """Writes a Llama of random weights with the embedded base's tokenizer; returns its parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return write_llama(folder, config)


def relative(found: Vector, expected: Vector, start: Vector) -> float:
    """L2 norm of the difference, relative to what the round moved."""
    moved = np.linalg.norm(expected - start)
    return float(np.linalg.norm(found - expected) / moved)


def cohorts(users: int, size: int, rounds: int) -> Sequence[Sequence[int]]:
    """Whole turns through the users: each round has the next ones."""
    return [[(size * turn + place) % users for place in range(size)] for turn in range(rounds)]
