"""One item or query of a user, task by task: text, answer, and the answer without noise.

Label noise: with chance `NOISE` an answer is replaced by another one, drawn uniformly: another
label, another rating, another school of thought, or the form of a style with another phrase. It
strikes items and queries alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from fedoppu.client.tasks import MOVIE_TAGS, NEWS_CATEGORIES, TASKS
from fedoppu.simulations.population.forms import (
    entitle,
    open_paper,
    paper,
    plain_tweet,
    styled_tweet,
)
from fedoppu.simulations.population.language import NUM_TOPICS, compose, topic_words
from fedoppu.simulations.population.preferences import (
    ENDINGS,
    PATTERNS,
    Preferences,
    Style,
)
from fedoppu.simulations.population.words import APPROACHES

NOISE: Final = 0.1


def num_labels(task: str) -> int:
    """Answers that a map of topics chooses among; a task without a map has the news' one."""
    return {"LaMP_1": len(APPROACHES), "LaMP_2M": len(MOVIE_TAGS)}.get(task, len(NEWS_CATEGORIES))


@dataclass(frozen=True)
class Draft:
    """An item or a query before it has a name and a date.

    Attributes:
        fields: An item's LaMP fields; a query's fields are those that its input is made of.
        answer: The gold answer, noise included.
        truth: The answer without noise: what an oracle says.
        topic: Index of the topic.
        quality: What the text of a review expresses, in levels; None elsewhere.
    """

    fields: Mapping[str, str]
    answer: str
    truth: str
    topic: int
    quality: float | None = None


def draft_item(task: str, user: Preferences, rng: np.random.Generator) -> Draft:
    """Draws an item of a user's history for one of the seven tasks."""
    topic = int(rng.choice(NUM_TOPICS, p=user.mix))
    match task:
        case "LaMP_1":
            return _cited_paper(user, topic, rng)
        case "LaMP_2N":
            return _article(user, topic, rng)
        case "LaMP_2M":
            return _movie(user, topic, rng)
        case "LaMP_3":
            return _review(user, topic, rng)
        case "LaMP_4":
            return _entitled("headline", user, topic, rng)
        case "LaMP_5":
            return _entitled("title", user, topic, rng)
        case _:
            return _tweet(user, topic, rng)


def draft_query(task: str, user: Preferences, rng: np.random.Generator) -> Draft:
    """Draws a query: an item to be answered, or the native query of LaMP_1 and LaMP_7."""
    if task == "LaMP_1":
        return _reference(user, int(rng.choice(NUM_TOPICS, p=user.mix)), rng)
    if task == "LaMP_7":
        return _paraphrase(user, int(rng.choice(NUM_TOPICS, p=user.mix)), rng)
    return draft_item(task, user, rng)


def _other(truth: int, count: int, rng: np.random.Generator) -> int:
    """With chance NOISE one of the other answers, uniformly; else the truth."""
    if rng.random() >= NOISE:
        return truth
    return (truth + int(rng.integers(1, count))) % count


def _other_style(style: Style, rng: np.random.Generator) -> Style:
    pattern = _other(style.pattern, PATTERNS, rng)
    if pattern == style.pattern:
        return style
    return Style(pattern, bool(rng.integers(2)), int(rng.integers(ENDINGS)))


def _article(user: Preferences, topic: int, rng: np.random.Generator) -> Draft:
    text = compose("news", topic, rng)
    truth = int(user.labels[topic])
    answer = NEWS_CATEGORIES[_other(truth, len(NEWS_CATEGORIES), rng)]
    anyone = Style(int(rng.integers(PATTERNS)), False, 0)
    title = entitle("headline", anyone, text)
    fields = {"text": str(text), "title": title, "category": answer}
    return Draft(fields, answer, NEWS_CATEGORIES[truth], topic)


def _movie(user: Preferences, topic: int, rng: np.random.Generator) -> Draft:
    text = compose("movie", topic, rng)
    truth = int(user.labels[topic])
    answer = MOVIE_TAGS[_other(truth, len(MOVIE_TAGS), rng)]
    return Draft({"description": str(text), "tag": answer}, answer, MOVIE_TAGS[truth], topic)


def _review(user: Preferences, topic: int, rng: np.random.Generator) -> Draft:
    quality = user.mean_quality + float(rng.standard_normal())
    text = compose("review", topic, rng, quality=quality)
    ratings = TASKS["LaMP_3"].labels
    truth = user.rate(quality) - 1
    answer = ratings[_other(truth, len(ratings), rng)]
    return Draft({"text": str(text), "score": answer}, answer, ratings[truth], topic, quality)


def _entitled(
    form: Literal["headline", "title"], user: Preferences, topic: int, rng: np.random.Generator
) -> Draft:
    text = compose("news" if form == "headline" else "abstract", topic, rng)
    answer = entitle(form, _other_style(user.style, rng), text)
    body = "text" if form == "headline" else "abstract"
    truth = entitle(form, user.style, text)
    return Draft({body: str(text), "title": answer}, answer, truth, topic)


def _tweet(user: Preferences, topic: int, rng: np.random.Generator) -> Draft:
    text = compose("tweet", topic, rng)
    answer = styled_tweet(_other_style(user.style, rng), text)
    return Draft({"text": answer}, answer, styled_tweet(user.style, text), topic)


def _paraphrase(user: Preferences, topic: int, rng: np.random.Generator) -> Draft:
    text = compose("tweet", topic, rng)
    answer = styled_tweet(_other_style(user.style, rng), text)
    return Draft({"text": plain_tweet(text)}, answer, styled_tweet(user.style, text), topic)


def _two_words(topic: int, rng: np.random.Generator) -> tuple[str, str]:
    first, second = topic_words(topic, 2, rng)
    return first, second


def _cited_paper(user: Preferences, topic: int, rng: np.random.Generator) -> Draft:
    """An own paper, of the user's school for its topic, and a paper that it cites."""
    school = int(user.labels[topic])
    truth = paper(school, _two_words(topic, rng), rng)
    cited = _other(school, len(APPROACHES), rng)
    answer = truth if cited == school else paper(cited, _two_words(topic, rng), rng)
    fields = {
        "title": paper(_other(school, len(APPROACHES), rng), _two_words(topic, rng), rng),
        "abstract": str(compose("abstract", topic, rng)),
        "citation": answer,
    }
    return Draft(fields, answer, truth, topic)


def _reference(user: Preferences, topic: int, rng: np.random.Generator) -> Draft:
    """Two papers of a topic, one of the user's school; the title in question tells no school."""
    school = int(user.labels[topic])
    other = (school + int(rng.integers(1, len(APPROACHES)))) % len(APPROACHES)
    truth = int(rng.integers(2))
    schools = (school, other) if truth == 0 else (other, school)
    options = [paper(each, _two_words(topic, rng), rng) for each in schools]
    references = TASKS["LaMP_1"].labels
    answer = references[_other(truth, len(references), rng)]
    title = open_paper(_two_words(topic, rng), rng)
    fields = {"title": title, "option_1": options[0], "option_2": options[1]}
    return Draft(fields, answer, references[truth], topic)
