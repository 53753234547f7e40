"""How a command ends: one envelope, one line, one exit code."""

import json
from typing import Any

import pytest

from fedoppu.common.cli import run_command
from fedoppu.common.errors import (
    ConnectionFailed,
    DataError,
    DeadlineExceeded,
    FedoppuError,
    RefusedByPolicy,
    UsageError,
)


def failing(error: BaseException) -> Any:
    def command() -> dict[str, Any]:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (DataError("a"), 1),
        (UsageError("a"), 2),
        (ConnectionFailed("a"), 3),
        (DeadlineExceeded("a"), 4),
        (RuntimeError("a"), 5),
        (RefusedByPolicy("a"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, exit_code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(failing(error), "json")
    assert ended.value.code == exit_code


def test_an_error_is_one_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(failing(DataError("record 3 has no id", hint="give it one")), "text")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: record 3 has no id\nhint: give it one\n")


def test_json_is_the_only_thing_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(lambda: {"rows": []}, "json")
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "status": "ok",
        "data": {"rows": []},
    }
    with pytest.raises(SystemExit):
        run_command(failing(FedoppuError("no", hint="yes")), "json")
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["error_code"] == "failed"
    assert (envelope["message"], envelope["hint"]) == ("no", "yes")


def test_a_bug_names_the_place_in_our_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(failing(ZeroDivisionError("by zero")), "json")
    assert (
        "ZeroDivisionError: by zero (test_cli.py:" in json.loads(capsys.readouterr().out)["message"]
    )
