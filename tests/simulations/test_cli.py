"""The `fedoppu simulate` command: settings, formats, exit codes; never a traceback for what a user did."""

import json
import shutil
from pathlib import Path

import pytest

from fedoppu.common.config import RunConfig, load_run_config
from tests.small_run import LEAST, command

QUESTION: dict[str, object] = {
    "id": "31",
    "input": "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3,"
    " 4, or 5 without further explanation. review: dull",
    "profile": [{"id": "310", "text": "bright", "score": "4"}],
}


def write_lamp(folder: Path, question: dict[str, object]) -> Path:
    """A data folder of one question in each part, the same in both but for its id."""
    for number, part in enumerate(("dev", "train")):
        own = question | {"id": f"{number}"}
        golds = {"task": "LaMP_3", "golds": [{"id": f"{number}", "output": "2"}]}
        (folder / part).mkdir(parents=True)
        (folder / part / f"{part}_questions.json").write_text(json.dumps([own]))
        (folder / part / f"{part}_outputs.json").write_text(json.dumps(golds))
    return folder


def test_listed_settings_are_yaml_that_gives_the_same_settings(tmp_path: Path) -> None:
    listed = command("users=7", "k=0,2", "--list")
    assert listed.exit_code == 0
    (tmp_path / "listed.yaml").write_text(listed.stdout)
    assert load_run_config(file=tmp_path / "listed.yaml") == load_run_config(["users=7", "k=0,2"])


def test_a_setting_on_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("users: 3\ncohort: 4\n")
    listed = command(
        "users=9", "--config", str(tmp_path / "own.yaml"), "--list", "--format", "json"
    )
    data = json.loads(listed.stdout)["data"]
    assert (data["users"], data["cohort"]) == (9, 4)
    assert data["base_users"] == RunConfig().base_users


def test_json_is_one_object_with_folder_and_rows(tmp_path: Path) -> None:
    ended = command(*LEAST, f"out={tmp_path / 'run'}", "--format", "json", "--quiet")
    assert (ended.exit_code, ended.stderr) == (0, "")
    envelope = json.loads(ended.stdout)
    assert (envelope["schema_version"], envelope["status"]) == (1, "ok")
    assert envelope["data"]["folder"] == str(tmp_path / "run")
    assert {row["arm"] for row in envelope["data"]["rows"]} == {"majority"}


def test_quiet_prints_the_table_alone(tmp_path: Path) -> None:
    ended = command(*LEAST, f"out={tmp_path / 'run'}", "-q")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.startswith("LaMP_3, k=0: 1 user, 1 query")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["userz=1"], 2, "Did you mean: 'users'"),
        (["users"], 2, "settings are key=value, got 'users'"),
        (["--config", "nowhere.yaml"], 2, "there is no configuration file nowhere.yaml"),
        (["data=nowhere"], 2, "there is no data at nowhere"),
        (["base=nowhere"], 2, "there is no base nowhere"),
        (
            ["personal.adapter.targets=nope"],
            1,
            "no target module nope; it has down_proj, gate_proj",
        ),
    ],
)
def test_a_mistake_is_one_line_and_a_hint(
    tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    ended = command(*LEAST, f"out={tmp_path / 'run'}", *arguments)
    assert ended.exit_code == exit_code
    assert ended.stdout == ""
    told = ended.stderr.splitlines()
    assert told[0].startswith("error: ")
    assert message in told[0]
    assert [line[:6] for line in told[1:]] in ([], ["hint: "])


def test_a_folder_that_holds_a_run_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    ended = command(*LEAST, f"out={tmp_path}")
    assert ended.exit_code == 2
    assert "holds a run already" in ended.stderr


def test_malformed_data_names_file_record_and_field(tmp_path: Path) -> None:
    bad = QUESTION | {"profile": [{"id": "310", "text": "bright"}]}
    data = write_lamp(tmp_path / "data", bad)
    ended = command(*LEAST, f"data={data}", f"out={tmp_path / 'run'}", "-q")
    assert ended.exit_code == 1
    assert "dev_questions.json: record 0 (id 0): profile 0: id 310: field score: is missing" in (
        ended.stderr
    )
    assert "hint: repair the record" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_too_few_users_are_told_with_a_remedy(tmp_path: Path) -> None:
    data = write_lamp(tmp_path / "data", QUESTION)
    ended = command(*LEAST, f"data={data}", f"out={tmp_path / 'run'}", "--format", "json", "-q")
    assert ended.exit_code == 1
    envelope = json.loads(ended.stdout)
    assert envelope["error_code"] == "data"
    assert "1 base users with enough items, at least 2 are needed" in envelope["message"]
    assert envelope["hint"]


def test_a_chat_without_a_template_is_refused_before_any_work(tmp_path: Path) -> None:
    ended = command(*LEAST, "prompt.style=chat", f"out={tmp_path / 'run'}", "-q")
    assert (ended.exit_code, ended.stderr) == (
        2,
        "error: prompt.style=chat takes a base with a chat template, and pocket has none\n"
        "hint: set prompt.style=plain\n",
    )
    assert not (tmp_path / "run").exists()


def test_a_base_on_the_generic_path_is_told_once_with_the_reason(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    for name, times in ((str(base), 1), ("pocket", 0)):
        ended = command(*LEAST, f"base={name}", f"out={tmp_path / Path(name).name}-run")
        assert ended.exit_code == 0, ended.stderr
        assert ended.stderr.count("takes the generic path") == times
    told = command(*LEAST, f"base={base}", f"out={tmp_path / 'again'}").stderr
    assert "slower: its activation is gelu, not silu" in " ".join(told.split())


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run begin that cannot make a prompt: pocket has no chat template."""
    monkeypatch.setattr("fedoppu.simulations.run.require_chat_template", lambda base: None)


@pytest.mark.usefixtures("_unchecked")
def test_a_clients_exception_names_member_and_user_and_ends_the_run(tmp_path: Path) -> None:
    chat = [*LEAST, "prompt.style=chat", "rounds=1", "cohort=2", f"out={tmp_path / 'run'}", "-q"]
    ended = command(*chat)
    assert ended.exit_code == 1
    assert ended.stderr.startswith("error: member 0, train.masked: ClientFailed: member 0: ")
    assert "user base-0000: BaseModelError: base pocket has no chat template" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.usefixtures("_unchecked")
def test_an_error_about_a_target_user_names_the_user(tmp_path: Path) -> None:
    ended = command(*LEAST, "prompt.style=chat", f"out={tmp_path / 'run'}", "-q")
    assert ended.exit_code == 1
    assert ended.stderr.splitlines() == [
        "error: user target-0000: base pocket has no chat template",
        "hint: set prompt.style=plain",
    ]
