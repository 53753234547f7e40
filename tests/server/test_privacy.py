"""The server's half of differential privacy: how much noise, under which key, and what reads it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedoppu.common.accounting import gaussian_epsilon, sampled_epsilon
from fedoppu.common.config import FederationConfig, PrivacySettings, ThresholdSettings
from fedoppu.common.errors import ProtocolError, RoundAborted, UsageError
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.matrix_factorization import correlated_noise
from fedoppu.common.privacy import sensitivity
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import RoundPlan, SumReady
from fedoppu.server.charges import Charge
from fedoppu.server.privacy import (
    GaussianPrivacy,
    NoiseTape,
    NoPrivacy,
    PrivacyMechanism,
    participation,
    privacy_of,
)
from tests.fake_federation import CONFIG

LENGTH, MEMBERS = 20_000, 40
ROOT = Randomness.from_seed(1)
PLAN = RoundPlan(
    run_id="ab" * 16,
    round=1,
    attempt=0,
    config_hash="cd" * 32,
    roster_hash="ef" * 32,
    model_hash="01" * 32,
    num_params=LENGTH,
    factors="B",
    clip=1.0,
    value_range=0.05,
    word_bits=32,
    level_bits=16,
    max_weight=1,
    threshold=8,
    neighbours=19,
    min_cohort=14,
    max_drops=6,
    metrics=False,
)


def config(mechanism: Any, **changes: Any) -> FederationConfig:
    settings = replace(PrivacySettings(mechanism, noise_multiplier=1.5), **changes)
    thresholds = ThresholdSettings(floor=2, corrupt=0, max_drop=0.3)
    return replace(CONFIG, privacy=settings, thresholds=thresholds, cohort=20)


def attempts(*rounds: int, members: int = MEMBERS) -> list[Charge]:
    return [Charge(PLAN.run_id, number, place, members) for place, number in enumerate(rounds)]


def mechanism_of(name: Any, **changes: Any) -> GaussianPrivacy:
    return GaussianPrivacy(config(name, **changes), ROOT, MEMBERS)


def zero_sum(plan: RoundPlan, survivors: int) -> SumReady:
    """The sum of clients whose updates are zero, each with the noise that the plan asks of it."""
    words = np.full(plan.num_params, survivors * VectorLayout.of(plan).middle, np.uint32)
    for member in range(survivors):
        noise = discrete_gaussian(bytes([member] * 32), plan.noise_scale, plan.num_params)
        words += noise.astype(np.uint32)
    return SumReady(words, tuple(range(survivors)), {})


def in_levels(mean: NDArray[np.float32], plan: RoundPlan, divisor: int) -> NDArray[np.float64]:
    return mean.astype(np.float64) * divisor * VectorLayout.of(plan).middle / plan.value_range


def noise_of(mechanism: GaussianPrivacy, survivors: int, plan: RoundPlan = PLAN) -> float:
    """Standard deviation of a decoded sum of zeros, in sensitivities of one client."""
    plan = mechanism.complete(plan, 20)
    outcome = mechanism.decode(zero_sum(plan, survivors), plan)
    levels = in_levels(outcome.mean, plan, mechanism.config.cohort)
    return float(levels.std()) / sensitivity(plan)


def test_no_mechanism_adds_nothing_and_promises_nothing() -> None:
    none: PrivacyMechanism = privacy_of(CONFIG, ROOT, MEMBERS)
    assert isinstance(none, NoPrivacy)
    assert none.complete(PLAN, 20) == PLAN
    assert none.affords(attempts(*[1] * 1000))
    assert none.spent(attempts(1)) is None


@pytest.mark.parametrize("survivors", [14, 20])
def test_central_noise_has_the_scale_of_the_multiplier_whoever_survives(survivors: int) -> None:
    assert noise_of(mechanism_of("central"), survivors) == pytest.approx(1.5, rel=0.02)


def test_distributed_noise_is_enough_from_the_fewest_survivors() -> None:
    mechanism = mechanism_of("distributed")
    assert noise_of(mechanism, 14) == pytest.approx(1.5, rel=0.02)
    assert noise_of(mechanism, 20) == pytest.approx(1.5 * math.sqrt(20 / 14), rel=0.02)


def test_under_poisson_sampling_distributed_noise_tells_nobody_how_many_took_part() -> None:
    mechanism = mechanism_of("distributed", sampling="poisson")
    scales = [noise_of(mechanism, survivors) for survivors in (14, 17, 20)]
    other = replace(PLAN, min_cohort=25, max_drops=10)  # of a cohort of 35
    scales += [noise_of(mechanism, survivors, other) for survivors in (25, 35)]
    assert min(scales) >= 1.5 * 0.98
    assert max(scales) / min(scales) < 1.03


def test_exact_sum_is_overwritten_by_the_noised_one() -> None:
    mechanism = mechanism_of("central")
    plan, ready = mechanism.complete(PLAN, 20), zero_sum(PLAN, 20)
    exact = ready.words.copy()
    outcome = mechanism.decode(ready, plan)
    assert np.mean(ready.words == exact) < 0.01
    assert (outcome.weight, outcome.clipped, outcome.held_out_loss) == (None, None, None)


def test_the_same_sum_gets_the_same_noise_and_no_other_sum_does() -> None:
    mechanism = mechanism_of("central")
    plan = mechanism.complete(PLAN, 20)

    def mean(plan: RoundPlan, survivors: int = 20, root: Randomness = ROOT) -> Any:
        return replace(mechanism, randomness=root).decode(zero_sum(plan, survivors), plan).mean

    first = mean(plan)
    np.testing.assert_array_equal(first, mean(plan))
    for other in (
        mean(replace(plan, attempt=1)),
        mean(replace(plan, round=2)),
        mean(replace(plan, config_hash="99" * 32)),
        mean(plan, survivors=19),
        mean(plan, root=Randomness.from_seed(2)),
    ):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("mechanism", "kind"),
    # the noise of a round of dp_ftrl is for one sum: after a look at it there is no other attempt
    [("central", RoundAborted), ("distributed", RoundAborted), ("dp_ftrl", ProtocolError)],
)
def test_total_out_of_reach_is_refused_without_a_figure(mechanism: str, kind: Any) -> None:
    own = mechanism_of(mechanism)
    plan = own.complete(PLAN, 20)
    ready = zero_sum(plan, 20)
    ready.words[7] = 2**31
    with pytest.raises(kind, match="a noised total is out of the survivors' reach") as error:
        own.decode(ready, plan)
    assert not any(part.isdigit() and len(part) > 2 for part in str(error.value).split())


def test_noise_that_does_not_fit_the_words_is_refused_before_the_round() -> None:
    narrow = replace(PLAN, word_bits=16, level_bits=8, value_range=0.01)
    with pytest.raises(UsageError, match="overflow 16-bit words"):
        mechanism_of("central", noise_multiplier=50.0).complete(narrow, 20)


def test_noise_of_a_few_levels_is_refused() -> None:
    coarse = replace(PLAN, num_params=4, level_bits=2, value_range=1.0)
    with pytest.raises(UsageError, match="must have a scale of at least 16 levels"):
        mechanism_of("central").complete(coarse, 20)


def test_plan_of_clients_that_add_noise_says_how_much() -> None:
    plan = mechanism_of("distributed").complete(PLAN, 20)
    assert plan.noise_scale == pytest.approx(1.5 * sensitivity(PLAN) / math.sqrt(14))
    assert mechanism_of("central").complete(PLAN, 20).noise_scale == 0


# --- correlated noise ----------------------------------------------------------------------------


def test_tape_gives_the_noise_of_each_round_however_often_and_from_wherever() -> None:
    plan = replace(PLAN, num_params=50)

    def expected(number: int) -> NDArray[np.int64]:
        return correlated_noise(
            lambda at: ROOT.secret("round", at), number, bands=3, scale=100.0, length=50
        )

    tape = NoiseTape()
    for number in (1, 2, 2, 4, 3, 5):
        noise = tape.noise(replace(plan, round=number), ROOT, bands=3, scale=100.0)
        np.testing.assert_array_equal(noise, expected(number))


def test_correlated_noise_takes_back_what_earlier_rounds_added() -> None:
    mechanism = mechanism_of("dp_ftrl", separation=4)
    sums = np.zeros(LENGTH)
    for number in range(1, 9):
        plan = mechanism.complete(replace(PLAN, round=number), 20)
        mean = mechanism.decode(zero_sum(plan, 20), plan).mean
        sums += in_levels(mean, plan, 20)
    independent = 1.5 * sensitivity(PLAN) * math.sqrt(8)
    assert sums.std() < 0.8 * independent


def test_noise_of_one_run_is_not_that_of_another() -> None:
    mechanism = mechanism_of("dp_ftrl")
    other = mechanism_of("dp_ftrl")
    plan = mechanism.complete(PLAN, 20)
    first = mechanism.decode(zero_sum(plan, 20), plan).mean
    second_plan = replace(plan, run_id="99" * 16)
    second = other.decode(zero_sum(plan, 20), second_plan).mean
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


# --- what rounds cost ----------------------------------------------------------------------------


def test_turns_bound_how_often_a_member_took_part() -> None:
    own = config("dp_ftrl", separation=3)
    part = participation(own, MEMBERS, attempts(1, 2, 3, 4, 4, 5))
    assert (part.rounds, part.most) == (6, 3)  # rounds 1, 4 and the second attempt at 4
    assert GaussianPrivacy(own, ROOT, MEMBERS).spent(
        attempts(1, 2, 3)
    ).released == gaussian_epsilon(1.5, 1, 1e-5)


def test_roster_that_grows_makes_no_earlier_round_cheaper() -> None:
    own = config("central", sampling="poisson")
    small = GaussianPrivacy(own, ROOT, 25).spent(attempts(1, 2, 3, members=25))
    grown = GaussianPrivacy(own, ROOT, 1000).spent(attempts(1, 2, 3, members=25))
    assert grown.released == small.released == sampled_epsilon(1.5, 20 / 25, 3, 1e-5)
    large = GaussianPrivacy(own, ROOT, 1000).spent(attempts(1, 2, 3, members=1000))
    assert large.released < small.released / 5
    assert grown.delta == large.delta > small.delta  # large cohorts vary most


def test_no_round_costs_nothing() -> None:
    spent = mechanism_of("central").spent([])
    assert (spent.rounds, spent.released, spent.server) == (0, 0.0, 0.0)


def test_budget_is_compared_with_what_the_released_models_cost() -> None:
    two = gaussian_epsilon(1.5, 2, 1e-5)
    mechanism = mechanism_of("central", epsilon=two)
    assert mechanism.affords(attempts(1, 2))
    assert not mechanism.affords(attempts(1, 2, 3))
