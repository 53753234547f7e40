"""The text that `pocket` reads: examples in a row, each document from a user of its own.

A document's user is drawn so that text alone tells no label: every topic gets a label uniformly
and independently, ratings rise or fall with quality with a wide shift, and the form of a title is
uniform. So the base knows the language, the formats, the topics, the sentiment scale and how to go
by earlier items, and is near chance without any.

Reading documents put words of the text's topic, or of its sentiment, where a label would be. No
task asks for those; they teach a small model what to look for in a text, which labels without a
meaning of their own would teach it very slowly.

What it never sees: a population of `fedoppu.simulations.population.generate`. Its users come from
`Randomness.from_seed(seed).child("pocket")`, a purpose that the generator never asks for, whatever
the seed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedoppu.client.profile import template_profile
from fedoppu.client.tasks import TASKS, PromptFormat
from fedoppu.client.vault import HistoryItem
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
SHAPES: Final = ("single", "several", "long", "reading")
SHAPE_WEIGHTS: Final = (0.1, 0.68, 0.02, 0.2)
LONG: Final = 22
PROFILES: Final = 0.125
PROFILED_ITEMS: Final = 12

# Genre, its name in a prompt, the task's own question, and a question that no task asks.
_READ: Final[tuple[tuple[Genre, str, str, str], ...]] = (
    ("news", "article", "category", "words"),
    ("news", "article", "category", "words"),
    ("movie", "movie", "tag", "words"),
    ("review", "review", "score", "feeling"),
    ("review", "review", "score", "feeling"),
    ("abstract", "abstract", "words", "words"),
)
OWN_QUESTION: Final = 0.4


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


def documents(seed: int, start: int = 0, *, readings: int = 0) -> Iterator[Document]:
    """All documents of a seed from number `start` on; the first `readings` of them only read."""
    randomness = Randomness.from_seed(seed).child(PURPOSE)
    index = start
    while True:
        rng = randomness.stream("document", index)
        yield reading(rng) if index < start + readings else document(rng)
        index += 1


def document(rng: np.random.Generator) -> Document:
    """Writes a document: single (one example), several (3 to 8), long (22) or reading."""
    shape = str(rng.choice(SHAPES, p=SHAPE_WEIGHTS))
    if shape == "reading":
        return reading(rng)
    task = str(rng.choice(list(WEIGHTS), p=list(WEIGHTS.values())))
    user = draw_reader(num_labels(task), rng)
    if shape == "single":
        return (_query(task, draft_query(task, user, rng)),)
    count = int(rng.integers(3, 9)) if shape == "several" else LONG
    return _profile(task, user, rng) + tuple(_in_a_row(task, user, count, rng))


def reading(rng: np.random.Generator) -> Document:
    """Writes a reading document of one to four texts, mostly one."""
    user = draw_reader(1, rng)
    count = 1 if rng.random() < 0.6 else int(rng.integers(2, 5))
    return tuple(_read(user, rng) for _ in range(count))


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


def _read(user: Preferences, rng: np.random.Generator) -> Segment:
    topic = int(rng.choice(NUM_TOPICS, p=user.mix))
    genre, name, question, own_question = _READ[int(rng.integers(len(_READ)))]
    asked = own_question if rng.random() < OWN_QUESTION else question
    quality = user.mean_quality + float(rng.standard_normal())
    text = compose(genre, topic, rng, quality=quality)
    words = topic_words(topic, 2, rng)
    if genre == "review":
        words = (sentiment_word(quality, rng), sentiment_word(quality, rng))
    return Segment(f"{name}: {text}\n{asked}:", f" {' '.join(words)}")


def _profile(task: str, user: Preferences, rng: np.random.Generator) -> Document:
    """In one document of eight, the profile that the product would make of the user's items."""
    if rng.random() >= PROFILES:
        return ()
    drafts = (draft_item(task, user, rng) for _ in range(PROFILED_ITEMS))
    items = [HistoryItem("", "", "", task, draft.fields) for draft in drafts]
    return (Segment(f"profile: {template_profile(TASKS[task], items)}", ""),)


def _in_a_row(
    task: str, user: Preferences, count: int, rng: np.random.Generator
) -> Iterator[Segment]:
    """Items as they are shown once retrieved, or as they are trained on, then queries."""
    render = _block if rng.random() < 0.5 else _item
    asked = int(rng.integers(1, count))
    for _ in range(count - asked):
        yield render(task, draft_item(task, user, rng))
    for _ in range(asked):
        yield _query(task, draft_query(task, user, rng))


def _rendered(shape: PromptFormat, draft: Draft) -> Segment:
    return Segment(shape.prompt.format_map(draft.fields), f" {draft.answer}")


def _query(task: str, draft: Draft) -> Segment:
    return _rendered(TASKS[task].query, draft)


def _item(task: str, draft: Draft) -> Segment:
    return _rendered(TASKS[task].item_format(draft.fields), draft)


def _block(task: str, draft: Draft) -> Segment:
    """The block of a retrieved item; where it has an answer, as the answer."""
    prompt, target, _ = TASKS[task].block.removesuffix("\n").partition(" {target}")
    return Segment(prompt.format_map(draft.fields), f" {draft.answer}" if target else "")
