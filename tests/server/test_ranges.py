"""The rounding range follows the updates, a bounded step at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client.policy import ClientPolicy
from fedoppu.server.ranges import STEP, mean_square_error, next_range, target

RNG = np.random.default_rng(0)


@given(
    st.floats(1e-6, 1e3),
    st.floats(0, 1),
    st.floats(0, 1e3),
    st.integers(1, 500),
    st.integers(2, 30),
)
def test_step_is_within_what_a_client_takes(
    value_range: float, share: float, size: float, clients: int, level_bits: int
) -> None:
    total = np.full(10, size)
    after = next_range(value_range, share, total=total, clients=clients, level_bits=level_bits)
    most = ClientPolicy().range_change
    assert value_range / most <= after <= value_range * most


def settle(
    value_range: float, sigma: float, *, clients: int, level_bits: int, rounds: int = 6
) -> float:
    """The range after some rounds of independent normal updates."""
    for _ in range(rounds):
        updates = RNG.normal(0, sigma, (clients, 5000))
        share = float(np.mean(np.abs(updates) > value_range))
        total = np.clip(updates, -value_range, value_range).sum(0)
        value_range = next_range(
            value_range, share, total=total, clients=clients, level_bits=level_bits
        )
    return value_range


@pytest.mark.parametrize("level_bits", [8, 16])
@pytest.mark.parametrize("start", [1e-5, 0.06, 1.0, 500.0])
def test_range_settles_at_the_target_from_anywhere(start: float, level_bits: int) -> None:
    settled = settle(start, 0.01, clients=20, level_bits=level_bits)
    assert settled == pytest.approx(target(level_bits) * 0.01, rel=0.1)


def test_range_is_never_settled_inside_the_updates_when_they_agree() -> None:
    """All clients send the same: then the mean is as large as each, and the range only too wide."""
    value_range, update = 500.0, RNG.normal(0, 0.01, 5000)
    for _ in range(12):
        share = float(np.mean(np.abs(update) > value_range))
        value_range = next_range(value_range, share, total=20 * update, clients=20, level_bits=16)
    assert target(16) * 0.01 <= value_range <= 5 * target(16) * 0.01


def test_zero_updates_leave_the_range_as_it_is() -> None:
    for total in (np.zeros(5), np.zeros(0)):
        assert next_range(0.5, 0.0, total=total, clients=3, level_bits=16) == 0.5


def test_share_that_the_target_clamps_leaves_the_range_and_any_other_moves_it() -> None:
    def after(share: float) -> float:
        return next_range(0.5, share, total=np.zeros(5), clients=3, level_bits=8)

    share = 8.2e-5  # beyond 3.94 standard deviations on either side
    assert after(share) == pytest.approx(0.5, rel=2e-3)
    assert after(4 * share) > 0.5 * 1.05
    assert after(share / 4) < 0.5 * 0.95


def test_sum_that_grows_does_not_widen_a_range_that_clamps_nothing() -> None:
    assert next_range(0.5, 0.0, total=np.full(5, 100.0), clients=3, level_bits=16) == 0.5


@pytest.mark.parametrize("share", [0.9999999, 1.0])
def test_all_clamped_widens_by_the_largest_step(share: float) -> None:
    after = next_range(0.5, share, total=np.ones(5), clients=3, level_bits=16)
    assert after == pytest.approx(0.5 * STEP, rel=1e-2)


@pytest.mark.parametrize(("level_bits", "deviations"), [(8, 3.94), (12, 5.15), (16, 6.14)])
def test_target_balances_rounding_and_clipping(level_bits: int, deviations: float) -> None:
    chosen = target(level_bits)
    assert chosen == pytest.approx(deviations, abs=0.06)
    for other in (0.8, 1.25):
        assert mean_square_error(chosen, level_bits) < mean_square_error(other * chosen, level_bits)


@pytest.mark.parametrize(("deviations", "level_bits"), [(2.0, 16), (3.0, 8), (4.0, 4)])
def test_error_of_the_model_is_that_of_rounding_normal_numbers(
    deviations: float, level_bits: int
) -> None:
    values = RNG.standard_normal(1_000_000)
    level = deviations / (2 ** (level_bits - 1) - 1)
    rounded = level * np.floor(values.clip(-deviations, deviations) / level + RNG.random(1_000_000))
    measured = float(np.mean((rounded - values) ** 2))
    assert measured == pytest.approx(mean_square_error(deviations, level_bits), rel=0.03)
