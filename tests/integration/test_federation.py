"""Whole rounds over our own Grid: real protocol, real messages, made-up training."""

from pathlib import Path

import numpy as np

from tests.fake_federation import federation, flat


def test_two_rounds_are_committed(tmp_path: Path) -> None:
    made = federation(tmp_path)
    latest = made.run()
    assert latest.record.round == 2
    assert np.abs(flat(latest)).sum() > 0
