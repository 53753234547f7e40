"""The rounding range follows the updates, a bounded step at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client.policy import ClientPolicy
from fedoppu.server.ranges import (
    FEW,
    NUDGE,
    STEP,
    UNEVEN,
    clipping_error,
    next_range,
    rounding_error,
    target,
)

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
@pytest.mark.parametrize("start", [1e-5, 0.01, 0.1, 1.0, 500.0])
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


MANY = np.zeros(1_000_000)


def test_share_that_the_target_clamps_leaves_the_range_and_any_other_moves_it() -> None:
    def after(share: float) -> float:
        return next_range(0.5, share, total=MANY, clients=30, level_bits=8)

    share = 1.083e-5  # beyond 4.4 standard deviations on either side
    assert after(share) == pytest.approx(0.5, rel=2e-3)
    assert after(4 * share) > 0.5 * 1.05
    assert after(share / 4) < 0.5 * 0.95


def test_few_clamped_coordinates_widen_the_range_by_a_nudge() -> None:
    def after(count: int, rms: float = 0.0) -> float:
        share = count / (30 * MANY.size)
        return next_range(0.5, share, total=MANY + rms, clients=30, level_bits=16)

    assert after(1) == after(FEW) == pytest.approx(0.5 * NUDGE)
    assert after(10 * FEW) > 0.5 * 1.3
    # unless the sum says that the range is too narrow by more
    independent = 0.6 / target(16)
    assert after(FEW, independent * np.sqrt(30)) == pytest.approx(0.6 * NUDGE, rel=5e-3)


def test_sum_that_grows_does_not_widen_a_range_that_clamps_nothing() -> None:
    assert next_range(0.5, 0.0, total=np.full(5, 100.0), clients=3, level_bits=16) == 0.5


@pytest.mark.parametrize("share", [0.9999999, 1.0])
def test_all_clamped_widens_by_the_largest_step(share: float) -> None:
    after = next_range(0.5, share, total=MANY, clients=3, level_bits=16)
    assert after == pytest.approx(0.5 * STEP, rel=1e-2)


@pytest.mark.parametrize(("level_bits", "deviations"), [(8, 4.4), (12, 5.8), (16, 6.95)])
def test_target_balances_rounding_and_clipping(level_bits: int, deviations: float) -> None:
    def error(k: float) -> float:
        return rounding_error(k, level_bits) + clipping_error(k / UNEVEN)

    chosen = target(level_bits)
    assert chosen == pytest.approx(deviations, abs=0.06)
    assert error(chosen) < min(error(0.9 * chosen), error(1.1 * chosen))


@pytest.mark.parametrize(("deviations", "level_bits"), [(2.0, 16), (3.0, 8), (4.0, 4)])
def test_errors_are_those_of_rounding_normal_numbers(deviations: float, level_bits: int) -> None:
    values = np.linspace(-8, 8, 1_000_001)
    weights = np.exp(-(values**2) / 2)
    level = deviations / (2 ** (level_bits - 1) - 1)
    rounded = level * np.floor(values.clip(-deviations, deviations) / level + RNG.random(1_000_001))
    measured = float(np.average((rounded - values) ** 2, weights=weights))
    expected = rounding_error(deviations, level_bits) + clipping_error(deviations)
    assert measured == pytest.approx(expected, rel=0.01)
