"""What the personal phase is measured on: bases of four shapes, and users with prompts like LaMP's.

Half the users have items of LaMP_2M, half of LaMP_2N, from our generator. A prompt is LaMP's own
question with its list of labels, in 100 tokens, and texts of the user, several joined and cut to
the wanted length. Every user has the same lengths in another order, so that users per CPU second
mean the same whichever users a side trains.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import Final, Literal

import numpy as np
import torch
from safetensors.torch import save_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedoppu.client.jobs import ClientJob, Example, Tokens
from fedoppu.client.model import POCKET, BaseTokenizer, Dtype, LoadedBase, load_base, resolve_base
from fedoppu.client.tasks import Task, get_task
from fedoppu.client.vault import HistoryItem
from fedoppu.common.adapters import AdapterSpec, initial_adapter
from fedoppu.common.config import TrainingSettings
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.population import stream_users

Shape = Literal["tiny", "house", "small", "135m"]
SHAPES: Final[tuple[Shape, ...]] = ("tiny", "house", "small", "135m")
TASKS: Final = ("LaMP_2M", "LaMP_2N")
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16")
TARGETS: Final = ("q_proj", "v_proj")
INSTRUCTION: Final = 100
SHORTEST, LONGEST = 113, 370
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")

# OPPU's own but for the rate (its 1e-4 moves no base of this size), batch (its 16) and dropout
SETTINGS: Final = TrainingSettings(
    learning_rate=1e-3,
    epochs=2,
    batch_size=4,
    weight_decay=1e-2,
    clip_norm=0.3,
    schedule="linear",
    warmup=0.1,
    newest=0,
)


@dataclass(frozen=True)
class Size:
    """The size of a Llama with random weights."""

    hidden: int
    middle: int
    layers: int
    heads: int
    vocab: int


SIZES: Final[Mapping[Shape, Size]] = {
    "tiny": Size(128, 352, 4, 4, 4096),
    "house": Size(256, 704, 6, 4, 4096),
    "small": Size(288, 768, 6, 6, 32_000),
}


@dataclass(frozen=True)
class Work:
    """How many users, and what each has.

    Attributes:
        users: Even numbers are users of LaMP_2M, odd ones of LaMP_2N.
        items: Of each user, to train on.
        queries: Of each user, to be answered.
        instruction: Tokens that all prompts of a user begin with, after the one for the beginning.
        shortest: Tokens of the shortest prompt.
        longest: Tokens of the longest one.
    """

    users: int = 32
    items: int = 16
    queries: int = 8
    instruction: int = INSTRUCTION
    shortest: int = SHORTEST
    longest: int = LONGEST

    def lengths(self, count: int) -> list[int]:
        """Tokens of `count` prompts: quantiles of a lognormal beyond the instruction."""
        if count < 2:
            return [self.shortest] * count
        normal, ends = NormalDist(), (self.shortest, self.longest)
        low, high = (np.log(end - self.instruction - 1) for end in ends)
        edge = normal.inv_cdf(1 - 0.5 / count)
        places = [normal.inv_cdf((item + 0.5) / count) / edge for item in range(count)]
        own = [np.exp((low + high) / 2 + place * (high - low) / 2) for place in places]
        return [self.instruction + 1 + round(float(length)) for length in own]


@dataclass(frozen=True)
class Asked:
    """An item to be answered.

    Attributes:
        prompt: (prompt_tokens,) int32.
        labels: Token ids of each label of the task.
        gold: Index of the right one.
    """

    prompt: Tokens = field(repr=False)
    labels: tuple[Tokens, ...] = field(repr=False)
    gold: int


@dataclass(frozen=True)
class Case:
    """A base in both dtypes, and the jobs of its users.

    Attributes:
        shape: Name of the base's shape.
        bases: Dtype: the base, loaded once; never changed.
        spec: Of every user's adapter.
        jobs: Of each user; its adapter starts from the same values on each side.
        asked: Of each user: items that it was not trained on, as queries with their labels.
    """

    shape: Shape
    bases: Mapping[Dtype, LoadedBase] = field(repr=False)
    spec: AdapterSpec = field(repr=False)
    jobs: tuple[ClientJob, ...] = field(repr=False)
    asked: tuple[tuple[Asked, ...], ...] = field(repr=False)

    def lengths(self) -> Row:
        """The row that says what is trained on."""
        examples = [example for job in self.jobs for example in job.examples]
        prompts = np.array([len(example.prompt) for example in examples])
        answers = np.array([len(example.answer) for example in examples])
        parts = " ".join(f"{part:.0f}" for part in np.percentile(prompts, (0, 25, 50, 75, 100)))
        note = (
            f"{len(self.jobs)} users, {len(self.jobs[0].examples)} items each; least, quartiles, "
            f"most {parts}; answers {answers.min()}-{answers.max()}, mean {answers.mean():.1f}"
        )
        name = f"{self.shape}: tokens of a prompt, mean"
        return Row(name, float(prompts.mean()), kind="bound", unit="tokens", note=note)


@contextmanager
def opened(
    shape: Shape, folder: Path | None, work: Work, *, dtypes: Sequence[Dtype] = DTYPES
) -> Iterator[Case]:
    """A case for the time of the block.

    Args:
        shape: One of `SHAPES`.
        folder: A base of that shape; random weights if None.
        work: What the users have.
        dtypes: In which the base is loaded.

    Raises:
        UsageError: The shape has no random weights, and no folder was given.
    """
    with TemporaryDirectory() as temporary:
        if folder is None:
            if shape not in SIZES:
                raise UsageError(
                    f"the {shape} shape needs a base", hint="give its folder: --base 135m=FOLDER"
                )
            folder = Path(temporary)
            _write_random(folder, SIZES[shape])
        facts = resolve_base(str(folder))
        bases = {dtype: load_base(facts, dtype=dtype) for dtype in dtypes}
        spec = AdapterSpec.from_base(facts, TARGETS, rank=8, alpha=8.0)
        tokenizer = bases[dtypes[0]].tokenizer
        users = [_user(number, tokenizer, work) for number in range(work.users)]
        yield Case(
            shape=shape,
            bases=bases,
            spec=spec,
            jobs=tuple(_job(number, spec, user) for number, user in enumerate(users)),
            asked=tuple(user.asked for user in users),
        )


def _write_random(folder: Path, size: Size) -> None:
    """A base with the embedded one's tokenizer, whose tokens all shapes know."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.middle,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    write_llama(folder, config)


def write_llama(folder: Path, config: LlamaConfig) -> int:
    """Writes a Llama of random weights with the embedded base's tokenizer; returns its parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(POCKET / name, folder / name)
    return int(model.num_parameters())


# --- users ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _User:
    """What is made of a user's items."""

    examples: tuple[Example, ...]
    asked: tuple[Asked, ...]


def _job(number: int, spec: AdapterSpec, user: _User) -> ClientJob:
    owner = Randomness.from_seed(number)
    return ClientJob(
        id=f"user {number}",
        start=initial_adapter(spec, owner),
        frozen=(),
        settings=SETTINGS,
        examples=user.examples,
        randomness=owner.child("training"),
    )


def _user(number: int, tokenizer: BaseTokenizer, work: Work) -> _User:
    task, count = get_task(TASKS[number % len(TASKS)]), work.items + work.queries
    history = _history(task.name, number // len(TASKS), count)
    rng = Randomness.from_seed(number).stream("lengths")
    parts = [np.array(work.lengths(part), np.int64) for part in (work.items, work.queries)]
    lengths = [int(length) for part in parts for length in rng.permutation(part)]
    head = _instruction(task, tokenizer, work.instruction)
    labels = tuple(_answer(label, tokenizer) for label in task.labels)
    examples, asked = [], []
    for place, (item, length) in enumerate(zip(history, lengths, strict=True)):
        text = _text(task, history[place:] + history[:place], tokenizer, length - len(head))
        prompt, gold = np.array([*head, *text], np.int32), item.fields[task.items[0].target]
        examples.append(Example(prompt, _answer(gold, tokenizer)))
        asked.append(Asked(prompt, labels, task.labels.index(gold)))
    return _User(tuple(examples[: work.items]), tuple(asked[work.items :]))


def _history(task: str, user: int, items: int) -> list[HistoryItem]:
    """As many items of a user as are needed; a short history is gone through again."""
    drawn = stream_users(
        task, "target", count=user + 1, population="preferences", seed=0, queries=1
    )
    *_, (last, _) = drawn
    return list(islice(cycle(last.history), items))


def _answer(label: str, tokenizer: BaseTokenizer) -> Tokens:
    return np.array([*tokenizer.encode(f" {label}"), tokenizer.eos], np.int32)


def _instruction(task: Task, tokenizer: BaseTokenizer, tokens: int) -> list[int]:
    """The beginning of a text and the last `tokens` of what LaMP asks, labels listed."""
    words = tokenizer.encode(f"{task.query.instruction} {task.literals[0]}")
    begin = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    return [begin, *words[-tokens:]]


def _text(
    task: Task, items: Sequence[HistoryItem], tokenizer: BaseTokenizer, tokens: int
) -> list[int]:
    """The first tokens of an item's text, and of the next items' where it is too short."""
    found: list[int] = []
    for item in cycle(items):
        found += tokenizer.encode(f" {item.fields[task.text]}")
        if len(found) >= tokens:
            break
    return found[:tokens]
