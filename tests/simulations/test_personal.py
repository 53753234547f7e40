"""The personal phase of a group of users on pocket: what is trained, saved, refused and answered."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedoppu.client.model import resolve_base
from fedoppu.client.vault import HistoryItem
from fedoppu.common.adapter_files import load_adapter, save_adapter
from fedoppu.common.adapters import Adapter, AdapterSpec
from fedoppu.common.config import load_run_config
from fedoppu.common.defaults import federation, personal_settings, personal_spec
from fedoppu.common.errors import AdapterError, ClientFailed
from fedoppu.simulations.baselines import Pool
from fedoppu.simulations.personal import (
    ScoreGroup,
    TrainGroup,
    score_group,
    train_group,
    worker_history,
)
from fedoppu.simulations.users import prepare_users
from fedoppu.simulations.workers import Worker, WorkerSpec, open_worker

TARGETS = ("target-0000", "target-0001", "target-0002")


def worker_of(folder: Path, task: str, *changes: str) -> Worker:
    """Three target users of one task, whose adapters are trained for one epoch on four items."""
    run = load_run_config(
        [
            *(f"task={task}", "users=3", "base_users=2", "queries=2"),
            *("personal.training.epochs=1", "personal.training.newest=4", *changes),
        ]
    )
    base = resolve_base(run.base)
    users = prepare_users(run, task=task, seed=0, folder=folder)
    config = federation(
        run, base, task=task, k=run.k[0], profile=run.profile[0], base_users=2, seed=0
    )
    personal = personal_settings(run, base, task)
    return open_worker(WorkerSpec(run.base, users.folder, config.canonical(), personal, 0, 1, 3))


def random_adapter(spec: AdapterSpec, seed: int, *, parent: str | None = None) -> Adapter:
    """An adapter that does something."""
    stream = np.random.default_rng(seed)
    tensors = {
        name: (0.1 * stream.standard_normal(shape)).astype(np.float32)
        for name, shape in spec.shapes().items()
    }
    return Adapter(spec, tensors, parent)


@dataclass(frozen=True)
class Ready:
    """A worker with a shared adapter and everyone's personal adapters on disk."""

    worker: Worker
    shared: Path
    adapters: Path
    pooled: dict[str, tuple[tuple[str, int], ...]]

    def scores(self, arms: tuple[str, ...], **changes: Any) -> ScoreGroup:
        return replace(ScoreGroup(TARGETS, arms, self.shared, self.adapters, {}), **changes)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    home = tmp_path_factory.mktemp("personal")
    worker = worker_of(home / "users", "LaMP_3")
    shared = random_adapter(worker.shared_spec, 1)
    save_adapter(home / "shared", shared, base_name="pocket")
    sizes = {user: len(worker_history(worker, user)[0]) for user in TARGETS}
    pool = Pool(sizes, worker.randomness)
    pooled = {user: pool.items(user, 4) for user in TARGETS}
    group = TrainGroup(
        TARGETS, ("local", "population", "personal"), home / "shared", home / "adapters", pooled
    )
    rows = train_group(worker, group)
    assert [(row.arm, row.user) for row in rows] == [
        (arm, user) for arm in group.arms for user in TARGETS
    ]
    return Ready(worker, home / "shared", home / "adapters", pooled)


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["local", "population", "personal"])
def test_an_adapter_knows_what_it_was_trained_on(ready: Ready, arm: str) -> None:
    shared = load_adapter(ready.shared)
    for user in TARGETS:
        own = load_adapter(ready.adapters / arm / user)
        assert own.parent == (None if arm == "local" else shared.digest())
        assert own.spec == personal_spec(
            ready.worker.base.facts, ready.worker.spec.personal.adapter
        )
        own.require(base_hash=ready.worker.config.base_hash, parent=own.parent)


def test_adapters_move_and_differ_by_what_is_under_them(ready: Ready) -> None:
    moved = [load_adapter(ready.adapters / arm / TARGETS[0]) for arm in ("local", "personal")]
    name = next(iter(moved[0].tensors)).rpartition(".")[0]
    assert any(one.tensors[f"{name}.B"].any() for one in moved)
    assert moved[0].digest() != moved[1].digest()


def test_training_again_gives_the_same_bytes(ready: Ready, tmp_path: Path) -> None:
    group = TrainGroup(TARGETS, ("personal",), ready.shared, tmp_path, ready.pooled)
    for row in train_group(ready.worker, group):
        assert load_adapter(ready.adapters / "personal" / row.user).digest() == row.digest
        assert (row.examples, row.steps) == (4, 1)
        assert row.train_loss is not None


def test_the_population_arm_is_trained_on_the_others_items(ready: Ready, tmp_path: Path) -> None:
    """Another user's pairs give another adapter; nothing of the own history is in it."""
    first, second = TARGETS[:2]
    own_items = {first: tuple((first, index) for index in range(4))}
    group = TrainGroup((first,), ("population",), ready.shared, tmp_path, own_items)
    (row,) = train_group(ready.worker, group)
    assert row.digest != load_adapter(ready.adapters / "population" / first).digest()
    assert first not in {owner for owner, _ in ready.pooled[first]}
    assert second in {owner for user in TARGETS for owner, _ in ready.pooled[user]}


def test_without_any_item_an_adapter_stays_as_it_began(ready: Ready, tmp_path: Path) -> None:
    group = TrainGroup(TARGETS[:1], ("population",), ready.shared, tmp_path, {TARGETS[0]: ()})
    (row,) = train_group(ready.worker, group)
    assert (row.examples, row.steps, row.train_loss) == (0, 0, None)
    own = load_adapter(tmp_path / "population" / TARGETS[0])
    assert not any(own.tensors[name].any() for name in own.tensors if name.endswith(".B"))


@dataclass(frozen=True)
class Broken:
    """Users whose histories cannot be put into a prompt."""

    def vault(self, user: str) -> "Broken":
        return self

    def history(self) -> Sequence[HistoryItem]:
        return (HistoryItem("7", "", "lamp", "LaMP_3", {"text": "dull", "score": "none"}),)


def test_a_history_that_cannot_be_read_names_the_user(ready: Ready, tmp_path: Path) -> None:
    broken = replace(ready.worker, users=Broken())  # type: ignore[arg-type]
    group = TrainGroup(TARGETS, ("personal",), ready.shared, tmp_path, {})
    with pytest.raises(ClientFailed, match="user target-0000: LaMP_3: the answer of 7"):
        train_group(broken, group)


def test_a_failed_job_names_user_and_arm(ready: Ready, tmp_path: Path) -> None:
    spec = replace(
        ready.worker.spec,
        personal=replace(
            ready.worker.spec.personal,
            training=replace(ready.worker.spec.personal.training, proximal=1.0),
        ),
    )
    group = TrainGroup(TARGETS, ("local",), ready.shared, tmp_path, {})
    with pytest.raises(
        ClientFailed, match="the local adapter of user target-0000 could not be trained: UsageError"
    ):
        train_group(replace(ready.worker, spec=spec), group)


# --- scoring ---------------------------------------------------------------------------------------


def test_every_query_is_answered_under_every_arm_and_control(ready: Ready) -> None:
    wrong = {user: tuple(other for other in TARGETS if other != user) for user in TARGETS}
    arms = ("base", "shared", "local", "population", "personal")
    found = score_group(ready.worker, ready.scores(arms, wrong=wrong))
    columns = [*((arm, None) for arm in arms), ("personal", 0), ("personal", 1)]
    assert list(found.results) == columns
    asked = [(result.user, result.query) for result in found.results["base", None]]
    assert len(asked) == len(set(asked)) == 6
    for results in found.results.values():
        assert [(result.user, result.query) for result in results] == asked


def test_arms_differ_where_their_adapters_do(ready: Ready) -> None:
    found = score_group(ready.worker, ready.scores(("base", "shared", "local", "personal")))
    scores = {
        arm: [result.label_log_likelihoods for result in results]
        for (arm, _), results in found.results.items()
    }
    assert len({str(each) for each in scores.values()}) == 4


def test_the_wrong_user_control_answers_with_the_others_adapter(
    ready: Ready, tmp_path: Path
) -> None:
    first, second = TARGETS[:2]
    wrong = {first: (second,)}
    found = score_group(ready.worker, ready.scores(("personal",), users=(first,), wrong=wrong))
    other = load_adapter(ready.adapters / "personal" / second)
    save_adapter(tmp_path / "personal" / first, other, base_name="pocket")
    swapped = ready.scores(("personal",), users=(first,), adapters=tmp_path)
    expected = score_group(ready.worker, swapped).results["personal", None]
    assert list(found.results["personal", 0]) == list(expected)
    assert list(found.results["personal", None]) != list(expected)


def test_shared_is_scored_on_the_own_history_for_prior_shift(ready: Ready) -> None:
    found = score_group(ready.worker, ready.scores(("shared",)))
    for user in TARGETS:
        history, _ = worker_history(ready.worker, user)
        assert found.answers[user] == tuple(item.fields["score"] for item in history)
        assert found.histories[user].scores.shape == (len(history), 5)
    assert score_group(ready.worker, ready.scores(("base",))).histories == {}


def test_an_adapter_of_another_base_is_refused(ready: Ready, tmp_path: Path) -> None:
    own = load_adapter(ready.adapters / "personal" / TARGETS[0])
    assert isinstance(own.spec, AdapterSpec)
    foreign = Adapter(replace(own.spec, base_hash="cd" * 32), own.tensors, own.parent)
    save_adapter(tmp_path / "personal" / TARGETS[0], foreign, base_name="another")
    group = ready.scores(("personal",), users=TARGETS[:1], adapters=tmp_path)
    with pytest.raises(AdapterError, match=r"was made for base cdcdcdcdcdcd, not for") as told:
        score_group(ready.worker, group)
    assert told.value.exit_code == 1
    assert "load the base" in told.value.hint


def test_an_adapter_that_grew_on_another_shared_adapter_is_refused(
    ready: Ready, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "shared", random_adapter(ready.worker.shared_spec, 2), base_name="x")
    group = ready.scores(("personal",), users=TARGETS[:1], shared=tmp_path / "shared")
    with pytest.raises(AdapterError, match="was trained on shared adapter"):
        score_group(ready.worker, group)
    local = ready.scores(("local",), users=TARGETS[:1], shared=tmp_path / "shared")
    assert score_group(ready.worker, local).results["local", None]


def test_a_missing_adapter_is_told_by_its_folder(ready: Ready, tmp_path: Path) -> None:
    group = ready.scores(("local",), users=TARGETS[:1], adapters=tmp_path)
    with pytest.raises(AdapterError, match=r"no adapter folder .*target-0000"):
        score_group(ready.worker, group)


def test_generation_answers_in_words_and_scores_the_gold(tmp_path: Path) -> None:
    worker = worker_of(tmp_path / "users", "LaMP_5", "prompt.answer_tokens=4", "k=1")
    save_adapter(tmp_path / "shared", random_adapter(worker.shared_spec, 1), base_name="pocket")
    group = ScoreGroup(TARGETS[:1], ("base", "shared"), tmp_path / "shared", tmp_path, {})
    found = score_group(worker, group)
    assert found.histories == {}
    assert found.answers == {TARGETS[0]: ()}
    for result in found.results["base", None]:
        assert result.label_log_likelihoods is None
        assert result.gold_log_likelihood is not None
        assert result.gold_log_likelihood < 0
        assert len(result.prediction.split()) <= 4


@dataclass(frozen=True)
class Empty:
    """A user with a query and no history."""

    queries: tuple[HistoryItem, ...]

    def vault(self, user: str) -> "Empty":
        return self

    def history(self) -> Sequence[HistoryItem]:
        return self.queries

    @property
    def profile(self) -> None:
        return None


def test_a_user_without_history_is_scored_and_nothing_is_known_of_their_labels(
    ready: Ready,
) -> None:
    _, queries = worker_history(ready.worker, TARGETS[0])
    newcomer = replace(ready.worker, users=Empty(tuple(queries)))  # type: ignore[arg-type]
    found = score_group(newcomer, ready.scores(("shared",), users=TARGETS[:1]))
    assert len(found.results["shared", None]) == 2
    assert found.answers == {TARGETS[0]: ()}
    assert found.histories[TARGETS[0]].scores.shape == (0, 5)


def test_items_without_labels_say_nothing_about_the_labels_of_queries(tmp_path: Path) -> None:
    worker = worker_of(tmp_path / "users", "LaMP_1")
    save_adapter(tmp_path / "shared", random_adapter(worker.shared_spec, 1), base_name="pocket")
    group = ScoreGroup(TARGETS[:1], ("shared",), tmp_path / "shared", tmp_path, {})
    assert score_group(worker, group).histories == {}
