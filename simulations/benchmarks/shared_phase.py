"""The command `python -m fedoppu.simulations.benchmarks.shared_phase`: ours beside pfl and Flower on Ray.

Numbers only: no side encrypts or masks anything. pfl runs in this process, by turns with ours, and
what is loaded once is loaded before anything is timed. Flower and ours run in processes of their
own, measured with their start-up and all their processes.
"""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from fedoppu.common.cli import run_command
from fedoppu.common.config import require
from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.bench import check_options, measure
from fedoppu.simulations.benchmarks.others import require_packages
from fedoppu.simulations.benchmarks.personal_settings import even_settings

OTHERS = {"pfl": ("peft", "pfl"), "flower": ("peft", "ray")}
DTYPES = ("float32", "bfloat16")
PACKAGES = ("fedoppu", "torch", "transformers", "peft", "numpy")
DISTRIBUTIONS = {"pfl": ("pfl",), "flower": ("flwr", "ray")}

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def benchmark(
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
    pairs: Annotated[int, typer.Option(help="Measurements beside pfl.")] = 5,
    flower_pairs: Annotated[int, typer.Option(help="Measurements beside Flower.")] = 3,
    without: Annotated[
        list[str] | None, typer.Option(help="A side to leave out: pfl or flower. Repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base, with commas.")] = ",".join(DTYPES),
    quick: Annotated[bool, typer.Option(help="A few short users: does it run at all?")] = False,
) -> None:
    """Compares rounds of federated averaging over one small base."""

    def command() -> dict[str, Any]:
        sides, dtypes = _chosen(without or []), _dtypes(dtype)
        require("--flower-pairs", flower_pairs, 1)
        check_options(json, pairs)
        for side in sides:
            require_packages(OTHERS[side], extra="bench")
        settings = even_settings()
        # torch is loaded after the threads are set
        from fedoppu.client.model import Dtype
        from fedoppu.simulations.benchmarks.shared_rows import Scope, rows_of

        scope = Scope(
            pairs=pairs,
            flower_pairs=flower_pairs,
            dtypes=cast(tuple[Dtype, ...], dtypes),
            quick=quick,
        )
        Console(stderr=True, highlight=False).print(settings, markup=False, soft_wrap=True)
        packages = (*PACKAGES, *(name for side in sides for name in DISTRIBUTIONS[side]))
        return measure(rows_of(sides, scope), packages=packages, json=json)

    run_command(command, "text")


def _chosen(without: list[str]) -> tuple[str, ...]:
    unknown = [name for name in without if name not in OTHERS]
    if unknown:
        raise UsageError(f"--without must be one of {', '.join(OTHERS)}, got {unknown[0]}")
    return tuple(name for name in OTHERS if name not in without)


def _dtypes(names: str) -> tuple[str, ...]:
    unknown = [name for name in names.split(",") if name not in DTYPES]
    if unknown:
        raise UsageError(f"--dtype must be of {', '.join(DTYPES)}, got {unknown[0]}")
    return tuple(names.split(","))


if __name__ == "__main__":
    app(prog_name="python -m fedoppu.simulations.benchmarks.shared_phase")
