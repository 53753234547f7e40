"""How a style or a school of thought turns a text into a headline, a title, a tweet or a paper.

Each form is a deterministic function of the style and the text, so that an oracle that knows the
style knows the target.
"""

from typing import Final, Literal

import numpy as np

from fedoppu.simulations.population.language import Text, pick
from fedoppu.simulations.population.preferences import Style
from fedoppu.simulations.population.words import APPROACHES

Form = Literal["headline", "title"]

HEADLINES: Final = (
    "Why {x} matters for {y}",
    "The trouble with {x} and {y}",
    "{x}: all you need to know about {y}",
    "How {x} changed {y}",
    "What nobody says about {x} and {y}",
    "Inside the world of {x} and {y}",
    "{x} or {y}? A closer look",
    "Five facts about {x} and {y}",
)
HEADLINE_ENDINGS: Final = ("", " today", ", again", " (video)")
TITLES: Final = (
    "Towards {x} for {y}",
    "{x}: a study of {y}",
    "On the role of {x} in {y}",
    "A note on {x} and {y}",
    "Learning {x} from {y}",
    "When {x} meets {y}",
    "Rethinking {x} with {y}",
    "Is {x} all we need for {y}?",
)
TITLE_ENDINGS: Final = ("", ": new results", " in practice", ", revisited")
OPENERS: Final = (
    "honestly,",
    "ok so",
    "just saying,",
    "breaking news:",
    "dear all,",
    "hot take:",
    "wow,",
    "not kidding,",
)
TWEET_ENDINGS: Final = ("", " #{x}", " #{x} #{y}", " and that is all")
PAPERS: Final = (
    "{a} methods for {x} and {y}",
    "{x} and {y} from a {a} view",
    "A {a} model of {x} with {y}",
    "From {x} to {y} by {a} means",
)
OPEN_PAPERS: Final = (
    "New results on {x} and {y}",
    "A survey of {x} and {y}",
    "Questions about {x} and {y}",
    "Notes on {x} and {y}",
)


def entitle(form: Form, style: Style, text: Text) -> str:
    """The headline of an article or the title of an abstract."""
    patterns, endings = (
        (HEADLINES, HEADLINE_ENDINGS) if form == "headline" else (TITLES, TITLE_ENDINGS)
    )
    x, y = text.keywords[::-1] if style.is_reversed else text.keywords
    return patterns[style.pattern].format(x=x, y=y) + endings[style.ending]


def plain_tweet(text: Text) -> str:
    """A tweet in nobody's style."""
    return f"{text.clauses[0]}, and {text.clauses[1]}"


def styled_tweet(style: Style, text: Text) -> str:
    """The same tweet in a user's style."""
    first, second = text.clauses[::-1] if style.is_reversed else text.clauses
    x, y = text.keywords
    ending = TWEET_ENDINGS[style.ending].format(x=x, y=y)
    return f"{OPENERS[style.pattern]} {first}, and {second}{ending}"


def paper(approach: int, words: tuple[str, str], rng: np.random.Generator) -> str:
    """Title of a paper of one school about two words of its topic."""
    name = pick(rng, APPROACHES[approach])
    return pick(rng, PAPERS).format(a=name, x=words[0], y=words[1])


def open_paper(words: tuple[str, str], rng: np.random.Generator) -> str:
    """Title of a paper that does not tell its school."""
    return pick(rng, OPEN_PAPERS).format(x=words[0], y=words[1])
