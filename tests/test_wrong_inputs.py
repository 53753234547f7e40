"""What a person may get wrong: each mistake is one line with the key, what it takes and what it got."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from errno import EACCES, ENOSPC
from pathlib import Path
from shutil import copytree
from signal import SIGKILL, SIGTERM, getsignal
from subprocess import PIPE, Popen

import pytest

from fedoppu.client.importers.lamp import read_oppu
from fedoppu.client.model import POCKET, load_base, resolve_base
from fedoppu.common.cli import run_command
from fedoppu.common.config import FederationConfig, RunConfig, load_run_config
from fedoppu.common.errors import BaseModelError, DataError, UsageError
from fedoppu.common.setting_checks import check_settings
from fedoppu.simulations.results import command_line, control_note
from tests.small_run import LEAST, command


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("k=", "k must be a whole number, or several with commas between, got nothing"),
        ("k=a", "k must be a whole number, or several with commas between, got a"),
        ("k=[[0]]", "k must be a whole number, or several with commas between, got 0"),
        ("k={a: 1}", "k must be a whole number, or several with commas between, got {'a': 1}"),
        ("k=0,0", "k must be one value or several different ones, got 0, 0"),
        ("task=[]", "task must be one value or several different ones, got nothing"),
        ("profile=temp", "profile must be one of none, template, llm, or several .*got temp"),
        ("users=", "users must be a whole number, got nothing"),
        ("users=1e3", "users must be a whole number, got 1000.0"),
        ("users.x=3", "users must be a whole number, got {'x': 3}"),
        ("rounds=x", "rounds must be a whole number or null, got x"),
        ("confidence=x", "confidence must be a number, got x"),
        ("data=[a,b]", "data must be text or null, got a, b"),
        ("research.plain_updates=maybe", "plain_updates must be true or false, got maybe"),
        ("engine=dask", "engine must be one of local, ray, flower, got dask"),
        ("personal.adapter.rank=0", "^personal.adapter.rank must be between 1 and 4096, got 0"),
        ("shared.adapter.alpha=inf", "^shared.adapter.alpha must be finite and at least"),
        ("threads=100000", "threads must be between 1 and 256, got 100000"),
        ("resamples=1000001", "resamples must be between 1 and 1000000, got 1000001"),
        ("shared.adapter=4", "shared.adapter holds settings and takes no value of its own, got 4"),
        ("rank=3", "Did you mean: 'shared.adapter.rank' or 'personal.adapter.rank'"),
        ("USERS=3", "Did you mean: 'users'"),
        ("out=${oc.env:HOME}", r"out takes no \$\{...\}"),
        ("task={a", "the setting task={a cannot be read: "),
        ("é=1", "^unknown key: é$"),
    ],
)
def test_a_setting_names_its_whole_key_what_it_takes_and_what_it_got(
    setting: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_run_config([setting])


def test_a_value_is_judged_with_the_settings_beside_it() -> None:
    run = load_run_config(["encoding.word_bits=16", "encoding.level_bits=12"])
    assert (run.encoding.word_bits, run.encoding.level_bits) == (16, 12)
    with pytest.raises(UsageError, match="level_bits must be between 2 and 14, got 20"):
        load_run_config(["encoding.word_bits=16", "encoding.level_bits=20"])


def test_a_wrong_value_in_the_file_is_told_although_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("users: many\n")
    with pytest.raises(UsageError, match="users must be a whole number, got many"):
        load_run_config(["users=3"], tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("users: 3\nusers: 4\n", "found duplicate key users in .*line 2"),
        ("users:\t3\n\tk: 0\n", "found a tab character .*line 2"),
        ("shared.adapter.rank: 2\n", "shared.adapter.rank: in a file, keys with dots are nested"),
        (
            "shared: {adapter: {rnk: 2}}\n",
            "unknown key: shared.adapter.rnk. .*'shared.adapter.rank'",
        ),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_run_config(file=tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read configuration file .*: Is a directory"):
        load_run_config(file=tmp_path)


def test_bytes_that_are_no_text_are_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"users: \xff")
    with pytest.raises(UsageError, match=r"is not YAML: .*can't decode byte 0xff"):
        load_run_config(file=tmp_path / "bad.yaml")


def test_all_defaults_pass_the_checks_one_by_one() -> None:
    check_settings(RunConfig, {"users": 3, "shared": {"adapter": {"rank": 2}}})


def test_a_federations_bytes_cannot_read_the_environment() -> None:
    with pytest.raises(UsageError, match=r"a federation's config takes no \$\{...\}"):
        FederationConfig.from_canonical(json.dumps({"task": "${oc.env:HOME}"}).encode())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["thresholds.floor=20"], "needs thresholds.floor .* = 20 members, got 3"),
        (["thresholds.corrupt=5"], "needs thresholds.floor .* = 7 members, got 3"),
        (
            ["encoding.word_bits=16", "encoding.level_bits=12", "base_users=20", "cohort=20"],
            "20 members with 12-bit levels overflow 16-bit words",
        ),
    ],
)
def test_a_cohort_that_cannot_be_is_found_before_anything_is_written(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    asked = ["rounds=1", "base_users=4", "cohort=3", f"out={tmp_path / 'run'}", *settings]
    ended = command(*LEAST, *asked)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()


def _change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: _change_config(folder, max_position_embeddings="lots"),
            "config.json: max_position_embeddings must be a positive whole number, got 'lots'",
        ),
        (lambda folder: _change_config(folder, hidden_size=64), "cannot be loaded: RuntimeError"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded: KeyError"),
    ],
)
def test_a_folder_that_is_not_one_model_is_no_base(
    tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    folder = copytree(POCKET, tmp_path / "broken")
    break_it(folder)
    with pytest.raises(BaseModelError, match=message):
        load_base(resolve_base(str(folder)))


def test_a_folder_named_like_a_gguf_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(BaseModelError, match="is not a GGUF file: it is a folder"):
        resolve_base(str(tmp_path / "model.gguf"))


def test_a_run_that_did_not_end_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    ended = command(*LEAST, f"out={tmp_path}")
    assert (ended.exit_code, "holds a run already, which did not end" in ended.stderr) == (2, True)


def test_half_a_surrogate_pair_in_the_data_is_told_with_its_place(tmp_path: Path) -> None:
    asked = (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3,"
    )
    record = {
        "user_id": "1",
        "profile": [{"id": "10", "text": "cut \ud83d", "score": "4"}],
        "query": [{"id": "11", "input": f"{asked} 4, or 5. review: dull", "gold": "2"}],
    }
    (tmp_path / "users.json").write_text(json.dumps([record]))
    with pytest.raises(DataError, match="id 10: field text: holds half of a surrogate pair"):
        read_oppu(tmp_path / "users.json", task="LaMP_3")


def _ending(error: BaseException) -> Callable[[], dict[str, object]]:
    def work() -> dict[str, object]:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(ENOSPC, "No space left on device", "run/x"), "machine", "No space .*: run/x"),
        (PermissionError(EACCES, "Permission denied"), "machine", "Permission denied"),
        (MemoryError("2 PiB"), "memory", "not enough memory: 2 PiB"),
    ],
)
def test_what_the_machine_refuses_is_no_bug_of_ours(
    error: BaseException, code: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^1$"):
        run_command(_ending(error), "json")
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["error_code"] == code
    assert re.fullmatch(message, envelope["message"])
    assert envelope["hint"]


def test_another_system_error_is_still_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^5$"):
        run_command(_ending(FileNotFoundError(2, "No such file", "x")), "json")
    assert json.loads(capsys.readouterr().out)["error_code"] == "bug"


def test_a_reader_that_has_enough_is_not_an_error() -> None:
    program = (
        "from fedoppu.common.cli import run_command\n"
        "run_command(lambda: [print('line', flush=True) for _ in range(10**5)], 'text')"
    )
    source = Popen([sys.executable, "-c", program], stdout=PIPE, stderr=PIPE)  # noqa: S603
    assert source.stdout is not None
    source.stdout.readline()
    source.stdout.close()
    assert source.stderr is not None
    assert (source.wait(timeout=60), source.stderr.read()) == (141, b"")
    source.stderr.close()


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(
        "import os, time\n"
        "from fedoppu.simulations.executors import _prepare_process\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), _prepare_process)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = Popen([sys.executable, str(tmp_path / "parent.py")], stdout=PIPE)  # noqa: S603
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    assert parent.stdout.read() == b""  # ends when nobody holds the pipe, so no worker is left
    assert parent.wait(timeout=60) == -SIGKILL
    parent.stdout.close()


def test_the_command_that_repeats_a_run_writes_null_as_it_is_read() -> None:
    run = load_run_config(["shared.training.epochs=null", "k=0,2", "research.plain_updates=true"])
    words = shlex.split(command_line(run))
    assert words[:2] == ["fedoppu", "simulate"]
    assert load_run_config(words[2:]) == run


@pytest.mark.parametrize(("users", "told"), [(3, True), (4, False)])
def test_an_empty_wrong_user_control_is_explained(users: int, told: bool) -> None:
    note = control_note(load_run_config([]), "LaMP_3", users)
    assert ("3 target users, 4 are needed" in note) is told
    assert control_note(load_run_config(["arms=base"]), "LaMP_3", users) == ""


def test_a_terminated_command_says_so_and_leaves_the_signal_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = getsignal(SIGTERM)
    cleared: list[bool] = []

    def command() -> dict[str, object]:
        try:
            os.kill(os.getpid(), SIGTERM)
            time.sleep(60)
        finally:
            cleared.append(True)
        return {}

    with pytest.raises(SystemExit, match=r"^143$"):
        run_command(command, "json")
    assert cleared == [True]
    assert json.loads(capsys.readouterr().out)["error_code"] == "terminated"
    assert getsignal(SIGTERM) == before
