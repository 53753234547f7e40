"""The command `python -m fedoppu.simulations.benchmarks.retrieval`: causal BM25 beside rebuilt indexes.

All sides run in this process, by turns, on one thread, and find the best earlier items of every
item of one history; see `retrieval_rows`.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedoppu.common.cli import run_command
from fedoppu.common.config import require
from fedoppu.simulations.benchmarks.bench import check_options, measure
from fedoppu.simulations.benchmarks.others import require_packages
from fedoppu.simulations.benchmarks.personal_settings import even_settings

PACKAGES = ("fedoppu", "numpy", "rank-bm25", "bm25s")
GOAL_ITEMS = 1000

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def benchmark(
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
    pairs: Annotated[int, typer.Option(help="Measurements of each side.")] = 5,
    items: Annotated[int, typer.Option(help="Items of the history.")] = GOAL_ITEMS,
) -> None:
    """Compares one causal pass over a history with an index that is rebuilt for each item."""

    def command() -> dict[str, Any]:
        require("--items", items, 2)
        check_options(json, pairs)
        require_packages(("rank_bm25", "bm25s"), extra="bench")
        settings = even_settings()
        # numpy is loaded here, after the threads are set
        from fedoppu.simulations.benchmarks.retrieval_rows import rows_of

        Console(stderr=True, highlight=False).print(settings, markup=False, soft_wrap=True)
        rows = rows_of(items, pairs=pairs, promised=items == GOAL_ITEMS)
        return measure(rows, packages=PACKAGES, json=json)

    run_command(command, "text")


if __name__ == "__main__":
    app(prog_name="python -m fedoppu.simulations.benchmarks.retrieval")
