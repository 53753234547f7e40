"""The command `python -m fedoppu.simulations.benchmarks.secagg`: ours beside Flower's SecAgg+.

Both sides run in this process, by turns, on one thread, with the same n, d, k and t. The goals are
those of the specification; what was counted instead of measured says so in its note.
"""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from fedoppu.common.cli import run_command
from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.bench import check_options, measure, one_thread

GROUPS = ("stream", "client", "server", "two_server", "bytes")
PACKAGES = ("fedoppu", "flwr", "cryptography", "pycryptodome", "numpy")
SIZES, LENGTHS, LONGEST = (10, 100, 1000), (10**5, 10**6), 10**7
QUICK_SIZES, QUICK_LENGTHS = (10,), (2000,)

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def benchmark(
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
    large: Annotated[bool, typer.Option(help="Vectors of 1e7 parameters too.")] = False,
    quick: Annotated[bool, typer.Option(help="A tiny cohort: does it run at all?")] = False,
    pairs: Annotated[int, typer.Option(help="Measurements of each side.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(help=f"A group alone: {', '.join(GROUPS)}. Repeatable.")
    ] = None,
) -> None:
    """Compares our secure aggregation with Flower's SecAgg+, each run by its own functions."""
    lengths = QUICK_LENGTHS if quick else (*LENGTHS, LONGEST) if large else LENGTHS
    sizes = QUICK_SIZES if quick else SIZES

    def command() -> dict[str, Any]:
        groups = _groups(only)
        check_options(json, pairs)
        one_thread()
        # numpy is loaded here, after the threads are set
        from fedoppu.simulations.benchmarks.secagg_rows import Scope, rows_of

        logging.getLogger("flwr").setLevel(logging.WARNING)
        rows = rows_of(groups, Scope(sizes, lengths, pairs))
        return measure(rows, packages=PACKAGES, json=json)

    run_command(command, "text")


def _groups(only: list[str] | None) -> list[str]:
    unknown = [name for name in only or () if name not in GROUPS]
    if unknown:
        raise UsageError(f"--only must be one of {', '.join(GROUPS)}, got {unknown[0]}")
    return only or list(GROUPS)


if __name__ == "__main__":
    app(prog_name="python -m fedoppu.simulations.benchmarks.secagg")
