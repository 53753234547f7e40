"""A child process of the peak benchmark: one group of users is trained, and the process ends.

`python -m fedoppu.simulations.benchmarks.personal_memory house 16 bfloat16 [FOLDER]`; whoever starts
it measures the memory of the whole process.
"""

import sys
from pathlib import Path
from typing import cast

from fedoppu.simulations.benchmarks.personal_settings import even_settings

MODULE = "fedoppu.simulations.benchmarks.personal_memory"


def main(shape: str, users: str, dtype: str, folder: str | None = None) -> None:
    """Trains `users` users in one group; 0 users: only what is loaded before."""
    even_settings()
    from fedoppu.client.model import Dtype
    from fedoppu.simulations.benchmarks.personal_cases import Shape, Work, opened
    from fedoppu.simulations.benchmarks.personal_sides import Ours

    number, kind = int(users), cast(Dtype, dtype)
    work = Work(users=max(1, number), queries=0)
    where = None if folder is None else Path(folder)
    with opened(cast(Shape, shape), where, work, dtypes=(kind,)) as case:
        if number:
            Ours(case, dtype=kind, group=number)(case.jobs)


if __name__ == "__main__":
    main(*sys.argv[1:])
