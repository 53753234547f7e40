"""What a round has cost so far, over all its attempts: drops, bytes, seconds."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from fedoppu.common.errors import ClientFailed
from fedoppu.common.messages import Stage
from fedoppu.server.exchange import Answers, Fault


class Tally:
    """Counts for one round. Its figures are of messages, never of what is in them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start at nothing."""
        self._clock = clock
        self.bytes_up = 0
        self.bytes_down = 0
        self.attempt = 0
        self.aborted: list[str] = []
        self.liars: dict[int, str] = {}
        self.faults: dict[Stage, dict[int, Fault]] = {}
        self.stages: list[tuple[int, str, float]] = []

    def begin(self, attempt: int) -> None:
        """Forgets the drops of the attempt before; bytes and seconds go on."""
        self.attempt = attempt
        self.faults = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Records the seconds of a stage."""
        begun = self._clock()
        try:
            yield
        finally:
            self.stages.append((self.attempt, stage, self._clock() - begun))

    def add(self, stage: Stage, answers: Answers, *, tolerate_failures: bool) -> None:
        """Adds an exchange.

        Raises:
            ClientFailed: An exception in a client, unless failures are tolerated.
        """
        self.bytes_up += answers.bytes_up
        self.bytes_down += answers.bytes_down
        seen = self.faults.setdefault(stage, {})
        for member in answers.replies:
            seen.pop(member, None)
        seen.update(answers.faults)
        failed = {m: f for m, f in answers.faults.items() if f.silence == "failed"}
        if failed and not tolerate_failures:
            first = next(iter(failed))
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise ClientFailed(
                f"member {first} failed in {stage}: {failed[first].reason}{others}",
                hint="its own log has the whole error",
            )

    def name(self, stage: Stage, members: Iterable[int], faults: Mapping[int, str]) -> None:
        """Adds members whose reply the protocol did not accept."""
        seen = self.faults.setdefault(stage, {})
        seen.update({member: Fault("malformed", faults[member]) for member in members})

    def accuse(self, liars: Mapping[int, str]) -> None:
        """Adds members that signed what is not so, over all attempts: the first lie is told."""
        self.liars = {**liars, **self.liars}

    @property
    def drops(self) -> dict[str, tuple[int, ...]]:
        """Stage: members without a usable reply in it, in the newest attempt."""
        return {stage: tuple(sorted(seen)) for stage, seen in self.faults.items() if seen}

    def who(self, most: int = 5) -> str:
        """The members that were missing and why, for people."""
        rows = [
            f"member {member} {fault.silence} in {stage} ({fault.reason})"
            for stage, seen in self.faults.items()
            for member, fault in sorted(seen.items())
        ]
        rows += [f"member {member} {lie}" for member, lie in sorted(self.liars.items())]
        more = [f"and {len(rows) - most} more"] if len(rows) > most else []
        return "; ".join(rows[:most] + more) or "nobody was missing"
