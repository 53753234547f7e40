"""Differential privacy against a server, a member or an owner of outputs that averages and subtracts."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.ledger import PrivacyBudget
from fedoppu.client.release import release
from fedoppu.common.config import FederationConfig, PrivacySettings, ThresholdSettings
from fedoppu.common.errors import FedoppuError, ProtocolError, RefusedByPolicy
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.messages import Opening
from fedoppu.common.privacy import client_noise, sensitivity
from fedoppu.common.quantization import VectorLayout, decode_levels
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import RoundOpened, RoundPlan, SumReady
from fedoppu.server.privacy import privacy_of
from tests.attacks.devices import Device, Script, devices, plan_for, update_of
from tests.attacks.switches import without
from tests.fake_federation import CONFIG, shared_config


def private(mechanism: Any, **changes: Any) -> FederationConfig:
    """The small federation with differential privacy; z = 1."""
    settings = replace(PrivacySettings(mechanism, noise_multiplier=1.0), **changes)
    return replace(shared_config(CONFIG, max_weight=1), privacy=settings)


def private_plan(members: list[Device], config: FederationConfig, **changes: Any) -> RoundPlan:
    """The plan of a round with noise, as the server would make it."""
    plan = plan_for(members, config=config, **changes)
    if "noise_scale" in changes:
        return plan
    server = privacy_of(config, Randomness.from_seed(11), len(members))
    return server.complete(plan, len(members))


# --- the noise of clients ------------------------------------------------------------------------


def ask_for_no_noise() -> float:
    """The server's plan says that nobody adds noise; how far the sum is then from the exact one."""
    config, members = private("distributed"), devices(5)
    plan = private_plan(members, config, noise_scale=0.0)
    return _distance(members, plan, config)


def _distance(members: list[Device], plan: RoundPlan, config: FederationConfig) -> float:
    """Root mean square of sum minus exact sum, in levels of rounding."""
    script = Script(members, plan, config)
    try:
        ready = script.run()
    except FedoppuError as error:
        raise next(iter(script.refusals.values()), error) from None
    exact = sum(_without_noise(member, plan) for member in members)
    got = decode_levels(ready.words, plan, ready.survivors)
    return float(np.sqrt(np.mean(np.square(got - exact))))


def _without_noise(member: Device, plan: RoundPlan) -> NDArray[np.int64]:
    update = LocalUpdate(plan.context, update_of(member, plan), 1, None)
    words = release(update, plan, member.dither)
    own = discrete_gaussian(
        member.dither.secret("noise", plan.context), plan.noise_scale, words.size
    )
    exact = words - own.astype(words.dtype)
    centred: NDArray[np.int64] = exact.astype(np.int64) - VectorLayout.of(plan).middle
    return centred


def test_server_that_asks_for_no_noise() -> None:
    with pytest.raises(ProtocolError, match=r"the plan's noise_scale is 0\.0, the federation's is"):
        ask_for_no_noise()
    with without("agreed noise"):
        assert ask_for_no_noise() == 0
    config, members = private("distributed"), devices(5)
    plan = private_plan(members, config)
    # of 24 elements: below a third in one of 1e8
    assert _distance(members, plan, config) > plan.noise_scale * math.sqrt(5) / 3


def test_corrupt_members_take_their_noise_off_again_and_enough_is_left() -> None:
    """Each adds noise for the honest survivors of the smallest cohort, not for those that are asked."""
    settings = ThresholdSettings(floor=4, corrupt=2)
    config = replace(private("distributed"), thresholds=settings)
    members = devices(8)
    plan = private_plan(members, config)
    wanted = sensitivity(plan)  # z = 1
    honest = plan.min_cohort - settings.corrupt
    assert plan.noise_scale * math.sqrt(honest) == pytest.approx(wanted)
    naive = client_noise(
        config.privacy, wanted, floor=8, corrupt=0
    )  # shared among all that are asked
    assert naive * math.sqrt(honest) < 0.75 * wanted


def noise_that_the_server_knows(root_of: Any) -> bool:
    """Whether the server, which knows the run's seed, takes a member's noise off."""
    config, members = private("distributed"), devices(5)
    plan = private_plan(members, config)
    vector = update_of(members[0], plan)
    words = release(LocalUpdate(plan.context, vector, 1, None), plan, root_of(0))
    guessed = Randomness.from_seed(3).child("member", 0)
    noise = discrete_gaussian(guessed.secret("noise", plan.context), plan.noise_scale, words.size)
    bare = (words - noise.astype(words.dtype)).astype(np.int64)
    calm = replace(plan, noise_scale=0.0)
    update = LocalUpdate(calm.context, vector, 1, None)
    exact = release(update, calm, guessed).astype(np.int64)
    return bool(np.abs(bare - exact).max() <= 1)  # but for the dither, which has another context


def test_noise_comes_from_a_secret_of_the_member() -> None:
    assert not noise_that_the_server_knows(lambda member: Randomness(b"\x5a" * 32))
    assert noise_that_the_server_knows(
        lambda member: Randomness.from_seed(3).child("member", member)
    )


# --- the noise of the server ---------------------------------------------------------------------


def average_of_releases(times: int) -> float:
    """The same sum is decoded again and again, as after crashes; the mean of the releases."""
    config, members = private("central"), devices(5)
    plan = private_plan(members, config)
    words = [
        release(LocalUpdate(plan.context, update_of(m, plan), 1, None), plan, m.dither)
        for m in members
    ]
    total = np.zeros_like(words[0])
    for each in words:
        total += each
    exact = decode_levels(total, plan, range(5)) * (plan.value_range / VectorLayout.of(plan).middle)
    releases = []
    for _ in range(times):
        server = privacy_of(config, Randomness.from_seed(11), 5)
        ready = SumReady(total.copy(), tuple(range(5)), {})
        releases.append(server.decode(ready, replace(plan, rotation="")).mean * config.cohort)
    return float(np.sqrt(np.mean(np.square(np.mean(releases, axis=0) - exact))))


def test_second_noise_on_one_sum_would_be_averaged_away() -> None:
    once = average_of_releases(1)
    assert once > 0
    assert average_of_releases(64) == pytest.approx(once)
    with without("one noise for a sum"):
        assert average_of_releases(64) < once / 4


# --- charges -------------------------------------------------------------------------------------

BUDGET = PrivacyBudget(epsilon=12.0, delta=1e-5)


def vectors_without_end(most: int) -> int:
    """A server asks attempt after attempt and never unmasks; how many vectors the victim sends.

    Each is a look at its data: with the masks off, by whatever way, the noise averages away.
    """
    config = private("distributed")
    members = devices(5, budget=BUDGET)
    sent = 0
    for attempt in range(most):
        plan = private_plan(members, config, attempt=attempt)
        script = Script(members, plan, config, silent=frozenset(range(5)))
        try:
            script.run()
        except FedoppuError:
            refused = script.refusals.get(0)
        if refused is None:
            sent += 1
        else:
            assert isinstance(refused, RefusedByPolicy)
            assert "privacy budget" in str(refused)
    return sent


def test_every_vector_that_was_sent_is_charged_and_the_vault_stops() -> None:
    afforded = vectors_without_end(8)
    assert 1 <= afforded < 8
    with without("charge"):
        assert vectors_without_end(8) == 8


class PowerFailure(Exception):
    """The device is off."""


def test_charge_is_durable_before_the_vector_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash right after the charge costs a vector; the other order would give one for free."""
    config = private("distributed")
    members = devices(5, budget=BUDGET)

    def off(*_: object) -> None:
        raise PowerFailure

    monkeypatch.setattr("fedoppu.client.handler.release", off)
    with pytest.raises(PowerFailure):
        Script(members, private_plan(members, config), config).run()
    spent = [member.ledger.epsilon(1e-5) for member in members]
    assert spent[0] > 0
    assert spent[1:] == [0, 0, 0, 0]  # it failed at the first one


# --- what is beside the vector -------------------------------------------------------------------


def metrics_beside_noise() -> RoundPlan:
    """The plan of a private federation asks for weight, loss and counts all the same."""
    config, members = private("central"), devices(5)
    plan = private_plan(members, config)
    asked = replace(plan, metrics=True)
    members[0].ask("query.keys", Opening(RoundOpened(asked), config.canonical()))
    return asked


def test_every_element_is_inside_the_one_noised_vector_or_absent() -> None:
    with pytest.raises(
        ProtocolError, match="the plan's metrics is True, the federation's is False"
    ):
        metrics_beside_noise()
    with without("agreed plan"):
        asked = metrics_beside_noise()
    assert VectorLayout.of(asked).scalars  # then exact numbers would travel
    assert not VectorLayout.of(replace(asked, metrics=False)).scalars


def another_clip() -> None:
    config, members = private("central"), devices(5)
    plan = private_plan(members, config)
    asked = replace(plan, clip=plan.clip * 8)
    members[0].ask("query.keys", Opening(RoundOpened(asked), config.canonical()))


def test_clip_bound_that_the_noise_is_not_made_for() -> None:
    with pytest.raises(ProtocolError, match="the plan's clip is"):
        another_clip()
    with without("agreed plan"):
        another_clip()
