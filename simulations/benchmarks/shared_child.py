"""One side of the shared phase in a process of its own, to be measured with its start-up.

`python -m fedoppu.simulations.benchmarks.shared_child SIDE FOLDER WORK USERS COHORT ROUNDS OUT`
writes the shared adapter to OUT, a .npy file. SIDE is ours or flower.
"""

import sys
from pathlib import Path

from fedoppu.simulations.benchmarks.personal_settings import even_settings

GROUP = 20  # users in one pass of ours: a cohort


def main(arguments: list[str]) -> None:
    """Runs one side."""
    side, folder, text, out = arguments[0], Path(arguments[1]), arguments[2], Path(arguments[6])
    users, cohort, rounds = map(int, arguments[3:6])
    even_settings()
    import numpy as np

    from fedoppu.simulations.benchmarks.shared_cases import Case, Work, cohorts

    work = Work.from_text(text)
    if side == "ours":
        from fedoppu.simulations.benchmarks.shared_ours import Ours

        ours = Ours(Case.open(folder, work), group=min(cohort, GROUP))
        vector = ours(cohorts(users, cohort, rounds))
    else:
        from fedoppu.simulations.benchmarks.shared_flower import Federation, run

        vector = run(Federation(folder, work, users, cohort, rounds))
    np.save(out, vector)


if __name__ == "__main__":
    main(sys.argv[1:])
