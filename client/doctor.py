"""The `fedoppu doctor` command: what this machine has, and what of it fedoppu can use."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedoppu.common.base import BaseFacts
from fedoppu.common.cli import run_command
from fedoppu.common.errors import FedoppuError

app = typer.Typer()

# distribution: (what needs it, the extra that brings it, or an empty string)
WANTED = {
    "flwr": ("rounds", ""),
    "torch": ("training and answering", "client"),
    "transformers": ("loading a base", "client"),
    "gguf": ("GGUF bases", "gguf"),
    "scipy": ("fedoppu simulate", "sim"),
    "rouge-score": ("fedoppu simulate", "sim"),
    "matplotlib": ("report.html", "sim"),
    "dp-accounting": ("exact epsilons of sampled cohorts", "dp"),
    "ray": ("engine=flower", "flower"),
}
LEAST_MEMORY = 4e9
LEAST_DISK = 2e9


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        verdict: ok, warn (something will not work) or fail (the main job will not work).
        value: What was found.
        hint: What to do about it, or an empty string.
    """

    name: str
    verdict: Literal["ok", "warn", "fail"]
    value: str
    hint: str = ""


@app.command()
def doctor(
    base: Annotated[
        str, typer.Option(help="Base to look at: pocket, a folder, or a GGUF file.")
    ] = "pocket",
    output: Annotated[
        Literal["text", "json"],
        typer.Option("--format", help="json prints one object on standard output."),
    ] = "text",
) -> None:
    """Say what this machine has, and what of it fedoppu can use."""

    def command() -> dict[str, Any]:
        findings = [*_machine(), *_packages(), *_model(base)]
        if output == "text":
            for finding in findings:
                typer.echo(f"{finding.verdict:<4}  {finding.name:<14} {finding.value}")
                if finding.hint:
                    typer.echo(f"{'':<4}  {'':<14} -> {finding.hint}")
        if any(finding.verdict == "fail" for finding in findings):
            raise FedoppuError(
                "this machine cannot run fedoppu as it is", hint="see the lines marked fail"
            )
        return {"findings": [asdict(finding) for finding in findings]}

    run_command(command, output)


def _machine() -> Iterator[Finding]:
    yield Finding(
        "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    yield Finding(
        "cores",
        "ok",
        str(os.cpu_count()),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = memory >= LEAST_MEMORY
    hint = (
        "" if enough else f"the main job was tried with {LEAST_MEMORY / 1e9:.0f} GB; set workers=1"
    )
    yield Finding("memory", "ok" if enough else "warn", f"{memory / 1e9:.1f} GB", hint)
    free = shutil.disk_usage(Path.cwd()).free
    roomy = free >= LEAST_DISK
    yield Finding(
        "disk",
        "ok" if roomy else "warn",
        f"{free / 1e9:.1f} GB free here",
        "" if roomy else "set out=FOLDER on another disk",
    )


def _packages() -> Iterator[Finding]:
    for name, (purpose, extra) in WANTED.items():
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            verdict: Literal["warn", "fail"] = "fail" if extra in ("", "client") else "warn"
            yield Finding(
                name,
                verdict,
                f"not installed: needed for {purpose}",
                f"pip install 'fedoppu[{extra}]'",
            )


def _model(base: str) -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    device = (
        torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else "none: everything runs on the CPU"
    )
    yield Finding("gpu", "ok", device)
    yield Finding("cpu kernels", "ok", torch.backends.cpu.get_cpu_capability())
    from fedoppu.client.model import resolve_base

    try:
        facts = resolve_base(base)
    except FedoppuError as error:
        yield Finding("base", "fail", str(error), error.hint)
        return
    size = f"{facts.num_parameters / 1e6:.1f} M parameters, context {facts.max_tokens}"
    yield Finding("base", "ok", f"{facts.name}: {size}, hash {facts.hash[:12]}")
    kinds = sorted({name.rsplit(".", 1)[-1] for name in facts.linear})
    yield Finding("adapted", "ok", f"{len(facts.linear)} linear layers: {', '.join(kinds)}")
    yield _path(facts)


def _path(facts: BaseFacts) -> Finding:
    """How training and answering compute on a base; the results are the same."""
    from fedoppu.client.base_checks import generic_because

    try:
        reason = generic_because(facts)
    except FedoppuError as error:
        return Finding("path", "fail", str(error), error.hint)
    if reason is None:
        return Finding("path", "ok", "fast, for training and for answers, with LoRA adapters")
    hint = "the results are the same, the time is not: Llama, Mistral and Qwen2 bases are fast"
    return Finding("path", "ok", f"generic, for training and for answers: {reason}", hint)
