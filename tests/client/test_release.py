from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.release import clamp, clip, release, scale
from fedoppu.common.errors import ClientFailed, ProtocolError, RefusedByPolicy
from fedoppu.common.quantization import VectorLayout, decode_sum
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import Words
from tests.integration.secagg_harness import identities, make_plan, roster_of

PLAN = make_plan(4, roster_of(identities(4)), num_params=50)
ROOT = Randomness.from_seed(3)
VECTORS = arrays.arrays(
    np.float32, 50, elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_nan=False)
)


def update(value: float = 0.01, *, weight: int = 64, loss: float | None = None) -> LocalUpdate:
    return LocalUpdate(PLAN.context, np.full(50, value, np.float32), weight, loss)


@given(vector=VECTORS, weight=st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_every_word_is_within_the_bound_whatever_the_update(
    vector: np.ndarray,
    weight: int,
) -> None:
    for plan in (PLAN, replace(PLAN, word_bits=16, level_bits=8)):
        local = LocalUpdate(plan.context, vector, weight)
        words = release(local, plan, ROOT)
        layout = VectorLayout.of(plan)
        assert words.shape == (layout.length,)
        assert words.dtype == layout.dtype
        assert words[:50].max() <= 2 * layout.middle
        assert words[50:].max() <= 255


@given(vector=VECTORS, bound=st.floats(0.01, 100))
@settings(max_examples=80, deadline=None)
def test_clip_bounds_the_norm_and_keeps_the_direction(vector: np.ndarray, bound: float) -> None:
    clipped = clip(vector, bound)
    norm = np.linalg.norm(vector.astype(np.float64))
    assert np.linalg.norm(clipped.astype(np.float64)) <= bound * (1 + 1e-6)
    if norm <= bound:
        assert clipped is vector
    else:
        assert np.allclose(clipped, vector * (bound / norm), rtol=1e-5, atol=1e-30)


def test_scale_and_clamp_edges() -> None:
    vector = np.array([0.5, -2.0, 0.0], np.float32)
    assert scale(vector, 64, 64) is vector
    assert scale(vector, 16, 64).tolist() == [0.125, -0.5, 0.0]
    assert scale(vector, 0, 64).tolist() == [0, 0, 0]
    clamped, beyond = clamp(vector, 0.5)
    assert (clamped.tolist(), beyond) == ([0.5, -0.5, 0.0], 1)


def test_one_clients_sum_is_its_update() -> None:
    words = release(update(0.1, weight=16, loss=2.5), PLAN, ROOT)
    decoded = decode_sum(words, PLAN, (0,), floor=1)
    assert decoded.total_weight == 16
    assert decoded.held_out_loss == pytest.approx(2.5, abs=1e-3)
    assert np.allclose(decoded.mean_update, 0.1, atol=64 / 16 * PLAN.value_range / 2**15)


def test_update_beyond_the_clip_is_released_with_the_norm_of_the_clip() -> None:
    # each coordinate comes to clip / sqrt(50) = 0.14, within the range: the norm alone is bounded
    decoded = decode_sum(release(update(30.0), PLAN, ROOT), PLAN, (0,))
    assert decoded.clipped == 0
    assert np.linalg.norm(decoded.mean_update) == pytest.approx(PLAN.clip, rel=1e-3)


def test_weight_above_the_bound_counts_as_the_bound() -> None:
    decoded = decode_sum(release(update(weight=1000), PLAN, ROOT), PLAN, (0,))
    assert decoded.total_weight == 64


def test_client_without_examples_sends_zeros() -> None:
    words = release(update(0.1, weight=0), PLAN, ROOT)
    assert (words[:50] == VectorLayout.of(PLAN).middle).all()
    assert decode_sum(words, PLAN, (0,)).total_weight == 0


@pytest.mark.parametrize(("loss", "shown"), [(-1.0, 0.0), (99.0, 16.0), (1.0, 1.0)])
def test_loss_is_clipped(loss: float, shown: float) -> None:
    words = release(update(loss=loss), PLAN, ROOT)
    assert decode_sum(words, PLAN, (0,), floor=1).held_out_loss == pytest.approx(shown, abs=1e-3)


def test_client_without_a_loss_looks_like_the_others() -> None:
    with_loss, without = release(update(loss=2.0), PLAN, ROOT), release(update(), PLAN, ROOT)
    assert with_loss.shape == without.shape
    decoded = decode_sum(without, PLAN, (0,), floor=0)
    assert (decoded.held_out_loss, decoded.held_out_clients) == (None, 0)


def test_clamped_coordinates_are_counted() -> None:
    plan = replace(PLAN, clip=100.0)
    vector = np.zeros(50, np.float32)
    vector[:7] = 0.6
    words = release(LocalUpdate(plan.context, vector, 64), plan, ROOT)
    assert decode_sum(words, plan, (0,)).clipped == 7


def words_of(root: Randomness, attempt: int = 0) -> Words:
    plan = replace(PLAN, attempt=attempt)
    vector = np.linspace(-0.1, 0.1, 50, dtype=np.float32)
    return release(LocalUpdate(plan.context, vector, 64), plan, root)


def test_dither_is_bound_to_root_and_context() -> None:
    base = words_of(ROOT)
    assert (base == words_of(ROOT)).all()
    assert (base != words_of(Randomness.from_seed(4))).any()
    assert (base != words_of(ROOT, attempt=1)).any()


def test_update_of_another_attempt_is_refused() -> None:
    with pytest.raises(ProtocolError, match="released for its own attempt alone"):
        release(update(), replace(PLAN, attempt=1), ROOT)


def test_update_of_another_shape_or_with_a_negative_weight_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"must have shape \(50,\), got \(3,\)"):
        release(LocalUpdate(PLAN.context, np.zeros(3, np.float32), 1), PLAN, ROOT)
    with pytest.raises(ProtocolError, match="weight must be at least 0, got -1"):
        release(update(weight=-1), PLAN, ROOT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_update_or_loss_that_is_not_finite_is_refused(bad: float) -> None:
    for local in (update(bad), update(loss=bad)):
        with pytest.raises(ClientFailed, match="training diverged"):
            release(local, PLAN, ROOT)


def test_plan_that_asks_for_noise_is_refused() -> None:
    plan = replace(PLAN, noise_scale=1.0)
    with pytest.raises(RefusedByPolicy, match="noise of scale 1, which this client cannot add"):
        release(replace(update(), context=plan.context), plan, ROOT)
