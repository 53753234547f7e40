"""The command that writes the test vectors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedoppu.common.cli import run_command
from fedoppu.simulations.vectors import attempt, modes, parts
from fedoppu.simulations.vectors.material import Case, plain

FILES: Mapping[str, Callable[[], Case]] = {
    "encoding": parts.encoding,
    "config": parts.config,
    "plan": parts.plan,
    "cohort": parts.cohort,
    "channel": parts.channel,
    "shares": parts.shares,
    "bundle": parts.bundle,
    "masks": parts.masks,
    "rotation": parts.rotation,
    "rounding": parts.rounding,
    "attempt_u32": attempt.attempt_u32,
    "attempt_u16": attempt.attempt_u16,
    "hybrid_keys": modes.hybrid_keys,
    "two_server": modes.two_server,
    "roster": modes.roster,
}
RECORDED: Mapping[str, Callable[[], Case]] = {
    "hybrid_recorded": modes.hybrid_recorded,
    "two_server_recorded": modes.two_server_recorded,
}


def text_of(case: Case) -> str:
    """A file's text."""
    return json.dumps(plain(case), indent=1, ensure_ascii=False) + "\n"


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    recorded: Annotated[bool, typer.Option(help="Seal the recorded ones anew too.")] = False,
) -> None:
    """Writes the test vectors of the wire protocol."""

    def command() -> dict[str, Any]:
        out.mkdir(parents=True, exist_ok=True)
        files = {**FILES, **(RECORDED if recorded else {})}
        for name, make in files.items():
            (out / f"{name}.json").write_text(text_of(make()), encoding="utf-8")
        return {"files": sorted(files)}

    run_command(command, "text")


if __name__ == "__main__":
    app()
