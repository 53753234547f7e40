"""The table for a terminal of 100 columns, and how numbers are written for people.

The files hold every digit; here a number has three digits, without a leading zero: .731 [.653,
.802].
"""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from fedoppu.simulations.panels import ALL
from fedoppu.simulations.scores import METRICS
from fedoppu.simulations.table import DIFFERENCES, WRONG_USER, Row, Table

Cell = tuple[str, int, str]
SHOWN = ("accuracy", "mae", "rouge1", "rougeL", "content_gain", "within_user_auc", "loss")
MISSING = "-"
OWN = "personal-"
_DIFFERENCE_NAMES = frozenset(f"{left}-{right}" for left, right in DIFFERENCES)


def is_difference(arm: str) -> bool:
    """Whether a row's arm is a difference, whose value is a gain."""
    return arm in _DIFFERENCE_NAMES


def title_of(metric: str) -> str:
    """A metric's name for people."""
    return next((one.title for one in METRICS if one.name == metric), metric)


def number(value: float | None, *, signed: bool = False) -> str:
    """Three digits, no leading zero: .731, 1.25, 12.5; with its sign if it is a gain."""
    if value is None:
        return MISSING
    decimals = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    rounded = round(value, decimals) + 0.0  # adding zero makes -0.0 plain 0.0
    text = f"{rounded:+.{decimals}f}" if signed else f"{rounded:.{decimals}f}"
    sign, digits = (text[0], text[1:]) if text[0] in "+-" else ("", text)
    return sign + digits.removeprefix("0" if digits.startswith("0.") else "")


def interval(row: Row | None, *, comma: str = ", ") -> str:
    """Value and interval of a row: .731 [.653, .802]."""
    if row is None or row.value is None:
        return MISSING
    text = number(row.value, signed=is_difference(row.arm))
    if row.low is None or row.high is None:
        return text
    return f"{text} [{number(row.low)}{comma}{number(row.high)}]"


def is_clear(row: Row | None) -> bool:
    """Whether a difference's interval leaves zero out."""
    if row is None or row.low is None or row.high is None or not is_difference(row.arm):
        return False
    return row.low > 0 or row.high < 0


def cells(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    """Rows by (task, k, profile), in the order of the rows."""
    found: dict[Cell, list[Row]] = {}
    for row in rows:
        found.setdefault((row.task, row.k, row.profile), []).append(row)
    return found


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """The metrics of a cell that fit a line: ratings are read by their error, not by accuracy."""
    present = {row.metric for row in rows}
    hidden = {"accuracy"} if "mae" in present and rows[0].task != ALL else set()
    return [name for name in SHOWN if name in present - hidden]


def arm_name(arm: str, control: str | None) -> str:
    """Name of a line: an arm with its control, or a difference."""
    return (
        f"{arm}, {control.replace('_', ' ')}"
        if control
        else arm.replace("wrong_user", "wrong user")
    )


def lines_of(rows: Sequence[Row]) -> dict[tuple[str, str | None], dict[str, Row]]:
    """The rows of a cell by line, then by metric; lines without any number are left out."""
    found: dict[tuple[str, str | None], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.arm, row.control), {})[row.metric] = row
    return {
        line: own
        for line, own in found.items()
        if line[1] == WRONG_USER or any(row.value is not None for row in own.values())
    }


def print_table(table: Table, console: Console) -> None:
    """Prints each (task, k, profile): a line for each arm, the differences below them.

    A gain whose interval leaves zero out is bold.
    """
    for cell, rows in cells(table.rows).items():
        console.print(Text(heading(cell, rows), style="bold"))
        console.print(_grid(rows))


def cell_name(cell: Cell) -> str:
    """Names a cell: task, retrieval, and the profile if there is one."""
    task, k, profile = cell
    name = "all tasks" if task == ALL else task
    return f"{name}, k={k}" + (f", {profile} profile" if profile != "none" else "")


def heading(cell: Cell, rows: Sequence[Row]) -> str:
    """A cell's name, and how many users and queries it has at most."""
    users, queries = max((row.users, row.queries) for row in rows)
    return f"{cell_name(cell)}: {_count(users, 'user')}, {_count(queries, 'query')}"


def _count(number: int, one: str) -> str:
    many = f"{one[:-1]}ies" if one.endswith("y") else f"{one}s"
    return f"{number} {one if number == 1 else many}"


def _grid(rows: Sequence[Row]) -> Grid:
    metrics, lines = shown_metrics(rows), lines_of(rows)
    grid = Grid(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for column in ("arm", *(title_of(metric) for metric in metrics)):
        grid.add_column(column, no_wrap=True)
    section = ""
    for (arm, control), own in lines.items():
        if _section(arm) != section:
            section = _section(arm)
            grid.add_row(Text(section, style="dim"))
        label = f"  {control.replace('_', ' ')}" if control else arm.removeprefix(OWN)
        grid.add_row(label, *(_text(own.get(name)) for name in metrics))
    return grid


def _section(arm: str) -> str:
    if not is_difference(arm):
        return ""
    return "gain of personal over" if arm.startswith(OWN) else "other gains"


def _text(row: Row | None) -> Text:
    # Without the space, four intervals of negative numbers still fit 100 columns.
    return Text(interval(row, comma=","), style="bold" if is_clear(row) else "")
