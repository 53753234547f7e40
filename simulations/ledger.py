"""Which groups of users are finished: one file for each, so that a killed run goes on where it was.

    groups/trained/00000.json    what is recorded of the adapters of the first group
    groups/scored/00000.json     the scores of its users

Guarantee: a group's file is there whole or not at all, and only after everything that the group
left elsewhere is durable. Results are read back from the files, in a run that was never interrupted
too, so that both take the same way; and nothing of a group is held once it is finished.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedoppu.common.commit import commit_file
from fedoppu.common.errors import DataError
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.workers import Worker

G = TypeVar("G")
R = TypeVar("R")


@dataclass(frozen=True)
class Ledger:
    """The finished groups of one stage.

    Attributes:
        folder: Gets a file for each.
        groups: The users of each group, in the order of the groups.
    """

    folder: Path
    groups: Sequence[tuple[str, ...]]

    def missing(self) -> list[int]:
        """Numbers of the groups that are not finished, ascending."""
        return [number for number in range(len(self.groups)) if not self._path(number).exists()]

    def finish(
        self,
        executor: GroupExecutor,
        work: Callable[[Worker, G], R],
        *,
        reference: Callable[[int], G],
        record: Callable[[R], Any],
    ) -> Iterator[int]:
        """Works on the groups that are missing, and yields the number of each when it is durable.

        Args:
            executor: Where they are worked on.
            work: The module-level function that does.
            reference: Makes the reference of a group from its number, when its turn comes.
            record: Makes of a result what is kept of it; plain values, as JSON has them.
        """
        missing = self.missing()
        results = executor.map(work, map(reference, missing))
        for number, result in zip(missing, results, strict=True):
            self._commit(number, record(result))
            yield number

    def records(self) -> Iterator[Any]:
        """What was kept of each group, in their order, one at a time.

        Raises:
            DataError: A file is missing, was changed, or is of other users.
        """
        return map(self._read, range(len(self.groups)))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"

    def _commit(self, number: int, record: Any) -> None:
        # Python writes the shortest text that reads back as the same float: nothing is lost
        entry = {"users": self.groups[number], "record": record}
        commit_file(self._path(number), json.dumps(entry).encode())

    def _read(self, number: int) -> Any:
        path = self._path(number)
        try:
            entry = json.loads(path.read_bytes())
            users, record = entry["users"], entry["record"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no finished group: {type(error).__name__}",
                hint="delete the file and resume: the group is worked on again",
            ) from None
        if users != list(self.groups[number]):
            raise DataError(
                f"{path} is of other users than group {number} of this run",
                hint="delete the file and resume: the group is worked on again",
            )
        return record
