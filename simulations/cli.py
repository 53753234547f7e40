"""The `fedoppu simulate` command: settings in, a table and a run folder out."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedoppu.common.cli import run_command
from fedoppu.common.config import as_flat, load_run_config, to_yaml
from fedoppu.common.errors import UsageError
from fedoppu.simulations.run_folder import read_run

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
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with the run in this folder, which was killed."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Print all settings as they would be used, and stop.")
    ] = False,
) -> None:
    """Simulate a federation of virtual users on this machine.

    Base users train a shared LoRA through secure aggregation; then each target user gets a
    personal adapter. The table compares the arms, with a wrong-user control, and everything is
    written to the run folder. A run that was killed goes on with --resume RUN.
    """

    def command() -> dict[str, Any]:
        if resume and config:
            raise UsageError("--resume takes the settings of the run, so there can be no --config")
        if resume:
            run, _ = read_run(resume, settings or ())
        else:
            run = load_run_config(settings or (), config)
        if show:
            if output == "text":
                typer.echo(to_yaml(as_flat(run)), nl=False)
            return as_flat(run)
        # heavy imports happen here, so that --help and a wrong key answer at once
        from fedoppu.simulations import run as main_job
        from fedoppu.simulations.console import Console

        console = Console(progress=not quiet, table=output == "text")
        if resume:
            return main_job.resume(resume, settings or (), console)
        return main_job.simulate(run, console)

    run_command(command, output)
