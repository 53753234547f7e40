"""The command `python -m fedoppu.simulations.benchmarks.peak`: what the engine uses of the machine.

How fast one thread multiplies matrices, in bf16 and fp32; the share of it that the products with
the frozen base reach in training (by formula, `personal_flops`); the memory of one group of users.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fedoppu.common.cli import run_command
from fedoppu.simulations.benchmarks.bench import check_options, measure
from fedoppu.simulations.benchmarks.personal_phase import (
    PACKAGES,
    folders_of,
    shapes_of,
    tell,
)
from fedoppu.simulations.benchmarks.personal_settings import even_settings

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def benchmark(
    shape: Annotated[str, typer.Option(help="Shapes of the base, with commas.")] = (
        "tiny,house,small"
    ),
    base: Annotated[
        list[str] | None,
        typer.Option(help="A shape's base, 135m=FOLDER; random weights without. Repeatable."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Measurements of peak and training.")] = 5,
    quick: Annotated[bool, typer.Option(help="A few short users: does it run at all?")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Measures the machine's matmul peak, the engine's share of it, and the engine's memory."""

    def command() -> dict[str, Any]:
        shapes, folders = shapes_of(shape), folders_of(base or [])
        check_options(json, pairs)
        tell(even_settings())
        # torch is loaded after the threads are set
        from fedoppu.simulations.benchmarks.personal_cases import Shape, Work
        from fedoppu.simulations.benchmarks.personal_peak import GROUP, Scope, peak_rows

        scope = Scope(
            shapes=cast(tuple[Shape, ...], shapes),
            folders=cast(Mapping[Shape, Path], folders),
            pairs=pairs,
            work=Work(4, 4, 0, longest=130) if quick else Work(GROUP, queries=0),
        )
        return measure(peak_rows(scope), packages=PACKAGES, json=json)

    run_command(command, "text")


if __name__ == "__main__":
    app(prog_name="python -m fedoppu.simulations.benchmarks.peak")
