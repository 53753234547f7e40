"""How every command ends: one envelope for machines, one line for people, one exit code for both.

Exit codes: 0 done, 1 failed, 2 usage, 3 connection or authentication, 4 time-out, 5 a bug of ours, 6 refused by
policy or consent, 130 interrupted. With `--format json`, standard output holds one JSON object and nothing else:
`{schema_version, status, data}` or `{schema_version, status, error_code, message, hint}`.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal

from fedoppu.common.errors import FedoppuError

SCHEMA_VERSION = 1
Format = Literal["text", "json"]


def run_command(command: Callable[[], dict[str, Any]], output: Format) -> None:
    """Runs a command and ends the process with its exit code.

    Args:
        command: Does the work, writes what people read, and returns what machines read.
        output: "json" prints the envelope instead.

    Raises:
        SystemExit: With the exit code, unless the command is done.
    """
    try:
        data = command()
    except FedoppuError as error:
        _fail(output, error.exit_code, error.code, str(error), error.hint)
    except KeyboardInterrupt:
        _fail(output, 130, "interrupted", "interrupted", "")
    except Exception as error:
        if output == "text":
            sys.stderr.write(traceback.format_exc())
        _fail(
            output,
            5,
            "bug",
            f"{type(error).__name__}: {error}{_where(error)}",
            "this is a bug of fedoppu",
        )
    else:
        if output == "json":
            _write({"schema_version": SCHEMA_VERSION, "status": "ok", "data": data})


def _fail(output: Format, exit_code: int, code: str, message: str, hint: str) -> None:
    if output == "json":
        body = {"status": "error", "error_code": code, "message": message, "hint": hint}
        _write({"schema_version": SCHEMA_VERSION, **body})
    else:
        sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    raise SystemExit(exit_code)


def _where(error: BaseException) -> str:
    """Innermost frame of our own code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
    ]
    return f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""


def _write(envelope: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(envelope, sort_keys=True) + "\n")
