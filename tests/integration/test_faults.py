"""Kills, full disks and Ctrl-C at counted moments: nothing that was committed is lost.

Beside `test_resume.py`, which kills whole trees of processes after times: here each moment at which
a run leaves something is met exactly, on a fast machine and on a slow one.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedoppu.simulations.costs import processes
from tests.fault_points import meet
from tests.small_run import command, finish, results, settings

START = [
    *("task=LaMP_3", "users=3", "base_users=4", "queries=1", "rounds=2", "cohort=4"),
    *("group_users=2", "personal.training.epochs=1", "personal.training.newest=2"),
    *("resamples=20", "arms=shared,population,personal"),
]
# so that a chain of faults has a few links on the way to the end
LONGEST = 20


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met no fault."""
    return finish(settings(f"out={tmp_path_factory.mktemp('reference') / 'run'}", start=START))


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many moments a whole run has."""
    folder = tmp_path_factory.mktemp("moments")
    ended = meet(None, 0, folder, *START, f"out={folder / 'run'}", "-q")
    assert ended.code == 0
    return ended.moments


def next_command(folder: Path) -> list[str]:
    """What a person types who finds the folder as it is."""
    if (folder / "config.yaml").exists():
        return ["--resume", str(folder), "-q"]
    return [*START, f"out={folder}", "-q"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_chain_of_kills_ends_in_the_same_bytes(
    tmp_path: Path, reference: Path, seed: int
) -> None:
    draw, folder = random.Random(seed), tmp_path / "run"  # noqa: S311
    ends: list[int] = []
    while not ends or ends[-1] != 0:
        at = draw.randint(1, LONGEST)
        ends.append(meet("kill", at, tmp_path, *next_command(folder)).code)
    assert set(ends[:-1]) == {-9}
    assert results(folder) == results(reference)
    begun = [line["process"] for line in processes(folder)]
    assert begun == list(range(1, len(begun) + 1))
    assert f"{len(begun) - 1}</td>" in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("before_end", [0, 2, 5])
def test_a_run_killed_while_it_writes_its_last_files_ends_in_the_same_bytes(
    tmp_path: Path, reference: Path, moments: int, before_end: int
) -> None:
    folder = tmp_path / "run"
    ended = meet("kill", moments - before_end, tmp_path, *next_command(folder))
    assert ended.code == -9
    assert command(*next_command(folder)).exit_code == 0
    assert results(folder) == results(reference)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4])
def test_a_run_killed_before_it_left_anything_is_begun_or_resumed(
    tmp_path: Path, reference: Path, at: int
) -> None:
    folder = tmp_path / "run"
    assert meet("kill", at, tmp_path, *next_command(folder)).code == -9
    again = next_command(folder)
    assert (again[0] == "--resume") == (at >= 4)  # run.json, then config.yaml
    assert command(*again).exit_code == 0
    assert results(folder) == results(reference)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_full_disk_names_the_file_and_the_remedy_and_loses_nothing(
    tmp_path: Path, reference: Path, moments: int, seed: int
) -> None:
    draw, folder = random.Random(seed), tmp_path / "run"  # noqa: S311
    ended = meet("full", draw.randint(4, moments - 1), tmp_path, *next_command(folder))
    assert ended.code == 1, ended.stderr
    assert f"to go on: fedoppu simulate --resume {folder}" in ended.stderr
    assert f"error: No space left on device: {folder}/" in ended.stderr
    assert "hint: free some room" in ended.stderr
    kept = results(folder)
    assert not [name for name in kept if name.endswith(".tmp")]
    assert command("--resume", str(folder), "-q").exit_code == 0
    assert results(folder) == results(reference)
    last = {"metrics.jsonl", "table.json", "personal.jsonl"}  # written again, with the same bytes
    written = {name: data for name, data in kept.items() if Path(name).name not in last}
    assert written.items() <= results(folder).items()


@pytest.mark.slow
def test_a_disk_without_room_for_the_settings_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = meet("full", 0, tmp_path, *next_command(folder))
    assert ended.code == 2
    assert ended.stderr == (
        f"error: {folder} cannot be written to: No space left on device\nhint: set out=FOLDER\n"
    )
    assert list(folder.iterdir()) == []


REAL = """
mount -t tmpfs -o size={room} none {folder} || exit 99
"$@" simulate {start} out={folder}/run -q; echo "code $?" >&2
mount -o remount,size=64m {folder}
"$@" simulate --resume {folder}/run -q || exit 98
cp -r {folder}/run {kept}
"""


@pytest.mark.slow
def test_a_real_disk_that_is_too_small_is_made_larger_and_the_run_goes_on(
    tmp_path: Path, reference: Path
) -> None:
    """In a namespace of its own, where any user may mount."""
    if not shutil.which("unshare"):
        pytest.skip("there is no unshare")
    folder, kept = tmp_path / "disk", tmp_path / "kept"
    folder.mkdir()
    room = f"{random.Random(0).randint(300, 900)}k"  # noqa: S311
    script = REAL.format(room=room, folder=folder, kept=kept, start=" ".join(START))
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    ended = subprocess.run(  # noqa: S603
        [*own, sys.executable, "-m", "fedoppu"], capture_output=True, text=True
    )
    if ended.returncode in (1, 99) and "code" not in ended.stderr:
        pytest.skip(f"no room can be made here: {ended.stderr.strip()}")
    assert "code 1\n" in ended.stderr
    assert f"error: No space left on device: {folder}/run/" in ended.stderr
    assert "hint: free some room" in ended.stderr
    assert ended.returncode == 0, ended.stderr
    assert results(kept) == results(reference)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_a_resumable_run(
    tmp_path: Path, reference: Path, moments: int
) -> None:
    draw, folder = random.Random(0), tmp_path / "run"  # noqa: S311
    ended = meet("interrupt", draw.randint(5, moments - 1), tmp_path, *next_command(folder))
    assert (ended.code, ended.stderr.count("error: interrupted")) == (130, 1)
    assert f"to go on: fedoppu simulate --resume {folder}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert command("--resume", str(folder), "-q").exit_code == 0
    assert results(folder) == results(reference)
