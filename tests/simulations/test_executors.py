"""Groups are worked on in order, wherever; a worker process that dies ends the run with a remedy."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, cast

import pytest

from fedoppu.common.config import PersonalSettings
from fedoppu.common.errors import ClientFailed, DataError
from fedoppu.simulations import executors
from fedoppu.simulations.executors import InProcess, Processes, Workforce
from fedoppu.simulations.users import prepare_users
from fedoppu.simulations.workers import Worker, WorkerSpec
from tests.small_run import LEAST, settings

SPEC = WorkerSpec("pocket", Path("users"), b"{}", PersonalSettings(), 0, 1, 1)


class FakePool:
    """A pool that works at once, or breaks; counts what was submitted and not yet looked at."""

    def __init__(self, *, broken_at: int | None = None) -> None:
        self.submitted = 0
        self.broken_at = broken_at

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.submitted == self.broken_at:
            future.set_exception(BrokenProcessPool("gone"))
        else:
            future.set_result(work(*arguments))
        self.submitted += 1
        return future


def doubled(worker: Any, group: int) -> int:
    return 2 * group


def refused(worker: Any, group: int) -> int:
    raise DataError("item 3 has no text", hint="give it one")


@pytest.fixture(autouse=True)
def _no_worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded, except by the slow tests, which start processes."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(executors, "open_worker", lambda spec: None)


def processes(pool: object, workers: int = 2) -> Processes:
    return Processes(SPEC, cast(Any, pool), workers)


def test_one_worker_is_this_process() -> None:
    with Workforce(1) as workforce:
        executor = workforce.executor(SPEC)
        assert isinstance(executor, InProcess)
        assert list(executor.map(doubled, [3, 1, 2])) == [6, 2, 4]


def test_in_this_process_a_group_is_worked_on_when_it_is_asked_for() -> None:
    seen: list[int] = []

    def note(worker: Any, group: int) -> int:
        seen.append(group)
        return group

    results = InProcess(SPEC).map(note, [1, 2, 3])
    next(results)
    assert seen == [1]


def test_processes_give_results_in_the_order_of_the_groups() -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(processes(pool).map(doubled, range(20))) == [2 * group for group in range(20)]


def test_no_groups_are_no_work() -> None:
    pool = FakePool()
    assert list(processes(pool).map(doubled, [])) == []
    assert pool.submitted == 0


def test_at_most_two_groups_a_process_are_under_way() -> None:
    pool = FakePool()
    results = processes(pool, workers=3).map(doubled, range(50))
    next(results)
    assert pool.submitted == 6
    next(results)
    assert pool.submitted == 7


def test_what_is_under_way_is_cancelled_when_nobody_wants_it() -> None:
    futures: list[Future[Any]] = []

    class Waiting:
        def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
            futures.append(Future())
            if len(futures) == 1:
                futures[0].set_result(0)
            return futures[-1]

    results = processes(Waiting()).map(doubled, range(9))
    next(results)
    cast(Any, results).close()
    assert [future.cancelled() for future in futures] == [False, True, True, True]


@pytest.mark.parametrize("broken_at", [0, 3])
def test_a_broken_pool_is_a_failed_client_with_a_remedy(broken_at: int) -> None:
    with pytest.raises(ClientFailed, match="a worker process died") as told:
        list(processes(FakePool(broken_at=broken_at)).map(doubled, range(9)))
    assert "set fewer workers or group_users" in told.value.hint


def test_an_error_in_a_group_is_passed_on_as_it_is() -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(DataError, match="item 3 has no text") as told,
    ):
        list(processes(pool).map(refused, [1]))
    assert told.value.hint == "give it one"


# --- real processes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    from fedoppu.client.model import resolve_base
    from fedoppu.common.defaults import federation, personal_settings

    folder = tmp_path_factory.mktemp("users")
    run, base = settings(start=LEAST), resolve_base("pocket")
    users = prepare_users(run, task="LaMP_3", seed=0, folder=folder)
    config = federation(run, base, task="LaMP_3", k=0, profile="none", base_users=2, seed=0)
    personal = personal_settings(run, base, "LaMP_3")
    return WorkerSpec("pocket", users.folder, config.canonical(), personal, 0, 1, 2)


def where(worker: Worker, group: int) -> tuple[int, str, int]:
    return group, worker.users.target[0], os.getpid()


def dies(worker: Worker, group: int) -> int:
    if group == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return group


@pytest.mark.slow
def test_worker_processes_rebuild_the_worker_and_leave_errors_whole(spec: WorkerSpec) -> None:
    with Workforce(2) as workforce:
        found = list(workforce.executor(spec).map(where, range(4)))
        assert [group for group, _, _ in found] == [0, 1, 2, 3]
        assert {user for _, user, _ in found} == {"target-0000"}
        assert os.getpid() not in {pid for _, _, pid in found}
        with pytest.raises(DataError, match="item 3 has no text") as told:
            list(workforce.executor(spec).map(refused, [1]))
        assert told.value.hint == "give it one"


@pytest.mark.slow
def test_a_worker_process_that_is_killed_ends_the_run_with_a_remedy(spec: WorkerSpec) -> None:
    with Workforce(2) as workforce, pytest.raises(ClientFailed, match="worker process died"):
        list(workforce.executor(spec).map(dies, range(4)))


def sleeps(worker: Worker, group: int) -> int:
    if group:
        time.sleep(120)
    return group


def interrupted(spec: WorkerSpec) -> None:
    with Workforce(2) as workforce:
        next(workforce.executor(spec).map(sleeps, range(4)))
        raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interruption_does_not_wait_for_work_under_way(spec: WorkerSpec) -> None:
    before, begun = set(multiprocessing.active_children()), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted(spec)
    # the pool's own thread reaps them too; while it is at it, a dead process still counts as active
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() - begun < 100
        time.sleep(0.05)
