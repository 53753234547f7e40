"""The root of a deployed server's random choices: cohorts and noise.

Guaranteed (spec of secure aggregation, rule 8): it comes from the operating system, lies in a file that its owner
alone can read, and is in no config, report or transcript. Whoever has it knows every cohort, and can take the noise of
central differential privacy off again: it belongs in no backup that others read.
"""

import os
import secrets
from pathlib import Path

from fedoppu.common.commit import fsync
from fedoppu.common.errors import DataError
from fedoppu.common.randomness import Randomness

ROOT_BYTES = 32
_OTHERS = 0o077


def server_root(path: Path) -> Randomness:
    """The root in a file, made if there is none.

    A lost file is a new root: rounds that were under way would get other noise, so a run is not gone on with.

    Raises:
        DataError: Others can read the file, or it holds no root.
    """
    _make(path)
    mode = path.stat().st_mode
    if mode & _OTHERS:
        raise DataError(
            f"{path} can be read or written by others (mode {mode & 0o777:o})",
            hint=f"take their rights away: chmod 600 {path}; and begin new runs with a new root",
        )
    data = path.read_bytes()
    if len(data) != ROOT_BYTES:
        raise DataError(
            f"{path} must hold {ROOT_BYTES} bytes, got {len(data)}",
            hint="restore the file, or remove it and begin new runs",
        )
    return Randomness(data)


def _make(path: Path) -> None:
    """Writes a new root where no file is, whole or not at all, even if two processes begin at once."""
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(ROOT_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # never over another's
        fsync(path.parent)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
