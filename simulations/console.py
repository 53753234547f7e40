"""What a person sees while a simulation runs: rounds, cohorts, drops, bytes, losses; then the table.

Progress goes to standard error, the table to standard output, so that either can be redirected.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from rich.console import Console as RichConsole

from fedoppu.server.metrics import privacy_text, read_privacy

T = TypeVar("T")
Row = Mapping[str, Any]
LINES = 200  # about as many tell of one stage, however many groups it has
FILE_WIDTH = 100  # of a table that goes to a file or a pipe


class Console:
    """Prints progress and tables.

    Args:
        progress: Whether progress is printed.
        table: Whether tables are printed.
    """

    def __init__(self, *, progress: bool, table: bool) -> None:
        """Open standard error and output."""
        self._progress = RichConsole(stderr=True, quiet=not progress, highlight=False)
        self.tables = RichConsole(quiet=not table, highlight=False)
        if not self.tables.is_terminal:
            self.tables.width = FILE_WIDTH

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        self._progress.print(text, markup=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Prints a line on standard error, whatever the settings say about progress."""
        RichConsole(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a warning, whatever the settings say about progress."""
        RichConsole(stderr=True, highlight=False).print(
            f"warning: {text}", style="yellow", markup=False, soft_wrap=True
        )

    def round_done(self, record: Row, rounds: int, *, left: float | None = None) -> None:
        """Prints one round of the shared phase, from its deterministic metrics, and the seconds left."""
        parts = [f"round {record['round']:>3}/{rounds}"]
        if record["cohort"] is not None:  # a Poisson cohort is not published, nor what counts it
            parts += [
                f"cohort {len(record['cohort'])}",
                f"survivors {len(record['survivors'])}",
                f"dropped {record['dropped']}",
                f"up {_bytes(record['bytes_up'])}",
                f"down {_bytes(record['bytes_down'])}",
            ]
        if "privacy" in record:
            parts.append(privacy_text(read_privacy(record["privacy"])))
        else:
            loss = record["held_out_loss"]
            parts.append(f"held-out loss {'-' if loss is None else f'{loss:.3f}'}")
        if (
            left and record["cohort"] is not None
        ):  # nor how long a round takes, which tells its size
            parts.append(f"about {left:.0f} s left")
        self.say("  " + "  ".join(parts))

    def steps(self, name: str, work: Iterable[T], total: int, *, before: int = 0) -> Iterator[T]:
        """Yields from `work` and says how far it is, with the time that is left.

        Args:
            name: Of the steps, for people.
            work: Does a step when it is asked for the next.
            total: Number of steps.
            before: Steps that were done in an earlier process; they tell nothing of the time.
        """
        begun = time.monotonic()
        for done, result in enumerate(work, before + 1):
            if done in (before + 1, total) or done % max(1, total // LINES) == 0:
                left = (time.monotonic() - begun) / (done - before) * (total - done)
                more = f"  about {left:.0f} s left" if done < total else ""
                self.say(f"  {name} {done}/{total}{more}")
            yield result


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
