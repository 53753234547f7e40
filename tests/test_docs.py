"""The documentation agrees with the code: what it names exists, and its commands run.

References are written `path/file.py: name` or `path/file.py: Class.method`. In a ```bash block every
line is a command; what is done with it:

- a line that sets up an environment (it has `pip install` or `-m venv`) is checked for syntax alone;
- `flwr run` needs a SuperLink of its own and is checked for syntax alone;
- a line with a word in capitals such as FOLDER is a pattern: its settings are checked, it is not run;
- any other `fedoppu simulate` runs with REDUCED settings appended, in a folder of its own;
- any other line runs as it is. The last two are slow.
"""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fedoppu.__main__ import COMMANDS
from fedoppu.common.config import load_run_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
REFERENCE = re.compile(r"`([\w/.-]+\.py):\s+([\w.]+)`")
PATH = re.compile(r"`((?:common|client|server|simulations|tests|docs|fedoppu)/[\w/.-]*)`")
ROOM = re.compile(r"^\| `(\w+)/`(.*)\|$", re.MULTILINE)
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+?)(#[^)]*)?\)")
PATTERN = re.compile(r"\b[A-Z]{3,}\b")
REDUCED = [
    *("task=LaMP_3", "users=4", "base_users=4", "queries=1", "rounds=1", "cohort=3", "seeds=1"),
    *("k=0", "profile=none", "resamples=20", "personal.training.epochs=1"),
]


@dataclass(frozen=True)
class Command:
    """A line of a bash block."""

    file: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    @property
    def program(self) -> str:
        return Path(self.words[0]).name if self.words else ""

    @property
    def sets_up(self) -> bool:
        return "pip install" in self.line or "-m venv" in self.line or self.program == "flwr"

    @property
    def is_pattern(self) -> bool:
        return PATTERN.search(self.line) is not None

    @property
    def simulates(self) -> bool:
        return self.program == "fedoppu" and self.words[1:2] == ["simulate"]

    def __str__(self) -> str:
        return f"{self.file}: {self.line[:60]}"


def commands() -> list[Command]:
    found = []
    for doc in DOCS:
        for block in BLOCK.findall(doc.read_text()):
            joined = block.replace("\\\n", " ")
            lines = [line for line in joined.splitlines() if line.strip()]
            found += [Command(doc.name, line) for line in lines if not line.startswith("#")]
    return found


RUN = [one for one in commands() if not (one.sets_up or one.is_pattern)]


def references() -> list[tuple[str, str, str]]:
    return [
        (doc.name, path, name)
        for doc in DOCS
        for path, name in REFERENCE.findall(" ".join(doc.read_text().split()))
    ]


@cache
def defined(path: Path) -> frozenset[str]:
    """Names at the top of a file, and Class.member of its classes; imports do not count."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        own = set(_names(node))
        names |= own
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner}" for part in node.body for inner in _names(part)}
    return frozenset(names)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [target.id for target in targets if isinstance(target, ast.Name)]


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("doc", "path", "name"), references())
def test_a_reference_names_a_file_and_what_it_defines(doc: str, path: str, name: str) -> None:
    assert (ROOT / path).is_file(), f"{doc} names {path}, which is not there"
    assert name in defined(ROOT / path), f"{doc} names {path}: {name}, which it does not define"


def test_the_architecture_has_two_journeys_full_of_references() -> None:
    text = " ".join((ROOT / "docs" / "architecture.md").read_text().split())
    journeys = text.split("## Journey ")[1:]
    assert len(journeys) == 2
    assert all(len(REFERENCE.findall(journey)) >= 15 for journey in journeys)


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_paths_and_links_exist(doc: Path) -> None:
    text = doc.read_text()
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), f"{doc.name} names {path}, which is not there"
    for target, _ in LINK.findall(text):
        if not target.startswith(("http://", "https://")):
            assert (doc.parent / target).exists(), f"{doc.name} links to {target}"


def test_every_file_of_a_room_is_in_the_table_of_rooms() -> None:
    for room, listed in ROOM.findall((ROOT / "docs" / "architecture.md").read_text()):
        own = {path.name for path in (ROOT / room).glob("*.py")} - {"__init__.py"}
        assert set(re.findall(r"`(\w+\.py)`", listed)) == own, f"{room}/ and its line differ"


# --- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_is_a_command(command: Command) -> None:
    check = subprocess.run(  # noqa: S603
        ["/bin/sh", "-n", "-c", command.line], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    if command.program == "fedoppu":
        assert command.words[1] in (*COMMANDS, "--help")


@pytest.mark.parametrize("command", [one for one in commands() if one.simulates], ids=str)
def test_the_settings_of_a_simulation_are_settings(command: Command) -> None:
    words = [word for word in command.words[2:] if "=" in word]
    load_run_config(words)
    if "--config" in command.words:
        load_run_config(file=ROOT / command.words[command.words.index("--config") + 1])


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_runs(command: Command, tmp_path: Path) -> None:
    words = command.words
    if command.program == "fedoppu":
        words = [sys.executable, "-m", "fedoppu", *words[1:]]
    if command.program in ("python", "python3"):
        words = [sys.executable, *words[1:]]
    if command.simulates and "--list" not in words:
        words += [*REDUCED, f"out={tmp_path / 'run'}"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)  # noqa: S603
    assert ended.returncode == 0, ended.stderr[-2000:]
