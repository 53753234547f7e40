"""Groups as Ray tasks: in order, retried when they are lost, refused where they would differ."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedoppu.common.config import PersonalSettings
from fedoppu.common.errors import ClientFailed, ConnectionFailed, DataError, UsageError
from fedoppu.simulations import ray_executor
from fedoppu.simulations.ray_executor import Home, RayTasks, import_ray, run_on_ray
from fedoppu.simulations.workers import WorkerSpec
from tests.small_run import LEAST, command, finish, results, settings

NOWHERE = "127.0.0.1:1"  # nobody listens there
SPEC = WorkerSpec("pocket", Path("users"), b"{}", PersonalSettings(), 0, 1, 1)
START = [
    *("task=LaMP_3", "users=5", "base_users=6", "queries=2", "rounds=2", "cohort=4"),
    *("group_users=2", "personal.training.epochs=1", "personal.training.newest=4"),
    *("resamples=50", "arms=shared,population,personal"),
]


def doubled(worker: Any, group: int) -> int:
    return 2 * group


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    """What a process settled once, the next test settles again, where it was."""
    before = Path.cwd()
    yield
    ray_executor._settle.cache_clear()
    os.chdir(before)


def test_without_ray_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="engine=ray needs Ray") as told:
        import_ray()
    assert told.value.hint == "pip install 'fedoppu[flower]'"
    ended = command(*LEAST, "engine=ray", "out=never")
    assert (ended.exit_code, Path("never").exists()) == (2, False)


def test_a_machine_that_does_not_see_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientFailed, match="does not see /nowhere") as told:
        run_on_ray(replace(Home.here(), folder="/nowhere"), SPEC, doubled, 1)
    assert "under the same path" in told.value.hint
    with pytest.raises(ClientFailed, match=f"does not see the users in {tmp_path}/users"):
        run_on_ray(replace(Home.here(), folder=str(tmp_path)), SPEC, doubled, 1)


def test_a_machine_with_other_versions_is_refused() -> None:
    own = Home.here()
    other = replace(own, versions=(*own.versions[:1], "0.9", *own.versions[2:]))
    with pytest.raises(ClientFailed, match=r"has torch .*, not 0\.9: results would differ"):
        run_on_ray(other, SPEC, doubled, 1)


# --- without a cluster -----------------------------------------------------------------------------


class Lost(Exception):
    """As Ray's own errors."""


class Gone(Lost):
    """As Ray's when the machine's own part of it has ended."""


class Failed(Lost):
    """An error of the task itself."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class FakeRay:
    """Works when it is asked for a result; counts what was submitted, and what was cancelled.

    Attributes:
        raises: Group: error of it.
        late: How often each result is waited for in vain.
    """

    class exceptions:  # noqa: N801
        RayError, RayTaskError, LocalRayletDiedError = Lost, Failed, Gone

    def __init__(self, *, raises: dict[int, Exception] | None = None, late: int = 0) -> None:
        self.raises = raises or {}
        self.late = late
        self.waited = 0
        self.submitted = 0
        self.cancelled: list[int] = []
        self.options: dict[str, Any] = {}

    def remote(self, *arguments: Any, **options: Any) -> Any:
        if options:
            self.options = options
            return lambda function: self
        self.submitted += 1
        return arguments[-1]

    def wait(self, groups: list[int], *, timeout: float) -> tuple[list[int], list[int]]:
        assert timeout == ray_executor.PROBE_SECONDS
        self.waited += 1
        return ([], groups) if self.waited <= self.late else (groups, [])

    def get(self, group: int) -> int:
        if group in self.raises:
            raise self.raises[group]
        return 2 * group

    def cancel(self, group: int, *, force: bool) -> None:
        assert force
        self.cancelled.append(group)


def tasks(ray: FakeRay, ahead: int, *, head: str = NOWHERE) -> RayTasks:
    return RayTasks(ray, SPEC, ahead, head=head)


def test_results_come_in_the_order_of_the_groups_and_few_are_under_way() -> None:
    ray = FakeRay()
    found = tasks(ray, 4).map(doubled, range(9))
    assert [next(found), next(found)] == [0, 2]
    assert ray.submitted == 5
    assert list(found) == [4, 6, 8, 10, 12, 14, 16]
    assert ray.cancelled == []


def test_a_lost_task_is_retried_and_an_error_of_a_group_is_not() -> None:
    ray = FakeRay()
    RayTasks(ray, replace(SPEC, threads=3), 4, head=NOWHERE)
    assert ray.options == {"num_cpus": 3, "max_retries": 3, "retry_exceptions": False}


def test_an_error_of_a_group_is_passed_on_as_it_is_and_the_others_are_cancelled() -> None:
    ray = FakeRay(raises={1: Failed(DataError("item 3 has no text", hint="give it one"))})
    with pytest.raises(DataError, match="item 3 has no text") as told:
        list(tasks(ray, 3).map(doubled, range(9)))
    assert told.value.hint == "give it one"
    assert ray.cancelled == [2, 3]


def test_a_group_that_is_lost_too_often_is_a_failed_client_with_a_remedy() -> None:
    ray = FakeRay(raises={0: Lost()})
    with pytest.raises(ClientFailed, match="was lost 4 times: Lost") as told:
        list(tasks(ray, 3).map(doubled, range(9)))
    assert "set fewer workers or group_users" in told.value.hint


def test_a_head_that_is_gone_is_a_failed_connection_with_a_remedy() -> None:
    for ray in (FakeRay(raises={0: Gone()}), FakeRay(late=ray_executor.PROBES)):
        with pytest.raises(ConnectionFailed, match=f"Ray at {NOWHERE} went away") as told:
            list(tasks(ray, 3).map(doubled, range(9)))
        assert "go on with engine=local" in told.value.hint
        assert ray.cancelled == [1, 2]


def test_a_group_may_take_its_time_while_the_head_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ray = FakeRay(late=5 * ray_executor.PROBES)
        own = tasks(ray, 3, head=f"127.0.0.1:{server.getsockname()[1]}")
        assert list(own.map(doubled, [1])) == [2]


def test_a_head_that_is_silent_for_a_moment_is_waited_for() -> None:
    ray = FakeRay(late=ray_executor.PROBES - 1)
    assert list(tasks(ray, 3).map(doubled, [1])) == [2]


# --- a head of our own, and a cluster --------------------------------------------------------------


def words(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fedoppu", "simulate", *arguments]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(settings(f"out={tmp_path_factory.mktemp('reference') / 'run'}", start=START))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def head(folder: str) -> Iterator[str]:
    """A Ray head with two processors, ended with all its processes; its address."""
    pytest.importorskip("ray", reason="engine=ray needs the extra fedoppu[flower]")
    port = free_port()
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]
    ports = [f"--port={port}", f"--ray-client-server-port={free_port()}"]
    process = subprocess.Popen(  # noqa: S603
        [ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", *options, *ports],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not alive(port):
            assert process.poll() is None, "ray start failed"
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def alive(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def task_processes(folder: str) -> list[int]:
    """Processes of the head in `folder` that work on a group just now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "cmdline").read_bytes()
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            own = folder.encode() in Path("/proc", parent, "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if own and name.startswith(b"ray::run_on_ray"):
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_head_of_our_own_gives_the_bytes_of_one_process_and_one_json_object(
    tmp_path: Path, reference: Path
) -> None:
    pytest.importorskip("ray", reason="engine=ray needs the extra fedoppu[flower]")
    out = (f"out={tmp_path / 'run'}", "--format", "json", "-q")
    ended = subprocess.run(  # noqa: S603
        words(*START, "engine=ray", "workers=2", *out), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["status"] == "ok"
    assert results(tmp_path / "run") == results(reference)


@pytest.mark.slow
def test_a_worker_that_is_killed_on_a_cluster_changes_nothing(
    tmp_path: Path, reference: Path
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        head(folder) as address,
    ):
        place = ("engine=ray", f"ray.address={address}", f"out={tmp_path / 'run'}")
        run = subprocess.Popen(  # noqa: S603
            words(*START, *place, "--format", "json", "-q"), stdout=subprocess.PIPE, text=True
        )
        try:
            while not (working := task_processes(folder)):
                assert run.poll() is None
                time.sleep(0.02)
            os.kill(working[0], signal.SIGKILL)
            told, _ = run.communicate()
            assert run.returncode == 0
            assert json.loads(told)["status"] == "ok"  # nothing of Ray's beside it
        finally:
            run.kill()
    assert results(tmp_path / "run") == results(reference)


@pytest.mark.slow
def test_an_address_without_a_cluster_is_a_failed_connection(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="engine=ray needs the extra fedoppu[flower]")
    place = ("engine=ray", f"ray.address=127.0.0.1:{free_port()}", f"out={tmp_path / 'run'}")
    ended = subprocess.run(words(*LEAST, *place, "-q"), capture_output=True, text=True)  # noqa: S603
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "error: Ray could not be reached at 127.0.0.1:" in ended.stderr
