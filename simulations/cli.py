"""The `fedoppu simulate` command: settings in, a table and a run folder out."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedoppu.common.cli import run_command
from fedoppu.common.config import as_flat, load_run_config, to_yaml

app = typer.Typer()

SETTINGS_HELP = (
    "Settings as key=value, for example task=LaMP_2M data=FOLDER base=FOLDER users=30 rounds=10 "
    "k=0,2 seed=1 workers=2 out=FOLDER."
)


@app.command()
def simulate(
    settings: Annotated[list[str] | None, typer.Argument(help=SETTINGS_HELP)] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML of the same keys; key=value wins.")
    ] = None,
    output: Annotated[
        Literal["text", "json"],
        typer.Option("--format", help="json prints one object on standard output."),
    ] = "text",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    show: Annotated[
        bool, typer.Option("--list", help="Print all settings as they would be used, and stop.")
    ] = False,
) -> None:
    """Simulate a federation of virtual users on this machine.

    Base users train a shared LoRA through secure aggregation; then each target user gets a
    personal adapter. The table compares the arms, with a wrong-user control, and everything is
    written to the run folder.
    """

    def command() -> dict[str, Any]:
        run = load_run_config(settings or (), config)
        if show:
            if output == "text":
                typer.echo(to_yaml(as_flat(run)), nl=False)
            return as_flat(run)
        # heavy imports happen here, so that --help and a wrong key answer at once
        from fedoppu.simulations.console import Console
        from fedoppu.simulations.run import simulate as run_simulation

        return run_simulation(run, Console(progress=not quiet, table=output == "text"))

    run_command(command, output)
