"""A run that is killed at any moment and resumed ends in the bytes of one that was not.

Real processes, killed with SIGKILL after times drawn from a seed over the length of a whole run, so
that imports, rounds, training, scoring and the last files are all hit; a killed run is resumed and
killed again until it ends.
"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_run import LEAST, command, finish, lines, results, settings

START = [
    *("task=LaMP_3", "users=5", "base_users=6", "queries=2", "rounds=3", "cohort=4"),
    *("group_users=2", "personal.training.epochs=1", "personal.training.newest=4"),
    *("resamples=50", "arms=shared,population,personal"),
]


def words(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fedoppu", "simulate", *arguments]


def started(*arguments: str) -> subprocess.Popen[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words(*arguments), text=True, **streams)  # type: ignore[call-overload,no-any-return]  # noqa: S603


def killed(after: float, *arguments: str) -> bool:
    """Whether a process was still at work after so many seconds, and was killed."""
    process = started(*arguments)
    try:
        _, err = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    assert process.returncode == 0, err
    return False


def report(folder: Path) -> str:
    """The report without what it cost and the name of the folder."""
    text = (folder / "report.html").read_text().replace(str(folder), "FOLDER")
    text = re.sub(r"(times that the run was resumed</th>\s*<td>)\d+", r"\1TIMES", text)
    return re.sub(r"\d+(\.\d+)? s\b", "SECONDS", text)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that was never interrupted, and how long its process took."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    begun = time.monotonic()
    subprocess.run(words(*START, f"out={folder}", "-q"), check=True, capture_output=True)  # noqa: S603
    return folder, time.monotonic() - begun


def interrupt(
    folder: Path, reference: tuple[Path, float], *, workers: int, draw: random.Random, most: int
) -> int:
    """Kills a run up to `most` times, lets it end, and holds it against the reference."""
    whole, length = reference
    kills = 0
    while kills < most:
        begun = (folder / "config.yaml").exists()
        first = ["--resume", str(folder)] if begun else [*START, f"out={folder}"]
        if not killed(draw.uniform(0.3, 1.0) * length, *first, f"workers={workers}", "-q"):
            break
        kills += 1
    if not (folder / "report.html").exists():
        subprocess.run(words("--resume", str(folder), "-q"), check=True, capture_output=True)  # noqa: S603
    assert results(folder) == results(whole)
    if workers == 1:
        assert report(folder) == report(whole)
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(
    tmp_path: Path, reference: tuple[Path, float], workers: int
) -> None:
    draw = random.Random(workers)  # noqa: S311
    assert interrupt(tmp_path / "run", reference, workers=workers, draw=draw, most=3) > 0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_many_more_moments(tmp_path: Path, reference: tuple[Path, float], seed: int) -> None:
    draw = random.Random(100 + seed)  # noqa: S311
    interrupt(tmp_path / "run", reference, workers=1 + seed % 2, draw=draw, most=8)


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_say_how_to_go_on(
    tmp_path: Path, reference: tuple[Path, float], sign: signal.Signals, code: int
) -> None:
    folder = tmp_path / "run"
    # a shell's background jobs ignore Ctrl-C, and so would what they start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = started(*START, f"out={folder}", "-q")
    signal.signal(signal.SIGINT, before)
    while not list(folder.glob("seed-0/*/*/groups/trained/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sign)
    _, err = process.communicate()
    assert process.returncode == code
    assert f"to go on: fedoppu simulate --resume {folder}" in err
    resumed = subprocess.run(  # noqa: S603
        words("--resume", str(folder)), check=True, capture_output=True, text=True
    )
    assert "3 of 3 rounds were done before" in resumed.stderr
    assert re.search(r"personal adapters [12]/3 were done before", resumed.stderr)
    assert results(folder) == results(reference[0])


@pytest.mark.slow
def test_a_folder_that_is_worked_on_is_refused_to_a_second_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = started(*START, f"out={folder}", "-q")
    try:
        while not (folder / "config.yaml").exists():
            assert first.poll() is None
            time.sleep(0.01)
        second = command("--resume", str(folder))
        assert second.exit_code == 2
        assert f"error: another process works on {folder}" in second.stderr
    finally:
        first.kill()
        first.communicate()


# --- in this process -------------------------------------------------------------------------------


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path: Path) -> None:
    folder = finish(settings(f"out={tmp_path / 'run'}", start=LEAST))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ended = command("--resume", str(folder))
    assert (ended.exit_code, ended.stdout) == (
        0,
        f"the run in {folder} is finished: nothing is left to do\n",
    )
    told = command("--resume", str(folder), "--format", "json")
    assert {row["arm"] for row in json.loads(told.stdout)["data"]["rows"]} == {"majority"}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "lost", ["report.html", "table.json", "seed-0/LaMP_3/k0-none/metrics.jsonl"]
)
def test_whatever_was_written_last_the_run_ends_in_the_same_bytes(
    tmp_path: Path, lost: str
) -> None:
    folder = finish(settings(f"out={tmp_path / 'run'}", start=LEAST))
    whole = results(folder)
    for name in ("report.html", lost):
        (folder / name).unlink(missing_ok=True)
    assert command("--resume", str(folder), "-q").exit_code == 0
    assert results(folder) == whole


def test_other_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = finish(settings(f"out={tmp_path / 'run'}", start=LEAST))
    ended = command("--resume", str(folder), "seed=9")
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"error: {folder} was begun with another seed: ")
    both = command("--resume", str(folder), "--config", "x.yaml")
    assert (both.exit_code, both.stdout) == (2, "")


def test_rounds_that_changed_nothing_are_replayed(tmp_path: Path) -> None:
    """Who answered in them sits out, and only the process that is gone knew."""
    still = [*LEAST, "rounds=3", "base_users=12", "cohort=4", "shared.training.learning_rate=0"]
    whole = finish(settings(f"out={tmp_path / 'whole'}", start=still))
    folder = finish(settings(f"out={tmp_path / 'run'}", start=still))
    (folder / "report.html").unlink()
    shutil.rmtree(next(folder.glob("seed-0/*/*/rounds/0003")))
    assert command("--resume", str(folder), "-q").exit_code == 0
    assert results(folder) == results(whole)
    cohorts = [set(line["cohort"]) for line in lines(folder / "metrics.jsonl")]
    assert not cohorts[0] & cohorts[1]


def test_what_was_spent_of_a_privacy_budget_is_charged_once(tmp_path: Path) -> None:
    """As killed after round 3 was charged, and before it was committed."""
    private = [
        *(*LEAST, "rounds=3", "base_users=12", "cohort=4"),
        *("privacy.mechanism=central", "privacy.noise_multiplier=1.5"),
    ]
    whole = finish(settings(f"out={tmp_path / 'whole'}", start=private))
    folder = finish(settings(f"out={tmp_path / 'run'}", start=private))
    (folder / "report.html").unlink()
    shutil.rmtree(next(folder.glob("seed-0/*/*/rounds/0003")))
    charges = next(folder.glob("seed-0/*/*/rounds/private/charges.json"))
    assert len(json.loads(charges.read_bytes())) == 3
    assert command("--resume", str(folder), "-q").exit_code == 0
    assert results(folder) == results(whole)


@pytest.mark.parametrize("file", ["round.json", "shared.npy"])
def test_a_round_that_was_cut_is_named_with_a_remedy_that_works(tmp_path: Path, file: str) -> None:
    start = [*LEAST, "rounds=2", "base_users=4", "cohort=2", "shared.training.newest=1"]
    folder = finish(settings(f"out={tmp_path / 'run'}", start=start))
    whole = results(folder)
    (folder / "report.html").unlink()
    cut = next(folder.glob(f"seed-0/*/*/rounds/0002/{file}"))
    cut.write_bytes(cut.read_bytes()[:20])
    ended = command("--resume", str(folder), "-q")
    assert ended.exit_code == 1
    assert f"error: {cut.parent} is not a committed round: " in ended.stderr
    assert "hint: restore it; a simulation does it again" in ended.stderr
    shutil.rmtree(cut.parent)
    assert command("--resume", str(folder), "-q").exit_code == 0
    assert results(folder) == whole
