"""How every command ends: one envelope for machines, one line for people, one exit code for both.

Exit codes: 0 done, 1 failed, 2 usage, 3 connection or authentication, 4 time-out, 5 a bug of ours, 6 refused by
policy or consent, 130 interrupted, 141 nobody reads the output, 143 terminated. With `--format json`, standard output
holds one JSON object and nothing else: `{schema_version, status, data}` or `{schema_version, status, error_code,
message, hint}`.
"""

import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, NoReturn

from fedoppu.common.errors import FedoppuError

SCHEMA_VERSION = 1
Format = Literal["text", "json"]
# what the machine refuses, whatever the program does
MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE}
)
MACHINE_HINT = "free some room, or allow it; fedoppu doctor says what is there"
MEMORY_HINT = "set fewer users, group_users or workers, or a smaller rank"


class _Terminated(BaseException):
    """SIGTERM came; raised so that worker processes and half-written files are cleared away."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into an exception; only the main thread may, elsewhere it stays as it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def run_command(command: Callable[[], dict[str, Any]], output: Format) -> None:
    """Runs a command and ends the process with its exit code.

    Args:
        command: Does the work, writes what people read, and returns what machines read.
        output: "json" prints the envelope instead.

    Raises:
        SystemExit: With the exit code, unless the command is done.
    """
    try:
        with _terminable():
            data = command()
    except FedoppuError as error:
        fail(output, error.exit_code, error.code, str(error), error.hint)
    except KeyboardInterrupt:
        fail(output, 130, "interrupted", "interrupted", "")
    except _Terminated:
        fail(output, 128 + signal.SIGTERM, "terminated", "terminated", "")
    except BrokenPipeError:
        # whoever read the output has enough of it, as head has; nothing more can be told there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except MemoryError as error:
        fail(output, 1, "memory", f"not enough memory: {error}", MEMORY_HINT)
    except OSError as error:
        if error.errno not in MACHINE:
            _bug(output, error)
        where = f": {error.filename}" if error.filename else ""
        fail(output, 1, "machine", f"{error.strerror}{where}", MACHINE_HINT)
    except Exception as error:
        _bug(output, error)
    else:
        if output == "json":
            _write({"schema_version": SCHEMA_VERSION, "status": "ok", "data": data})


def _bug(output: Format, error: Exception) -> NoReturn:
    if output == "text":
        sys.stderr.write(traceback.format_exc())
    message = f"{type(error).__name__}: {error}{_where(error)}"
    fail(output, 5, "bug", message, "this is a bug of fedoppu")


def fail(output: Format, exit_code: int, code: str, message: str, hint: str) -> NoReturn:
    """Ends the process with an error: an envelope on standard output, or lines on standard error.

    Raises:
        SystemExit: With the exit code.
    """
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
