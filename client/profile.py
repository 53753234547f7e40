"""A text about the user, made from the history on the device; it precedes prompts and never leaves.

Both kinds are pure functions of the items they are given, and the empty string without any. They see
every item that they are given: a profile of the whole history tells a prompt for item i about later
items. It is right for queries, which come after the history; for a strictly causal one, give
`history[:i]`.

Source of the idea: OPPU's profile-augmented generation, https://arxiv.org/abs/2402.04401. The words of
the templates are ours.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from fedoppu.client.jobs import ModelQuery, Predictor
from fedoppu.client.prompts import PromptBuilder
from fedoppu.client.retrieval import words
from fedoppu.client.tasks import Task
from fedoppu.client.vault import HistoryItem

SAMPLE = 10
FREQUENT = 5
LEADING_LABELS = 3
_SENTENCE_END = re.compile(r"[.!?]")
# Words that say nothing about a person; a word must also have three letters.
_COMMON_WORDS = """
about after all also and any are because been before but can could did does for from get had has have
her here him his how into its just like may more most new not now off one only our out over said she
should some such than that the their them then there these they this those too two under use used
using very via was way well were what when where which while who why will with would you your
"""
_COMMON = frozenset(_COMMON_WORDS.split())


def template_profile(task: Task, history: Sequence[HistoryItem]) -> str:
    """A profile of counts and means, put into words.

    Args:
        task: Says which fields to count.
        history: The task's items, oldest first; any number.

    Returns:
        One line, the most telling facts first, because a budget cuts it from the end; "" without
        items.

    Raises:
        DataError: An item has no answer.
    """
    if not history:
        return ""
    answers = [item.fields[task.item_format(item.fields).target] for item in history]
    texts = [task.document(item.fields) for item in history]
    if task.kind == "rating":
        return f"{_ratings(answers)}; often writes {_frequent(texts)}"
    if task.items_are_queries and task.labels:
        return f"mostly {_leading(answers)}; often about {_frequent(texts)}"
    if task.name == "LaMP_1":
        titles = [item.fields.get("title", "") for item in history]
        return f"works on {_frequent(titles)}"
    return f"{_style(answers)}; often writes {_frequent(answers)}"


def written_profile(
    task: Task, history: Sequence[HistoryItem], prompts: PromptBuilder, predictor: Predictor
) -> str:
    """A profile that the base itself writes, greedily, from a sample of the history.

    The sample is `SAMPLE` items evenly spaced over the history, the newest among them; each takes at
    most `prompt.retrieved_tokens`, and the answer at most `prompt.profile_tokens`. The base answers
    without any adapter, so that a profile does not depend on what was trained.

    Args:
        task: Of the history.
        history: The task's items, oldest first; any number.
        prompts: Of the same task and base as the predictor.
        predictor: Answers one query.

    Returns:
        One line; "" without items.

    Raises:
        DataError: An item is not of the task, or the base cannot hold the question.
    """
    if not history:
        return ""
    prompt = prompts.profile_prompt(sample(history, SAMPLE))
    query = ModelQuery(f"{task.name} profile", prompt, (), max_tokens=prompts.profile_tokens)
    tokens = next(iter(predictor.generate([query])))
    return " ".join(prompts.answer(tokens).split())


def sample(history: Sequence[HistoryItem], size: int) -> list[HistoryItem]:
    """At most `size` items evenly spaced over the history, the newest among them, order kept."""
    count = min(size, len(history))
    return [history[(step + 1) * len(history) // count - 1] for step in range(count)]


def _leading(labels: Iterable[str]) -> str:
    """The most frequent labels with their shares; ties in alphabetic order."""
    count = Counter(labels)
    ranked = sorted(count, key=lambda label: (-count[label], label))[:LEADING_LABELS]
    return ", ".join(f"{label} ({100 * count[label] / count.total():.0f} %)" for label in ranked)


def _ratings(scores: Sequence[str]) -> str:
    mean = sum(float(score) for score in scores) / len(scores)
    count = Counter(scores)
    most = min(count, key=lambda score: (-count[score], score))
    return f"gives {mean:.1f} on average, mostly {most}"


def _style(texts: Sequence[str]) -> str:
    """How long the texts are, and how they are punctuated and spelt."""
    length = sum(len(words(text)) for text in texts) / len(texts)
    habits = {
        "questions": [text.rstrip().endswith("?") for text in texts],
        "exclamations": [text.rstrip().endswith("!") for text in texts],
        "colons": [": " in text for text in texts],
        "figures": [any(letter.isdigit() for letter in text) for text in texts],
        "capitals": [_is_title_case(text) for text in texts],
        "several sentences": [len(_SENTENCE_END.findall(text)) > 1 for text in texts],
    }
    often = [name for name, seen in habits.items() if 2 * sum(seen) >= len(texts)]
    return f"writes about {length:.0f} words" + (f" with {', '.join(often)}" if often else "")


def _is_title_case(text: str) -> bool:
    long = [word for word in text.split() if len(word) > 3 and word[0].isalpha()]
    return bool(long) and sum(word[0].isupper() for word in long) >= 0.8 * len(long)


def _frequent(texts: Iterable[str]) -> str:
    """Words that are in most texts, each text counting once; ties in alphabetic order."""
    count = Counter(
        word
        for text in texts
        for word in set(words(text))
        if len(word) > 2 and word not in _COMMON and not word.isdigit()
    )
    ranked = sorted(count, key=lambda word: (-count[word], word))[:FREQUENT]
    return ", ".join(ranked) if ranked else "little"
