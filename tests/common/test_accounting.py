"""Epsilons, against computations of other kinds."""

import math

import numpy as np
import pytest
from dp_accounting import pld, rdp  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr  # type: ignore[import-untyped]
from scipy.stats import binom  # type: ignore[import-untyped]

from fedoppu.common import accounting
from fedoppu.common.accounting import (
    ORDERS,
    calibrate,
    combined_multiplier,
    distributed_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_rdp,
    poisson_excess,
    poisson_shortfall,
    rdp_to_epsilon,
    sampled_epsilon,
    sampled_gaussian_rdp,
    sum_excess,
)
from fedoppu.common.errors import UsageError

Floats = NDArray[np.float64]


# --- one Gaussian mechanism ----------------------------------------------------------------------


def test_unsampled_epsilon_of_the_specification() -> None:
    assert gaussian_epsilon(1.0, 100, 1e-5) == pytest.approx(91.8, abs=0.05)
    assert gaussian_epsilon(5.0, 10, 1e-5) == pytest.approx(2.59, abs=0.005)


@given(z=st.floats(0.02, 1e4), epsilon=st.floats(0.0, 50.0))
@settings(max_examples=100, deadline=None)
def test_delta_is_the_area_between_the_densities(z: float, epsilon: float) -> None:
    """The hockey-stick divergence of N(1, z^2) from N(0, z^2), by integration."""
    x = np.linspace(1 - 12 * z, 1 + 12 * z, 100_001)
    p = np.exp(-(((x - 1) / z) ** 2) / 2) / (z * math.sqrt(2 * math.pi))
    loss = (2 * x - 1) / (2 * z * z)
    area = np.trapezoid(p * -np.expm1(np.minimum(epsilon - loss, 0.0)), x)
    assert gaussian_delta(z, epsilon) == pytest.approx(area, rel=1e-3, abs=1e-9)


@given(z=st.floats(0.01, 1e5), compositions=st.integers(1, 10_000), bits=st.integers(4, 90))
@settings(max_examples=100, deadline=None)
def test_epsilon_is_the_inverse_of_delta_and_not_below_it(
    z: float, compositions: int, bits: int
) -> None:
    delta, one = 2.0**-bits, z / math.sqrt(compositions)
    epsilon = gaussian_epsilon(z, compositions, delta)
    assert gaussian_delta(one, epsilon) <= delta * (1 + 1e-6)
    if epsilon > 0:
        assert gaussian_delta(one, epsilon * (1 - 1e-4)) > delta


def test_tails_beyond_the_reach_of_erfc_are_finite_and_smooth() -> None:
    epsilons = [gaussian_epsilon(z, 1, 1e-300) for z in (0.9, 0.95, 1.0, 1.05)]
    assert epsilons == sorted(epsilons, reverse=True)
    assert gaussian_epsilon(1e-3, 1, 1e-5) == pytest.approx(5e5 + 1e3 * 4.26489, rel=1e-5)


def test_tails_beyond_the_reach_of_erfc_are_those_of_another_implementation() -> None:
    epsilon = gaussian_epsilon(1.0, 1, 1e-300)
    above, below = log_ndtr(0.5 - epsilon), epsilon + log_ndtr(-0.5 - epsilon)
    assert above + math.log(-math.expm1(below - above)) == pytest.approx(math.log(1e-300), rel=1e-7)


def test_several_gaussians_are_one() -> None:
    multipliers = [0.5, 3.0, 7.0]
    one = combined_multiplier(multipliers)
    assert one == pytest.approx(1 / math.sqrt(4 + 1 / 9 + 1 / 49))
    assert combined_multiplier([2.0] * 9) == pytest.approx(2 / 3)
    separate = pld.PLDAccountant()
    for z in multipliers:
        separate.compose(accounting_event(z))
    assert gaussian_epsilon(one, 1, 1e-6) == pytest.approx(separate.get_epsilon(1e-6), rel=1e-3)
    assert combined_multiplier([]) == math.inf
    assert gaussian_epsilon(math.inf, 3, 1e-5) == 0.0


def accounting_event(z: float) -> object:
    import dp_accounting

    return dp_accounting.GaussianDpEvent(z)


@pytest.mark.parametrize(
    ("z", "compositions", "delta", "message"),
    [
        (0.0, 1, 1e-5, "noise multiplier must be above 0, got 0"),
        (-1.0, 1, 1e-5, "noise multiplier must be above 0"),
        (math.nan, 1, 1e-5, "noise multiplier must be above 0, got nan"),
        (1.0, -1, 1e-5, "compositions must be at least 0, got -1"),
        (1.0, 1, 0.0, "delta must be between 0 and 1, got 0"),
        (1.0, 1, 1.0, "delta must be between 0 and 1, got 1"),
    ],
)
def test_wrong_arguments_are_named(z: float, compositions: int, delta: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gaussian_epsilon(z, compositions, delta)
    with pytest.raises(UsageError, match=message):
        sampled_epsilon(z, 0.5, compositions, delta)


# --- sampling ------------------------------------------------------------------------------------


def independent_epsilons(z: float, q: float, rounds: int, delta: float) -> tuple[float, float]:
    """A lower and an upper bound: the privacy loss on a grid, rounded down and up, convolved by FFT.

    Written for this test alone: nothing of it is shared with `accounting` or dp-accounting.
    """
    step, low, high = 1e-4, -25.0, 60.0
    edges = np.arange(low, high, step)
    bounds = []
    for up in (0, 1):
        worst = 0.0
        for removed in (True, False):
            mass = loss_masses(edges, z, q, removed=removed)
            # mass[i] lies in (edges[i], edges[i + 1]]; it is moved to one of its ends
            origin = round(-low / step) - up
            shifted = np.roll(np.append(mass, 0.0), -origin)
            total = np.asarray(
                np.fft.irfft(np.fft.rfft(shifted) ** rounds, shifted.size).clip(0), np.float64
            )
            losses = np.arange(shifted.size) * step
            losses = np.where(losses > high, losses - shifted.size * step, losses)
            worst = max(worst, least_epsilon(total, losses, delta))
        bounds.append(worst)
    return bounds[0], bounds[1]


def loss_masses(edges: Floats, z: float, q: float, *, removed: bool) -> Floats:
    """Mass of the privacy loss of one round in each cell of the grid.

    With the user: (1 - q) N(0, z^2) + q N(1, z^2); without: N(0, z^2). The loss of removing is
    log(1 - q + q exp((2x - 1) / 2z^2)) under the first, and that of adding its negative under the second.
    """

    def point(loss: Floats) -> Floats:
        inside = (np.exp(np.minimum(loss, 700.0)) - (1 - q)) / q
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(inside > 0, z * z * np.log(np.maximum(inside, 1e-300)) + 0.5, -np.inf)

    if removed:
        x = point(edges)
        return np.asarray(np.diff((1 - q) * ndtr(x / z) + q * ndtr((x - 1) / z)))
    return np.asarray(-np.diff(ndtr(point(-edges) / z)))


def least_epsilon(mass: Floats, losses: NDArray[np.floating], delta: float) -> float:
    low, high = 0.0, 59.0
    for _ in range(60):
        middle = (low + high) / 2
        above = losses > middle
        reached = (mass[above] * -np.expm1(middle - losses[above])).sum()
        low, high = (middle, high) if reached > delta else (low, middle)
    return high


def test_sampled_epsilon_is_that_of_the_specification_and_of_an_independent_computation() -> None:
    epsilon = sampled_epsilon(1.0, 0.1, 100, 1e-5)
    assert epsilon == pytest.approx(7.05, abs=0.02)
    low, high = independent_epsilons(1.0, 0.1, 100, 1e-5)
    assert high - low < 0.04
    assert low <= epsilon <= high
    assert (low + high) / 2 == pytest.approx(epsilon, abs=0.005)


def test_another_plan_agrees_with_the_independent_computation() -> None:
    epsilon = sampled_epsilon(2.0, 0.1, 50, 1e-5)
    low, high = independent_epsilons(2.0, 0.1, 50, 1e-5)
    assert low <= epsilon <= high


@pytest.mark.parametrize(
    ("z", "rate", "rounds", "spec"),
    [(0.5, 0.1, 100, 31.37), (2.0, 0.1, 100, 2.34), (1.0, 0.1, 50, 5.15)],
)
def test_other_figures_of_the_specification(
    z: float, rate: float, rounds: int, spec: float
) -> None:
    assert sampled_epsilon(z, rate, rounds, 1e-5) == pytest.approx(spec, abs=0.007)


def test_small_losses_are_seen_by_the_grid() -> None:
    """Limit of ever finer grids: 0.14890; one as for larger rates gives 0.158."""
    assert sampled_epsilon(1.0, 1e-3, 1000, 1e-5) == pytest.approx(0.1489, rel=2e-3)


def test_renyi_bound_is_above_and_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sampled_epsilon(1.0, 0.1, 100, 1e-5)
    monkeypatch.setattr(accounting, "has_pld", lambda: False)
    bound = sampled_epsilon(1.0, 0.1, 100, 1e-5)
    assert exact < bound
    assert bound == pytest.approx(7.90, abs=0.08)  # the specification's has fractional orders too


@pytest.mark.parametrize(("z", "rate"), [(1.0, 0.1), (0.7, 0.01), (5.0, 0.5)])
def test_renyi_divergences_are_those_of_another_implementation(z: float, rate: float) -> None:
    import dp_accounting

    orders = [2, 3, 8, 32, 64]
    theirs = rdp.RdpAccountant(orders)
    theirs.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z)))
    ours = [sampled_gaussian_rdp(z, rate, order) for order in orders]
    assert ours == pytest.approx(list(theirs._rdp), rel=1e-9)


def test_renyi_divergence_without_sampling_and_without_anyone() -> None:
    assert sampled_gaussian_rdp(2.0, 1.0, 8) == gaussian_rdp(2.0, 8) == 1.0
    assert sampled_gaussian_rdp(2.0, 0.0, 8) == 0.0
    assert sampled_gaussian_rdp(2.0, 1 - 1e-12, 8) == pytest.approx(1.0)


def test_renyi_divergences_give_an_epsilon_above_the_exact_one() -> None:
    bound = rdp_to_epsilon({order: gaussian_rdp(2.0, order) for order in ORDERS}, 1e-5)
    exact = gaussian_epsilon(2.0, 1, 1e-5)
    assert exact < bound < 1.15 * exact


@given(
    z=st.floats(0.01, 100.0),
    rate=st.floats(1e-3, 1.0),
    rounds=st.integers(1, 200),
)
@settings(max_examples=8, deadline=None)
def test_sampling_never_costs_more_and_more_noise_never_does(
    z: float, rate: float, rounds: int
) -> None:
    epsilon = sampled_epsilon(z, rate, rounds, 1e-5)
    assert epsilon <= gaussian_epsilon(z, rounds, 1e-5)
    assert sampled_epsilon(1.2 * z, rate, rounds, 1e-5) <= epsilon * (1 + 1e-6) + 1e-9


def test_nothing_costs_nothing() -> None:
    assert sampled_epsilon(1.0, 0.1, 0, 1e-5) == 0.0
    assert sampled_epsilon(1.0, 0.0, 10, 1e-5) == 0.0
    assert sampled_epsilon(math.inf, 0.1, 10, 1e-5) == 0.0
    assert sampled_epsilon(1.0, 1.0, 10, 1e-5) == gaussian_epsilon(1.0, 10, 1e-5)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_rates_that_cannot_be_are_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="sampling rate must be between 0 and 1"):
        sampled_epsilon(1.0, rate, 10, 1e-5)


# --- calibration ---------------------------------------------------------------------------------


def test_calibration_of_the_specification() -> None:
    assert calibrate(8.0, 1e-5, rate=0.1, compositions=100) == pytest.approx(0.936, abs=0.0011)


@pytest.mark.parametrize(
    ("epsilon", "rate", "rounds"),
    [(1.0, 0.1, 100), (8.0, 1.0, 100), (0.5, 0.01, 1000), (40.0, 0.2, 10)],
)
def test_calibrated_noise_is_enough_and_a_digit_less_is_not(
    epsilon: float, rate: float, rounds: int
) -> None:
    z = calibrate(epsilon, 1e-5, rate=rate, compositions=rounds)
    assert z == float(f"{z:.3g}")
    assert sampled_epsilon(z, rate, rounds, 1e-5) <= epsilon
    step = 10.0 ** (math.floor(math.log10(z)) - 2)
    assert sampled_epsilon(z - step, rate, rounds, 1e-5) > epsilon


def test_calibration_without_the_extra_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = calibrate(3.0, 1e-5, rate=0.1, compositions=40)
    calibrate.cache_clear()
    monkeypatch.setattr(accounting, "has_pld", lambda: False)
    bound = calibrate(3.0, 1e-5, rate=0.1, compositions=40)
    calibrate.cache_clear()
    assert exact < bound < 1.3 * exact


def test_budgets_that_no_noise_keeps_are_refused() -> None:
    with pytest.raises(UsageError, match="no noise multiplier up to 1e\\+06 gives epsilon 1e-06"):
        calibrate(1e-6, 1e-12, rate=1.0, compositions=10**6)
    with pytest.raises(UsageError, match=r"privacy.epsilon must be between 1e-06"):
        calibrate(0.0, 1e-5, rate=1.0, compositions=1)


# --- Poisson cohorts -----------------------------------------------------------------------------


@given(members=st.integers(1, 2000), rate=st.floats(0.0, 1.0), floor=st.integers(-1, 2001))
@settings(max_examples=150, deadline=None)
def test_tails_of_poisson_cohorts_are_binomial(members: int, rate: float, floor: int) -> None:
    below = poisson_shortfall(members, rate, floor)
    assert below == pytest.approx(binom.cdf(floor - 1, members, rate), rel=1e-7, abs=1e-14)
    above = poisson_excess(members, rate, floor)
    assert above == pytest.approx(binom.sf(floor, members, rate), rel=1e-7, abs=1e-14)


def test_far_tails_are_exact() -> None:
    assert poisson_shortfall(10, 0.5, 1) == pytest.approx(2.0**-10, rel=1e-12)
    assert poisson_shortfall(10, 0.5, 2) == pytest.approx(11 * 2.0**-10, rel=1e-12)
    far = binom.cdf(20 - 1, 1000, 0.1)
    assert far < 1e-20
    assert poisson_shortfall(1000, 0.1, 20) == pytest.approx(far, rel=1e-8)


# --- distributed noise ---------------------------------------------------------------------------


def pmf(scale: float, most: int = 60) -> Floats:
    x = np.arange(-most, most + 1, dtype=np.float64)
    weights = np.exp(-(x**2) / (2 * scale**2))
    return np.asarray(weights / weights.sum())


def sum_pmf(scale: float, clients: int) -> Floats:
    total = pmf(scale)
    for _ in range(clients - 1):
        total = np.convolve(total, pmf(scale), mode="same")
    return total


@pytest.mark.parametrize("clients", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.5, 0.6, 0.8])
def test_a_sum_of_discrete_gaussians_is_within_tau_of_one(scale: float, clients: int) -> None:
    near = slice(60 - 6, 60 + 7)  # the convolution of cut-off tails is exact here
    ratio = sum_pmf(scale, clients)[near] / pmf(scale * math.sqrt(clients))[near]
    difference = abs(np.log(ratio)).max()
    assert 0 < difference <= sum_excess(scale, clients)


@pytest.mark.parametrize("order", [2, 4, 16])
@pytest.mark.parametrize("scale", [0.6, 1.0, 2.0])
def test_distributed_noise_is_as_private_as_the_theorem_says(scale: float, order: int) -> None:
    """Renyi divergence of a sum of four, moved by one level: at most epsilon^2 order / 2."""
    noise = sum_pmf(scale, 4)
    near = slice(60 - int(12 * scale), 60 + int(12 * scale) + 1)
    moved, still = np.log(np.roll(noise, 1)[near]), np.log(noise[near])
    divergence = np.logaddexp.reduce(order * moved - (order - 1) * still) / (order - 1)
    epsilon = distributed_epsilon(1.0, scale, clients=4, length=1)
    assert 0 < divergence <= epsilon**2 * order / 2 * (1 + 1e-9)


@pytest.mark.parametrize(("clients", "length"), [(10, 1), (100, 10_000), (1000, 10**6)])
def test_distributed_bound_is_above_the_gaussian_and_tends_to_it(clients: int, length: int) -> None:
    sensitivity = 37.0
    excesses = []
    for scale in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 10.0):
        gaussian = sensitivity / (math.sqrt(clients) * scale)
        bound = distributed_epsilon(sensitivity, scale, clients=clients, length=length)
        assert bound >= gaussian
        excesses.append(bound / gaussian - 1)
    assert excesses == sorted(excesses, reverse=True)
    assert excesses[0] > 1e-3
    assert excesses[-2] < 1e-12  # at 4 levels each, the least that is allowed


def test_distributed_bound_is_the_theorem_s() -> None:
    tau = 10 * math.exp(-2 * math.pi**2 * 0.09 / 2)
    assert sum_excess(0.3, 2) == pytest.approx(tau)
    bound = distributed_epsilon(3.0, 0.3, clients=2, length=100)
    assert bound == pytest.approx(math.sqrt(9 / (2 * 0.09) + 2 * tau * 100))
    bound = distributed_epsilon(0.3, 0.6, clients=2, length=1)
    tau = 10 * math.exp(-2 * math.pi**2 * 0.36 / 2)
    assert bound == pytest.approx(0.3 / (math.sqrt(2) * 0.6) + tau)


def test_excess_at_the_least_scale_does_not_matter_for_any_run() -> None:
    assert sum_excess(4.0, 10**6) * 1e12 * 1e6 < 1e-40  # elements, rounds
    assert sum_excess(1.0, 1) == 0.0


def test_discrete_gaussians_cost_what_the_gaussian_does() -> None:
    """So the Gaussian's privacy loss may stand for the discrete one's, from the least scale of 16 on."""
    for sampling, rounds, expected in (
        (1.0, 1, gaussian_epsilon(1.0, 1, 1e-5)),
        (1.0, 10, gaussian_epsilon(1.0, 10, 1e-5)),
        (0.1, 1, sampled_epsilon(1.0, 0.1, 1, 1e-5)),
    ):
        differences = []
        for scale in (2, 16, 50):
            discrete = pld.privacy_loss_distribution.from_discrete_gaussian_mechanism(
                scale, sensitivity=scale, sampling_prob=sampling
            )
            epsilon = discrete.self_compose(rounds).get_epsilon_for_delta(1e-5)
            differences.append(abs(epsilon / expected - 1))
        assert differences[1] < 1e-3
        assert differences[2] < 1e-4
        assert differences[0] > differences[2]


@given(scale=st.floats(0.4, 20.0), shift=st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_moments_of_a_discrete_gaussian_are_the_gaussians(scale: float, shift: float) -> None:
    """The sum of the density over the integers hardly depends on where it is centred."""
    x = np.arange(-400, 401, dtype=np.float64)
    total = np.exp(-((x - shift) ** 2) / (2 * scale**2)).sum() / (scale * math.sqrt(2 * math.pi))
    assert abs(total - 1) <= 2.1 * math.exp(-2 * (math.pi * scale) ** 2) + 1e-13


@pytest.mark.parametrize("z", [0.3, 0.7, 1.0, 1.9, 3.1, 8.0, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_of_one_gaussian_is_never_a_little_too_small(z: float, delta: float) -> None:
    """The last step of the bisection goes up: at the epsilon that is told, delta holds."""
    assert gaussian_delta(z, gaussian_epsilon(z, 1, delta)) <= delta * (1 + 1e-13)
