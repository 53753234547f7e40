"""The main job from settings to a table: what its bytes depend on, and what it can be run on.

Data and bases beside the repository are used where they are there, and else the test says that it
was skipped.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedoppu.client.model import load_base, resolve_base
from fedoppu.common.adapter_files import load_adapter
from fedoppu.common.config import TASKS
from tests.small_run import command, federations, finish, lines, results, rows, settings

BESIDE = Path(__file__).resolve().parents[2].parent / "shared"
# one task; enough users for every control
ONE = [
    *("task=LaMP_3", "users=5", "base_users=6", "queries=2", "rounds=2", "cohort=4"),
    *("group_users=2", "personal.training.epochs=1", "personal.training.newest=6"),
    *("resamples=100",),
]


def beside(*parts: str) -> Path:
    """A file or folder beside the repository, or the end of the test."""
    path = BESIDE.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"there is no ../shared/{'/'.join(parts)}: it is not part of the repository")
    return path


def one(folder: Path, *changes: str) -> Path:
    return finish(settings(*changes, f"out={folder}", start=ONE))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are held against."""
    return one(tmp_path_factory.mktemp("reference") / "run")


def adapters(folder: Path) -> dict[str, str]:
    """Digests of all adapters of a run, by relative path."""
    found = sorted(folder.rglob("fedoppu.json"))
    return {str(path.relative_to(folder)): json.loads(path.read_text())["digest"] for path in found}


# --- what the bytes depend on ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_bytes(reference: Path, tmp_path: Path) -> None:
    assert results(one(tmp_path / "again")) == results(reference)


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one(reference: Path, tmp_path: Path) -> None:
    assert results(one(tmp_path / "two", "workers=2")) == results(reference)


@pytest.mark.slow
def test_another_seed_gives_another_run(reference: Path, tmp_path: Path) -> None:
    other = one(tmp_path / "other", "seed=1")
    assert not set(adapters(other).values()) & set(adapters(reference).values())
    assert (other / "table.json").read_bytes() != (reference / "table.json").read_bytes()


@pytest.mark.slow
def test_flowers_engine_gives_the_bytes_of_groups_of_one(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="engine=flower needs the extra fedoppu[flower]")
    small = ("group_users=1", "rounds=1", "arms=shared")
    ours = one(tmp_path / "ours", *small)
    # a process of its own: Ray's helpers outlive the run that started them
    changes = ("engine=flower", f"out={tmp_path / 'flowers'}", "-q")
    words = [sys.executable, "-m", "fedoppu", "simulate", *ONE, *small, *changes]
    subprocess.run(words, check=True, capture_output=True)  # noqa: S603
    assert results(tmp_path / "flowers") == results(ours)


@pytest.mark.slow
def test_the_settings_in_the_folder_give_the_same_run(reference: Path, tmp_path: Path) -> None:
    config = str(reference / "config.yaml")
    ended = command("--config", config, f"out={tmp_path / 'again'}", "--format", "json", "-q")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["data"]["rows"] == rows(reference)
    assert results(tmp_path / "again") == results(reference)


# --- switches --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_updates_in_clear_lead_to_nearly_the_same_adapter_and_print_a_warning(
    reference: Path, tmp_path: Path
) -> None:
    """The sum is exact, so only rounding to levels separates the two."""
    out = f"out={tmp_path / 'plain'}"
    ended = command(*ONE, "research.plain_updates=true", "arms=base,shared", out, "-q")
    assert ended.exit_code == 0, ended.stderr
    assert ended.stderr.startswith("warning: research.plain_updates=true: updates travel in clear")
    assert "the server saw each update in clear" in (tmp_path / "plain" / "report.html").read_text()
    secure, plain = (
        load_adapter(folder / "seed-0" / "LaMP_3" / "k0-none" / "shared")
        for folder in (reference, tmp_path / "plain")
    )
    ours, clear = (one.spec.flatten(one.tensors) for one in (secure, plain))
    assert not np.array_equal(ours, clear)
    assert np.linalg.norm(ours - clear) < 0.01 * np.linalg.norm(clear)


@pytest.mark.slow
def test_members_drop_out_and_the_run_goes_on(tmp_path: Path) -> None:
    changes = ("research.dropout=0.2", "rounds=4", "base_users=12", "cohort=8", "arms=shared")
    found = lines(one(tmp_path / "run", *changes) / "metrics.jsonl")
    assert [record["round"] for record in found] == [1, 2, 3, 4]
    assert sum(record["dropped"] for record in found) > 0
    for record in found:
        assert set(record["survivors"]) <= set(record["cohort"])


@pytest.mark.slow
def test_retrieval_and_profiles_are_federations_of_their_own(tmp_path: Path) -> None:
    folder = one(tmp_path / "run", "k=0,2", "profile=none,template", "rounds=1", "arms=base,shared")
    names = [path.name for path in federations(folder)]
    assert names == ["k0-none", "k0-template", "k2-none", "k2-template"]
    losses = {
        (row["k"], row["profile"]): row["value"]
        for row in rows(folder)
        if (row["task"], row["arm"], row["metric"]) == ("LaMP_3", "base", "loss")
    }
    assert len(set(losses.values())) == 4  # each prompt is another one
    assert len(set(adapters(folder).values())) == 4


@pytest.mark.slow
def test_the_null_population_runs(tmp_path: Path) -> None:
    folder = one(tmp_path / "run", "population=null", "rounds=1", "arms=shared,majority")
    assert {row["arm"] for row in rows(folder)} == {"shared", "majority"}


# --- the claim --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generated_preferences_are_learned_and_the_gain_is_personal(tmp_path: Path) -> None:
    """R12 on a reduced size: each interval leaves zero out on the right side.

    personal over wrong user: the gain is the user's own. Its content gain: more than how often the
    user gives each answer. personal over shared: there is a gain at all.
    """
    changes = ("users=12", "base_users=18", "queries=10", "cohort=9", "arms=shared,personal")
    start = ["task=LaMP_2N,LaMP_3", *changes, "workers=2"]
    folder = finish(settings(f"out={tmp_path / 'run'}", start=start))
    lows = {(row["task"], row["arm"], row["metric"]): row["low"] for row in rows(folder)}
    for task, main in (("LaMP_2N", "accuracy"), ("LaMP_3", "mae")):
        for metric in (main, "loss", "content_gain", "within_user_auc"):
            assert lows[task, "personal-wrong_user", metric] > 0
        for metric in (main, "loss"):
            assert lows[task, "personal-shared", metric] > 0


# --- tasks, data, bases ----------------------------------------------------------------------------


@pytest.mark.slow
def test_all_seven_tasks_run(tmp_path: Path) -> None:
    short = ("prompt.answer_tokens=6", "users=2", "base_users=3", "cohort=3", "rounds=1")
    folder = one(tmp_path / "run", f"task={','.join(TASKS)}", *short, "personal.training.newest=4")
    assert {row["task"] for row in rows(folder)} == {*TASKS, "all"}
    for task in TASKS:
        own = {row["metric"]: row for row in rows(folder) if row["task"] == task}
        assert own["loss"]["value"] is not None
        main = {"LaMP_3": "mae", "LaMP_4": "rouge1", "LaMP_5": "rouge1", "LaMP_7": "rouge1"}
        assert main.get(task, "accuracy") in own


def lamp_settings(data: Path, base: Path) -> list[str]:
    return [
        *(f"data={data}", f"base={base}", "users=3", "base_users=4", "cohort=3", "rounds=1"),
        *("queries=2", "prompt.text_tokens=32", "prompt.answer_tokens=6"),
        *("personal.training.newest=4", "personal.training.epochs=1", "resamples=50"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["LaMP_1", "LaMP_2M", "LaMP_2N", "LaMP_3", "LaMP_4", "LaMP_5"])
def test_lamp_files_run_with_a_base_of_ones_own(task: str, tmp_path: Path) -> None:
    data, base = beside("data", "lamp_style"), beside("models", "house-6m")
    start = [f"task={task}", *lamp_settings(data, base)]
    folder = finish(settings(f"out={tmp_path / 'run'}", start=start))
    found = {(row["arm"], row["metric"]): row for row in rows(folder) if not row["control"]}
    assert found["personal", "loss"]["users"] == 3
    assert ("oracle", "accuracy") not in found
    (federation,) = federations(folder)
    assert load_adapter(federation / "shared").spec.base_hash == resolve_base(str(base)).hash
    assert "more in queries alone" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_another_foreign_checkpoint_loads_as_a_base() -> None:
    facts = resolve_base(str(beside("models", "stories260K")))
    base = load_base(facts)
    assert base.tokenizer.decode(base.tokenizer.encode("Once upon a time")) == "Once upon a time"
    assert facts.num_parameters < 1_000_000


@pytest.mark.slow
def test_an_adapter_of_one_base_is_refused_on_another(reference: Path, tiny_base: Path) -> None:
    """R14, from a finished run's folder."""
    own = federations(reference)[0] / "adapters" / "personal" / "target-0000"
    adapter = load_adapter(own)
    with pytest.raises(Exception, match="was made for base") as told:
        adapter.require(base_hash=resolve_base(str(tiny_base)).hash, parent=adapter.parent)
    assert type(told.value).__name__ == "AdapterError"
