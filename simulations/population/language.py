"""English-like texts about a topic, of the genres that LaMP's tasks hold.

A text fills the slots of two sentence templates. `{t}` is a word of the topic (every third slot may
hold a word of another topic, but the first two never do), `{s}` a sentiment word, every other slot
a word that means nothing. News, films, reviews and abstracts have 20 to 40 words, tweets about 20.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from fedoppu.simulations.population.words import FILLERS, SENTIMENT, TOPICS

Genre = Literal["news", "movie", "review", "abstract", "tweet"]
TOPIC_WORDS: Final = tuple(TOPICS.values())
NUM_TOPICS: Final = len(TOPIC_WORDS)
STRAY: Final = 0.15
READING_NOISE: Final = 0.5
_SLOT: Final = re.compile(r"\{(\w+)\}")
_A_BEFORE_VOWEL: Final = re.compile(r"\b([Aa]) (?=[AEIOaeio]|[Uu](?!s))")

# For each genre: opening clauses and closing clauses; a text is one of each.
TEMPLATES: Final[Mapping[Genre, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "news": (
        (
            "The {t} near {where} {verb} a {adj} {who} after the {t} on {when}.",
            "A {who} from {where} spoke about the {t} and a {adj} {t} this {when}.",
            "In {where} the {t} and the {t} {verb} almost every {who} last {when}.",
            "Nobody in {where} had seen such a {adj} {t} before the {t} {verb} it.",
            "Officials in {where} say that one {t} {verb} another {t} in {when}.",
            "It was a {adj} {when} for the {t} when the {t} {verb} {where}.",
        ),
        (
            "The {thing} says that a {t} and some {adj} {t} are still there.",
            "Every {who} asked about the {t}, but the {t} stayed out of the {thing}.",
            "Later the {who} {verb} the {t} with a {thing} and a {t}.",
            "More {t} than {t} is what the {adj} {thing} shows so far.",
            "By {when} the {t} was gone, and the {thing} {verb} the {t}.",
            "A second {who} told us that the {t} {verb} a {adj} {t}.",
        ),
    ),
    "movie": (
        (
            "A {adj} {who} in {where} finds a {t} and has to save the {t} before {when}.",
            "When a {t} disappears from {where}, a {who} follows the {t} through a {adj} {thing}.",
            "Two people meet over a {t} in {where} and lose their {t} on a {adj} {when}.",
            "After the {t} {verb} {where}, a {who} inherits a {t} and a {adj} {thing}.",
            "The last {t} of {where} belongs to a {who} whose {t} {verb} the {thing}.",
            "On a {adj} {when} a {who} wakes up in {where} beside a {t} and a {t}.",
        ),
        (
            "But the {t} hides a {adj} {thing}, and the {t} wants it back.",
            "Together with a {who} they take the {t} across a {thing} of {t}.",
            "Soon a {t} and a {who} with a {t} are all that is left.",
            "Only the {t} knows why the {who} {verb} the {t} that {when}.",
            "What begins with a {t} ends with a {adj} {thing} and a {t}.",
            "Every {when} the {t} comes closer, until the {t} {verb} them.",
        ),
    ),
    "review": (
        (
            "We bought it for the {t} on a {when}, and the {t} was {s} and the {thing} {s}.",
            "A {s} {t} and a {s} {t} is what the {who} got in {where}.",
            "The {t} felt {s} from the start, and with the {t} it was {s}.",
            "My {who} wanted a {t} with a {t}, and both looked {s}, even {s}.",
            "After a {when} in {where} the {t} seemed {s} and the {t} rather {s}.",
            "It came with a {t} and a {adj} {t}, one {s}, the other {s}.",
        ),
        (
            "Using the {t} was {s}, and the {thing} for the {t} turned out {s}.",
            "For a {t} of this kind the {thing} is {s} and the {t} {s}.",
            "Our {who} called the {t} {s} and found the {t} quite {s}.",
            "The {adj} {thing} was {s}, as was the {t}, and the {t} {s}.",
            "By {when} the {t} was still {s} and the {t} still {s}.",
            "In short a {s} {t}, a {s} {thing} and some {t}.",
        ),
    ),
    "abstract": (
        (
            "We study how a {t} depends on the {t} in a {adj} setting from {where}.",
            "This paper asks whether the {t} can explain a {adj} {t} at {where}.",
            "Little is known about the {t} and its {adj} relation to the {t}.",
            "We present a {adj} {thing} of every {t} and {t} that was {verb} since {when}.",
            "The {t} is often confused with the {t}, as a {who} in {where} {verb}.",
            "Given a {t}, we ask which {t} a {adj} {who} would choose.",
        ),
        (
            "Our data hold one {t} for each {t}, and the {thing} is {adj}.",
            "Results on a {thing} of {t} show that the {t} is {adj}.",
            "We find that the {t} {verb} the {t} more than a {thing} does.",
            "A {adj} test with the {t} and a {who} {verb} the {t}.",
            "The {thing} covers {t} and {t} from {where} until {when}.",
            "An error in the {t} is {adj} when the {t} is {verb}.",
        ),
    ),
    "tweet": (
        (
            "the {t} in {where} {verb} my {adj} {t}",
            "my {who} just {verb} a {t} and a {t}",
            "this {when} the {t} {verb} a {adj} {t}",
            "nobody told me that the {t} {verb} the {t}",
            "there is a {t} beside the {adj} {t} in {where}",
            "a {who} in {where} took the {t} with the {t}",
        ),
        (
            "the {t} stayed with the {who} until {when}",
            "every {who} wants a {adj} {t} now",
            "we still wait for the {t} and the {thing}",
            "the {thing} has more {t} than before",
            "one {adj} {t} is enough for {when}",
            "you should see the {t} on the {thing}",
        ),
    ),
}


@dataclass(frozen=True)
class Text:
    """A generated text.

    Attributes:
        clauses: Its opening and its closing.
        keywords: The first two words of its topic, in the order in which they occur.
    """

    clauses: tuple[str, str]
    keywords: tuple[str, str]

    def __str__(self) -> str:
        """The whole text."""
        return " ".join(self.clauses)


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def topic_words(topic: int, count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Different words of a topic, uniformly; at most as many as it has."""
    words = TOPIC_WORDS[topic]
    return tuple(words[i] for i in rng.permutation(len(words))[:count])


def sentiment_word(quality: float, rng: np.random.Generator) -> str:
    """A word near a quality: level = quality plus reading noise, rounded, within -3 ... 3."""
    level = round(quality + READING_NOISE * float(rng.standard_normal()))
    return pick(rng, SENTIMENT[max(-3, min(3, level)) + 3])


def compose(genre: Genre, topic: int, rng: np.random.Generator, *, quality: float = 0.0) -> Text:
    """Writes a text about a topic.

    Args:
        genre: Which templates.
        topic: Index of the topic.
        rng: Source of all choices.
        quality: What the sentiment words of a review express, in levels around 0.
    """
    openings, closings = TEMPLATES[genre]
    drawn = list(topic_words(topic, 8, rng))
    keywords = (drawn[0], drawn[1])

    def fill(slot: re.Match[str]) -> str:
        name = slot.group(1)
        if name == "s":
            return sentiment_word(quality, rng)
        if name != "t":
            return pick(rng, FILLERS[name])
        word = drawn.pop(0)
        is_stray = word not in keywords and rng.random() < STRAY
        return pick(rng, TOPIC_WORDS[int(rng.integers(NUM_TOPICS))]) if is_stray else word

    opening = _SLOT.sub(fill, pick(rng, openings))
    return Text((_articles(opening), _articles(_SLOT.sub(fill, pick(rng, closings)))), keywords)


def _articles(clause: str) -> str:
    """Writes "an" before a vowel."""
    return _A_BEFORE_VOWEL.sub(r"\1n ", clause)
