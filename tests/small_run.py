"""What the tests of the main job share: one small finished run, and ways to start others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from fedoppu.common.config import RunConfig, load_run_config
from fedoppu.simulations.cli import app
from fedoppu.simulations.console import Console
from fedoppu.simulations.run import simulate

# two tasks, all arms and controls; the adapters are trained too little to be good at anything
SMALL = [
    *("task=LaMP_2N,LaMP_3", "users=5", "base_users=6", "queries=3", "rounds=1", "cohort=4"),
    *("personal.training.epochs=1", "personal.training.newest=8", "resamples=200"),
]
# as little as can be: no round, no personal adapter
LEAST = [
    *("task=LaMP_3", "users=1", "base_users=2", "queries=1", "rounds=0"),
    *("arms=majority", "resamples=10"),
]


def settings(*changes: str, start: list[str] = SMALL) -> RunConfig:
    """The small run's settings, changed."""
    return load_run_config([*start, *changes])


def finish(run: RunConfig) -> Path:
    """Runs to the end without a word; the run folder."""
    return Path(simulate(run, Console(progress=False, table=False))["folder"])


def command(*arguments: str) -> Result:
    """`fedoppu simulate` in this process: exit code, standard output and error."""
    return CliRunner().invoke(app, list(arguments))


def lines(file: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a table.json."""
    found: list[dict[str, Any]] = json.loads((folder / "table.json").read_bytes())["rows"]
    return found


def federations(folder: Path) -> list[Path]:
    """The folders of a run's federations."""
    return sorted(path.parent for path in folder.glob("seed-*/*/*/config.yaml"))


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a run that depends on the settings alone, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in _results(folder)}


def _results(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("timing.jsonl", "report.html", "config.yaml"):
            yield path
