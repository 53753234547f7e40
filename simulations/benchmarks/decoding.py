"""The command `python -m fedoppu.simulations.benchmarks.decoding`: answers of mixed users beside peft's.

Eight users with an adapter each ask two queries of 15 labels (LaMP_2M, LaMP_2N). Ours answers all
of them in one call; a user of peft switches adapters and answers one after another. Both sides run
in this process, by turns, on one thread with the same allocator settings; see `decoding_cases`.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedoppu.common.cli import run_command
from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.bench import check_options, measure
from fedoppu.simulations.benchmarks.personal_settings import even_settings

SHAPES = ("tiny", "house", "pocket")
PACKAGES = ("fedoppu", "torch", "transformers", "peft", "numpy")

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def benchmark(
    shape: Annotated[
        str, typer.Option(help=f"Shapes of the base, with commas: {', '.join(SHAPES)}.")
    ] = ",".join(SHAPES),
    house: Annotated[
        Path | None, typer.Option(help="Folder of the house base; random weights without.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Measurements of each side.")] = 5,
    quick: Annotated[bool, typer.Option(help="A few short users: does it run at all?")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Compares label scores and greedy answers of mixed users with switching peft's adapters."""

    def command() -> dict[str, Any]:
        shapes = _shapes(shape)
        check_options(json, pairs)
        even_settings()
        # torch is loaded after the threads are set
        from fedoppu.simulations.benchmarks.decoding_rows import Scope, decoding_rows
        from fedoppu.simulations.benchmarks.personal_cases import Work

        users, longest = (2, 130) if quick else (8, 370)
        work = Work(users=users, items=1, queries=2, longest=longest)
        folders = {} if house is None else {"house": house}
        rows = decoding_rows(Scope(shapes, folders, pairs, work, promised=not quick))
        return measure(rows, packages=PACKAGES, json=json)

    run_command(command, "text")


def _shapes(names: str) -> tuple[str, ...]:
    shapes = tuple(names.split(","))
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        raise UsageError(f"--shape must be of {', '.join(SHAPES)}, got {unknown[0]}")
    return shapes


if __name__ == "__main__":
    app(prog_name="python -m fedoppu.simulations.benchmarks.decoding")
