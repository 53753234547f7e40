"""The folder of a run: what says that it is one, who works on it, and what it may be resumed with.

    config.yaml    the settings; a folder that has it holds a run
    run.json       the format of the folder, the version that began it, and the hash of its base
    report.html    written last: a folder that has it holds a finished run

Guarantee: one process at a time works on a folder, and the lock ends with the process, however it
ends. A run is resumed with the settings that it began with, but for those that no result depends on.
Not covered: two machines on one network file system that does not pass locks on.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedoppu.common.commit import commit_file
from fedoppu.common.config import RunConfig, as_flat, load_run_config, to_yaml
from fedoppu.common.errors import UsageError

CONFIG, MARK, LAST = "config.yaml", "run.json", "report.html"
FORMAT = 2  # of the folder; another one cannot be resumed
# where the groups are worked on: no result depends on it
PLACE = ("workers", "engine", "ray")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps every other process away from a folder, which is made if it is missing.

    The lock is on the folder itself: the system drops it when the process ends, by `kill -9` too,
    and worker processes do not inherit it.

    Raises:
        UsageError: Another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to: {error.strerror}", hint="set out=FOLDER"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"another process works on {folder}", hint="wait until it has ended, or end it"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def begin(folder: Path, run: RunConfig, base_hash: str) -> None:
    """Makes a folder the folder of a run.

    Raises:
        UsageError: It holds a run already, or cannot be written to.
    """
    if (folder / CONFIG).exists():
        raise _holds_a_run(folder)
    mark = {"format": FORMAT, "fedoppu": version("fedoppu"), "base_hash": base_hash}
    try:
        commit_file(folder / MARK, json.dumps(mark).encode())
        commit_file(folder / CONFIG, to_yaml(as_flat(run)).encode())
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to: {error.strerror}", hint="set out=FOLDER"
        ) from None


def _holds_a_run(folder: Path) -> UsageError:
    if is_finished(folder):
        hint = "set out=FOLDER to another folder, or delete this one"
        return UsageError(f"{folder} holds a run already", hint=hint)
    hint = (
        f"fedoppu simulate --resume {folder} goes on with it; or set out=FOLDER to another folder"
    )
    return UsageError(f"{folder} holds a run already, which did not end", hint=hint)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (folder / LAST).exists()


def read_run(folder: Path, changes: Sequence[str] = ()) -> tuple[RunConfig, RunConfig]:
    """The settings of the run in a folder.

    Args:
        folder: Of the run.
        changes: key=value settings that the user gave with it.

    Returns:
        The settings that the run began with, which its results follow; and the same with the
        changes, which say where the groups are worked on.

    Raises:
        UsageError: There is no run, it is of another version, or a change could change a result.
    """
    if not (folder / CONFIG).exists():
        raise UsageError(
            f"there is no run in {folder}: it has no {CONFIG}",
            hint="--resume takes the folder that a run was writing to",
        )
    _mark(folder)
    begun = load_run_config(file=folder / CONFIG)
    changed = load_run_config(changes, folder / CONFIG)
    place = {name: value for name, value in vars(changed).items() if name in PLACE}
    other = _different(as_flat(replace(begun, **place)), as_flat(changed))
    if begun.engine != changed.engine and "flower" in (begun.engine, changed.engine):
        other.append("engine")  # Flower's works with groups of one
    if other:
        raise UsageError(
            f"{folder} was begun with another {', '.join(other)}: a run is resumed with the settings "
            "that it began with",
            hint=f"leave it out, or begin a new run; {', '.join(PLACE)} may differ",
        )
    return begun, changed


def _mark(folder: Path) -> Mapping[str, Any]:
    try:
        mark = json.loads((folder / MARK).read_bytes())
        if (mark["format"], mark["fedoppu"]) == (FORMAT, version("fedoppu")):
            return dict(mark)
        found = f"fedoppu {mark['fedoppu']}, format {mark['format']}"
    except (OSError, ValueError, KeyError, TypeError):
        found = f"a version that left no {MARK}"
    raise UsageError(
        f"the run in {folder} is of {found}; this is fedoppu {version('fedoppu')}, format {FORMAT}",
        hint="resume it with the version that began it, or begin a new run",
    )


def _different(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ."""
    found: list[str] = []
    for key, value in left.items():
        if isinstance(value, dict):
            found += _different(value, right[key], f"{prefix}{key}.")
        elif value != right[key]:
            found.append(prefix + key)
    return found


def take_up(folder: Path, base_hash: str) -> None:
    """Gets a folder ready to go on with: the same base, and nothing that was half written.

    Raises:
        UsageError: The base was changed.
    """
    if _mark(folder)["base_hash"] != base_hash:
        raise UsageError(
            f"the base was changed since the run in {folder} began",
            hint="restore it, or begin a new run",
        )
    for path in (*folder.rglob(".*.tmp"), *folder.rglob(".*.old")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
