"""The text that `pocket` reads: examples in a row, each document from a user of its own.

A document's user is drawn so that text alone tells no label: every topic gets a label uniformly and
independently, ratings rise or fall with quality with a wide shift, and the form of a title is
uniform. So the base knows the language, the formats, the topics, the sentiment scale and how to go
by earlier items, and is near chance without any.

What it never sees: a population of `fedoppu.simulations.population.generate`. Its users come from
`Randomness.from_seed(seed).child("pocket")`, a purpose that the generator never asks for, whatever
the seed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedoppu.client.tasks import TASKS, PromptFormat
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.population.drafts import Draft, draft_item, draft_query, num_labels
from fedoppu.simulations.population.language import (
    NUM_TOPICS,
    Genre,
    compose,
    sentiment_word,
    topic_words,
)
from fedoppu.simulations.population.preferences import Preferences, draw_style

PURPOSE: Final = "pocket"
WEIGHTS: Final[Mapping[str, float]] = {
    "LaMP_1": 0.15,
    "LaMP_2N": 0.2,
    "LaMP_2M": 0.15,
    "LaMP_3": 0.2,
    "LaMP_4": 0.1,
    "LaMP_5": 0.1,
    "LaMP_7": 0.1,
}
# Genres of reading documents beside reviews, and what their texts are called in a prompt.
_READ: Final[tuple[tuple[Genre, str], ...]] = (
    ("news", "article"),
    ("movie", "movie"),
    ("abstract", "abstract"),
)
SHAPES: Final = ("single", "several", "long", "reading")
SHAPE_WEIGHTS: Final = (0.25, 0.5, 0.02, 0.23)


@dataclass(frozen=True)
class Segment:
    """A prompt and its answer; the answer may be empty.

    Attributes:
        prompt: What is read.
        answer: What is asked for; it starts with a space.
    """

    prompt: str
    answer: str


Document = tuple[Segment, ...]


def documents(seed: int, start: int = 0) -> Iterator[Document]:
    """All documents of a seed from number `start` on; document i is a function of (seed, i)."""
    randomness = Randomness.from_seed(seed).child(PURPOSE)
    index = start
    while True:
        yield document(randomness.stream("document", index))
        index += 1


def document(rng: np.random.Generator) -> Document:
    """Writes a document: single (one example), several (2 to 8), long (22) or reading.

    Reading documents ask in words of their own what a text is about, or how it feels: no task does,
    but they teach where in a text the topic and the sentiment are.
    """
    task = str(rng.choice(list(WEIGHTS), p=list(WEIGHTS.values())))
    shape = str(rng.choice(SHAPES, p=SHAPE_WEIGHTS))
    user = draw_reader(num_labels(task), rng)
    if shape == "reading":
        return tuple(_reading(user, rng) for _ in range(int(rng.integers(1, 4))))
    if shape == "single":
        return (_query(task, draft_query(task, user, rng)),)
    count = int(rng.integers(2, 9)) if shape == "several" else 22
    return _profile(user, rng) + tuple(_in_a_row(task, user, count, rng))


def draw_reader(labels: int, rng: np.random.Generator) -> Preferences:
    """A user: few topics, a uniform map, ratings in either direction, a uniform style."""
    direction = 1.0 if rng.random() < 0.5 else -1.0
    return Preferences(
        mix=rng.dirichlet(np.full(NUM_TOPICS, 0.2)),
        labels=rng.integers(labels, size=NUM_TOPICS),
        shift=float(rng.uniform(-2, 2)),
        scale=direction * float(np.exp(0.2 + 0.4 * rng.standard_normal())),
        mean_quality=float(rng.standard_normal()),
        style=draw_style(rng),
    )


def _in_a_row(
    task: str, user: Preferences, count: int, rng: np.random.Generator
) -> Iterator[Segment]:
    """Earlier items as they are shown, or as they are trained on, then queries."""
    is_shown = rng.random() < 0.5
    asked = int(rng.integers(1, count))
    for position in range(count):
        if position >= count - asked:
            yield _query(task, draft_query(task, user, rng))
        else:
            render = _block if is_shown else _item
            yield render(task, draft_item(task, user, rng))


def _reading(user: Preferences, rng: np.random.Generator) -> Segment:
    topic = int(rng.choice(NUM_TOPICS, p=user.mix))
    kind = int(rng.integers(4))
    if kind == 0:
        quality = user.mean_quality + float(rng.standard_normal())
        text = compose("review", topic, rng, quality=quality)
        words = " ".join(sentiment_word(quality, rng) for _ in range(3))
        return Segment(f"review: {text}\nfeeling:", f" {words}")
    genre, name = _READ[kind - 1]
    text = compose(genre, topic, rng)
    return Segment(f"{name}: {text}\nwords:", f" {' '.join(topic_words(topic, 3, rng))}")


def _profile(user: Preferences, rng: np.random.Generator) -> Document:
    """A line about the user in one document of eight: its words, never its map."""
    if rng.random() >= 0.125:
        return ()
    topic = int(rng.choice(NUM_TOPICS, p=user.mix))
    words = ", ".join(topic_words(topic, 3, rng))
    return (Segment(f"profile: mostly about {words}", ""),)


def _rendered(shape: PromptFormat, draft: Draft) -> Segment:
    prompt = shape.prompt.format_map(draft.fields)
    return Segment(prompt, f" {draft.answer}")


def _query(task: str, draft: Draft) -> Segment:
    return _rendered(TASKS[task].query, draft)


def _item(task: str, draft: Draft) -> Segment:
    """An item as it is trained on."""
    return _rendered(TASKS[task].item_format(draft.fields), draft)


def _block(task: str, draft: Draft) -> Segment:
    """An item as it is shown when it was retrieved; its answer where the block has one."""
    prompt, target, _ = TASKS[task].block.removesuffix("\n").partition(" {target}")
    return Segment(prompt.format_map(draft.fields), f" {draft.answer}" if target else "")
