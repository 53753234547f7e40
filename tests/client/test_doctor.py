"""The `fedoppu doctor` command: what is found, what is missing, and what to do about it."""

import builtins
import importlib.metadata
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedoppu.client.doctor import LEAST_MEMORY, WANTED, app

Usage = namedtuple("Usage", "total used free")


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def findings(*arguments: str) -> dict[str, dict[str, str]]:
    ended = doctor("--format", "json", *arguments)
    assert ended.exit_code == 0
    found = json.loads(ended.stdout)["data"]["findings"]
    return {one["name"]: one for one in found}


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Hides a distribution."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_everything_that_is_needed_is_looked_at() -> None:
    found = findings()
    assert {"python", "cores", "memory", "disk", "gpu", "cpu kernels", "base"} <= set(found)
    assert set(WANTED) <= set(found)
    assert found["flwr"] == {"name": "flwr", "verdict": "ok", "value": "1.41.0", "hint": ""}
    assert "linear layers: down_proj, gate_proj" in found["adapted"]["value"]


def test_people_get_a_line_for_each_finding() -> None:
    ended = doctor()
    assert ended.exit_code == 0
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("ok    python")
    assert any(line.startswith("ok    base           pocket: ") for line in lines)


def test_a_llama_takes_the_fast_path() -> None:
    path = findings()["path"]
    assert (path["verdict"], path["hint"]) == ("ok", "")
    assert path["value"].startswith("fast, for training and for answers")


def test_why_another_base_takes_the_generic_path_is_said(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    path = findings("--base", str(base))["path"]
    assert path["value"] == (
        "generic, for training and for answers: its activation is gelu, not silu"
    )
    assert "the results are the same" in path["hint"]


def test_a_base_that_cannot_be_built_is_one_line(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    ended = doctor("--base", str(base))
    assert ended.exit_code == 1
    assert f"fail  path           base {base} cannot be built: ValueError: " in ended.stdout


def test_another_base_is_looked_at(tiny_base: Path) -> None:
    found = findings("--base", str(tiny_base))
    assert "0.1 M parameters, context 512" in found["base"]["value"]


def test_a_base_that_is_not_there_fails_with_a_hint() -> None:
    ended = doctor("--base", "nowhere")
    assert ended.exit_code == 1
    assert "fail  base           there is no base nowhere" in ended.stdout
    assert "-> base= takes pocket" in ended.stdout
    assert ended.stderr.startswith("error: this machine cannot run fedoppu as it is")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("package", "verdict", "hint"),
    [("ray", "warn", "fedoppu[flower]"), ("gguf", "warn", "fedoppu[gguf]")],
)
def test_a_missing_extra_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, package: str, verdict: str, hint: str
) -> None:
    without(monkeypatch, package)
    found = findings()[package]
    assert found["verdict"] == verdict
    assert "not installed: needed for" in found["value"]
    assert found["hint"] == f"pip install '{hint}'"


def test_without_a_package_of_the_main_job_the_doctor_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "transformers")
    ended = doctor("--format", "json")
    assert ended.exit_code == 1
    envelope = json.loads(ended.stdout)
    assert (envelope["status"], envelope["hint"]) == ("error", "see the lines marked fail")


def test_without_torch_the_base_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch")
    real = builtins.__import__

    def no_torch(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    ended = doctor()
    assert ended.exit_code == 1
    assert "fail  torch" in ended.stdout
    assert "base  " not in ended.stdout


def test_little_memory_and_a_full_disk_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if "PHYS" in name else LEAST_MEMORY / 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 1))
    found = findings()
    assert (found["memory"]["verdict"], found["disk"]["verdict"]) == ("warn", "warn")
    assert "set workers=1" in found["memory"]["hint"]
    assert "set out=FOLDER on another disk" in found["disk"]["hint"]
