"""The benchmark of the personal phase: that its sides do the same work, and that it counts right."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from fedoppu.client.batches import Row
from fedoppu.client.engine import engine_for
from fedoppu.client.jobs import ClientJob
from fedoppu.client.multi_lora import stack_levels
from fedoppu.common.adapters import Adapter
from fedoppu.common.errors import FedoppuError, UsageError
from fedoppu.simulations.benchmarks import peak, personal_phase
from fedoppu.simulations.benchmarks.personal_cases import Case, Work, opened
from fedoppu.simulations.benchmarks.personal_exact import (
    cosine,
    cosine_row,
    distance,
    distance_row,
    gradient_row,
    movements,
    score_row,
)
from fedoppu.simulations.benchmarks.personal_flops import pass_flops, training_flops
from fedoppu.simulations.benchmarks.personal_ladder import RUNGS, ladder_rows
from fedoppu.simulations.benchmarks.personal_peak import Scope as PeakScope
from fedoppu.simulations.benchmarks.personal_peak import _child, _shape_rows
from fedoppu.simulations.benchmarks.personal_rows import (
    GOALS,
    LEAN,
    Contest,
    Scope,
    _rates,
    block,
    comparison_rows,
    ours_in,
)
from fedoppu.simulations.benchmarks.personal_sides import (
    LeanLoop,
    OppuWay,
    Ours,
    Side,
    Trained,
    check_alike,
)
from fedoppu.simulations.benchmarks.personal_turns import Turns, take_turns

# one batch an epoch: the order of the examples, which is each side's own, changes nothing
SHORT = Work(users=4, items=4, queries=2, instruction=24, shortest=30, longest=60)


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with opened("tiny", None, SHORT) as opened_case:
        yield opened_case


# --- users ---------------------------------------------------------------------------------------


def test_users_have_prompts_as_long_as_those_of_lamp() -> None:
    lengths = Work().lengths(16)
    assert (min(lengths), max(lengths), len(lengths)) == (113, 370, 16)
    assert 165 < np.mean(lengths) < 185
    assert Work().lengths(0) == []
    assert Work().lengths(1) == [113]


def test_every_user_has_the_same_lengths_so_that_any_user_costs_the_same(case: Case) -> None:
    of_users = [sorted(len(example.prompt) for example in job.examples) for job in case.jobs]
    assert of_users == [SHORT.lengths(4)] * 4
    orders = {tuple(len(example.prompt) for example in job.examples) for job in case.jobs}
    assert len(orders) > 1


def test_a_users_prompts_begin_with_its_tasks_instruction_and_differ_after_it(case: Case) -> None:
    heads = [{bytes(e.prompt[:25]) for e in job.examples} for job in case.jobs]
    assert all(len(head) == 1 for head in heads)
    assert heads[0] == heads[2] != heads[1]
    texts = {bytes(example.prompt[25:]) for job in case.jobs for example in job.examples}
    assert len(texts) == 16


def test_queries_are_not_among_what_was_trained_on(case: Case) -> None:
    for job, asked in zip(case.jobs, case.asked, strict=True):
        assert len(asked) == 2
        known = {bytes(example.prompt) for example in job.examples}
        assert all(bytes(one.prompt) not in known for one in asked)
        assert all(0 <= one.gold < len(one.labels) for one in asked)


def test_a_shape_without_random_weights_asks_for_a_folder() -> None:
    with (
        pytest.raises(UsageError, match="the 135m shape needs a base"),
        opened("135m", None, SHORT),
    ):
        pass


# --- sides ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trained]]:
    folder = tmp_path_factory.mktemp("trainer")
    before = {dtype: state(base.model) for dtype, base in case.bases.items()}
    sides: dict[str, Side] = {
        "oppu": OppuWay(case, folder=str(folder)),
        "lean fp32": LeanLoop(case, dtype="float32"),
        "lean bf16": LeanLoop(case, dtype="bfloat16"),
        "fp32": Ours(case, dtype="float32", group=2),
        "bf16": Ours(case, dtype="bfloat16", group=2),
    }
    made = {name: side(case.jobs[:2]) for name, side in sides.items()}
    assert made["oppu"][0].vector.tolist() == sides["oppu"](case.jobs[:1])[0].vector.tolist()
    assert not list(folder.iterdir())
    for dtype, base in case.bases.items():
        assert state(base.model).keys() == before[dtype].keys()
        assert all(torch.equal(v, before[dtype][k]) for k, v in state(base.model).items())
    return made


def state(model: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def test_all_sides_take_the_same_steps(trained: dict[str, list[Trained]]) -> None:
    check_alike(trained)
    assert {user.steps for side in trained.values() for user in side} == {2}
    wrong = {"a": trained["oppu"], "b": [replace(trained["fp32"][0], steps=3)]}
    with pytest.raises(FedoppuError, match="b took 3 steps for user 0, others 2"):
        check_alike(wrong)


def test_all_sides_move_the_adapters_alike(case: Case, trained: dict[str, list[Trained]]) -> None:
    moved = {name: movements(case, users) for name, users in trained.items()}
    for user, lean in moved["lean fp32"].items():
        assert np.linalg.norm(lean) > 1e-3
        assert distance(moved["fp32"][user], lean) <= 2e-4
        for name in ("oppu", "lean bf16", "bf16"):
            assert cosine(moved[name][user], lean) >= 0.98, name


def test_a_difference_is_seen(case: Case, trained: dict[str, list[Trained]]) -> None:
    moved = movements(case, trained["fp32"])
    scaled = {user: 1.001 * vector for user, vector in moved.items()}
    other = {user: np.roll(vector, 1) for user, vector in moved.items()}
    rows = [distance_row(case, scaled, moved), cosine_row(case, other, moved, theirs_in="fp32")]
    assert [row.met for row in rows] == [False, False]
    assert rows[0].ours == pytest.approx(1e-3, rel=1e-2)
    same = [distance_row(case, moved, moved), cosine_row(case, moved, moved, theirs_in="bf16")]
    assert [row.met for row in same] == [True, True]


def test_gradients_are_those_of_peft(case: Case) -> None:
    assert gradient_row(case).ours <= 2e-6


def test_scores_of_the_same_adapters_are_equal(
    case: Case, trained: dict[str, list[Trained]]
) -> None:
    assert score_row(case, trained["bf16"], trained["bf16"]).ours == 0.0
    far = [replace(user, vector=user.vector * 30) for user in trained["bf16"]]
    assert score_row(case, trained["bf16"], far).ours > 0.0


# --- turns and rows ------------------------------------------------------------------------------


def test_sides_take_turns() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str) -> Callable[[int], int]:
        def turn(index: int) -> int:
            calls.append((name, index))
            return 3

        return turn

    turns = take_turns({name: side(name) for name in "abc"}, 2)
    assert calls == [(name, index) for index in (0, 1) for name in "abc"]
    assert all(len(rates) == 2 for rates in turns.rates.values())
    with pytest.raises(UsageError, match="pairs must be at least 1, got 0"):
        take_turns({}, 0)


def test_a_goal_is_one_of_the_worst_pair() -> None:
    turns = Turns({"a": [10.0, 12.0, 20.0], "b": [1.0, 1.3, 1.0]}, [1.0, 2.0, 1.5])
    row = turns.row("a / b", ours="a", theirs="b", goal=9.8)
    assert (row.ours, row.theirs, row.ratio) == (12.0, 1.0, 12.0)
    assert row.low == pytest.approx(12 / 1.3)
    assert row.met is False
    assert turns.row("a / b", ours="a", theirs="b", goal=9.7).met is True
    assert "load 1-2" in row.note


def test_users_of_a_round_differ_from_those_of_the_next() -> None:
    jobs: Any = list(range(32))
    blocks: list[list[Any]] = [list(block(jobs, index)) for index in range(5)]
    assert all(len(users) == 16 for users in blocks)
    assert len({users[0] for users in blocks}) == 5
    assert {user % 2 for user in blocks[1][:2]} == {0, 1}
    firsts: list[Any] = [block(jobs[:4], index)[0] for index in range(4)]
    assert sorted(firsts) == [0, 1, 2, 3]


def test_a_side_trains_the_first_users_of_the_block(case: Case) -> None:
    seen: list[list[str]] = []

    def side(jobs: Any) -> list[Trained]:
        seen.append([job.id for job in jobs])
        return [Trained(job.id, np.zeros(0, np.float32), 1) for job in jobs]

    contest = Contest(case, {"slow": (side, 1), "fast": (side, 4)})
    contest.run(2)
    assert seen[:2] == [["warm-up"], ["warm-up"]]
    assert [len(ids) for ids in seen[2:]] == [1, 4, 1, 4]
    assert all(ids[0] == other[0] for ids, other in zip(seen[2::2], seen[3::2], strict=True))
    assert len(contest.trained["fast"]) == 8


def test_the_rows_of_a_shape_have_its_goals(case: Case) -> None:
    scope = Scope(("tiny",), pairs=1, work=SHORT, slow=1)
    rows = {row.name: row for row in comparison_rows(scope)}
    best = ours_in("bfloat16", 4)
    ours = (best, ours_in("bfloat16", 1), ours_in("float32", 4))
    assert rows[f"tiny: {best} / OPPU's way"].goal == GOALS["tiny"][0]
    for dtype, lean in LEAN.items():
        assert rows[f"tiny: {ours_in(dtype, 4)} / {lean}"].goal == GOALS["tiny"][1]
    assert rows["tiny: tokens of a prompt, mean"].ours == np.mean(SHORT.lengths(4))
    assert len(rows) == 12
    turns = Turns({side: [1.0] for side in ("OPPU's way", *LEAN.values(), *ours)}, [1.0])
    assert not [row for row in _rates(case, turns, promised=False) if row.goal is not None]


# --- ladder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_computes_the_losses_of_the_engine(case: Case, name: str) -> None:
    base = case.bases["float32"]
    jobs = [shaken(job) for job in case.jobs]
    levels = stack_levels([(job.start,) for job in jobs])
    rows = [
        Row(owner, example, place)
        for owner, job in enumerate(jobs)
        for place, example in enumerate(job.examples)
    ]
    found = [losses(engine, rows, levels) for engine in (RUNGS[name](base), engine_for(base))]
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4)


def shaken(job: ClientJob) -> ClientJob:
    rng = np.random.default_rng(0)
    tensors = {
        name: value + rng.normal(0, 0.02, value.shape).astype(np.float32)
        for name, value in job.start.tensors.items()
    }
    return replace(job, start=Adapter(job.start.spec, tensors, None))


def losses(engine: Any, rows: list[Row], levels: Any) -> list[float]:
    """Of each row the sum of its losses."""
    sums = np.zeros(len(rows))
    for one in engine.passes(rows, share=True):
        owners = np.array([rows[index].owner for index in one.picked])
        with torch.no_grad():
            found = one.losses([level.take(owners) for level in levels]).numpy()
        np.add.at(sums, one.sources, found)
    return list(sums)


def test_the_ladder_has_a_row_for_each_rung_and_group() -> None:
    rows = list(ladder_rows(Scope(("tiny",), pairs=1, work=SHORT)))
    assert len(rows) == len(RUNGS) + 1
    assert rows[0].theirs is None
    assert [row.theirs for row in rows[1:6]] == [row.ours for row in rows[:5]]
    assert rows[-1].name == "tiny: groups of 1 instead"
    assert rows[-1].theirs == rows[5].ours


# --- operations and memory -----------------------------------------------------------------------


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of products with matrices of given shapes."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes, self.total = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = (tuple(matrix.shape) for matrix in args[-2:])
            if right in self.shapes or right[::-1] in self.shapes:
                self.total += 2 * left[0] * left[1] * right[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("group", [1, 4])
def test_the_formula_counts_the_products_that_training_makes(
    case: Case, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = case.bases["float32"]
    weights = {tuple(p.shape) for p in base.model.parameters() if p.dim() == 2}
    side = Ours(case, dtype="float32", group=group)
    with Products(weights) as padded:
        side(case.jobs)
    # padding is work that the method does not need
    monkeypatch.setattr("fedoppu.client.llama.filled", lambda packed: packed)
    with Products(weights) as needed:
        side(case.jobs)
    assert training_flops(base, case.jobs, group=group).total == needed.total < padded.total


def test_shared_tokens_and_the_last_layer_are_counted_once(case: Case) -> None:
    model = case.bases["float32"].model
    few, many = pass_flops(model, 100, 10), pass_flops(model, 100, 20)
    layer = 2 * 10 * (2 * 128 * 128 + 3 * 128 * 352) + 2 * 10 * 128 * 4096
    assert many.forward - few.forward == layer
    assert few.forward - few.backward == 2 * 100 * 3 * 128 * 128
    summed = few + many
    assert (summed.total, summed.tokens) == (few.total + many.total, 200)


def test_shares_of_the_peak_are_shares(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedoppu.simulations.benchmarks.personal_peak.SQUARES", (64,))
    monkeypatch.setattr("fedoppu.simulations.benchmarks.personal_peak.SECONDS", 0.01)
    rows = list(_shape_rows(case, pairs=1))
    assert [row.unit for row in rows] == ["GFLOP/s", "%", "GFLOP/s", "%"]
    assert all(row.ours > 0 for row in rows)
    assert PeakScope(("tiny",)).work.users == 16


def test_a_measured_process_that_fails_is_no_measurement() -> None:
    with pytest.raises(FedoppuError, match="the process that was measured ended with 1"):
        _child((), None)


# --- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", [personal_phase.app, peak.app])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "tiny,huge"], "--shape must be of tiny, house, small, 135m, got huge"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--json", "missing/a.json"], "there is no folder"),
        (["--base", "huge=x"], "--base takes SHAPE=FOLDER"),
        (["--base", "house"], "--base takes SHAPE=FOLDER"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(
    app: Any, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert message in result.output
