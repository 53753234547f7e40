"""The discrete Gaussian sampler, against the exact distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedoppu.common.errors import UsageError
from fedoppu.common.integer_noise import _propose, discrete_gaussian

KEY = bytes(range(32))


def exact_pmf(scale: float, most: int) -> NDArray[np.float64]:
    """Of -most .. most."""
    x = np.arange(-most, most + 1, dtype=np.float64)
    weights = np.exp(-(x**2) / (2 * scale**2))
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0, 1.7, 4.0, 12.5])
def test_frequencies_are_those_of_the_exact_distribution(scale: float) -> None:
    length, most = 400_000, int(12 * scale) + 3
    samples = discrete_gaussian(KEY, scale, length)
    expected = length * exact_pmf(scale, most)
    counts = np.bincount(samples + most, minlength=2 * most + 1)
    often = expected >= 10
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = often.sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees) + 5
    assert counts[~often].sum() < expected[~often].sum() + 20


def test_a_rounded_continuous_gaussian_is_told_apart() -> None:
    length, scale, most = 400_000, 0.7, 12
    rounded = np.rint(np.random.default_rng(1).normal(0, scale, length)).astype(np.int64)
    expected = length * exact_pmf(scale, most)
    counts = np.bincount(rounded + most, minlength=2 * most + 1)
    often = expected >= 10
    assert ((counts - expected)[often] ** 2 / expected[often]).sum() > 100


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0, 50.0, 61_173.0, 1e7, 1e10])
def test_moments_and_tail(scale: float) -> None:
    length = 200_000
    samples = discrete_gaussian(KEY, scale, length).astype(np.float64)
    x = np.arange(-40, 41)
    deviation = np.sqrt((exact_pmf(scale, 40) * x**2).sum()) if scale <= 4 else scale
    z = samples / deviation
    assert abs(z.mean()) < 5 / np.sqrt(length)
    # the standard error of a square is largest at small scales, where most samples are zero
    assert abs((z**2).mean() - 1) < 5 * (z**2).std() / np.sqrt(length)
    if scale >= 1:
        assert abs((z**3).mean()) < 5 * np.sqrt(15 / length)
        assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / length) + 0.01
    if scale >= 50:
        beyond = (abs(z) > 3).mean()
        assert abs(beyond - 0.0026998) < 5 * np.sqrt(0.0027 / length) + 0.0003 * (scale == 50)
    assert abs(z).max() < (8 if scale > 0.5 else 16)


@pytest.mark.parametrize("scale", [61_173.0, 1e7])
def test_large_scales_are_continuous_gaussians_to_the_eye(scale: float) -> None:
    levels = discrete_gaussian(KEY, scale, 100_000)
    assert abs((levels % 2).mean() - 0.5) < 0.01  # the low bits are there
    samples = np.sort(levels) / scale
    grid = np.linspace(-4, 4, 81)
    standard = np.random.default_rng(3).normal(size=1_000_000)
    ours = np.searchsorted(samples, grid) / samples.size
    theirs = np.searchsorted(np.sort(standard), grid) / standard.size
    assert abs(ours - theirs).max() < 1.63 / np.sqrt(100_000) + 0.002


@given(
    scale=st.floats(0.05, 1e9),
    length=st.integers(0, 3000),
    seed=st.binary(min_size=32, max_size=32),
)
@settings(max_examples=30, deadline=None)
def test_samples_are_a_function_of_the_key_and_a_longer_vector_begins_alike(
    scale: float, length: int, seed: bytes
) -> None:
    samples = discrete_gaussian(seed, scale, length)
    assert samples.dtype == np.int64
    assert samples.shape == (length,)
    assert (samples == discrete_gaussian(seed, scale, length + 7)[:length]).all()


def test_length_may_need_many_batches() -> None:
    samples = discrete_gaussian(KEY, 3.0, 100_003)
    assert samples.shape == (100_003,)
    halves = samples[:50_000], samples[50_000:100_000]
    assert (halves[0] != halves[1]).any()  # no batch is repeated
    assert abs(np.corrcoef(*halves)[0, 1]) < 5 / np.sqrt(50_000)


def test_neighbouring_samples_and_other_keys_are_independent() -> None:
    samples = discrete_gaussian(KEY, 1000.0, 100_000)
    assert abs(np.corrcoef(samples[1:], samples[:-1])[0, 1]) < 5 / np.sqrt(100_000)
    other = discrete_gaussian(bytes(31) + b"\x01", 1000.0, 100_000)
    third = discrete_gaussian(bytes(31) + b"\x02", 1000.0, 100_000)
    assert (other != third).mean() > 0.99
    assert abs(np.corrcoef(other, third)[0, 1]) < 5 / np.sqrt(100_000)


@pytest.mark.parametrize("scale", [4.0, 6.0, 1e6 + 0.5])
def test_uniforms_beyond_whole_turns_are_refused(scale: float) -> None:
    """Else small remainders would be likelier, by one in 2^63 / scale: no sample can show that."""
    steps = int(scale) + 1
    whole = 2**63 // steps * steps
    likely, sure = np.full(3, 2**64 - 1, np.uint64), np.zeros(3, np.uint64)
    draws = np.array([whole - steps, whole, 2**63 - 1], np.uint64) << np.uint64(1)
    assert _propose(draws[:1], likely[:1], sure[:1], scale).tolist() == [0]
    assert _propose(draws, likely, sure, scale).size == 1


def test_scale_zero_is_no_noise() -> None:
    assert not discrete_gaussian(KEY, 0.0, 1000).any()


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), 2.0**41])
def test_scales_that_cannot_be_are_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="scale of discrete Gaussian noise must be"):
        discrete_gaussian(KEY, scale, 10)
