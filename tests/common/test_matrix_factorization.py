"""Correlated noise: the factorisation, its sensitivity, its integers, what it gains."""

from collections.abc import Iterator
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedoppu.common.errors import UsageError
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.matrix_factorization import (
    LATTICE_BITS,
    coefficients,
    column_norm,
    correlated_noise,
    error_ratio,
    largest_scale,
    noise_of_rounds,
)

Floats = NDArray[np.float64]
UNIT = 1 << LATTICE_BITS


def key_of(round: int) -> bytes:
    return round.to_bytes(32, "big")


def strategy_matrix(rounds: int, bands: int) -> Floats:
    """C, in whole levels."""
    column = coefficients(bands) / UNIT
    return sum(
        (np.diag(np.full(rounds - j, column[j]), -j) for j in range(min(bands, rounds))),
        np.zeros((rounds, rounds)),
    )


def patterns(rounds: int, gap: int) -> Iterator[tuple[int, ...]]:
    """All sets of rounds that are at least `gap` apart."""
    for size in range(1, rounds + 1):
        for chosen in combinations(range(rounds), size):
            if all(b - a >= gap for a, b in pairwise(chosen)):
                yield chosen


def largest_change(rounds: int, bands: int, gap: int) -> float:
    """Largest squared norm of a user's change of C X, for each participation, with vectors of norm 1."""
    matrix = strategy_matrix(rounds, bands)
    worst = 0.0
    for chosen in patterns(rounds, gap):
        # collinear vectors are the worst ones, and only their signs are free
        for signs in product((1.0, -1.0), repeat=len(chosen)):
            change = matrix[:, list(chosen)] @ np.array(signs)
            worst = max(worst, float(change @ change) / len(chosen))
    return worst


def test_coefficients_are_those_of_the_square_root_on_the_lattice() -> None:
    assert coefficients(5).tolist() == [1024, 512, 384, 320, 280]
    full = strategy_matrix(40, 40)
    assert abs(full @ full - np.tril(np.ones((40, 40)))).max() < 0.02  # but for the lattice
    assert coefficients(40).dtype == np.int64


@pytest.mark.parametrize("bands", [1, 2, 5, 16])
def test_strategy_times_its_inverse_is_the_identity_exactly(bands: int) -> None:
    """In integers: the inverse has determinant 1 up to powers of the unit."""
    column, rounds = [int(one) for one in coefficients(bands)], 30
    inverse = [1]  # in units of 2^-10t, exact
    for t in range(1, rounds):
        inverse.append(
            -sum(column[j] * UNIT ** (j - 1) * inverse[t - j] for j in range(1, min(bands, t + 1)))
        )
    for t in range(rounds):
        product_ = sum(column[j] * UNIT**j * inverse[t - j] for j in range(min(bands, t + 1)))
        assert product_ == (UNIT if t == 0 else 0)


@pytest.mark.parametrize(("rounds", "bands"), [(6, 1), (7, 2), (8, 3), (9, 4), (8, 8)])
def test_sensitivity_is_bounded_for_every_participation(rounds: int, bands: int) -> None:
    bound = column_norm(bands) ** 2
    assert largest_change(rounds, bands, gap=bands) <= bound * (1 + 1e-12)
    assert largest_change(rounds, bands, gap=bands) > 0.99 * bound  # and it is reached


@pytest.mark.parametrize(("rounds", "bands"), [(7, 2), (8, 3), (9, 4)])
def test_members_that_come_back_too_soon_break_the_bound(rounds: int, bands: int) -> None:
    assert largest_change(rounds, bands, gap=bands - 1) > 1.05 * column_norm(bands) ** 2


@given(
    bands=st.integers(1, 9),
    scale=st.floats(0.5, 1e6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_what_is_released_is_a_function_of_the_private_mechanism_alone(
    bands: int, scale: float, seed: int
) -> None:
    """The noised sums equal nearest((C X + W)_t - sum C_j y_{t-j}), which never sees X."""
    rounds, length = 12, 50
    sums = np.random.default_rng(seed).integers(-(10**7), 10**7, (rounds, length))
    noise = noise_of_rounds(key_of, bands=bands, scale=scale, length=length)
    added = np.array([sums[t] + next(noise) for t in range(rounds)])

    column, released = coefficients(bands), np.zeros((rounds, length), np.int64)
    lattice_scale = scale * column_norm(bands) * UNIT
    for t in range(rounds):
        private = discrete_gaussian(key_of(t + 1), lattice_scale, length)
        private += sum(column[j] * sums[t - j] for j in range(min(bands, t + 1)))
        known = sum(column[j] * released[t - j] for j in range(1, min(bands, t + 1)))
        released[t] = np.floor_divide(private - known + UNIT // 2, UNIT)
    assert (released == added).all()


def test_noise_of_a_round_is_made_again_from_its_keys() -> None:
    rounds = noise_of_rounds(key_of, bands=4, scale=1000.0, length=100)
    for round in range(1, 9):
        again = correlated_noise(key_of, round, bands=4, scale=1000.0, length=100)
        first = next(rounds)
        assert (first == again).all()
        first[:] = 0  # what a caller does with it changes no later round


def test_noise_depends_on_the_rounds_before_even_beyond_the_bands() -> None:
    def other(round: int) -> bytes:
        return bytes(32) if round == 1 else key_of(round)

    ours = correlated_noise(key_of, 9, bands=3, scale=1e4, length=100)
    theirs = correlated_noise(other, 9, bands=3, scale=1e4, length=100)
    assert (ours != theirs).any()


def test_one_band_is_independent_noise() -> None:
    noise = correlated_noise(key_of, 5, bands=1, scale=300.0, length=10_000)
    assert noise.std() == pytest.approx(300.0, rel=0.04)
    assert column_norm(1) == error_ratio(64, 1) == largest_scale(64, 1) == 1.0


def test_sums_of_rounds_have_less_error_than_with_independent_noise() -> None:
    rounds, length, scale = 64, 2000, 1000.0
    independent = scale**2 * (rounds + 1) / 2
    for bands in (2, 8, 64):
        noise = noise_of_rounds(key_of, bands=bands, scale=scale, length=length)
        sums = np.cumsum([next(noise) for _ in range(rounds)], axis=0)
        ratio = (sums.astype(np.float64) ** 2).mean() / independent
        assert ratio == pytest.approx(error_ratio(rounds, bands), rel=0.05)
    assert error_ratio(64, 2) < 0.58
    assert error_ratio(64, 8) < 0.23  # 4.4 times less at the same epsilon
    assert error_ratio(64, 64) < 0.154


def test_error_ratio_is_that_of_the_matrices() -> None:
    for rounds, bands in ((1, 1), (10, 3), (20, 20), (7, 30)):
        matrix = strategy_matrix(rounds, bands)
        left = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(matrix)
        ratio = (left**2).sum() * column_norm(bands) ** 2 / (rounds * (rounds + 1) / 2)
        assert error_ratio(rounds, bands) == pytest.approx(ratio)


@pytest.mark.parametrize(("rounds", "bands"), [(1, 1), (5, 1), (6, 2), (9, 4), (4, 9)])
def test_largest_scale_is_the_norm_of_the_last_row_of_the_inverse(rounds: int, bands: int) -> None:
    row = np.linalg.inv(strategy_matrix(rounds, bands))[-1]
    assert largest_scale(rounds, bands) == pytest.approx(column_norm(bands) * np.linalg.norm(row))


def test_largest_scale_is_the_deviation_of_the_last_round() -> None:
    noise = correlated_noise(key_of, 20, bands=8, scale=1000.0, length=20_000)
    assert noise.std() == pytest.approx(1000.0 * largest_scale(20, 8), rel=0.03)


def test_no_scale_is_no_noise() -> None:
    assert not correlated_noise(key_of, 6, bands=4, scale=0.0, length=10).any()


@pytest.mark.parametrize("bands", [0, -1, 10_001])
def test_bands_that_cannot_be_are_refused(bands: int) -> None:
    with pytest.raises(UsageError, match="bands of correlated noise must be between 1 and 10000"):
        coefficients(bands)
