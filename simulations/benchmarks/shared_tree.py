"""The cost of a command with all processes that it starts, also those that leave its tree.

Ray's workers are not waited for by who started them, so the kernel adds their CPU time to nobody's.
They inherit the environment, so each process that carries this run's mark is sampled instead; what
it spends after its last sample is missed, which is at most `SAMPLE_SECONDS` each (Linux).
"""

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from fedoppu.simulations.benchmarks.meters import TreeCost

SAMPLE_SECONDS = 0.1
MARK = "FEDOPPU_BENCHMARK_RUN"
# fields of /proc/PID/stat after the name
USER, SYSTEM, STARTED, RESIDENT = 11, 12, 19, 21


@dataclass
class _Seen:
    """What was sampled of the marked processes.

    Attributes:
        cpu: Process and when it started: CPU seconds at its last sample.
        peak: Most resident bytes of all of them at once.
    """

    mark: bytes
    cpu: dict[tuple[str, str], float] = field(default_factory=dict)
    peak: int = 0

    def sample(self) -> None:
        """Looks at every process of the machine once."""
        resident = 0
        for pid, fields in _processes():
            key = (pid, fields[STARTED])
            # Ray changes the names of its processes, and their environment with it
            if key in self.cpu or self.mark in _environment(pid):
                ticks = int(fields[USER]) + int(fields[SYSTEM])
                self.cpu[key] = ticks / os.sysconf("SC_CLK_TCK")
                resident += int(fields[RESIDENT]) * os.sysconf("SC_PAGE_SIZE")
        self.peak = max(self.peak, resident)


def run_marked(command: Sequence[str], env: Mapping[str, str]) -> TreeCost:
    """Runs a command to its end and measures all processes that descend from it.

    Args:
        command: Program and arguments; what it prints is dropped.
        env: Its environment.
    """
    mark, ended = uuid4().hex, threading.Event()
    seen = _Seen(f"{MARK}={mark}".encode())
    begun = time.monotonic()
    process = subprocess.Popen(  # noqa: S603  # the benchmark's own command
        command, env={**env, MARK: mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            seen.sample()

    sampler = threading.Thread(target=watch, daemon=True)
    sampler.start()
    code = process.wait()
    ended.set()
    sampler.join()
    return TreeCost(sum(seen.cpu.values()), seen.peak, time.monotonic() - begun, code)


def _processes() -> Iterator[tuple[str, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:
                continue
            yield folder.name, text.rpartition(")")[2].split()


def _environment(pid: str) -> bytes:
    try:
        return (Path("/proc") / pid / "environ").read_bytes()
    except OSError:
        return b""
