"""The report: whole, repeatable, closed to the outside, honest about what is not shown."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fedoppu.common.randomness import Randomness
from fedoppu.simulations import figures
from fedoppu.simulations.columns import UserColumns, columns_of
from fedoppu.simulations.panels import ArmScores, Unit
from fedoppu.simulations.report import render, size, write_report
from fedoppu.simulations.report_data import (
    Recall,
    ReportData,
    RoundPoint,
    findings,
    guaranteed,
    headline,
    not_guaranteed,
    state_of,
    traffic,
)
from fedoppu.simulations.scores import UserScores
from fedoppu.simulations.statistics import BootstrapSettings
from fedoppu.simulations.table import Row, Table, build_table

VOID = {"meta", "br", "link", "img"}


def users(level: float) -> UserColumns:
    values = np.random.default_rng(0).normal(scale=0.05, size=8) + level
    sums = {
        "accuracy_official": np.array([[4.0, 8.0]]),
        "macro_f1": np.ones((1, 9)),
        "parse_failures": np.array([[0.0, 8.0]]),
    }
    return columns_of(
        UserScores(f"u{i}", 8, {"accuracy": v, "content_gain": v - 0.2, "loss": 1 - v}, sums)
        for i, v in enumerate(values.tolist())
    )


def arm(name: str, level: float, control: str | None = None) -> ArmScores:
    return ArmScores("LaMP_2N", "classification", 0, "none", 0, name, users(level), control)


def table(personal: float = 0.8) -> Table:
    scores = [
        arm("base", 0.2),
        arm("shared", 0.5),
        arm("personal", personal),
        arm("personal", 0.3, control="wrong_user"),
    ]
    return build_table(scores, BootstrapSettings(Randomness.from_seed(0), resamples=200))


def data(**fields: object) -> ReportData:
    rounds = [
        RoundPoint("LaMP_2N k=0", number, 3.0 / number, 1000 * number, 2000, 10, number % 2)
        for number in (2, 1, 3)
    ]
    everything = {
        "table": table(),
        "config": "seed: 0\nout: </pre><script>alert(1)</script>\n",
        "command": "fedoppu simulate task=LaMP_2N seed=0",
        "rounds": rounds,
        "lengths": {Unit("LaMP_2N", 0, f"u{i}"): 10 + i for i in range(8)},
        "recalls": [Recall("LaMP_2N", 64, 16)],
        "costs": [("personal adapter", "8.2 kB")],
        "environment": [("torch", "2.13")],
        "warnings": ["research.dropout=0.1 lets members drop out"],
    }
    return ReportData(**(everything | fields))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def page() -> str:
    return render(data())


class Outline(HTMLParser):
    """Checks that every element is closed in its place; collects what refers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "data", "action")]
        self.ids += [v or "" for k, v in attrs if k == "id" and tag == "h2"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


def test_the_page_refers_to_nothing_outside(page: str) -> None:
    found = outline(page)
    assert found.references
    assert all(reference.startswith("#") for reference in found.references)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert found.tags.isdisjoint({"script", "link", "iframe", "object", "embed"})


def test_the_page_is_well_formed_and_its_links_lead_somewhere(page: str) -> None:
    found = outline(page)
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids)
    links = re.findall(r'<a href="#([^"]+)"', page)
    assert set(links) <= set(found.ids)


def test_what_comes_from_a_run_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_same_data_give_the_same_bytes(page: str, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", data())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_the_page_holds_everything_that_a_reader_needs(page: str) -> None:
    expected = [
        "LaMP_2N, k=0: 8 users, 64 queries",
        "personal, wrong user",
        "16 of 64 queries (25 %)",
        "research.dropout=0.1 lets members drop out",
        "fedoppu simulate task=LaMP_2N seed=0",
        "No differential privacy",
        "The users are generated",
        "8.2 kB",
        "macro-F1",
    ]
    assert [text for text in expected if text not in page] == []
    assert page.count("<svg") == 4  # gains, users, lengths, shared phase


def test_a_claim_that_the_interval_does_not_decide_is_printed_as_not_shown() -> None:
    same = render(data(table=table(personal=0.5)))
    assert "not shown</span>\nA personal adapter is better than the shared adapter alone." in same
    worse = render(data(table=table(personal=0.1)))
    assert "the opposite is shown</span>\nA personal adapter is better" in worse


@pytest.mark.parametrize(
    ("low", "high", "state"), [(0.1, 0.2, "shown"), (-0.1, 0.1, "open"), (-0.2, -0.1, "against")]
)
def test_a_state_is_where_the_interval_lies(low: float, high: float, state: str) -> None:
    row = Row("t", "personal-shared", 0, "none", None, "loss", 0.0, low, high, 9, 9)
    assert state_of(row) == state


def test_claims_without_an_interval_are_not_findings() -> None:
    rows = table().rows
    claims = [(one.row.arm, one.row.metric) for one in findings(rows)]
    assert claims == [
        ("personal-shared", "accuracy"),
        ("personal-wrong_user", "accuracy"),
        ("personal", "content_gain"),
        ("shared-base", "accuracy"),
    ]


@pytest.mark.parametrize(
    ("task", "metrics", "expected"),
    [
        ("LaMP_2N", ["accuracy", "loss"], "accuracy"),
        ("LaMP_3", ["accuracy", "mae", "loss"], "mae"),
        ("LaMP_4", ["rouge1", "loss"], "loss"),
        ("all", ["accuracy", "loss"], "accuracy"),
    ],
)
def test_the_headline_of_a_task(task: str, metrics: list[str], expected: str) -> None:
    rows = [Row(task, "base", 0, "none", None, name, 0.0, 0.0, 0.0, 9, 9) for name in metrics]
    assert headline(rows) == expected


def test_traffic_is_summed_and_losses_are_the_first_and_the_last() -> None:
    (line,) = traffic(data().rounds)
    assert (line.rounds, line.asked, line.dropped) == (3, 30, 2)
    assert (line.bytes_up, line.bytes_down) == (6000, 6000)
    assert (line.first_loss, line.last_loss) == (3.0, 1.0)


def test_updates_in_clear_take_the_promise_back() -> None:
    plain = data(plain_updates=True)
    assert not any("masked vector" in line for line in guaranteed(plain))
    assert not_guaranteed(plain)[0].startswith("Updates travelled in clear")
    assert any("masked vector" in line for line in guaranteed(data()))


def test_a_private_report_says_what_was_spent_and_who_can_take_the_noise_off() -> None:
    rounds = [RoundPoint("f", number, None, None, None, None, None) for number in (1, 2)]
    page = render(data(rounds=rounds, privacy=["f: epsilon 7.05 after 2 of 2 rounds"]))
    assert "f: epsilon 7.05 after 2 of 2 rounds" in page
    assert "whoever knows the seed can take it off again" in page
    assert "No differential privacy" not in page
    assert "the mean held-out loss, and who took part" not in page
    assert page.count("<td>-</td>") >= 6  # nothing that counts the cohort
    assert "None" not in page
    assert not re.search(r"\bnan\b", page)


def test_a_report_without_rounds_users_or_a_table_is_still_a_page() -> None:
    empty = ReportData(Table(()), "", "fedoppu simulate")
    page = render(empty)
    assert outline(page).open == []
    assert "<svg" not in page


def test_a_federation_without_held_out_items_has_no_loss() -> None:
    rounds = [RoundPoint("f", 1, None, 10, 10, 2, 0)]
    (line,) = traffic(rounds)
    assert (line.first_loss, line.last_loss) == (None, None)
    assert "<svg" in figures.shared_phase(rounds)


def test_a_figure_is_one_described_svg_and_always_the_same() -> None:
    rows = [row for row in table().rows if "-" in row.arm and row.metric == "loss"]
    first = figures.forest(rows, "loss")
    assert first == figures.forest(rows, "loss")
    root = ElementTree.fromstring(first)  # noqa: S314 (our own text)
    assert root.tag == "svg"
    assert root.get("aria-label") == "Gains in loss with intervals"
    assert "personal − shared" in first  # noqa: RUF001 (a minus sign)


def test_of_thousands_of_users_a_figure_draws_some_and_says_so() -> None:
    few, many = [figures.users([0.1 * n for n in range(size)], "loss") for size in (500, 4000)]
    assert "500 users, from the most harmed" in few
    assert "4000 users (500 are drawn)" in many
    assert len(many) < 1.2 * len(few)
    points = [figures.Length(items, 0.1) for items in range(4000)]
    assert "one user of 4,000" in figures.by_length(points, "loss")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_gains_by_length_are_averaged_in_thirds_of_the_users(count: int) -> None:
    points = [figures.Length(items, 0.1 * items) for items in range(count)]
    assert "mean of a third of the users" in figures.by_length(points, "accuracy")


def test_a_name_in_a_figure_is_escaped() -> None:
    rounds = [RoundPoint("<b>&", 1, 1.0, 1, 1, 1, 0)]
    assert "<b>" not in figures.shared_phase(rounds)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (950, "950 B"), (1234, "1.2 kB"), (3.4e6, "3.4 MB"), (5e9, "5.0 GB")],
)
def test_sizes_are_written_for_people(count: float, text: str) -> None:
    assert size(count) == text


def test_plotting_is_not_imported_before_a_report_is_written() -> None:
    source = (
        "import sys, fedoppu.simulations.report, fedoppu.simulations.printing\n"
        "print(sorted({'matplotlib', 'jinja2', 'scipy', 'rouge_score'} & set(sys.modules)))"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.stdout.strip() == "[]"
