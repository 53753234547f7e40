"""Where groups of virtual users are worked on: in this process, or in worker processes.

The groups are fixed by the configuration and each is a pure function of its worker's spec, so the results, and their
order, are the same for any number of workers.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from types import TracebackType
from typing import Protocol, TypeVar

from fedoppu.common.errors import ClientFailed
from fedoppu.simulations.workers import Worker, WorkerSpec, open_worker

G = TypeVar("G")
R = TypeVar("R")


class GroupExecutor(Protocol):
    """Runs a module-level function on each group and yields the results in the order of the groups."""

    def map(self, work: Callable[[Worker, G], R], groups: Iterable[G]) -> Iterator[R]:
        """Yields `work(worker, group)` for each group."""


def run_group(spec: WorkerSpec, work: Callable[[Worker, G], R], group: G) -> R:
    """Runs one group; the function that a worker process executes."""
    return work(open_worker(spec), group)


class InProcess:
    """Works in this process, one group at a time."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Keep the spec; the worker is opened with the first group."""
        self._spec = spec

    def map(self, work: Callable[[Worker, G], R], groups: Iterable[G]) -> Iterator[R]:
        """Yields `work(worker, group)` for each group."""
        for group in groups:
            yield run_group(self._spec, work, group)


class Processes:
    """Works in the processes of a pool; at most two groups a process are under way."""

    def __init__(self, spec: WorkerSpec, pool: ProcessPoolExecutor, workers: int) -> None:
        """Keep the spec and the pool, which belongs to a `Workforce`."""
        self._spec = spec
        self._pool = pool
        self._ahead = 2 * workers

    def map(self, work: Callable[[Worker, G], R], groups: Iterable[G]) -> Iterator[R]:
        """Yields `work(worker, group)` for each group.

        Raises:
            ClientFailed: A worker process died.
        """
        under_way: deque[Future[R]] = deque()
        waiting = iter(groups)
        try:
            while True:
                for group in waiting:
                    under_way.append(self._pool.submit(run_group, self._spec, work, group))
                    if len(under_way) >= self._ahead:
                        break
                if not under_way:
                    return
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise ClientFailed(
                "a worker process died while it worked on a group of users",
                hint="it may have run out of memory: set fewer workers or group_users",
            ) from None
        finally:
            for future in under_way:
                future.cancel()


class Workforce:
    """The processes of a run, started once and used by all its federations."""

    def __init__(self, workers: int) -> None:
        """Start nothing yet; with one worker everything happens in this process."""
        self._workers = workers
        self._strangers = multiprocessing.active_children()
        context = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_process)
            if workers > 1
            else None
        )

    def executor(self, spec: WorkerSpec) -> GroupExecutor:
        """An executor for one federation."""
        return InProcess(spec) if self._pool is None else Processes(spec, self._pool, self._workers)

    def __enter__(self) -> "Workforce":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes; after an error or Ctrl-C at once, whatever they are at."""
        if self._pool is None:
            return
        if error is not None:
            for process in multiprocessing.active_children():
                if process not in self._strangers:
                    process.terminate()
        self._pool.shutdown(wait=error is None, cancel_futures=True)


def _prepare_process() -> None:
    """Leaves Ctrl-C to the parent, ends with it, and keeps libraries quiet and offline."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
