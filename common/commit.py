"""Atomic commits: a folder or file is there whole, or not at all, whenever the process is killed.

Guarantee: after `commit_folder` returns, the folder is durable; before, a reader sees the old state.
An error of the system, such as a full disk, names the path and leaves nothing half-written behind.
Not covered: two writers of the same path at once.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of the system the path that it was about: a write to a full disk knows none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def commit_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends without an exception.

    An existing `path` is replaced; an exception removes the temporary folder and leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
            for file in sorted(temporary.rglob("*")):
                fsync(file)
            _replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace(temporary: Path, path: Path) -> None:
    fsync(temporary)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old)
    else:
        temporary.rename(path)
    fsync(path.parent)


def commit_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all (temporary, fsync, rename)."""
    commit_parts(path, [data])


def commit_parts(path: Path, parts: Iterable[bytes]) -> None:
    """The same of a file that is larger than what is held of it at once: its parts, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as stream:
                stream.writelines(parts)
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
