"""What the server has spent of a privacy budget: each attempt in which masked vectors were asked for.

    rounds/private/charges.json    the attempts, in their order

Guarantee: a charge is durable before anybody is asked for a masked vector, so before anything can be
released; an attempt that failed later stays charged; an attempt that is repeated after a crash, with
the same vectors and the same noise, is charged once.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedoppu.common.commit import commit_file
from fedoppu.common.errors import DataError

CHARGES = "charges.json"


@dataclass(frozen=True)
class Charge:
    """One attempt at a round.

    Attributes:
        run_id: Hex, of the run.
        round: From 1.
        attempt: From 0.
        members: In the roster then, which sets the chance of each to be asked.
    """

    run_id: str
    round: int
    attempt: int
    members: int


class ChargeLedger:
    """The charges of one federation's runs in a folder."""

    def __init__(self, folder: Path) -> None:
        """Keep where the file is."""
        self._path = folder / CHARGES

    def all(self, committed: int) -> tuple[Charge, ...]:
        """All charges.

        Args:
            committed: Rounds that were committed; each was charged at least once.

        Raises:
            DataError: The file was changed or is lost; going on would exceed the budget unseen.
        """
        found = self._read()
        if found is None or len({charge.round for charge in found}) < committed:
            raise DataError(
                f"{self._path} is malformed or lacks some of the {committed} committed rounds; "
                "without it the privacy budget could be exceeded",
                hint="restore the file, or begin a new run in another folder",
            )
        return found

    def _read(self) -> tuple[Charge, ...] | None:
        if not self._path.exists():
            return ()
        try:
            return tuple(Charge(**row) for row in json.loads(self._path.read_bytes()))
        except (ValueError, TypeError):
            return None

    def add(self, charge: Charge, before: tuple[Charge, ...]) -> tuple[Charge, ...]:
        """Makes a charge durable before it returns; one that is there already changes nothing.

        Returns:
            All charges.
        """
        if charge in before:
            return before
        after = (*before, charge)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        commit_file(self._path, json.dumps([asdict(one) for one in after]).encode())
        return after
