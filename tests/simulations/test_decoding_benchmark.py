"""The benchmark of answers: that both sides answer the same, and that it says so when they do not."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedoppu.client.jobs import ModelQuery
from fedoppu.common.errors import FedoppuError
from fedoppu.simulations.benchmarks import decoding
from fedoppu.simulations.benchmarks.decoding_cases import (
    PeftWay,
    check_answers,
    check_scores,
    questions,
)
from fedoppu.simulations.benchmarks.decoding_rows import Scope, decoding_rows
from fedoppu.simulations.benchmarks.personal_cases import Case, Work, opened

SHORT = Work(users=2, items=1, queries=2, instruction=24, shortest=30, longest=60)
SIDES = ("bf16, peft fp32", "bf16, peft bf16", "fp32, peft fp32")


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with opened("tiny", None, SHORT) as found:
        yield found


@pytest.fixture(scope="module")
def queries(case: Case) -> list[ModelQuery]:
    return questions(case, max_tokens=4)


def test_users_have_adapters_of_their_own_that_matter(
    case: Case, queries: Sequence[ModelQuery]
) -> None:
    assert [len(query.labels) for query in queries] == [15] * 4
    stacks = [query.adapters for query in queries]
    assert stacks[0][0] is stacks[1][0]
    assert stacks[0][0].digest() != stacks[2][0].digest()
    theirs = PeftWay.of(case.bases["float32"], case.spec, queries)
    own = theirs.score(queries[0])
    swapped = ModelQuery("", queries[0].prompt, stacks[2], queries[0].labels)
    assert np.abs(own - theirs.score(swapped)).max() > 1e-4


def test_all_rows_of_a_shape_are_measured_once() -> None:
    rows = list(decoding_rows(Scope(("tiny",), {}, 1, SHORT, max_tokens=3)))
    assert [row.name for row in rows] == [
        f"tiny: {what}, {both}" for what in ("15 labels", "greedy answers") for both in SIDES
    ]
    assert [row.goal for row in rows] == [25.0, *[None] * 5]
    assert "same label in 4 of 4" in rows[2].note
    assert all(row.ours > 0 and row.theirs for row in rows)


def test_sides_that_differ_are_not_compared() -> None:
    scores = [np.zeros(3), np.zeros(3)]
    check_scores(scores, scores)
    with pytest.raises(FedoppuError, match=r"scores differ by 0.0002 nats"):
        check_scores(scores, [np.zeros(3), np.array([0.0, 2e-4, 0.0])])
    with pytest.raises(FedoppuError, match="scores differ by nan"):
        check_scores(scores, [np.full(3, np.nan)] * 2)
    check_answers([(1, 2), ()], [(1, 2), ()])
    with pytest.raises(FedoppuError, match="1 of 2 answers differ"):
        check_answers([(1, 2), ()], [(1, 2), (3,)])


def test_the_command_writes_a_file_without_goals_when_quick(tmp_path: Path) -> None:
    target = tmp_path / "decoding.json"
    arguments = ["--quick", "--pairs", "1", "--shape", "tiny", "--json", str(target)]
    result = CliRunner().invoke(decoding.app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 6
    assert {row["goal"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--shape", "tiny,huge"], "--shape must be of tiny, house, pocket, got huge"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_wrong_input_gets_one_line_before_anything_runs(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(decoding.app, arguments)
    assert result.exit_code == 2
    assert line in result.stderr
    assert "Traceback" not in result.stderr
