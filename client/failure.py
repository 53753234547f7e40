"""Exceptions in one client's part, told in one line."""

import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def describe(error: BaseException) -> str:
    """The error and the innermost frame of our own code, in one line."""
    first = str(error).splitlines()[0] if str(error) else "no message"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if PACKAGE in Path(frame.filename).resolve().parents]
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {first}{where}"
