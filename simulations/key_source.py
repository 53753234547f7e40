"""Keys of virtual clients, drawn from the run's seed: reproducible, so worthless as keys.

`SeededKeySource` works only while a simulation's Grid is open: it takes the Grid's marker, and
refuses once that is closed. Nothing in `client/` imports this module, and no message or setting
selects it; a daemon has only `OsKeySource`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness


class GridMarker:
    """Shows that a simulation's Grid is open; made by `simulation_grid` alone."""

    def __init__(self) -> None:
        """Starts open."""
        self.open = True


@contextmanager
def simulation_grid() -> Iterator[GridMarker]:
    """Yields a marker that is open for as long as the block runs: the Grid wraps its life in it."""
    marker = GridMarker()
    try:
        yield marker
    finally:
        marker.open = False


@dataclass(frozen=True)
class SeededKeySource:
    """Keys of one virtual client.

    Attributes:
        randomness: Root of the run.
        member: Whose keys they are.
        marker: Of the Grid that the client lives in.
    """

    randomness: Randomness = field(repr=False)
    member: int
    marker: GridMarker = field(repr=False)

    def secret(self, purpose: str, length: int) -> bytes:
        """Bytes for a purpose, the same whenever they are asked for.

        Raises:
            UsageError: No simulation's Grid is open.
        """
        if not self.marker.open:
            raise UsageError("seeded keys work only inside a simulation's Grid, which is closed")
        seed = self.randomness.secret("protocol key", self.member, purpose)
        return hashlib.shake_256(seed).digest(length)
