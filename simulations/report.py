"""The report of a run: one page that stands alone, without scripts and without the network.

It says first what was found and what was not, then the numbers, the users, the shared phase, the
cost, what is and is not guaranteed, and how to do it again. There is no date in it: the same data
give the same bytes under the same matplotlib.

matplotlib and jinja2 are imported when a report is written, and only then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedoppu.common.commit import commit_file
from fedoppu.simulations.panels import ALL
from fedoppu.simulations.printing import (
    Cell,
    arm_name,
    cell_name,
    cells,
    heading,
    interval,
    is_clear,
    is_difference,
    lines_of,
    number,
    shown_metrics,
    title_of,
)
from fedoppu.simulations.report_data import (
    ReportData,
    findings,
    guaranteed,
    headline,
    not_guaranteed,
    traffic,
)
from fedoppu.simulations.scores import METRICS
from fedoppu.simulations.table import Comparison, Row

TEMPLATE = "templates/report.html.j2"
MAIN = "personal-shared"


@dataclass(frozen=True)
class Line:
    """A line of a table in the page: its name and a (text, is_clear) for each column."""

    name: str
    texts: tuple[tuple[str, bool], ...]


def write_report(path: Path, data: ReportData) -> None:
    """Commits report.html: whole or not at all."""
    commit_file(path, render(data).encode())


def render(data: ReportData) -> str:
    """The page as HTML text; everything that comes from a run is escaped."""
    from jinja2 import Environment, StrictUndefined

    source = files("fedoppu.simulations").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(_context(data)) + "\n"


def _context(data: ReportData) -> dict[str, Any]:
    sections = [_section(cell, rows, data) for cell, rows in cells(data.table.rows).items()]
    return {
        "data": data,
        "percent": f"{data.confidence * 100:g} %",
        "overview": _overview(data.table.rows),
        "sections": sections,
        "curves": _curves(data),
        "traffic": traffic(data.rounds),
        "guaranteed": guaranteed(data),
        "not_guaranteed": not_guaranteed(data),
        "arm_name": arm_name,
        "number": number,
        "size": size,
    }


def _overview(rows: Sequence[Row]) -> list[Line]:
    """One line a cell: shared and personal in the cell's main metric, and the two gains."""
    found = []
    for cell, own in cells(rows).items():
        metric = headline(own)
        by_arm = {(row.arm, row.control): row for row in own if row.metric == metric}
        values = [by_arm.get((arm, None)) for arm in ("shared", "personal")]
        gains = [by_arm.get((arm, None)) for arm in (MAIN, "personal-wrong_user")]
        texts = [(interval(row), is_clear(row)) for row in gains]
        texts += [(number(row.value if row else None), False) for row in values]
        found.append(Line(cell_name(cell), ((title_of(metric), False), *texts)))
    return found


def _section(cell: Cell, rows: Sequence[Row], data: ReportData) -> dict[str, Any]:
    from markupsafe import Markup

    from fedoppu.simulations import figures

    metric = headline(rows)
    gains = [row for row in rows if row.metric == metric and is_difference(row.arm)]
    known = [row for row in gains if row.value is not None]
    return {
        "anchor": "-".join(str(part) for part in cell),
        "name": cell_name(cell),
        "title": heading(cell, rows),
        "unit": title_of(metric),
        "findings": findings(rows),
        "interval": interval,
        "columns": [title_of(name) for name in shown_metrics(rows)],
        "arms": _lines(rows, shown_metrics(rows), differences=False),
        "official": _official(rows),
        "gains": _lines(rows, shown_metrics(rows), differences=True),
        "forest": Markup(figures.forest(known, title_of(metric))) if known else None,  # noqa: S704
        "comparisons": _comparisons(cell, metric, data),
        **_user_figures(cell, metric, data),
    }


def _lines(rows: Sequence[Row], metrics: Sequence[str], *, differences: bool) -> list[Line]:
    return [
        Line(
            arm_name(arm, control),
            tuple((interval(own.get(name)), is_clear(own.get(name))) for name in metrics),
        )
        for (arm, control), own in lines_of(rows).items()
        if is_difference(arm) is differences
    ]


def _official(rows: Sequence[Row]) -> dict[str, Any] | None:
    """LaMP's metrics, weighted by queries; none in the pooled cell."""
    present = {row.metric for row in rows}
    names = [m.name for m in METRICS if m.combine is not None and m.name in present]
    if not names:
        return None
    columns = [title_of(name) for name in names]
    return {"columns": columns, "lines": _lines(rows, names, differences=False)}


def _comparisons(cell: Cell, metric: str, data: ReportData) -> list[Comparison]:
    return [
        one
        for one in data.table.comparisons
        if (one.task, one.k, one.profile) == cell and one.metric == metric
    ]


def _user_figures(cell: Cell, metric: str, data: ReportData) -> dict[str, Any]:
    """Who is helped: each user's gain over shared, sorted and by the length of the history."""
    from markupsafe import Markup

    from fedoppu.simulations import figures

    found = [one for one in _comparisons(cell, metric, data) if one.arm == MAIN]
    if not found or cell[0] == ALL:
        return {"users": None, "lengths": None}
    unit = title_of(metric)
    gains = found[0].gains()
    points = [
        figures.Length(data.lengths[user], gain)
        for user, gain in gains.items()
        if user in data.lengths
    ]
    # The figures escape every text of theirs: matplotlib writes XML.
    return {
        "users": Markup(figures.users(list(gains.values()), unit)),  # noqa: S704
        "lengths": Markup(figures.by_length(points, unit)) if points else None,  # noqa: S704
    }


def _curves(data: ReportData) -> Any:
    from markupsafe import Markup

    from fedoppu.simulations import figures

    return Markup(figures.shared_phase(data.rounds)) if data.rounds else None  # noqa: S704


def size(count: float | None) -> str:
    """Bytes for people, in powers of 1000: 950 B, 1.2 kB, 3.4 MB; a dash where they are not known."""
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
