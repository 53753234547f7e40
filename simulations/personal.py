"""The personal phase of a group of virtual users, and their answers under every arm.

Arms: `base`; `shared`; `local`, a personal adapter on the base alone; `population`, an adapter on shared that is
trained on as many items pooled from other target users; `personal`, ours. The control `wrong_user` is personal under
other users' adapters, each alone, with the own history, profile and retrieval.

Both functions that work on a group are module-level and take plain references, so that any process can run them.
Nothing of a user is read by another user's job, but for the population arm and the wrong-user control.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedoppu.client.jobs import ClientFailure, ClientJob, Example, ModelQuery, TrainedAdapter
from fedoppu.client.prompts import PreparedQuery
from fedoppu.client.vault import QUERY, HistoryItem
from fedoppu.common.adapter_files import load_adapter, save_adapter
from fedoppu.common.adapters import Adapter
from fedoppu.common.errors import ClientFailed, FedoppuError
from fedoppu.simulations.baselines import OwnHistory
from fedoppu.simulations.scores import QueryResult, labelled_result
from fedoppu.simulations.workers import Worker

TRAINED_ARMS = ("local", "population", "personal")
SCORED_ARMS = ("base", "shared", *TRAINED_ARMS)
WRONG_USER = "wrong_user"


@dataclass(frozen=True)
class TrainGroup:
    """Users whose adapters are trained in one pass.

    Attributes:
        users: Their ids.
        arms: Of TRAINED_ARMS.
        shared: Folder of the shared adapter.
        adapters: Folder that gets "{arm}/{user}".
        pooled: User: (other user, index of the item) pairs of the population arm.
    """

    users: tuple[str, ...]
    arms: tuple[str, ...]
    shared: Path
    adapters: Path
    pooled: Mapping[str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class TrainedRow:
    """What is recorded of one trained adapter; without examples it has no loss and is as it began."""

    user: str
    arm: str
    examples: int
    steps: int
    tokens: int
    train_loss: float | None
    digest: str


@dataclass(frozen=True)
class ScoreGroup:
    """Users who are scored in one pass.

    Attributes:
        users: Their ids.
        arms: Of SCORED_ARMS.
        shared: Folder of the shared adapter.
        adapters: Folder that holds "{arm}/{user}".
        wrong: User: other users whose personal adapters are tried, each alone; empty for no control.
        own: Whether shared is asked about the own histories too.
    """

    users: tuple[str, ...]
    arms: tuple[str, ...]
    shared: Path
    adapters: Path
    wrong: Mapping[str, tuple[str, ...]]
    own: bool = True


@dataclass(frozen=True)
class GroupAnswers:
    """The answers of a group of users.

    Attributes:
        results: (arm, None) or ("personal", index of the wrong user): the answers of all users of the group.
        histories: User: shared's scores on the own history; empty for tasks whose items hold no label.
        answers: User: the answers of the own history, oldest first; empty where items hold none of the task's.
    """

    results: Mapping[tuple[str, int | None], Sequence[QueryResult]]
    histories: Mapping[str, OwnHistory] = field(repr=False)
    answers: Mapping[str, tuple[str, ...]] = field(repr=False)


def train_group(worker: Worker, group: TrainGroup) -> tuple[TrainedRow, ...]:
    """Trains and saves the adapters of a group of users.

    Raises:
        ClientFailed: A job failed; the message names the user.
    """
    shared = load_adapter(group.shared)
    examples = _Examples(worker)
    jobs = [
        _job(
            worker, user, arm=arm, shared=shared, examples=examples.of_arm(user, arm, group.pooled)
        )
        for arm in group.arms
        for user in group.users
    ]
    rows: list[TrainedRow] = []
    for trained in worker.trainer.update_many(jobs):
        arm, user = trained.id.split("/", 1)
        if isinstance(trained, ClientFailure):
            raise ClientFailed(
                f"the {arm} adapter of user {user} could not be trained: {trained.message}"
            )
        save_adapter(group.adapters / arm / user, trained.adapter, base_name=worker.base.facts.name)
        rows.append(_row(arm, user, trained))
    return tuple(rows)


def _row(arm: str, user: str, trained: TrainedAdapter) -> TrainedRow:
    return TrainedRow(
        user=user,
        arm=arm,
        examples=trained.examples,
        steps=trained.steps,
        tokens=trained.tokens,
        train_loss=trained.train_loss if trained.examples else None,
        digest=trained.adapter.digest(),
    )


def _job(
    worker: Worker, user: str, *, arm: str, shared: Adapter, examples: Sequence[Example]
) -> ClientJob:
    """The job of one adapter; all arms of a user start from the same A and see the same order of steps."""
    owner = worker.randomness.child("owner", user)
    frozen = () if arm == "local" else (shared,)
    parent = frozen[0].digest() if frozen else None
    return ClientJob(
        id=f"{arm}/{user}",
        start=worker.fresh_personal(owner, parent),
        frozen=frozen,
        settings=worker.spec.personal.training,
        examples=examples,
        randomness=owner.child("training"),
    )


class _Examples:
    """Examples of users' histories; those of one user are built once a group."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._built: dict[str, list[Example]] = {}

    def of_user(self, user: str) -> list[Example]:
        """Each item of the user's history as an example, oldest first."""
        if user not in self._built:
            with _naming(user):
                history, _ = worker_history(self._worker, user)
                profile = self._worker.profile(user, history)
                self._built[user] = self._worker.prompts.history_examples(history, profile=profile)
        return self._built[user]

    def of_arm(
        self, user: str, arm: str, pooled: Mapping[str, tuple[tuple[str, int], ...]]
    ) -> list[Example]:
        """What an arm's adapter of the user is trained on."""
        if arm != "population":
            return self.of_user(user)
        return [self.of_user(other)[index] for other, index in pooled[user]]


@contextmanager
def _naming(user: str) -> Iterator[None]:
    """Gives an error about a user's own data the name of the user."""
    try:
        yield
    except FedoppuError as error:
        raise ClientFailed(f"user {user}: {error}", hint=error.hint) from None


def worker_history(worker: Worker, user: str) -> tuple[list[HistoryItem], list[HistoryItem]]:
    """A virtual user's items of the task, oldest first, and queries."""
    everything = worker.users.vault(user).history()
    items = [item for item in everything if item.kind == worker.task.name]
    return items, [item for item in everything if item.kind == QUERY]


def score_group(worker: Worker, group: ScoreGroup) -> GroupAnswers:
    """Answers every query of a group of users under every arm.

    Raises:
        ClientFailed: A query cannot be asked; the message names the user.
        AdapterError: An adapter on disk is of another base or another shared adapter.
    """
    shared = load_adapter(group.shared)
    asked = [prepared for user in group.users for prepared in _prepare(worker, user)]
    results: dict[tuple[str, int | None], Sequence[QueryResult]] = {}
    for arm, control in _columns(group):
        stacks = {
            user: _stack(worker, group, user, arm=arm, control=control, shared=shared)
            for user in group.users
        }
        results[arm, control] = _answer(worker, asked, stacks)
    answers = {user: _own_answers(worker, user) for user in group.users}
    own = (
        {user: _own_history(worker, user, shared) for user in group.users}
        if "shared" in group.arms and group.own
        else {}
    )
    return GroupAnswers(
        results, {user: history for user, history in own.items() if history}, answers
    )


def _columns(group: ScoreGroup) -> Iterable[tuple[str, int | None]]:
    yield from ((arm, None) for arm in group.arms)
    if "personal" in group.arms and group.wrong:
        yield from (("personal", index) for index in range(len(group.wrong[group.users[0]])))


@dataclass(frozen=True)
class _Asked:
    """One query of one user."""

    user: str
    query: PreparedQuery


def _prepare(worker: Worker, user: str) -> list[_Asked]:
    with _naming(user):
        history, queries = worker_history(worker, user)
        profile = worker.profile(user, history)
        prepared = worker.prompts.queries(history, queries, profile=profile)
        return [_Asked(user, query) for query in prepared]


def _stack(
    worker: Worker, group: ScoreGroup, user: str, *, arm: str, control: int | None, shared: Adapter
) -> tuple[Adapter, ...]:
    """The adapters of one arm for one user; each must be of this base and, on shared, of this shared adapter."""
    if arm == "base":
        return ()
    if arm == "shared":
        return (shared,)
    owner = user if control is None else group.wrong[user][control]
    parent = None if arm == "local" else shared.digest()
    own = load_adapter(group.adapters / arm / owner).require(
        base_hash=worker.config.base_hash, parent=parent
    )
    return (own,) if arm == "local" else (shared, own)


def _answer(
    worker: Worker, asked: Sequence[_Asked], stacks: Mapping[str, tuple[Adapter, ...]]
) -> list[QueryResult]:
    if worker.task.kind == "generation":
        return _generate(worker, asked, stacks)
    queries = [
        ModelQuery(one.query.id, one.query.prompt, stacks[one.user], labels=one.query.labels)
        for one in asked
    ]
    return [
        labelled_result(
            one.user,
            one.query.id,
            gold=one.query.gold,
            scores=scores.tolist(),
            labels=worker.task.labels,
            gold_tokens=len(one.query.gold_tokens),
        )
        for one, scores in zip(asked, worker.predictor.score(queries), strict=True)
    ]


def _generate(
    worker: Worker, asked: Sequence[_Asked], stacks: Mapping[str, tuple[Adapter, ...]]
) -> list[QueryResult]:
    queries = [
        ModelQuery(
            one.query.id,
            one.query.prompt,
            stacks[one.user],
            labels=(one.query.gold_tokens,),
            max_tokens=worker.config.prompt.answer_tokens,
        )
        for one in asked
    ]
    answered = zip(
        asked, worker.predictor.score(queries), worker.predictor.generate(queries), strict=True
    )
    return [
        QueryResult(
            user=one.user,
            query=one.query.id,
            gold=one.query.gold,
            prediction=worker.prompts.answer(tokens),
            label_log_likelihoods=None,
            gold_log_likelihood=float(scores[0]),
            gold_tokens=len(one.query.gold_tokens),
        )
        for one, scores, tokens in answered
    ]


def _own_answers(worker: Worker, user: str) -> tuple[str, ...]:
    """The answers of the own history; empty where an item has no answer of the task's kind (LaMP-1, generation)."""
    history, _ = worker_history(worker, user)
    return tuple(
        answer for item in history if (answer := worker.task.history_label(item.fields)) is not None
    )


def _own_history(worker: Worker, user: str, shared: Adapter) -> OwnHistory | None:
    """Shared's label scores on the own history, with causal retrieval; None if items hold no label."""
    if not (worker.task.labels and worker.task.items_are_queries):
        return None
    answers, (history, _) = _own_answers(worker, user), worker_history(worker, user)
    if not history:
        return OwnHistory((), np.zeros((0, len(worker.task.labels))))
    examples = worker.prompts.history_examples(history, profile=worker.profile(user, history))
    labels = worker.prompts.label_tokens()
    queries = [
        ModelQuery(f"{user}/{index}", example.prompt, (shared,), labels=labels)
        for index, example in enumerate(examples)
    ]
    return OwnHistory(answers, np.stack(list(worker.predictor.score(queries))))
