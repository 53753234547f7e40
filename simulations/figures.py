"""The figures of a report, as SVG text that stands inside a page.

No figure refers to anything outside: no namespaces, no scripts, no fonts. The same numbers give the
same bytes under the same matplotlib. Colours are Okabe and Ito's, which all common kinds of colour
vision tell apart, and no figure says with colour alone what it says. Figures are as wide as a phone
and are scaled up, not down.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedoppu.simulations.report_data import RoundPoint
from fedoppu.simulations.table import Row

T = TypeVar("T")
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":")
MOST = 500  # users that a figure draws: more than it has pixels for, and each takes kilobytes
WIDTH = 5.2  # inches at 72 points: 374 pixels
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fedoppu",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Length:
    """A user's number of own items, and the gain."""

    items: int
    gain: float


@dataclass(frozen=True)
class _Sheet:
    figure: Figure = field(repr=False)
    axes: tuple[Axes, ...] = field(repr=False)


def forest(rows: Sequence[Row], unit: str) -> str:
    """Gains with their intervals, one line each, and the line of no gain.

    Args:
        rows: Differences of one metric; those without a value are left out.
        unit: Names the horizontal axis.
    """
    shown = [row for row in rows if row.value is not None]
    with matplotlib.rc_context(STYLE):
        sheet = _sheet((0.55 + 0.26 * len(shown),))
        axes = sheet.axes[0]
        for place, row in enumerate(reversed(shown)):
            _bar(axes, place, row)
        axes.axvline(0, color=GREY, linewidth=1, zorder=0)
        axes.set_yticks(range(len(shown)), [_label(row.arm) for row in reversed(shown)])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel(f"gain in {unit} (right of 0: the first is better)")
        axes.spines["left"].set_visible(False)
        return _svg(sheet.figure, f"Gains in {unit} with intervals")


def _bar(axes: Axes, place: int, row: Row) -> None:
    value, low, high = row.value or 0.0, row.low, row.high
    clear = low is not None and high is not None and (low > 0 or high < 0)
    colour = GREY if not clear else BLUE if value > 0 else ORANGE
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    # A hollow mark is an interval that holds zero.
    axes.plot([value], [place], "o", color=colour, markersize=5, mfc=colour if clear else "white")


def _label(arm: str) -> str:
    return arm.replace("-", " − ").replace("_", " ")  # noqa: RUF001 (a minus sign, for people)


def shared_phase(rounds: Sequence[RoundPoint]) -> str:
    """Federated held-out loss, bytes so far and dropped members, by round; one line a federation."""
    lines: dict[str, list[RoundPoint]] = {}
    for point in sorted(rounds, key=lambda point: (point.federation, point.round)):
        lines.setdefault(point.federation, []).append(point)
    with matplotlib.rc_context(STYLE):
        sheet = _sheet((1.9, 1.2, 1.2), share=True)
        for index, (name, points) in enumerate(lines.items()):
            style = {"color": SERIES[index % 6], "linestyle": DASHES[(index // 6) % 4]}
            _round_lines(sheet.axes, name, points, style)
        titles = ("held-out loss, nats per answer token", "megabytes so far, up and down")
        for axes, title in zip(sheet.axes, (*titles, "dropped members"), strict=True):
            axes.set_title(title)
        sheet.axes[2].set_xlabel("round")
        sheet.axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
        sheet.axes[2].yaxis.set_major_locator(MaxNLocator(integer=True))
        sheet.axes[2].set_ylim(bottom=-0.2)
        if len(lines) <= 12:
            sheet.figure.legend(loc="outside lower center", ncols=1 + (len(lines) > 3))
        return _svg(sheet.figure, "Held-out loss, bytes and dropped members by round")


def _round_lines(
    axes: Sequence[Axes], name: str, points: Sequence[RoundPoint], style: Mapping[str, Any]
) -> None:
    known = [(p.round, p.held_out_loss) for p in points if p.held_out_loss is not None]
    rounds = [point.round for point in points]
    megabytes, total = [], 0.0
    for point in points:  # what is not published leaves a gap
        total += nan if point.bytes_up is None else (point.bytes_up + (point.bytes_down or 0)) / 1e6
        megabytes.append(total)
    dropped = [nan if point.dropped is None else point.dropped for point in points]
    mark = "." if len(points) < 40 else ""
    axes[0].plot(
        [r for r, _ in known], [loss for _, loss in known], label=name, marker=mark, **style
    )
    axes[1].plot(rounds, megabytes, **style)
    axes[2].plot(rounds, dropped, marker=mark, **style)


def users(each: Sequence[float], unit: str) -> str:
    """Each user's gain, sorted: how many are helped, how many harmed, and by how much."""
    ordered = sorted(each)
    places, gains = list(_spread(range(1, len(ordered) + 1))), list(_spread(ordered))
    with matplotlib.rc_context(STYLE):
        sheet = _sheet((1.9,))
        axes = sheet.axes[0]
        colours = [BLUE if gain > 0 else ORANGE for gain in gains]
        axes.bar(places, gains, width=0.9 * len(ordered) / len(gains), color=colours)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(f"{_shown(len(ordered))}, from the most harmed to the most helped")
        axes.set_ylabel(f"gain in {unit}")
        axes.set_xlim(0.4, len(ordered) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(sheet.figure, f"Gain in {unit} of each user, sorted")


def by_length(points: Sequence[Length], unit: str) -> str:
    """Gain against the length of the own history, with the mean gain of each third of the users."""
    ordered = sorted(points, key=lambda point: (point.items, point.gain))
    with matplotlib.rc_context(STYLE):
        sheet = _sheet((2.2,))
        axes = sheet.axes[0]
        shown = _spread(ordered)
        lengths, gains = [p.items for p in shown], [p.gain for p in shown]
        name = "a user" if len(shown) == len(ordered) else f"one user of {len(ordered):,}"
        axes.scatter(lengths, gains, s=14, color=BLUE, alpha=0.6, linewidths=0, label=name)
        axes.axhline(0, color=GREY, linewidth=0.8)
        for index, third in enumerate(_thirds(ordered)):
            ends = [third[0].items, third[-1].items]
            mean = sum(point.gain for point in third) / len(third)
            label = "mean of a third of the users" if index == 0 else None
            axes.plot(ends, [mean, mean], color=ORANGE, linewidth=2.5, label=label)
        axes.set_xlabel("items in the own history")
        axes.set_ylabel(f"gain in {unit}")
        sheet.figure.legend(loc="outside lower center", ncols=2)
        return _svg(sheet.figure, f"Gain in {unit} by length of the own history")


def _spread(ordered: Sequence[T]) -> Sequence[T]:
    """All, or `MOST` of them at even distances, the first and the last among them."""
    if len(ordered) <= MOST:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (MOST - 1))] for place in range(MOST)]


def _shown(count: int) -> str:
    return f"{count} users" + (f" ({MOST} are drawn)" if count > MOST else "")


def _thirds(ordered: Sequence[Length]) -> list[Sequence[Length]]:
    cuts = [round(len(ordered) * part / 3) for part in range(4)]
    thirds = [ordered[cuts[part] : cuts[part + 1]] for part in range(3)]
    return [third for third in thirds if third]


def _sheet(heights: tuple[float, ...], *, share: bool = False) -> _Sheet:
    """Axes above each other; built without pyplot, which would keep every figure alive."""
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(
        len(heights), 1, sharex=share, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    return _Sheet(figure, tuple(axes[:, 0]))


def _svg(figure: Figure, title: str) -> str:
    """The figure as one svg element that refers to nothing, described for a screen reader."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside a page an svg needs no namespace declarations, and a plain href is enough.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
