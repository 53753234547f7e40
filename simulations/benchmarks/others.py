"""Packages that only a comparison needs: the other sides of the benchmarks."""

from collections.abc import Sequence
from importlib.util import find_spec

from fedoppu.common.errors import UsageError


def require_packages(modules: Sequence[str], *, extra: str) -> None:
    """Checks that the other sides can be imported, before anything is measured.

    Args:
        modules: Names that are imported.
        extra: The extra of this project that installs them.

    Raises:
        UsageError: One is not installed.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this comparison needs {', '.join(missing)}, which is not installed",
            hint=f"pip install 'fedoppu[{extra}]'",
        )
