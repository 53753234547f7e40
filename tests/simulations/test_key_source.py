import pytest

from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.key_source import SeededKeySource, simulation_grid

ROOT = Randomness.from_seed(1)


def test_keys_depend_on_root_member_and_purpose_alone() -> None:
    with simulation_grid() as marker:
        one = SeededKeySource(ROOT, 1, marker)
        assert one.secret("mask", 20_000) == SeededKeySource(ROOT, 1, marker).secret("mask", 20_000)
        others = [
            one.secret("seed", 32),
            SeededKeySource(ROOT, 2, marker).secret("mask", 32),
            SeededKeySource(Randomness.from_seed(2), 1, marker).secret("mask", 32),
        ]
        assert len({one.secret("mask", 32), *others}) == 4


def test_no_keys_come_after_the_grid_is_closed() -> None:
    with simulation_grid() as marker:
        source = SeededKeySource(ROOT, 1, marker)
    with pytest.raises(UsageError, match="only inside a simulation's Grid"):
        source.secret("mask", 32)
