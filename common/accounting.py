"""How much privacy composed Gaussian noise costs: epsilon at a delta, and the least noise for a budget.

z is a noise multiplier: the standard deviation of the noise over the sensitivity. Without sampling, T rounds are one
Gaussian mechanism of multiplier z / sqrt(T), whose epsilon is exact (Balle and Wang 2018,
https://arxiv.org/abs/1805.06530, theorem 8). With Poisson sampling it is computed from the privacy loss distribution by
`dp-accounting` (the [dp] extra); without it by Renyi differential privacy of our own, which is larger (7.97 for 7.05).

**Why the Gaussian stands for the discrete Gaussian that is added.** Let theta(a) be the sum over the integers of the
Gaussian density of the noise's scale, moved by a. By Poisson's summation it is 1 +- 2 exp(-2 pi^2 scale^2) for every a,
and largest at integers. The moment generating function of the discrete Gaussian at s is the Gaussian's times
theta(s scale^2) / theta(0). So for queries of integers every Renyi divergence is at most the Gaussian's (Canonne et al.
2020, proposition 5), and the moment that it comes from is within a factor 1 +- 4 exp(-2 pi^2 scale^2); with Poisson
sampling the same holds at integer orders, where the divergence is a sum of such moments. The Renyi bounds below hold
for the discrete noise as they stand. The loss itself lives on a lattice, which shows most in one dimension and one
round: there epsilon differs by at most 1e-3 at a scale of 16 and 1e-4 at 50 (tests/common/test_accounting.py);
`require_scales` in privacy.py refuses less than 16, and a run's noise has thousands of levels and of dimensions.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec

import numpy as np

from fedoppu.common.config import require
from fedoppu.common.errors import UsageError

ORDERS = tuple(range(2, 65)) + tuple(range(72, 257, 8)) + (320, 384, 512, 1024)
MIN_MULTIPLIER, MAX_MULTIPLIER = 1e-3, 1e6
_LEAST_PLD_MULTIPLIER = 0.05  # below, one round costs hundreds and no sampling helps


def combined_multiplier(multipliers: Iterable[float]) -> float:
    """The one Gaussian mechanism that several are together: 1 / sqrt(sum of 1 / z^2); infinite for none.

    Exact, whatever was chosen adaptively in between (Dong, Roth, Su 2019, https://arxiv.org/abs/1905.02383,
    corollary 3.3).
    """
    total = math.fsum(1 / multiplier**2 for multiplier in multipliers)
    return 1 / math.sqrt(total) if total > 0 else math.inf


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """Least delta of one Gaussian mechanism at an epsilon (Balle and Wang 2018, theorem 8)."""
    return math.exp(_log_delta(1 / noise_multiplier, epsilon))


def gaussian_epsilon(noise_multiplier: float, compositions: int, delta: float) -> float:
    """Least epsilon of T Gaussian mechanisms without sampling; exact, rounded up in the tenth digit.

    Args:
        noise_multiplier: z; infinite costs nothing.
        compositions: T, at least 0.
        delta: Between 0 and 1.
    """
    _require(noise_multiplier, compositions, delta)
    if compositions == 0 or noise_multiplier == math.inf:
        return 0.0
    mu, target = math.sqrt(compositions) / noise_multiplier, math.log(delta)
    if _log_delta(mu, 0.0) <= target:
        return 0.0
    low, high = 0.0, 1.0
    while _log_delta(mu, high) > target:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _log_delta(mu, middle) > target else (low, middle)
    return high


def _log_delta(mu: float, epsilon: float) -> float:
    """log(Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu)), without overflow."""
    above = _log_normal_cdf(mu / 2 - epsilon / mu)
    below = epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu)
    return above + math.log(-math.expm1(below - above)) if below < above else -math.inf


def _log_normal_cdf(x: float) -> float:
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    inverse = 1 / (x * x)  # asymptotic series; its next term is below 2e-12 here
    series = -inverse + 3 * inverse**2 - 15 * inverse**3 + 105 * inverse**4
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2 + math.log1p(series)


def gaussian_rdp(noise_multiplier: float, order: float) -> float:
    """Renyi divergence of a Gaussian mechanism: order / (2 z^2) (Mironov 2017)."""
    return order / (2 * noise_multiplier**2)


def sampled_gaussian_rdp(noise_multiplier: float, rate: float, order: int) -> float:
    """Renyi divergence of the Poisson-sampled Gaussian, both directions, at an integer order from 2.

    Mironov, Talwar, Zhang 2019 (https://arxiv.org/abs/1908.10530, section 3.3): the binomial sum.
    """
    if rate == 0:
        return 0.0
    if rate == 1:
        return gaussian_rdp(noise_multiplier, order)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + k * math.log(rate)
        + (order - k) * math.log1p(-rate)
        + k * (k - 1) / (2 * noise_multiplier**2)
        for k in range(order + 1)
    ]
    largest = max(terms)
    moment = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    return max(0.0, moment) / (order - 1)


def rdp_to_epsilon(rdp: Mapping[int, float], delta: float) -> float:
    """Least epsilon of a mechanism whose Renyi divergence is known at some orders (integers from 2).

    Canonne, Kamath, Steinke 2020 (https://arxiv.org/abs/2004.00010, proposition 12).
    """
    _require(1.0, 0, delta)
    epsilons = [
        divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        for order, divergence in rdp.items()
    ]
    return max(0.0, min(epsilons))


def has_pld() -> bool:
    """Whether the [dp] extra is installed, so that sampled epsilons come from privacy loss distributions."""
    return find_spec("dp_accounting") is not None


def sampled_epsilon(noise_multiplier: float, rate: float, compositions: int, delta: float) -> float:
    """Epsilon of T Poisson-sampled Gaussian mechanisms, an upper bound; adjacency: add or remove one user.

    Args:
        noise_multiplier: z.
        rate: Chance of each user to be in a round's cohort.
        compositions: T, at least 0.
        delta: Between 0 and 1.
    """
    _require(noise_multiplier, compositions, delta)
    require("the sampling rate", rate, 0.0, 1.0)
    if compositions == 0 or rate == 0 or noise_multiplier == math.inf:
        return 0.0
    return _bound(noise_multiplier, rate, compositions, delta, 1.0)


def _bound(z: float, rate: float, compositions: int, delta: float, fineness: float) -> float:
    """The least of what is known: no amplification, Renyi divergences; a PLD, unless fineness is 0."""
    least = gaussian_epsilon(z, compositions, delta)
    if rate == 1:
        return least
    least = min(least, _rdp_epsilon(z, rate, compositions, delta))
    if fineness and rate > 0 and has_pld() and z >= _LEAST_PLD_MULTIPLIER:
        step = _loss_step(z, rate) / fineness
        least = min(least, _pld_epsilon(z, rate, compositions, delta, step))
    return least


def _loss_step(z: float, rate: float) -> float:
    """Interval of the discretised privacy loss of one round; small beside its range and its deviation.

    Connecting the dots makes the result an upper bound at any interval; at these it is within 1e-3 of the least.
    """
    widest = (1 / (2 * z * z) + 12 / z) / 1e4
    deviation = rate * math.sqrt(math.expm1(min(1 / (z * z), 100.0)))
    return min(widest, max(0.05 * deviation, widest / 100))


def _rdp_epsilon(noise_multiplier: float, rate: float, compositions: int, delta: float) -> float:
    rdp = {
        order: compositions * sampled_gaussian_rdp(noise_multiplier, rate, order)
        for order in ORDERS
    }
    return rdp_to_epsilon(rdp, delta)


@lru_cache(maxsize=1024)
def _pld_epsilon(z: float, rate: float, compositions: int, delta: float, step: float) -> float:
    import dp_accounting  # type: ignore[import-untyped]
    from dp_accounting import pld

    adjacency = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld.PLDAccountant(adjacency, value_discretization_interval=step)
    one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z))
    accountant.compose(dp_accounting.SelfComposedDpEvent(one, compositions))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, *, rate: float, compositions: int) -> float:
    """Least noise multiplier that keeps T rounds within epsilon, rounded up to three digits.

    Args:
        epsilon: Budget, above 0.
        delta: Of it.
        rate: Of Poisson sampling; 1 claims no amplification.
        compositions: T, at least 1.

    Raises:
        UsageError: No multiplier up to 1e6 does.
    """
    require("privacy.epsilon", epsilon, 1e-6, 1e6)
    _require(MAX_MULTIPLIER, compositions, delta)

    def cost(z: float, fineness: float) -> float:
        return _bound(z, rate, compositions, delta, fineness)

    if cost(MAX_MULTIPLIER, 0.0) > epsilon:
        raise UsageError(
            f"no noise multiplier up to {MAX_MULTIPLIER:g} gives epsilon {epsilon:g} at delta "
            f"{delta:g} over {compositions} rounds",
            hint="raise privacy.epsilon, or plan fewer rounds",
        )
    # from the quick bound down with coarse distributions, then digit by digit with fine ones
    above = _least(lambda z: cost(z, 0.0), epsilon, low=MIN_MULTIPLIER, high=MAX_MULTIPLIER)
    z = _digits(_least(lambda z: cost(z, 0.25), epsilon, low=above / 4, high=above))
    while cost(z, 1.0) > epsilon:
        z = _digits(z, 1)
    while cost(_digits(z, -1), 1.0) <= epsilon and z > MIN_MULTIPLIER:
        z = _digits(z, -1)
    return z


def _least(cost: Callable[[float], float], most: float, *, low: float, high: float) -> float:
    """Least argument, to 2e-4 relative, whose cost is at most `most`; costs fall, cost(high) is."""
    if cost(low) <= most:
        return low
    while high / low > 1.0002:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= most else (middle, high)
    return high


def poisson_shortfall(members: int, rate: float, floor: int) -> float:
    """Chance that a Poisson cohort has fewer than `floor` members: P(Binomial(members, rate) < floor).

    The terms of the exact sum, from the largest down; relative error below 1e-7 up to a million members.
    """
    require("the sampling rate", rate, 0.0, 1.0)
    if rate in (0.0, 1.0):
        return float(floor > members * rate)
    return _below(members, floor, math.log(rate), math.log1p(-rate))


def poisson_excess(members: int, rate: float, most: int) -> float:
    """Chance that a Poisson cohort has more than `most` members."""
    require("the sampling rate", rate, 0.0, 1.0)
    if rate in (0.0, 1.0):
        return float(most < members * rate)
    return _below(members, members - most, math.log1p(-rate), math.log(rate))


def _below(members: int, floor: int, log_rate: float, log_rest: float) -> float:
    """P(Binomial(members, rate) < floor), with log(rate) and log(1 - rate)."""
    if floor <= 0 or floor > members:
        return float(floor > members)
    if floor > members * math.exp(log_rate):
        return 1.0 - _lower_tail(members, members - floor, log_rest, log_rate)
    return _lower_tail(members, floor - 1, log_rate, log_rest)


def _lower_tail(members: int, most: int, log_rate: float, log_rest: float) -> float:
    """P(Binomial <= most) for most up to the mode, below which the terms fall."""
    ways = math.lgamma(members + 1) - math.lgamma(most + 1) - math.lgamma(members - most + 1)
    term = math.exp(ways + most * log_rate + (members - most) * log_rest)
    total, odds = term, math.exp(log_rest - log_rate)
    for count in range(most, 0, -1):
        term *= count / (members - count + 1) * odds
        total += term
        if term <= 1e-17 * total:
            break
    return min(1.0, total)


def sum_excess(scale: float, clients: int) -> float:
    """The tau of Kairouz, Liu, Steinke 2021 (https://arxiv.org/abs/2102.06387, theorem 1).

    The sum of n discrete Gaussians is no discrete Gaussian; the logarithm of the ratio of the two probabilities of any
    integer is at most tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 scale^2 k / (k + 1)).

    Args:
        scale: Of each, levels.
        clients: n, at least 1.
    """
    k = np.arange(1, clients, dtype=np.float64)
    return float(10 * np.exp(-2 * (math.pi * scale) ** 2 * k / (k + 1)).sum())


def distributed_epsilon(sensitivity: float, scale: float, *, clients: int, length: int) -> float:
    """Concentrated-DP epsilon of a sum with distributed discrete Gaussian noise (the same theorem).

    The sum is (1/2) epsilon^2-concentrated differentially private, with epsilon = min(sqrt(D^2 / (n scale^2) +
    2 tau d), D / (sqrt(n) scale) + tau sqrt(d)). It is above the Gaussian's D / (sqrt(n) scale) and tends to it.

    Args:
        sensitivity: D, L2, levels.
        scale: Of each client's noise, levels.
        clients: n, those that add noise.
        length: d, elements of the vector.
    """
    gaussian, tau = sensitivity / (math.sqrt(clients) * scale), sum_excess(scale, clients)
    return min(math.sqrt(gaussian**2 + 2 * tau * length), gaussian + tau * math.sqrt(length))


def _digits(value: float, steps: int = 0) -> float:
    """The value rounded up to three digits, and so many of the last digit more."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{(math.ceil(value / step - 1e-9) + steps) * step:.3g}")


def _require(noise_multiplier: float, compositions: int, delta: float) -> None:
    if not noise_multiplier > 0:
        raise UsageError(f"a noise multiplier must be above 0, got {noise_multiplier}")
    if compositions < 0:
        raise UsageError(f"compositions must be at least 0, got {compositions}")
    if not 0 < delta < 1:
        raise UsageError(f"delta must be between 0 and 1, got {delta}")
