"""The rounding range follows the updates, a bounded step at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.server.ranges import STEP, TARGET, next_range

RNG = np.random.default_rng(0)


@given(
    st.floats(1e-6, 1e3),
    st.floats(0, 1),
    st.floats(0, 1e3),
    st.integers(1, 500),
)
def test_step_is_within_what_a_client_takes(
    value_range: float, share: float, size: float, clients: int
) -> None:
    total = np.full(10, size)
    after = next_range(value_range, share, total=total, clients=clients)
    assert value_range / 4 <= after <= value_range * 4


def settle(value_range: float, sigma: float, *, clients: int, rounds: int = 12) -> float:
    """The range after some rounds of independent normal updates."""
    for _ in range(rounds):
        updates = RNG.normal(0, sigma, (clients, 5000))
        share = float(np.mean(np.abs(updates) > value_range))
        clamped = np.clip(updates, -value_range, value_range)
        value_range = next_range(value_range, share, total=clamped.sum(0), clients=clients)
    return value_range


@pytest.mark.parametrize("start", [1e-4, 0.06, 1.0, 500.0])
def test_range_settles_at_six_deviations_from_anywhere(start: float) -> None:
    assert settle(start, 0.01, clients=20) == pytest.approx(TARGET * 0.01, rel=0.15)


def test_range_is_never_settled_inside_the_updates_when_they_agree() -> None:
    """All clients send the same: then the mean is as large as each, and the range only too wide."""
    value_range, update = 0.5, RNG.normal(0, 0.01, 5000)
    for _ in range(12):
        share = float(np.mean(np.abs(update) > value_range))
        value_range = next_range(value_range, share, total=20 * update, clients=20)
    assert TARGET * 0.01 <= value_range <= 5 * TARGET * 0.01


def test_zero_updates_leave_the_range_as_it_is() -> None:
    assert next_range(0.5, 0.0, total=np.zeros(5), clients=3) == 0.5
    assert next_range(0.5, 0.0, total=np.zeros(0), clients=3) == 0.5


def test_clamped_coordinates_never_narrow_the_range() -> None:
    assert next_range(0.5, 1e-12, total=np.zeros(5), clients=3) >= 0.5


def test_half_clamped_widens_by_the_largest_step() -> None:
    assert next_range(0.5, 1.0, total=np.ones(5), clients=3) == pytest.approx(0.5 * STEP)
