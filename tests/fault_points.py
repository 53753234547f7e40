"""Runs the main job in a process of its own that meets a fault at a counted moment.

The moments are just before and just after each time that something becomes visible under its name:
a number names a place in the run, whatever the speed of the machine. Wall times are written when
they are due, so that file does not count.
"""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.small_run import command

Fault = Literal["kill", "full", "interrupt"]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Exit code; negative for a signal.
        moments: How many it came by.
        stderr: What it said.
    """

    code: int
    moments: int
    stderr: str


def meet(fault: Fault | None, at: int, log: Path, *arguments: str) -> Ended:
    """Runs `fedoppu simulate ARGUMENTS` until a fault, or its end.

    Args:
        fault: SIGKILL, a disk that is full from then on, or Ctrl-C; None for none.
        at: Number of the moment, from 1.
        log: Folder for what the process says.
        arguments: Of the command.
    """
    # a server that has imported everything forks each process: no imports, no threads of ours
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedoppu.simulations.run", "tests.small_run"])
    files = (log / "moments", log / "stderr")
    for file in files:
        file.write_text("")
    process = context.Process(target=_run, args=(fault, at, files, arguments))
    process.start()
    process.join()
    moments, stderr = (file.read_text() for file in files)
    assert process.exitcode is not None
    return Ended(process.exitcode, len(moments), stderr)


def _run(fault: Fault | None, at: int, files: Sequence[Path], arguments: Sequence[str]) -> None:
    moments, stderr = files
    faulty = _Faulty(fault, at, moments)
    os.rename, os.replace = faulty.naming(os.rename), faulty.naming(os.replace)
    os.fsync = faulty.writing(os.fsync)
    ended = command(*arguments)
    stderr.write_text(ended.stderr)
    os._exit(ended.exit_code)


class _Faulty:
    """Counts the moments, and has the fault when its turn comes."""

    def __init__(self, fault: Fault | None, at: int, moments: Path) -> None:
        self._fault = fault
        self._at = at
        self._log = os.open(moments, os.O_WRONLY | os.O_APPEND)
        self._count = 0

    def naming(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any) -> None:
            if str(target).endswith("timing.jsonl"):
                self.writing(real)(source, target)
                return
            self._moment()
            self.writing(real)(source, target)
            self._moment()

        return call

    def writing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> None:
            if self._fault == "full" and self._count >= self._at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(*arguments)

        return call

    def _moment(self) -> None:
        os.write(self._log, b".")
        self._count += 1
        if self._count == self._at and self._fault in ("kill", "interrupt"):
            os.kill(os.getpid(), signal.SIGKILL if self._fault == "kill" else signal.SIGINT)
