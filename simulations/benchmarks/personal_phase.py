"""The command `python -m fedoppu.simulations.benchmarks.personal_phase`: ours beside OPPU's way and peft.

All sides run in this process, by turns, on one thread with the same allocator settings, and train
the same users in the same number of steps; see `personal_sides`. With `--ladder` it is the engine
against itself: what each of its steps gains.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from fedoppu.common.cli import run_command
from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.bench import check_options, measure
from fedoppu.simulations.benchmarks.personal_settings import even_settings

SHAPES = ("tiny", "house", "small", "135m")
PACKAGES = ("fedoppu", "torch", "transformers", "peft", "accelerate", "numpy")

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def benchmark(
    shape: Annotated[
        str, typer.Option(help=f"Shapes of the base, with commas: {', '.join(SHAPES)}.")
    ] = "tiny,house,small",
    base: Annotated[
        list[str] | None,
        typer.Option(help="A shape's base, 135m=FOLDER; random weights without. Repeatable."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Measurements of each side.")] = 5,
    ladder: Annotated[bool, typer.Option(help="What each step of the engine gains.")] = False,
    quick: Annotated[bool, typer.Option(help="A few short users: does it run at all?")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Compares training one adapter per user: transformers.Trainer, a lean peft loop, our engine."""

    def command() -> dict[str, Any]:
        shapes, folders = shapes_of(shape), folders_of(base or [])
        check_options(json, pairs)
        tell(even_settings())
        # torch is loaded after the threads are set
        from fedoppu.simulations.benchmarks.personal_cases import Shape, Work
        from fedoppu.simulations.benchmarks.personal_ladder import ladder_rows
        from fedoppu.simulations.benchmarks.personal_rows import Scope, comparison_rows

        scope = Scope(
            shapes=cast(tuple[Shape, ...], shapes),
            folders=cast(Mapping[Shape, Path], folders),
            pairs=pairs,
            work=Work(users=4, items=4, queries=2, longest=130) if quick else Work(),
            promised=not quick,
            tell=tell,
        )
        rows = (ladder_rows if ladder else comparison_rows)(scope)
        return measure(rows, packages=PACKAGES, json=json)

    run_command(command, "text")


def tell(line: str) -> None:
    """Prints a line of progress."""
    Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)


def shapes_of(names: str) -> tuple[str, ...]:
    """The shapes that an option names.

    Raises:
        UsageError: One is not a shape.
    """
    shapes = tuple(names.split(","))
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        raise UsageError(f"--shape must be of {', '.join(SHAPES)}, got {unknown[0]}")
    return shapes


def folders_of(given: Sequence[str]) -> dict[str, Path]:
    """By shape, the folder of its base.

    Raises:
        UsageError: One is not SHAPE=FOLDER.
    """
    parts = [one.partition("=") for one in given]
    for name, _, folder in parts:
        if name not in SHAPES or not folder:
            raise UsageError(f"--base takes SHAPE=FOLDER, a shape of {', '.join(SHAPES)}")
    return {name: Path(folder) for name, _, folder in parts}


if __name__ == "__main__":
    app(prog_name="python -m fedoppu.simulations.benchmarks.personal_phase")
