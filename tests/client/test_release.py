from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.release import clamp, clip, release, scale, shorten
from fedoppu.common.errors import ClientFailed, ProtocolError, RefusedByPolicy
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.privacy import sensitivity
from fedoppu.common.quantization import VectorLayout, decode_levels, decode_sum, mean_of_levels
from fedoppu.common.randomness import Randomness
from fedoppu.common.rotation import rotate
from fedoppu.common.rounds import RoundPlan, Words
from tests.integration.secagg_harness import identities, make_plan, roster_of

PLAN = make_plan(4, roster_of(identities(4)), num_params=50)
ROTATED = replace(PLAN, rotation="5a" * 32)
PRIVATE = replace(ROTATED, metrics=False, max_weight=1)
NOISED = replace(PRIVATE, noise_scale=30.0)
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
    for plan in (PLAN, ROTATED, replace(PLAN, word_bits=16, level_bits=8)):
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


def test_rotated_update_comes_back() -> None:
    vector = np.linspace(-0.1, 0.1, 50, dtype=np.float32)
    decoded = decode_sum(
        release(LocalUpdate(ROTATED.context, vector, 64), ROTATED, ROOT), ROTATED, (0,)
    )
    level = ROTATED.value_range / VectorLayout.of(ROTATED).middle
    assert np.linalg.norm(decoded.mean_update - vector) <= level * np.sqrt(50)


def test_what_is_clamped_is_the_rotated_vector() -> None:
    """A coordinate beyond the range is spread by the rotation; without it, it would be cut."""
    vector = np.zeros(50, np.float32)
    vector[7] = 0.9
    for plan, cut in ((PLAN, 1), (ROTATED, 0)):
        words = release(LocalUpdate(plan.context, vector, 64), plan, ROOT)
        assert decode_sum(words, plan, (0,)).clipped == cut


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


# --- differential privacy ------------------------------------------------------------------------


def private(vector: np.ndarray, plan: RoundPlan, weight: int = 5, root: Randomness = ROOT) -> Words:
    return release(LocalUpdate(plan.context, vector.astype(np.float32), weight, 2.0), plan, root)


def centred_norm(words: Words, plan: RoundPlan) -> float:
    return float(np.linalg.norm(words.astype(np.int64) - VectorLayout.of(plan).middle))


@given(vector=VECTORS, scale=st.sampled_from([1.0, 2.0**-40, 2.0**-60]), weight=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_integers_of_a_private_update_hold_the_sensitivity(
    vector: np.ndarray, scale: float, weight: int
) -> None:
    for plan in (PRIVATE, replace(PRIVATE, value_range=0.01, rotation="")):
        words = private(vector * np.float32(scale), plan, weight)
        assert words.shape == (50,)
        assert centred_norm(words, plan) <= sensitivity(plan)


@pytest.mark.parametrize("level_bits", [8, 16, 30])
@pytest.mark.parametrize("shape", ["flat", "peak", "ends"])
def test_integers_beyond_the_bound_are_moved_toward_zero(level_bits: int, shape: str) -> None:
    middle = (1 << (level_bits - 1)) - 1
    levels = np.full(999, middle, np.uint32)
    if shape == "flat":
        levels += 1
    elif shape == "peak":
        levels[3] += middle
    else:
        levels[::2], levels[1::2] = 0, 2 * middle
    before = levels.astype(np.int64) - middle
    norm = float(np.linalg.norm(before.astype(np.float64)))
    for bound in (norm * (1 - 1e-15), norm * 0.999, norm / 3, 0.5):
        moved = levels.copy()
        shorten(moved, middle, bound)
        after = moved.astype(np.int64) - middle
        assert sum(int(x) ** 2 for x in after) <= bound**2
        assert (np.abs(after) <= np.abs(before)).all()
        assert (after * before >= 0).all()


def test_release_holds_the_integers_to_the_bound_that_noise_is_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where what is before them lengthened the vector, as floats might."""
    monkeypatch.setattr("fedoppu.client.release.rotate", lambda vector, seed: vector * 3)
    plan = replace(PRIVATE, value_range=PLAN.clip)
    levels = decode_levels(private(np.full(50, 10.0), plan), plan, (0,))
    assert sum(int(level) ** 2 for level in levels) <= sensitivity(plan) ** 2
    assert np.linalg.norm(levels) > 0.99 * sensitivity(plan)


def test_integers_within_the_bound_stay() -> None:
    levels = np.array([5, 7, 9], np.uint16)
    shorten(levels, 7, 3.0)
    assert levels.tolist() == [5, 7, 9]


def test_noise_is_added_to_the_levels_alone_and_comes_last() -> None:
    vector = np.linspace(-0.1, 0.1, 50)
    exact = release(LocalUpdate(NOISED.context, vector.astype(np.float32), 5), NOISED, ROOT)
    noise = discrete_gaussian(ROOT.secret("noise", NOISED.context), 30.0, 50)
    rotated = rotate(vector.astype(np.float32), NOISED.rotation)
    levels = decode_levels(exact, NOISED, (0,)) - noise
    assert noise.any()
    expected = rotated / NOISED.value_range * VectorLayout.of(NOISED).middle
    assert np.abs(levels - expected).max() < 1.01


@pytest.mark.parametrize("word_bits", [16, 32])
def test_noise_below_zero_wraps_and_is_decoded(word_bits: int) -> None:
    plan = replace(NOISED, word_bits=word_bits, level_bits=8, noise_scale=500.0)
    words = private(np.full(50, 0.05), plan)
    assert words.dtype == VectorLayout.of(plan).dtype
    assert words.max() > 2 * VectorLayout.of(plan).middle + 5000
    noise = discrete_gaussian(ROOT.secret("noise", plan.context), 500.0, 50)
    mean = mean_of_levels(decode_levels(words, plan, (0,)) - noise, plan, divisor=1.0)
    assert np.abs(mean - 0.05).max() < 5 * plan.value_range / 127


def test_neither_rounding_nor_noise_can_be_guessed_without_the_root() -> None:
    vector = np.linspace(-0.1, 0.1, 50)
    for plan in (PRIVATE, NOISED):
        ours, theirs = private(vector, plan), private(vector, plan, root=Randomness.from_seed(4))
        assert (ours == private(vector, plan)).all()
        assert (ours != theirs).any()
    assert (private(vector, NOISED) - private(vector, replace(NOISED, attempt=1))).any()


def test_every_private_client_weighs_one_and_none_without_examples() -> None:
    vector = np.full(50, 0.1)
    assert (private(vector, PRIVATE, 1) == private(vector, PRIVATE, 1000)).all()
    assert (private(vector, PRIVATE, 0) == VectorLayout.of(PRIVATE).middle).all()


def test_loss_has_no_part_in_a_private_update() -> None:
    vector = np.full(50, 0.1, np.float32)
    words = [
        release(LocalUpdate(NOISED.context, vector, 5, loss), NOISED, ROOT)
        for loss in (None, 2.0, float("nan"))
    ]
    assert (words[0] == words[1]).all()
    assert (words[0] == words[2]).all()


def test_noise_beside_metrics_is_refused() -> None:
    for noise_scale in (1.0, -1.0, float("nan")):
        plan = replace(PLAN, noise_scale=noise_scale, max_weight=1)
        with pytest.raises(RefusedByPolicy, match=r"noise of scale .* beside metrics without any"):
            release(replace(update(), context=plan.context), plan, ROOT)


@pytest.mark.parametrize("plan", [replace(PRIVATE, max_weight=64), replace(NOISED, max_weight=64)])
def test_weights_in_a_private_plan_are_refused(plan: RoundPlan) -> None:
    with pytest.raises(
        RefusedByPolicy, match="every client weighs the same, but its max_weight is 64"
    ):
        release(replace(update(), context=plan.context), plan, ROOT)
