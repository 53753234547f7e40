"""engine=ray: groups of virtual users as Ray tasks, on this machine or on a cluster.

The Grid, the ServerApp and the ClientApps stay in this process; only groups go out, as references, and
results come back in the order of the groups. A group is a pure function of its reference, whichever
process works on it, so the bytes are those of one process, for any number of workers. A task that is
lost with its process or machine is started again; a file that a group leaves is committed whole, so
that a second writing changes nothing.

A head that goes away ends the run in one line within about twenty seconds. When the run itself is killed
on this machine its tasks end in seconds; two idle agents of Ray's own stay for about two minutes.

Not covered: a machine that the cluster gave up on and that still writes; processors that round
differently, which no version number shows.

All machines must see the run folder, the data and the base under the same paths, and have the same
versions of what computes: both are checked in each task, and named where they fail.
"""

import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from fedoppu.common.errors import ClientFailed, ConnectionFailed, UsageError
from fedoppu.simulations.executors import GroupExecutor, run_group
from fedoppu.simulations.workers import Worker, WorkerSpec, open_worker

G = TypeVar("G")
R = TypeVar("R")

CONNECT_SECONDS = 10.0
PROBE_SECONDS, PROBES = 5.0, 3  # a head that is silent so often has gone; after 60 s Ray ends us
RETRIES = 3  # of a task that is lost; an error of a group is none, and is not tried again
VERSIONS = ("fedoppu", "torch", "transformers", "numpy")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def import_ray() -> ModuleType:
    """Ray, or the one line that says how to get it.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("engine=ray needs Ray", hint="pip install 'fedoppu[flower]'") from None
    return ray


@dataclass(frozen=True)
class Home:
    """What a task must find where it runs.

    Attributes:
        folder: The one that relative paths begin in.
        versions: Of what computes.
    """

    folder: str
    versions: tuple[str, ...]

    @classmethod
    def here(cls) -> "Home":
        """This process's."""
        return cls(os.getcwd(), tuple(version(name) for name in VERSIONS))


def run_on_ray(home: Home, spec: WorkerSpec, work: Callable[[Worker, G], R], group: G) -> R:
    """Runs one group; the function that a Ray task executes.

    The worker of the process, and the base in it, are kept for its next groups (`open_worker`).

    Raises:
        ClientFailed: This machine does not see the folders, or computes with something else.
    """
    _settle(home)
    if not spec.users.is_dir():
        raise _unseen(f"the users in {spec.users.absolute()}")
    worker = open_worker(spec)
    if worker.base.facts.hash != worker.config.base_hash:
        raise ClientFailed(
            f"the base {spec.base} on Ray's machine {os.uname().nodename} is another one",
            hint="give all machines the same files",
        )
    return run_group(spec, work, group)


@lru_cache(maxsize=1)
def _settle(home: Home) -> None:
    """Once a process: works where the run was started, so that paths and names are the same."""
    try:
        os.chdir(home.folder)
    except OSError:
        raise _unseen(home.folder) from None
    found = Home.here().versions
    if found != home.versions:
        other = [
            f"{name} {there}, not {here}"
            for name, there, here in zip(VERSIONS, found, home.versions, strict=True)
            if there != here
        ]
        raise ClientFailed(
            f"Ray's machine {os.uname().nodename} has {'; '.join(other)}: results would differ",
            hint="install the same versions on all machines",
        )
    os.environ.update(OFFLINE)


def _unseen(what: str) -> ClientFailed:
    return ClientFailed(
        f"Ray's machine {os.uname().nodename} does not see {what}",
        hint="start the run in a folder that all machines of the cluster see under the same path, "
        "with out=, data= and base= in such folders too",
    )


class RayTasks:
    """Works in tasks of a Ray cluster; at most two groups a processor are under way."""

    def __init__(self, ray: Any, spec: WorkerSpec, ahead: int, *, head: str) -> None:
        """Keep the spec, and Ray, whose connection belongs to a `RayWorkforce`; its head's address."""
        self._ray = ray
        self._spec = spec
        self._ahead = ahead
        self._head = head
        options = {"num_cpus": spec.threads, "max_retries": RETRIES, "retry_exceptions": False}
        self._task = ray.remote(**options)(run_on_ray)

    def map(self, work: Callable[[Worker, G], R], groups: Iterable[G]) -> Iterator[R]:
        """Yields `work(worker, group)` for each group.

        Raises:
            ClientFailed: A group was lost too often, or a machine cannot work on it.
            ConnectionFailed: Ray went away.
        """
        home = Home.here()
        under_way: deque[Any] = deque()
        waiting = iter(groups)
        try:
            while True:
                for group in waiting:
                    under_way.append(self._task.remote(home, self._spec, work, group))
                    if len(under_way) >= self._ahead:
                        break
                if not under_way:
                    return
                yield self._result(under_way.popleft())
        finally:
            for reference in under_way:
                self._ray.cancel(reference, force=True)

    def _result(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        self._wait(reference)
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:  # an error of the group, as in any other process
            raise error.cause from None
        except errors.LocalRayletDiedError:
            raise self._gone() from None
        except errors.RayError as error:
            raise ClientFailed(
                f"a group of users was lost {1 + RETRIES} times: {type(error).__name__}",
                hint="its process may have run out of memory: set fewer workers or group_users",
            ) from None

    def _wait(self, reference: Any) -> None:
        """Waits for a group as long as Ray is there; Ray itself would end this process after a minute."""
        silent = 0
        while not self._ray.wait([reference], timeout=PROBE_SECONDS)[0]:
            silent = 0 if _listens(self._head) else silent + 1
            if silent == PROBES:
                raise self._gone()

    def _gone(self) -> ConnectionFailed:
        return ConnectionFailed(
            f"Ray at {self._head} went away while groups of users were worked on",
            hint="start it again and go on with the run, or go on with engine=local",
        )


class RayWorkforce:
    """A connection to Ray for the length of a run: to a cluster, or to a head of our own."""

    def __init__(self, address: str | None, workers: int) -> None:
        """Connect.

        Args:
            address: Of a cluster; None starts a head on this machine, which ends with the run.
            workers: Processors of that head.

        Raises:
            UsageError: Ray is not installed.
            ConnectionFailed: There is no cluster at the address.
        """
        os.environ.update(QUIET)
        self._ray: Any = import_ray()
        self._notices = ExitStack()
        own = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
        try:
            _require_listener(address)
            with _own_sigterm():
                self._ray.init(
                    # "local": or an address in the environment would be taken
                    address=address or "local",
                    log_to_driver=False,  # what tasks print would be on our standard output
                    logging_level="ERROR",
                    **own,
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise ConnectionFailed(
                f"Ray could not be reached at {address or 'this machine'}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
                hint="ray.address takes host:port of a head that runs, or auto",
            ) from None

    def executor(self, spec: WorkerSpec) -> GroupExecutor:
        """An executor for one federation."""
        processors = int(self._ray.cluster_resources().get("CPU", 1)) // spec.threads
        head = str(self._ray.get_runtime_context().gcs_address)
        return RayTasks(self._ray, spec, 2 * max(processors, 1), head=head)

    def __enter__(self) -> "RayWorkforce":
        """Keep Ray's notices, that a process died and the like, off our standard output."""
        self._notices.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cluster, or end the own head, whatever it is at."""
        with self._notices:
            self._ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Puts our handler of SIGTERM back after Ray put its own in place, which aborts the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listens(address: str) -> bool:
    try:
        _require_listener(address)
    except OSError:
        return False
    return True


def _require_listener(address: str | None) -> None:
    """Fails at once where nobody listens at host:port; Ray itself tries for minutes."""
    host, found, port = (address or "").rpartition(":")
    if found and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
