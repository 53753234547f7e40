"""The shared phase's benchmark: its sides do the same work, and its command measures them."""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedoppu.simulations.benchmarks.shared_cases import Case, Work, cohorts, relative, write_base
from fedoppu.simulations.benchmarks.shared_ours import Ours
from fedoppu.simulations.benchmarks.shared_peft import PeftModel, adamw
from fedoppu.simulations.benchmarks.shared_phase import app
from fedoppu.simulations.benchmarks.shared_rows import EQUAL, Scope, rows_of
from fedoppu.simulations.benchmarks.shared_tree import run_marked

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
WORK = Work(tokens=12, batch=2, steps=3, answer=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("base")
    assert write_base(written) == 873_600
    return written


@pytest.fixture(scope="module")
def case(folder: Path) -> Case:
    return Case.open(folder, WORK)


def rounds_of_peft(case: Case, plan: list[list[int]]) -> np.typing.NDArray[np.float32]:
    """Federated averaging written out: one user after another."""
    model, shared = PeftModel(case), case.vector(case.start)
    parameters = list(model.factors.values())
    for users in plan:
        made = []
        for user in users:
            tensors = case.adapter(shared).tensors
            with torch.no_grad():
                for name, parameter in model.factors.items():
                    parameter.copy_(torch.from_numpy(tensors[name]))
            optimizer = adamw(parameters, case)
            for batch in torch.split(torch.from_numpy(case.rows(user)), case.work.batch):
                optimizer.zero_grad()
                torch.autograd.backward(model.loss(batch))
                torch.nn.utils.clip_grad_norm_(parameters, case.work.settings().clip_norm)
                optimizer.step()
            made.append(model.vector())
        shared = np.mean(made, axis=0)
    return shared


@pytest.mark.parametrize("group", [1, 3])
def test_our_rounds_equal_federated_averaging_written_out(case: Case, group: int) -> None:
    plan = [[0, 1, 2], [3, 0, 1]]
    ours = Ours(case, group=group)(plan)
    assert relative(ours, rounds_of_peft(case, plan), case.vector(case.start)) < 2 * EQUAL


def test_pfls_rounds_equal_ours(case: Case) -> None:
    pytest.importorskip("pfl", reason="pfl is not installed: pip install 'fedoppu[bench]'")
    from fedoppu.simulations.benchmarks.shared_pfl import Pfl

    plan = cohorts(4, 2, 2)
    pfl = Pfl(case, range(4))
    first = pfl(plan)
    assert relative(Ours(case, group=2)(plan), first, case.vector(case.start)) < EQUAL
    assert pfl(plan).tobytes() == first.tobytes()


def test_rows_are_those_of_the_job_in_the_order_of_its_training(case: Case) -> None:
    examples = case.job(5, case.start).examples
    kept = {(*example.prompt.tolist(), *example.answer.tolist()) for example in examples}
    rows = case.rows(5)
    assert rows.shape == (WORK.batch * WORK.steps, WORK.tokens + 1)
    assert {tuple(row) for row in rows.tolist()} == kept
    assert all(len(example.answer) == WORK.answer for example in examples)


def test_work_travels_as_text() -> None:
    assert Work.from_text(WORK.as_text()) == WORK
    assert WORK.name == "2 x 12 tokens x 3 steps, 4 learnt, float32"
    assert "all learnt" in Work(8, 1, 1, 8).name


def test_cohorts_go_through_all_users_in_turn() -> None:
    assert cohorts(5, 2, 3) == [[0, 1], [2, 3], [4, 0]]


def test_goals_are_those_of_the_issue() -> None:
    goals = {work.name: goal for work, goal in Scope(5, 3, ("float32",)).works}
    assert goals == {
        "1 x 32 tokens x 8 steps, all learnt, float32": 3.0,
        "1 x 32 tokens x 8 steps, 4 learnt, float32": 3.0,
        "4 x 64 tokens x 4 steps, all learnt, float32": 2.0,
        "4 x 64 tokens x 4 steps, 4 learnt, float32": 2.0,
    }


# --- processes -----------------------------------------------------------------------------------

ORPHAN = "sum(range(20_000_000)); x = bytearray(60_000_000); import time; time.sleep(.5)"
LEAVES = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {ORPHAN!r}], start_new_session=True)
while not os.path.exists(sys.argv[1]) and child.poll() is None:
    time.sleep(.05)
"""


def test_processes_that_nobody_waits_for_are_counted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES, str(tmp_path / "never")]
    cost = run_marked(command, dict(os.environ))
    assert cost.exit_code == 0
    assert cost.cpu_seconds > 0.15
    assert cost.peak_bytes > 60_000_000
    assert cost.wall_seconds > 0.5


def test_what_a_command_returns_is_told() -> None:
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    assert run_marked(failing, dict(os.environ)).exit_code == 3


@pytest.mark.slow
def test_flowers_rounds_equal_ours() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedoppu[flower]'")
    rows = list(rows_of(["flower"], Scope(1, 1, ("float32",), quick=True)))
    assert [row.name.split(":")[0] for row in rows] == [
        "- distance from Flower",
        "Flower on Ray",
        "- memory",
    ]
    assert rows[0].met
    assert all(row.ours > 0 and row.theirs for row in rows[1:])


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def without_pfl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pfl", None)


@pytest.mark.usefixtures("without_pfl")
def test_a_missing_side_is_told_with_the_extra_that_brings_it() -> None:
    result = CliRunner().invoke(app, ["--without", "flower"])
    assert result.exit_code == 2
    assert "needs pfl, which is not installed" in result.stderr
    assert "pip install 'fedoppu[bench]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--flower-pairs", "0"], "--flower-pairs must be at least 1, got 0"),
        (["--without", "ray"], "--without must be one of pfl, flower, got ray"),
        (["--dtype", "float16"], "--dtype must be of float32, bfloat16, got float16"),
    ],
)
def test_wrong_input_gets_one_line_before_anything_runs(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert re.search(line, result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(find_spec("pfl") is None, reason="pfl is not installed")
def test_quick_command_prints_a_table_and_writes_a_file(tmp_path: Path) -> None:
    target = tmp_path / "shared.json"
    arguments = ["--quick", "--pairs", "1", "--without", "flower", "--json", str(target)]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float32"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(target.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["bound", "cost"]
    assert rows[0]["met"]
