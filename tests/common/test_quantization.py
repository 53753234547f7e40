import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.config import EncodingSettings
from fedoppu.common.errors import RoundAborted, UsageError
from fedoppu.common.quantization import (
    CLIPPED,
    LOSS,
    LOSS_COUNT,
    LOSS_LEVELS,
    LOSS_MAX,
    WEIGHT,
    Scalar,
    VectorLayout,
    decode_levels,
    decode_sum,
    mean_of_levels,
    noise_tail,
    read_scalars,
    require_no_overflow,
    round_to_levels,
    write_scalars,
)
from fedoppu.common.rotation import rotate
from fedoppu.common.rounds import RoundPlan, Words
from tests.integration.secagg_harness import identities, make_plan, roster_of

PLAN = make_plan(4, roster_of(identities(4)), num_params=1000)
NARROW = replace(PLAN, word_bits=16, level_bits=8)
PRIVATE = replace(PLAN, metrics=False, max_weight=1)
NOISED = replace(PRIVATE, noise_scale=40.0)
KEY = b"\x07" * 32


def encode(plan: RoundPlan, value: float, *, weight: int = 1, loss: float | None = None) -> Words:
    layout = VectorLayout.of(plan)
    values = np.full(plan.num_params, value, np.float32)
    level = 0 if loss is None else round(loss / LOSS_MAX * LOSS_LEVELS)
    scalars = {WEIGHT: weight, LOSS: level, LOSS_COUNT: int(loss is not None), CLIPPED: 300}
    levels = round_to_levels(values, layout, key=KEY)
    return np.concatenate([levels, write_scalars(layout, scalars)])


@pytest.mark.parametrize("plan", [PLAN, NARROW])
@pytest.mark.parametrize("value", [-0.5, -0.1234, 0.0, 1e-6, 0.25, 0.5])
def test_rounding_is_unbiased_and_off_by_less_than_a_level(plan: RoundPlan, value: float) -> None:
    layout = VectorLayout.of(plan)
    levels = round_to_levels(np.full(20_000, value, np.float32), layout, key=KEY)
    exact = float(np.float32(value)) * layout.middle / layout.value_range + layout.middle
    assert levels.dtype == layout.dtype
    assert np.abs(levels - exact).max() < 1
    assert abs(levels.mean() - exact) < 5 * 0.5 / np.sqrt(levels.size)


@pytest.mark.parametrize("plan", [PLAN, NARROW])
def test_zero_and_the_ends_of_the_range_are_levels(plan: RoundPlan) -> None:
    layout = VectorLayout.of(plan)
    values = np.array([-0.5, 0.0, 0.5], np.float32)
    assert round_to_levels(values, layout, key=KEY).tolist() == [
        0,
        layout.middle,
        2 * layout.middle,
    ]


def test_dither_is_a_function_of_the_key_alone() -> None:
    layout = VectorLayout.of(NARROW)
    values = np.linspace(-0.4, 0.4, 1000, dtype=np.float32)
    once, again = (round_to_levels(values, layout, key=KEY) for _ in range(2))
    assert (once == again).all()
    assert (once != round_to_levels(values, layout, key=bytes(32))).any()


@given(values=st.lists(st.integers(0, 1), min_size=1, max_size=6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_scalars_add_up_in_limbs(values: list[int], data: st.DataObject) -> None:
    layout = VectorLayout.of(NARROW)
    clients = [
        {scalar.name: data.draw(st.integers(0, scalar.maximum)) for scalar in layout.scalars}
        for _ in values
    ]
    total = np.zeros(layout.length, layout.dtype)
    for client in clients:
        total[layout.num_params :] += write_scalars(layout, client)
    expected = {name: sum(client[name] for client in clients) for name in clients[0]}
    assert read_scalars(layout, total, survivors=len(clients)) == expected


def test_limbs_hold_the_maximum() -> None:
    assert [Scalar("x", most).limbs for most in (1, 255, 256, 65_535, 65_536)] == [1, 1, 2, 2, 3]


def test_scalar_above_its_maximum_is_refused() -> None:
    values = {WEIGHT: 65, LOSS: 0, LOSS_COUNT: 0, CLIPPED: 0}
    with pytest.raises(UsageError, match="weight must be between 0 and 64, got 65"):
        write_scalars(VectorLayout.of(PLAN), values)


@pytest.mark.parametrize(
    ("word_bits", "level_bits", "most"), [(16, 8, 257), (16, 4, 257), (16, 14, 4), (32, 16, 65_537)]
)
def test_overflow_bound_is_exact(word_bits: int, level_bits: int, most: int) -> None:
    plan = replace(PLAN, word_bits=word_bits, level_bits=level_bits)
    require_no_overflow(plan, most)
    with pytest.raises(UsageError, match=rf"{most + 1} members .* sums of at most {most}"):
        require_no_overflow(plan, most + 1)


@pytest.mark.parametrize("value", [-0.5, 0.5])
def test_257_clients_at_the_ends_of_the_range_fit_16_bit_words(value: float) -> None:
    one = encode(NARROW, value, weight=64, loss=LOSS_MAX)
    total = np.zeros_like(one)
    for _ in range(257):
        total += one
    decoded = decode_sum(total, NARROW, range(257))
    assert (decoded.mean_update == np.float32(value)).all()
    assert decoded.total_weight == 257 * 64
    assert decoded.held_out_loss == pytest.approx(LOSS_MAX)


def test_overflow_is_checked_before_there_is_a_plan() -> None:
    settings = EncodingSettings(word_bits=16, level_bits=8)
    require_no_overflow(settings, 257)
    with pytest.raises(UsageError, match="258 members with 8-bit levels overflow 16-bit words"):
        require_no_overflow(settings, 258)


@given(level_bits=st.integers(8, 14), members=st.integers(1, 300), noise_scale=st.floats(0, 3000))
@settings(max_examples=80, deadline=None)
def test_sum_with_noise_must_fit_twice_its_tail(
    level_bits: int, members: int, noise_scale: float
) -> None:
    plan = replace(NOISED, word_bits=16, level_bits=level_bits, noise_scale=noise_scale)
    needed = members * (2**level_bits - 1) + 2 * noise_tail(plan, members)
    if needed < 2**16:
        require_no_overflow(plan, members)
        return
    with pytest.raises(UsageError, match=f"{members} members .* overflow 16-bit words"):
        require_no_overflow(plan, members)


def test_noise_that_does_not_fit_is_named_with_its_remedies() -> None:
    plan = replace(NOISED, word_bits=16, level_bits=8, noise_scale=300.0)
    with pytest.raises(
        UsageError, match=r"and with noise up to \d+ of their 65536 values"
    ) as error:
        require_no_overflow(plan, 200)
    assert error.value.hint is not None
    assert "privacy.noise_multiplier" in error.value.hint
    require_no_overflow(replace(plan, noise_scale=0.0), 200)


@pytest.mark.parametrize("num_params", [1, 1000, 10**7])
def test_noise_leaves_its_tail_with_probability_below_2_to_the_minus_40(num_params: int) -> None:
    plan = replace(NOISED, num_params=num_params, noise_scale=500.0)
    deviations = noise_tail(plan, 9) / (500.0 * 3)
    assert num_params * math.erfc(deviations / math.sqrt(2)) < 2**-40
    assert 7 < deviations < 10
    assert noise_tail(replace(plan, noise_scale=0.0), 9) == 0


@pytest.mark.parametrize("plan", [PLAN, NARROW])
def test_weighted_mean_and_metrics_come_out_of_a_sum(plan: RoundPlan) -> None:
    # Clients send update * weight / 64: 0.4 * 48/64 and -0.2 * 16/64.
    one = encode(plan, 0.3, weight=48, loss=2.0)
    two = encode(plan, -0.05, weight=16, loss=3.0)
    np.add(one, two, out=one)
    decoded = decode_sum(one, plan, (0, 3), floor=2)
    assert decoded.total_weight == 64
    assert decoded.mean_update.dtype == np.float32
    level = 0.5 / VectorLayout.of(plan).middle
    assert np.allclose(decoded.mean_update, 0.25, atol=2 * level)
    assert decoded.held_out_loss == pytest.approx(2.5, abs=LOSS_MAX / LOSS_LEVELS)
    assert (decoded.held_out_clients, decoded.clipped) == (2, 600)


def test_loss_of_fewer_than_the_floor_is_not_published() -> None:
    total = encode(PLAN, 0.1, loss=2.0)
    total += encode(PLAN, 0.1)
    for floor in (None, 2):
        decoded = decode_sum(total, PLAN, (0, 1), floor=floor)
        assert decoded.held_out_loss is None
        assert decoded.held_out_clients == 0


def test_sum_without_weight_is_a_zero_update() -> None:
    decoded = decode_sum(encode(PLAN, 0.0, weight=0), PLAN, (0,))
    assert (decoded.mean_update == 0).all()


def test_private_plan_has_no_scalars() -> None:
    layout = VectorLayout.of(PRIVATE)
    assert layout.length == PRIVATE.num_params
    assert write_scalars(layout, {}).size == 0
    with pytest.raises(UsageError, match="the plan has no metrics: decode its levels"):
        decode_sum(np.zeros(1000, np.uint32), PRIVATE, (0,))


@pytest.mark.parametrize("plan", [NOISED, replace(NOISED, word_bits=16, level_bits=8)])
def test_levels_with_noise_on_either_side_are_decoded(plan: RoundPlan) -> None:
    layout, tail = VectorLayout.of(plan), noise_tail(plan, 3)
    rng = np.random.default_rng(0)
    exact = rng.integers(0, 3 * 2 * layout.middle + 1, plan.num_params)
    exact[:2], exact[2:4] = 0, 3 * 2 * layout.middle
    noise = rng.integers(-tail, tail + 1, plan.num_params)
    noise[:4] = -tail, tail, -tail, tail
    words = ((exact + noise) % (1 << plan.word_bits)).astype(layout.dtype)
    totals = decode_levels(words, plan, (0, 1, 2))
    assert totals.dtype == np.int64
    assert (totals == exact + noise - 3 * layout.middle).all()


@pytest.mark.parametrize("beyond", [1, -1])
def test_levels_beyond_the_tail_of_the_noise_refuse_the_round(beyond: int) -> None:
    tail, middle = noise_tail(NOISED, 2), VectorLayout.of(NOISED).middle
    edge = 4 * middle + tail + 1 if beyond > 0 else -tail - 1
    words = np.full(1000, edge % 2**32, np.uint32)
    with pytest.raises(RoundAborted, match=r"total of coordinate is .* out of range"):
        decode_levels(words, NOISED, (0, 1))


def test_mean_divides_by_a_fixed_number_and_rotates_back() -> None:
    plan = replace(PRIVATE, rotation="5a" * 32)
    update = np.linspace(-0.1, 0.1, 1000, dtype=np.float32)
    layout = VectorLayout.of(plan)
    levels = round_to_levels(rotate(update, plan.rotation), layout, key=KEY)
    totals = decode_levels(levels, plan, (2,))
    mean = mean_of_levels(totals, plan, divisor=4.0)
    level = plan.value_range / layout.middle
    assert mean.dtype == np.float32
    assert np.linalg.norm(mean - update / 4) < level / 4 * np.sqrt(1000)
    assert (mean_of_levels(totals, plan, divisor=0.0) == 0).all()


@pytest.mark.parametrize("place", [0, 999, 1000, 1004])
def test_total_out_of_range_refuses_the_round(place: int) -> None:
    total = encode(PLAN, 0.5, weight=64, loss=16.0)
    total[place] = 2**32 - 1
    with pytest.raises(RoundAborted, match=r"above the .* some client sent a value out of range"):
        decode_sum(total, PLAN, (0,))


def test_sum_of_another_length_is_refused() -> None:
    with pytest.raises(RoundAborted, match="the sum has"):
        decode_sum(np.zeros(3, np.uint32), PLAN, (0,))
