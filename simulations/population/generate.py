"""Virtual users in LaMP's format: `generate` draws a population from a seed, with its ground truth.

What is promised, and tested: a seed draws a new population; a user does not depend on how many
others are drawn, nor on the number of queries; at least a third of a user's map is private; at
least 8 % of the answers are noise; histories are 15 to 80 items long, heavy-tailed, at least 30 on
average; nothing that decides an answer depends on the length.

The generator is held: no method was tuned by changing it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final, Literal

import numpy as np

from fedoppu.client.importers.lamp import LampUser
from fedoppu.client.tasks import get_task
from fedoppu.client.vault import QUERY, HistoryItem
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.population.drafts import Draft, draft_item, draft_query, num_labels
from fedoppu.simulations.population.preferences import (
    DIFFERENT,
    EXCHANGEABLE,
    Preferences,
    Variation,
    draw_common,
    draw_user,
)

Kind = Literal["preferences", "null"]
VARIATIONS: Final[Mapping[str, Variation]] = {"preferences": DIFFERENT, "null": EXCHANGEABLE}
MEDIAN_LENGTH: Final = 30
LOG_LENGTH_SD: Final = 0.6
SHORTEST, LONGEST = 15, 80
FIRST_DAY: Final = date(2015, 1, 1)
MEAN_GAP_DAYS: Final = 6.0
SOURCE: Final = "generated"


@dataclass(frozen=True)
class Population:
    """Generated users and what is true of them.

    Attributes:
        target: Users with personal adapters; they are scored.
        base: Users who train the shared adapter; none is a target.
        oracle: For (user id, query id), the answer of one who knows the user's preferences: the
            gold without noise.
        truths: For (user id, item or query id), the draft that it was made of.
        common: What the population has in common.
        preferences: For each user id, the latent preferences.
    """

    target: tuple[LampUser, ...]
    base: tuple[LampUser, ...]
    oracle: Mapping[tuple[str, str], str]
    truths: Mapping[tuple[str, str], Draft]
    common: Preferences
    preferences: Mapping[str, Preferences]


@dataclass(frozen=True)
class _Member:
    """One generated user with the truth of each record."""

    user: LampUser
    preferences: Preferences
    drafts: Mapping[str, Draft]


def generate(
    task: str,
    *,
    population: Kind,
    seed: int,
    target_users: int,
    base_users: int,
    queries: int,
) -> Population:
    """Draws a population for one LaMP task.

    Args:
        task: One of the seven, for example "LaMP_2N".
        population: preferences, or null: users are exchangeable.
        seed: Each seed draws another population, with another map.
        target_users: At least 1.
        base_users: At least 0.
        queries: Queries of each user, newer than its history; at least 1.

    Raises:
        UsageError: No such task or population, or a number below its bound.
    """
    get_task(task)
    _check_arguments(
        population,
        {"target_users": (target_users, 1), "base_users": (base_users, 0), "queries": (queries, 1)},
    )
    source = _source(task, population, seed)
    target, base = (
        tuple(_draw(task, role, count=count, queries=queries, source=source))
        for role, count in (("target", target_users), ("base", base_users))
    )
    return _assemble(target, base, source.common)


def stream_users(
    task: str, role: str, *, count: int, population: Kind, seed: int, queries: int
) -> Iterator[tuple[LampUser, dict[str, str]]]:
    """Yields the users that `generate` draws for a role, one at a time: nothing is held of the others.

    Args:
        task: One of the seven.
        role: target or base.
        count: Users of the role.
        population: preferences, or null.
        seed: Of the population.
        queries: Queries of each user.

    Returns:
        Each user, and the true answer of each of the user's queries.
    """
    get_task(task)
    _check_arguments(population, {f"{role}_users": (count, 0), "queries": (queries, 1)})
    source = _source(task, population, seed)
    for member in _draw(task, role, count=count, queries=queries, source=source):
        yield (
            member.user,
            {query.id: member.drafts[query.id].truth for query in member.user.queries},
        )


def _source(task: str, population: Kind, seed: int) -> "_Source":
    root = Randomness.from_seed(seed).child("population", population, task)
    common = draw_common(num_labels(task), root.stream("common"))
    return _Source(root, VARIATIONS[population], common)


def _draw(
    task: str, role: str, *, count: int, queries: int, source: "_Source"
) -> Iterator["_Member"]:
    return (_member(task, f"{role}-{index:04d}", queries, source) for index in range(count))


@dataclass(frozen=True)
class _Source:
    """What every user of a population is drawn from."""

    root: Randomness
    variation: Variation
    common: Preferences


def _check_arguments(population: str, numbers: Mapping[str, tuple[int, int]]) -> None:
    if population not in VARIATIONS:
        raise UsageError(f"population must be one of {', '.join(VARIATIONS)}, got {population}")
    for name, (value, least) in numbers.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")


def _assemble(
    target: tuple[_Member, ...], base: tuple[_Member, ...], common: Preferences
) -> Population:
    everyone = target + base
    truths = {
        (member.user.user_id, id): draft
        for member in everyone
        for id, draft in member.drafts.items()
    }
    oracle = {
        (member.user.user_id, query.id): member.drafts[query.id].truth
        for member in everyone
        for query in member.user.queries
    }
    return Population(
        target=tuple(member.user for member in target),
        base=tuple(member.user for member in base),
        oracle=oracle,
        truths=truths,
        common=common,
        preferences={member.user.user_id: member.preferences for member in everyone},
    )


def _member(task: str, user_id: str, queries: int, source: _Source) -> _Member:
    """Draws one user; items and queries have streams of their own: neither moves the other."""
    own = source.root.child("user", user_id)
    user = draw_user(source.common, source.variation, num_labels(task), own.stream("preferences"))
    length = draw_length(own.stream("length"))
    days = _days(length + queries, own.stream("days"))
    items, texts = own.stream("items"), own.stream("queries")
    drafts = {f"h{i:03d}": draft_item(task, user, items) for i in range(length)}
    asked = {f"q{i:03d}": draft_query(task, user, texts) for i in range(queries)}
    history = tuple(
        HistoryItem(id, day, SOURCE, task, draft.fields)
        for (id, draft), day in zip(drafts.items(), days[:length], strict=True)
    )
    records = tuple(
        HistoryItem(id, day, SOURCE, QUERY, _query_fields(task, draft))
        for (id, draft), day in zip(asked.items(), days[length:], strict=True)
    )
    return _Member(LampUser(user_id, task, history, records), user, {**drafts, **asked})


def _query_fields(task: str, draft: Draft) -> Mapping[str, str]:
    return {"input": get_task(task).render_input(draft.fields), "gold": draft.answer}


def draw_length(rng: np.random.Generator) -> int:
    """Items of a history: lognormal, median 30, clipped to 15 ... 80; about 34 on average."""
    length = MEDIAN_LENGTH * float(np.exp(LOG_LENGTH_SD * rng.standard_normal()))
    return max(SHORTEST, min(LONGEST, round(length)))


def _days(count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """ISO dates, each later than the one before."""
    day = FIRST_DAY + timedelta(days=int(rng.integers(1500)))
    days = []
    for gap in rng.exponential(MEAN_GAP_DAYS, count):
        day += timedelta(days=1 + int(gap))
        days.append(day.isoformat())
    return tuple(days)
