"""The personal phase and the evaluation of one federation: groups of users to trained adapters, answers and scores."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedoppu.client.tasks import Task
from fedoppu.common.commit import commit_file
from fedoppu.common.config import RunConfig
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.baselines import OwnHistory, majority, prior_shift, wrong_users
from fedoppu.simulations.console import Console
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.personal import (
    SCORED_ARMS,
    TRAINED_ARMS,
    WRONG_USER,
    GroupAnswers,
    ScoreGroup,
    TrainedRow,
    TrainGroup,
    pooled_items,
    score_group,
    train_group,
)
from fedoppu.simulations.scores import QueryResult, UserScores, average_scores, score_users
from fedoppu.simulations.users import PreparedUsers, history_lengths

ALL_ARMS = (*SCORED_ARMS, "majority", "prior_shift", "oracle")


@dataclass(frozen=True)
class Arm:
    """The scores of one arm, or of one control of it."""

    arm: str
    control: str | None
    users: tuple[UserScores, ...] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What the personal phase of one federation needs to know.

    Attributes:
        run: The settings.
        task: The task.
        users: Its users.
        newest: Items that a personal adapter is trained on at most; 0 for all.
        randomness: Root of the random choices.
        shared: Folder of the shared adapter.
        folder: Where adapters and records go.
    """

    run: RunConfig
    task: Task
    users: PreparedUsers
    newest: int
    randomness: Randomness
    shared: Path
    folder: Path

    @property
    def adapters(self) -> Path:
        """Folder of the personal adapters, "{arm}/{user}"."""
        return self.folder / "adapters"


def chosen_arms(run: RunConfig) -> tuple[str, ...]:
    """The arms of a run, in the order of the table.

    Raises:
        UsageError: An arm has no such name.
    """
    unknown = set(run.arms) - set(ALL_ARMS) - {"all"}
    if unknown:
        raise UsageError(
            f"arms must be all or some of {', '.join(ALL_ARMS)}, got {', '.join(sorted(unknown))}"
        )
    return ALL_ARMS if "all" in run.arms else tuple(arm for arm in ALL_ARMS if arm in run.arms)


def evaluate(work: Evaluation, executor: GroupExecutor, console: Console) -> tuple[Arm, ...]:
    """Trains every adapter and scores every arm.

    Raises:
        ClientFailed: A user's job failed.
    """
    arms = chosen_arms(work.run)
    needed = _answered(arms)
    rows = _train(work, executor, console, tuple(arm for arm in TRAINED_ARMS if arm in arms))
    _write_rows(work.folder / "personal.jsonl", rows)
    answers = _score(work, executor, console, needed)
    return tuple(arm for arm in _arms(work, answers) if arm.arm in arms)


def _answered(arms: Sequence[str]) -> tuple[str, ...]:
    """The arms whose answers are needed: the others of `ALL_ARMS` are made from those of another arm."""
    needed = {*arms, "shared"} if "prior_shift" in arms else set(arms)
    return tuple(arm for arm in SCORED_ARMS if arm in needed) or ("base",)


def _groups(work: Evaluation) -> list[tuple[str, ...]]:
    size = work.run.group_users
    target = work.users.target
    return [target[start : start + size] for start in range(0, len(target), size)]


def _train(
    work: Evaluation, executor: GroupExecutor, console: Console, arms: tuple[str, ...]
) -> list[TrainedRow]:
    if not arms:
        return []
    pooled = _pooled(work) if "population" in arms else {}
    groups = [
        TrainGroup(
            users,
            arms,
            work.shared,
            work.adapters,
            {user: pooled[user] for user in users if pooled},
        )
        for users in _groups(work)
    ]
    done = console.steps("personal adapters", executor.map(train_group, groups), len(groups))
    return [row for rows in done for row in rows]


def _pooled(work: Evaluation) -> Mapping[str, tuple[tuple[str, int], ...]]:
    sizes = history_lengths(work.users, work.task.name)
    return pooled_items(sizes, work.users.target, newest=work.newest, randomness=work.randomness)


def _score(
    work: Evaluation, executor: GroupExecutor, console: Console, arms: tuple[str, ...]
) -> GroupAnswers:
    wrong = (
        wrong_users(work.users.target, work.run.personal.wrong_users, randomness=work.randomness)
        or {}
    )
    groups = [
        ScoreGroup(
            users, arms, work.shared, work.adapters, {user: wrong[user] for user in users if wrong}
        )
        for users in _groups(work)
    ]
    done = console.steps("scored groups", executor.map(score_group, groups), len(groups))
    return _merge(list(done))


def _merge(parts: Sequence[GroupAnswers]) -> GroupAnswers:
    results: dict[tuple[str, int | None], list[QueryResult]] = {}
    histories: dict[str, OwnHistory] = {}
    answers: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for key, values in part.results.items():
            results.setdefault(key, []).extend(values)
        histories |= part.histories
        answers |= part.answers
    return GroupAnswers(results, histories, answers)


def _arms(work: Evaluation, answers: GroupAnswers) -> Iterator[Arm]:
    results, task = answers.results, work.task
    for arm in SCORED_ARMS:
        if (arm, None) in results:
            yield Arm(arm, None, score_users(results[arm, None], task))
    wrong = [
        score_users(values, task) for (_, index), values in results.items() if index is not None
    ]
    if ("personal", None) in results:
        yield Arm("personal", WRONG_USER, average_scores(wrong))
    any_arm = next(iter(results.values()))
    yield Arm("majority", None, score_users(majority(any_arm, answers.answers, task.kind), task))
    if ("shared", None) in results:
        known = [one for one in results["shared", None] if one.user in answers.histories]
        shifted = prior_shift(known, answers.histories, task.labels)
        yield Arm("prior_shift", None, score_users(shifted, task))
    if work.users.oracle:
        yield Arm("oracle", None, score_users(_oracle(any_arm, work.users.oracle), task))


def _oracle(
    results: Sequence[QueryResult], oracle: Mapping[tuple[str, str], str]
) -> tuple[QueryResult, ...]:
    return tuple(
        replace(
            result,
            prediction=oracle[result.user, result.query],
            label_log_likelihoods=None,
            gold_log_likelihood=None,
        )
        for result in results
    )


def _write_rows(path: Path, rows: Sequence[TrainedRow]) -> None:
    lines = [json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows]
    commit_file(path, "".join(lines).encode())
