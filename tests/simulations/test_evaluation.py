"""From groups of users to arms: who is trained and scored on whom, and what each arm is made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedoppu.client.tasks import TASKS
from fedoppu.common.config import load_run_config
from fedoppu.common.errors import ClientFailed, UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations import evaluation
from fedoppu.simulations.baselines import OwnHistory
from fedoppu.simulations.console import Console
from fedoppu.simulations.evaluation import ALL_ARMS, Arm, Evaluation, chosen_arms, evaluate
from fedoppu.simulations.personal import (
    GroupAnswers,
    ScoreGroup,
    TrainedRow,
    TrainGroup,
    train_group,
)
from fedoppu.simulations.scores import QueryResult, labelled_result
from fedoppu.simulations.users import Oracle, PreparedUsers
from tests.small_run import lines

QUIET = Console(progress=False, table=False)
TASK = TASKS["LaMP_3"]
LENGTHS = {f"u{number}": 10 + number for number in range(7)}


@dataclass
class FakeExecutor:
    """Trains nothing; answers everything with "4", the right answer being "5"."""

    trained: list[TrainGroup] = field(default_factory=list)
    scored: list[ScoreGroup] = field(default_factory=list)

    def map(self, work: Callable[..., Any], groups: Iterable[Any]) -> Iterator[Any]:
        for group in groups:
            if work is train_group:
                self.trained.append(group)
                yield tuple(row(arm, user) for arm in group.arms for user in group.users)
            else:
                self.scored.append(group)
                yield answers(group)


def row(arm: str, user: str) -> TrainedRow:
    return TrainedRow(user, arm, examples=3, steps=1, tokens=9, train_loss=None, digest="ab")


def answers(group: ScoreGroup) -> GroupAnswers:
    columns: list[tuple[str, int | None]] = [(arm, None) for arm in group.arms]
    if "personal" in group.arms and group.wrong:
        columns += [("personal", index) for index in range(len(group.wrong[group.users[0]]))]
    histories = {user: OwnHistory(("5", "5"), np.log(np.full((2, 5), 0.2))) for user in group.users}
    return GroupAnswers(
        {column: [result(user, column) for user in group.users] for column in columns},
        histories if "shared" in group.arms else {},
        dict.fromkeys(group.users, ("5", "5", "1")),
    )


def result(user: str, column: tuple[str, int | None]) -> QueryResult:
    """The wrong user with index i gives the score i + 1, everyone else 4."""
    best = 3 if column[1] is None else column[1]
    chances = [0.6 if label == best else 0.1 for label in range(5)]
    return labelled_result(
        user,
        "q",
        gold="5",
        scores=[float(np.log(chance)) for chance in chances],
        labels=TASK.labels,
        gold_tokens=2,
    )


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setattr(evaluation, "history_lengths", lambda users: LENGTHS)
    known = "".join(f'{{"user": "{user}", "answers": {{"q": "5"}}}}\n' for user in LENGTHS)
    (tmp_path / "oracle.jsonl").write_text(known)
    oracle = Oracle.read(tmp_path / "oracle.jsonl")
    users = PreparedUsers(tmp_path / "users", tuple(LENGTHS), (), oracle)
    return Evaluation(
        run=load_run_config(["group_users=3"]),
        task=TASK,
        users=users,
        newest=12,
        randomness=Randomness.from_seed(5),
        shared=tmp_path / "shared",
        folder=tmp_path,
    )


def with_run(work: Evaluation, *changes: str) -> Evaluation:
    return replace(work, run=load_run_config(["group_users=3", *changes]))


def mae(arms: Sequence[Arm], arm: str, control: str | None = None) -> set[float | None]:
    (found,) = [one for one in arms if (one.arm, one.control) == (arm, control)]
    assert len(found.users) == len(LENGTHS)
    return {None if (v := user.values["mae"]) is None else round(v, 9) for user in found.users}


def test_arms_are_chosen_in_the_order_of_the_table() -> None:
    assert chosen_arms(load_run_config(["arms=personal,base"])) == ("base", "personal")
    assert chosen_arms(load_run_config([])) == ALL_ARMS
    assert chosen_arms(load_run_config(["arms=all,base"])) == ALL_ARMS


def test_an_unknown_arm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"arms must be all or some of base, .*, got lcoal"):
        chosen_arms(load_run_config(["arms=lcoal,base"]))


def test_every_user_is_in_one_group_of_the_configured_size(work: Evaluation) -> None:
    executor = FakeExecutor()
    evaluate(work, executor, QUIET)
    for groups in (executor.trained, executor.scored):
        assert [len(group.users) for group in groups] == [3, 3, 1]
        assert [user for group in groups for user in group.users] == list(LENGTHS)


def test_nobody_is_their_own_wrong_user_or_in_their_own_population(work: Evaluation) -> None:
    executor = FakeExecutor()
    evaluate(work, executor, QUIET)
    wrong = {user: others for group in executor.scored for user, others in group.wrong.items()}
    pooled = {user: pairs for group in executor.trained for user, pairs in group.pooled.items()}
    assert set(wrong) == set(pooled) == set(LENGTHS)
    for user in LENGTHS:
        assert len(set(wrong[user])) == 3
        assert user not in wrong[user]
        assert user not in {owner for owner, _ in pooled[user]}
        assert len(set(pooled[user])) == min(LENGTHS[user], work.newest)


def test_the_wrong_user_control_averages_single_wrong_users(work: Evaluation) -> None:
    arms = evaluate(work, FakeExecutor(), QUIET)
    assert mae(arms, "personal") == {1.0}
    # the three wrong users answer 1, 2 and 3: errors of 4, 3 and 2
    assert mae(arms, "personal", "wrong_user") == {3.0}


def test_arms_without_a_model_are_made_of_golds_histories_and_answers(work: Evaluation) -> None:
    arms = evaluate(work, FakeExecutor(), QUIET)
    assert mae(arms, "oracle") == {0.0}
    assert mae(arms, "majority") == {0.0}  # the median of 5, 5, 1
    assert mae(arms, "prior_shift") == {1.0}  # two items move the prior too little for .6
    shifted, shared = (next(a for a in arms if a.arm == name) for name in ("prior_shift", "shared"))
    for moved, plain in zip(shifted.users, shared.users, strict=True):
        assert moved.values["loss"] is not None
        assert plain.values["loss"] is not None
        assert moved.values["loss"] < plain.values["loss"]


def test_without_labels_in_the_histories_there_is_no_prior_to_shift(work: Evaluation) -> None:
    class NoLabels(FakeExecutor):
        def map(self, work: Callable[..., Any], groups: Iterable[Any]) -> Iterator[Any]:
            for found in super().map(work, groups):
                if isinstance(found, GroupAnswers):
                    found = replace(found, histories={}, answers=dict.fromkeys(found.answers, ()))
                yield found

    arms = {arm.arm: arm for arm in evaluate(work, NoLabels(), QUIET) if arm.control is None}
    assert len(arms["prior_shift"].users) == len(arms["majority"].users) == 0
    assert len(arms["shared"].users) == len(LENGTHS)


def test_on_data_there_is_no_oracle(work: Evaluation) -> None:
    on_data = replace(work, users=replace(work.users, oracle=None))
    assert "oracle" not in {arm.arm for arm in evaluate(on_data, FakeExecutor(), QUIET)}


@pytest.mark.parametrize(
    ("arms", "trained", "scored"),
    [
        ("base", (), ("base",)),
        ("majority", (), ("base",)),
        ("oracle", (), ("base",)),
        ("prior_shift", (), ("shared",)),
        ("personal,base", ("personal",), ("base", "personal")),
        ("population,prior_shift", ("population",), ("shared", "population")),
    ],
)
def test_only_what_the_chosen_arms_need_is_trained_and_answered(
    work: Evaluation, arms: str, trained: tuple[str, ...], scored: tuple[str, ...]
) -> None:
    executor = FakeExecutor()
    found = evaluate(with_run(work, f"arms={arms}"), executor, QUIET)
    assert {group.arms for group in executor.trained} == ({trained} if trained else set())
    assert {group.arms for group in executor.scored} == {scored}
    assert {group.own for group in executor.scored} == {"prior_shift" in arms}
    assert {arm.arm for arm in found} == set(arms.split(","))


def test_fewer_users_than_wrong_users_need_leave_the_control_empty(work: Evaluation) -> None:
    few = with_run(work, "personal.wrong_users=7")
    executor = FakeExecutor()
    arms = evaluate(few, executor, QUIET)
    assert {len(group.wrong) for group in executor.scored} == {0}
    (control,) = [arm for arm in arms if arm.control]
    assert len(control.users) == 0


def test_what_was_trained_is_written_down(work: Evaluation) -> None:
    evaluate(with_run(work, "arms=local,personal"), FakeExecutor(), QUIET)
    records = lines(work.folder / "personal.jsonl")
    assert len(records) == 2 * len(LENGTHS)
    assert set(records[0]) == {
        *("user", "arm", "examples", "steps", "tokens", "train_loss", "digest"),
    }


def test_without_trained_arms_the_record_is_an_empty_file(work: Evaluation) -> None:
    evaluate(with_run(work, "arms=base"), FakeExecutor(), QUIET)
    assert lines(work.folder / "personal.jsonl") == []


def test_a_failed_group_ends_the_evaluation(work: Evaluation) -> None:
    class Failing(FakeExecutor):
        def map(self, work: Callable[..., Any], groups: Iterable[Any]) -> Iterator[Any]:
            raise ClientFailed("the personal adapter of user u3 could not be trained")

    with pytest.raises(ClientFailed, match="of user u3"):
        evaluate(work, Failing(), QUIET)


def test_finished_groups_are_neither_trained_nor_scored_again(work: Evaluation) -> None:
    class Dies(FakeExecutor):
        """Is killed with the second group that it scores."""

        def map(self, work: Callable[..., Any], groups: Iterable[Any]) -> Iterator[Any]:
            for found in super().map(work, groups):
                if len(self.scored) == 2:
                    raise KeyboardInterrupt
                yield found

    whole = evaluate(replace(work, folder=work.folder / "whole"), FakeExecutor(), QUIET)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work, Dies(), QUIET)
    again = FakeExecutor()
    resumed = evaluate(work, again, QUIET)
    assert again.trained == []
    assert [group.users for group in again.scored] == [("u3", "u4", "u5"), ("u6",)]
    assert plain(resumed) == plain(whole)


def plain(arms: Sequence[Arm]) -> list[Any]:
    return [
        (
            *(arm.arm, arm.control, one.user, one.queries, one.values),
            {name: (sums.dtype, sums.tolist()) for name, sums in one.sums.items()},
        )
        for arm in arms
        for one in arm.users
    ]
