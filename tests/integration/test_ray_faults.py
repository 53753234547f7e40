"""engine=ray when something is killed: the run itself, its head, or every process of one group.

What a run starts is told by who started it, and followed by process number: other Rays of the
machine do not matter. Everything is waited for until it is seen. Those that wait minutes for Ray to
notice are `long`.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.simulations.test_ray_executor import START, alive, free_port, words
from tests.simulations.test_workers import spec_of
from tests.small_run import command, finish, results, settings

pytest.importorskip("ray", reason="engine=ray needs the extra fedoppu[flower]")

PATIENCE = 300.0  # seconds until something that must happen is given up on


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(settings(f"out={tmp_path_factory.mktemp('reference') / 'run'}", start=START))


def wait_for(seen: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not seen():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)


def processes() -> dict[int, tuple[int, str, str]]:
    """Number: (number of the parent, time of its start, what it is called), of all processes."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
            name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if state != "Z":
            found[int(entry.name)] = (int(parent), rest[17], name)
    return found


def started_by(pid: int) -> set[tuple[int, str]]:
    """What a process started, and what that started: number and time of the start.

    But for Ray's two agents: they work on nothing, and end two minutes after what they served.
    """
    everything, found = processes(), {pid}
    for _ in range(8):  # generations
        found |= {child for child, (parent, *_) in everything.items() if parent in found}
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return {
        (child, everything[child][1])
        for child in found - {pid}
        if child in everything and not everything[child][2].startswith(agents)
    }


def still_there(them: set[tuple[int, str]]) -> bool:
    now = {(pid, begun) for pid, (_, begun, _) in processes().items()}
    return bool(them & now)


@contextmanager
def begun(folder: Path, *place: str) -> Iterator[subprocess.Popen[str]]:
    """A run on Ray that has trained its first group of adapters, and not its last."""
    run = subprocess.Popen(  # noqa: S603
        words(*START, "engine=ray", *place, f"out={folder}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(
            lambda: run.poll() is not None or list(folder.glob("seed-0/*/*/groups/trained/*.json")),
            "a first group",
        )
        assert run.poll() is None, run.communicate()[1]
        yield run
    finally:
        run.kill()
        run.wait()


@pytest.mark.long
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_run_that_is_ended_leaves_no_task_behind_and_is_resumed_anywhere(
    tmp_path: Path, reference: Path, sign: signal.Signals, code: int
) -> None:
    folder = tmp_path / "run"
    with begun(folder, "workers=2") as run:
        tasks = started_by(run.pid)
        assert len(tasks) > 3
        run.send_signal(sign)
        _, err = run.communicate()
        assert run.returncode == code
    assert (f"to go on: fedoppu simulate --resume {folder}" in err) == (code == 143)
    wait_for(lambda: not still_there(tasks), "the end of Ray's processes")
    again = shutil.copytree(folder, tmp_path / "again")
    ended = command("--resume", str(folder), "engine=local", "-q")
    assert ended.exit_code == 0, ended.stderr
    assert results(folder) == results(reference)
    if sign == signal.SIGKILL:
        on_ray = words("--resume", str(again), "engine=ray", "workers=2", "-q")
        subprocess.run(on_ray, check=True, capture_output=True)  # noqa: S603
        assert results(again) == results(reference)


@contextmanager
def head(folder: str) -> Iterator[tuple[str, set[int]]]:
    """A Ray head; its address, and its processes: killed at the end, if they are still there."""
    port = free_port()
    options = ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"]
    ports = [f"--port={port}", f"--ray-client-server-port={free_port()}"]
    process = subprocess.Popen(  # noqa: S603
        [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", *options, *ports),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: process.poll() is not None or alive(port), "a head")
        assert process.poll() is None, "ray start failed"
        yield f"127.0.0.1:{port}", {process.pid}
    finally:
        for pid, _ in started_by(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_head_that_goes_away_ends_the_run_in_one_line_and_it_goes_on_elsewhere(
    tmp_path: Path, reference: Path
) -> None:
    folder = tmp_path / "run"
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as home,
        head(home) as (address, pids),
        begun(folder, f"ray.address={address}") as run,
    ):
        for pid in [*(child for child, _ in started_by(min(pids))), *pids]:
            os.kill(pid, signal.SIGKILL)
        _, err = run.communicate(timeout=PATIENCE)
        assert run.returncode == 3, err
        assert f"to go on: fedoppu simulate --resume {folder}" in err
        port = address.rpartition(":")[2]  # Ray tells the machine's own name for itself
        assert f":{port} went away while groups of users were worked on" in err
        assert "hint: start it again and go on with the run" in err
        assert "Traceback" not in err
    ended = command("--resume", str(folder), "engine=local", "-q")
    assert ended.exit_code == 0, ended.stderr
    assert results(folder) == results(reference)


DEADLY = """
import os, pickle, sys
from pathlib import Path
from fedoppu.common.errors import FedoppuError
from fedoppu.simulations import ray_executor

def deadly(worker, group):
    with open(group, "a") as log:
        log.write("tried ")
    os.kill(os.getpid(), 9)

spec = pickle.loads(Path(sys.argv[1]).read_bytes())
ray_executor.RETRIES = 1
with ray_executor.RayWorkforce(None, 1) as workforce:
    try:
        list(workforce.executor(spec).map(deadly, [sys.argv[2]]))
    except FedoppuError as error:
        told = (type(error).__name__, error, error.hint)
print(*told, sep="|")
"""


@pytest.mark.slow
def test_a_group_that_always_kills_its_process_ends_the_run_after_so_many_tries(
    tmp_path: Path,
) -> None:
    import pickle

    spec, log = tmp_path / "spec", tmp_path / "log"
    spec.write_bytes(pickle.dumps(spec_of(tmp_path / "users")))
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-c", DEADLY, str(spec), str(log)], capture_output=True, text=True
    )
    kind, message, hint = ended.stdout.strip().split("|")
    assert (kind, log.read_text().split()) == ("ClientFailed", ["tried", "tried"])
    assert message == "a group of users was lost 2 times: WorkerCrashedError"
    assert "set fewer workers or group_users" in hint
