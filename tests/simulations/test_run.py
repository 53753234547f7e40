"""The run folder of the main job: which files, which fields, and what may not be in them."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from fedoppu.common.adapter_files import load_adapter
from fedoppu.common.config import load_run_config
from fedoppu.common.errors import BaseModelError, UsageError
from fedoppu.server.metrics import RoundRecord
from fedoppu.simulations.console import Console
from fedoppu.simulations.run import simulate
from tests.small_run import LEAST, federations, finish, lines, rows, settings

ROW = {
    *("task", "arm", "k", "profile", "control", "metric"),
    *("value", "low", "high", "users", "queries"),
}
TRAINED = ("local", "population", "personal")
FEDERATION_FILES = {
    *("config.yaml", "metrics.jsonl", "timing.jsonl", "table.json", "personal.jsonl"),
    *("rounds", "groups", "shared", "adapters"),
}


def test_the_run_folder_holds_the_files_that_are_documented(small_run: Path) -> None:
    assert {path.name for path in small_run.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "timing.jsonl", "table.json"),
        *("report.html", "seed-0"),
    }
    assert [str(path.relative_to(small_run)) for path in federations(small_run)] == [
        "seed-0/LaMP_2N/k0-none",
        "seed-0/LaMP_3/k0-none",
    ]
    for folder in federations(small_run):
        assert {path.name for path in folder.iterdir()} == FEDERATION_FILES
        assert {path.name for path in (folder / "adapters").iterdir()} == set(TRAINED)


def test_table_rows_have_exactly_the_documented_fields(small_run: Path) -> None:
    found = rows(small_run)
    assert all(set(row) == ROW for row in found)
    assert {row["control"] for row in found} == {None, "wrong_user"}
    assert {row["arm"] for row in found if row["control"]} == {"personal"}
    assert {row["task"] for row in found} == {"LaMP_2N", "LaMP_3", "all"}
    arms = {"base", "shared", "majority", "prior_shift", "oracle", *TRAINED}
    assert {row["arm"] for row in found if "-" not in row["arm"]} == arms


def test_every_arm_answers_every_query(small_run: Path) -> None:
    for row in rows(small_run):
        if row["metric"] == "accuracy" and row["task"] != "all":
            assert (row["users"], row["queries"]) == (5, 15)
            assert row["low"] <= row["value"] <= row["high"]


def test_a_gain_is_the_difference_of_its_two_rows(small_run: Path) -> None:
    values = {
        (row["task"], row["arm"], row["control"], row["metric"]): row["value"]
        for row in rows(small_run)
    }
    for task, sign, metric in (("LaMP_2N", 1, "accuracy"), ("LaMP_3", -1, "mae")):
        personal = values[task, "personal", None, metric]
        for name, other in (
            ("shared", values[task, "shared", None, metric]),
            ("wrong_user", values[task, "personal", "wrong_user", metric]),
        ):
            gain = values[task, f"personal-{name}", None, metric]
            assert gain == pytest.approx(sign * (personal - other))


def test_metrics_hold_one_line_a_round_and_no_wall_time(small_run: Path) -> None:
    found = lines(small_run / "metrics.jsonl")
    assert [line["task"] for line in found] == ["LaMP_2N", "LaMP_3"]
    for line in found:
        assert (line["kind"], line["round"], line["seed"]) == ("round", 1, 0)
        assert len(line["cohort"]) == 4
        assert line["survivors"] == line["cohort"]
        assert line["bytes_up"] > 0
        own = {key: line[key] for key in line if key not in ("task", "k", "profile", "seed")}
        assert RoundRecord.from_data(own).model_hash == line["model_hash"]
    for name in ("metrics.jsonl", "table.json"):
        assert "seconds" not in (small_run / name).read_text()


def test_wall_times_are_in_a_file_of_their_own(small_run: Path) -> None:
    kinds = [line["kind"] for line in lines(small_run / "timing.jsonl")]
    assert kinds == ["process", "round", "phases", "round", "phases"]


def test_the_files_of_the_run_are_those_of_its_federations_together(small_run: Path) -> None:
    for name in ("metrics.jsonl", "timing.jsonl"):
        parts = [line for folder in federations(small_run) for line in lines(folder / name)]
        whole = lines(small_run / name)
        assert [line for line in whole if line["kind"] != "process"] == parts
    own = [row for folder in federations(small_run) for row in rows(folder)]
    of_a_task = [row for row in rows(small_run) if row["task"] != "all"]
    assert own == of_a_task


def test_config_is_resolved_and_reads_back(small_run: Path) -> None:
    again = load_run_config(file=small_run / "config.yaml")
    assert again == settings(f"out={small_run}")


def test_adapters_are_peft_folders_whose_parent_is_the_shared_adapter(small_run: Path) -> None:
    for folder, arm in product(federations(small_run), TRAINED):
        shared = load_adapter(folder / "shared")
        assert shared.parent is None
        owners = sorted(path.name for path in (folder / "adapters" / arm).iterdir())
        assert len(owners) == 5
        for owner in owners:
            own = folder / "adapters" / arm / owner
            peft = json.loads((own / "adapter_config.json").read_text())
            assert (peft["peft_type"], peft["r"]) == ("LORA", 8)
            assert load_adapter(own).parent == (None if arm == "local" else shared.digest())


def test_every_trained_adapter_is_recorded_with_its_digest(small_run: Path) -> None:
    for folder in federations(small_run):
        records = lines(folder / "personal.jsonl")
        assert len(records) == len(TRAINED) * 5
        for record in records:
            saved = load_adapter(folder / "adapters" / record["arm"] / record["user"])
            assert saved.digest() == record["digest"]
            assert record["examples"] == 8  # personal.training.newest


def test_the_shared_adapter_is_that_of_the_last_round(small_run: Path) -> None:
    for folder in federations(small_run):
        last = json.loads((folder / "rounds" / "0001" / "round.json").read_text())
        assert load_adapter(folder / "shared").digest() == last["record"]["model_hash"]


def test_the_report_opens_without_network(small_run: Path) -> None:
    page = (small_run / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_a_run_keeps_the_device_that_was_chosen_for_it(tmp_path: Path) -> None:
    """Resumed on another machine, auto could mean another device, and so other bytes."""
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    folder = finish(settings("device=auto", f"out={tmp_path / 'run'}", start=LEAST))
    assert load_run_config(file=folder / "config.yaml").device == chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch finds no CUDA device"):
        finish(settings("device=cuda", f"out={tmp_path / 'run'}", start=LEAST))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    run = settings(f"out={tmp_path / 'run'}", start=LEAST)
    finish(run)
    before = (tmp_path / "run" / "table.json").read_bytes()
    with pytest.raises(UsageError, match="holds a run already"):
        finish(run)
    assert (tmp_path / "run" / "table.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written to"):
        finish(settings(f"out={tmp_path / 'file' / 'run'}", start=LEAST))


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("data=nowhere", UsageError, "there is no data at nowhere"),
        ("arms=personnel", UsageError, "arms must be all or some of base, shared"),
        ("base=nowhere", UsageError, "there is no base nowhere"),
        (
            "personal.adapter.targets=nope",
            BaseModelError,
            "no target module nope; it has down_proj",
        ),
        ("shared.adapter.targets=q_proj,nope", BaseModelError, "no target module nope"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(
    tmp_path: Path, setting: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finish(settings(setting, f"out={tmp_path / 'run'}", start=LEAST))
    assert not (tmp_path / "run").exists()


def test_seeds_are_federations_of_their_own_pooled_in_one_table(tmp_path: Path) -> None:
    folder = finish(settings("seed=3", "seeds=2", f"out={tmp_path / 'run'}", start=LEAST))
    assert [path.parts[-3] for path in federations(folder)] == ["seed-3", "seed-4"]
    assert {row["users"] for row in rows(folder) if row["metric"] == "mae"} == {2}
    users = [folder / f"seed-{seed}" / "LaMP_3" / "users" / "users.jsonl" for seed in (3, 4)]
    assert users[0].read_bytes() != users[1].read_bytes()


@pytest.mark.parametrize("arm", ["majority", "oracle", "prior_shift"])
def test_an_arm_that_is_made_from_others_may_stand_alone(tmp_path: Path, arm: str) -> None:
    folder = finish(settings(f"arms={arm}", f"out={tmp_path / 'run'}", start=LEAST))
    assert {row["arm"] for row in rows(folder)} == {arm}


def test_progress_and_floor_are_told_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = simulate(
        settings(f"out={tmp_path / 'run'}", start=LEAST), Console(progress=True, table=True)
    )
    out, err = capsys.readouterr()
    assert "majority" in out
    assert "floor of 2 members" in err
    assert "1 target users, 2 base users" in err
    assert result["folder"] == str(tmp_path / "run")
    assert result["rows"] == rows(tmp_path / "run")
