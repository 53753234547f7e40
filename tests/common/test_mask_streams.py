"""Masks look random to tests that a linear generator fails; the control has one in their place.

Flower 1.41's masks come from a Mersenne Twister: its output passes a test of frequencies, and is
known for good after 624 words, as each of its bits is a sum (XOR) of earlier ones. What is tested
is what a server gets: masked vectors, of several masks each. In the lowest bit of a sum of masks
the carries play no part, so it is the XOR of their lowest bits, and a sum of Mersenne Twisters is
as linear as one. The vectors' own words are zero, which is the server's best case.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common import masking
from fedoppu.common.masking import KeyAgreement, Mask, add_masks, derive, public_key, random_words
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.rounds import MaskedUpdate, Words
from fedoppu.common.signing import Scope
from tests.common.linear_bits import (
    TWISTER_DEGREE,
    Bits,
    TwisterStream,
    Words32,
    parity_rate,
    shortest_register,
    taps,
    twist_rate,
)
from tests.integration.secagg_harness import Federation, unevenness

LENGTH = 2 * TWISTER_DEGREE + 326  # bits: a random stream of so many has complexity 20,100
# |complexity - length / 2| exceeds x for a random stream with probability below 2^(2 - 2 x)
# (Rueppel 1986, Analysis and Design of Stream Ciphers, chapter 4)
COMPLEXITY_TOLERANCE = 20
STREAMS = ("aes", "twister")


@dataclass(frozen=True)
class Masked:
    """A round's masked vectors of zeros, (members, LENGTH), and whether its sum was right."""

    words: Words32
    exact: bool


@pytest.fixture(scope="module")
def rounds() -> dict[str, Masked]:
    """The same round by the protocol as it is, and with its generator swapped."""
    found = {"aes": run_round()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_stream", TwisterStream)
        found["twister"] = run_round()
    return found


def run_round() -> Masked:
    federation = Federation(4, num_params=LENGTH)
    layout = VectorLayout.of(federation.plan)

    def zeros(_: int) -> Words:
        return np.zeros(layout.length, layout.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation, "words", zeros)
        total = federation.run()
    vectors = [event.words for event in federation.sent if isinstance(event, MaskedUpdate)]
    stacked = np.stack([vector[:LENGTH].astype(np.uint32) for vector in vectors])
    return Masked(stacked, not total.words.any())


@pytest.fixture(scope="module")
def twister_polynomial() -> int:
    """The one relation of all output bits of MT19937, learned from its own output."""
    outputs = np.frombuffer(TwisterStream(bytes(32)).update(bytes(4 * LENGTH)), "<u4")
    length, polynomial = shortest_register(lowest_bits(outputs))
    assert length == TWISTER_DEGREE
    return polynomial


def lowest_bits(words: Words) -> Bits:
    return (words & 1).astype(np.uint8)


def pair_masks(stream: str, length: int) -> Words32:
    """One pairwise mask of the protocol alone."""
    ours = KeyAgreement(hashlib.sha256(b"ours").digest())
    peer = public_key(hashlib.sha256(b"theirs").digest())
    words = np.zeros(length, np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        if stream == "twister":
            patch.setattr(masking, "_stream", TwisterStream)
        add_masks(words, [ours.mask(peer, Scope(b"\x01" * 32, b"\x02" * 32), owner=1, other=2)])
    return words


def deviations(rate: float, count: int) -> float:
    """How far a share of `count` coin flips is from one half, in standard deviations."""
    return abs(rate - 0.5) * 2 * float(np.sqrt(count))


# --- the tests themselves ------------------------------------------------------------------------


def shortest_by_trial(bits: list[int]) -> int:
    """Length of the shortest register, by trying all."""
    for length in range(len(bits) + 1):
        for taps_of in range(1 << length):
            fits = all(
                bits[n] == sum(bits[n - 1 - i] for i in range(length) if taps_of >> i & 1) % 2
                for n in range(length, len(bits))
            )
            if fits:
                return length
    return len(bits)


@given(bits=st.lists(st.integers(0, 1), max_size=9))
def test_shortest_register_is_the_shortest_and_makes_the_bits(bits: list[int]) -> None:
    array = np.array(bits, np.uint8)
    length, polynomial = shortest_register(array)
    assert length == shortest_by_trial(bits)
    places = taps(polynomial)
    assert all(sum(bits[n - tap] for tap in places) % 2 == 0 for n in range(length, len(bits)))


def test_twisters_relation_is_the_published_one(twister_polynomial: int) -> None:
    # Table II of the paper: the characteristic polynomial of MT19937 has 135 terms.
    assert len(taps(twister_polynomial)) == 135


# --- masked vectors of a round -------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
def test_sum_is_right_and_frequencies_look_uniform_whatever_the_generator(
    rounds: dict[str, Masked], stream: str
) -> None:
    """Chi-square passes both: it is no evidence of anything."""
    assert rounds[stream].exact
    for vector in rounds[stream].words:
        assert abs(unevenness(vector)) < 5
        assert abs(unevenness(np.ascontiguousarray(vector[:, None].view(np.uint8)[:, 0]))) < 5


def test_masked_vectors_keep_no_relation_of_the_twister(
    rounds: dict[str, Masked], twister_polynomial: int
) -> None:
    for vector in rounds["aes"].words:
        rate = parity_rate(lowest_bits(vector), twister_polynomial)
        assert deviations(rate, LENGTH - TWISTER_DEGREE) < 5


def test_control_is_flagged_by_parity(rounds: dict[str, Masked], twister_polynomial: int) -> None:
    for vector in rounds["twister"].words:
        assert parity_rate(lowest_bits(vector), twister_polynomial) == 1


@pytest.mark.parametrize("member", [0, 3])
def test_masked_vectors_are_as_complex_as_random_bits(
    rounds: dict[str, Masked], member: int
) -> None:
    length, _ = shortest_register(lowest_bits(rounds["aes"].words[member]))
    assert abs(length - LENGTH / 2) < COMPLEXITY_TOLERANCE


@pytest.mark.parametrize("member", [0, 3])
def test_control_is_flagged_by_linear_complexity(rounds: dict[str, Masked], member: int) -> None:
    length, learned = shortest_register(lowest_bits(rounds["twister"].words[member]))
    assert length == TWISTER_DEGREE
    assert LENGTH / 2 - length > 5 * COMPLEXITY_TOLERANCE
    # what was learned from one member's vector foretells every other's
    other = lowest_bits(rounds["twister"].words[1])
    assert parity_rate(other, learned) == 1


# --- one mask ------------------------------------------------------------------------------------


def test_one_mask_does_not_follow_the_twisters_recurrence() -> None:
    words = pair_masks("aes", 20_000)
    assert deviations(twist_rate(words), 32 * (words.size - 624)) < 5


def test_control_is_flagged_by_the_recurrence_in_every_bit() -> None:
    assert twist_rate(pair_masks("twister", 2_000)) == 1


@pytest.mark.parametrize("bit", [0, 1, 7, 31])
def test_every_bit_of_a_mask_is_complex(bit: int) -> None:
    words = pair_masks("aes", 12_000)
    length, _ = shortest_register((words >> bit & 1).astype(np.uint8))
    assert abs(length - 6_000) < COMPLEXITY_TOLERANCE


@pytest.mark.parametrize(("dtype", "view"), [("<u2", np.uint16), ("<u4", np.uint32)])
def test_dither_comes_from_the_same_kind_of_stream(
    dtype: str, view: type[np.unsignedinteger]
) -> None:
    words = np.concatenate(list(random_words(b"\x07" * 32, dtype, 100_000))).view(view)
    assert abs(unevenness(words)) < 5
    length, _ = shortest_register(lowest_bits(words[:12_000]))
    assert abs(length - 6_000) < COMPLEXITY_TOLERANCE


# --- known answers -------------------------------------------------------------------------------

# AES-256 of the zero block, which is the first block of a mask: NIST AESAVS (2002), KeySbox case 0
# and VarKey cases 0 and 255. SP 800-38A starts its counter elsewhere, where no mask ever is.
FIRST_BLOCKS = [
    (
        "c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558",
        "46f2fb342d6f0ab477476fc501242c5f",
    ),
    ("80" + "00" * 31, "e35a6dcb19b201a01ebcfa8aa22b5759"),
    ("ff" * 32, "4bf85f1b5d54adbc307b0a048389adcb"),
]


@pytest.mark.parametrize(("key", "block"), FIRST_BLOCKS)
def test_first_block_of_a_mask_is_the_published_one(key: str, block: str) -> None:
    words = np.zeros(4, "<u4")
    add_masks(words, [Mask(bytes.fromhex(key))])
    assert words.tobytes().hex() == block


def test_public_key_is_the_published_product_of_the_base_point() -> None:
    # RFC 7748, section 5.2: the first iteration, nine times the point nine
    nine = bytes([9]) + bytes(31)
    expected = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert public_key(nine).hex() == expected


def test_mask_key_comes_from_the_published_shared_secret() -> None:
    # RFC 7748, section 5.2: the first vector
    scalar = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    secret = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"  # noqa: S105
    scope = Scope(b"\x01" * 32, b"\x02" * 32)
    mask = KeyAgreement(bytes.fromhex(scalar)).mask(bytes.fromhex(point), scope, owner=1, other=2)
    assert mask.key == derive(bytes.fromhex(secret), scope.bind("pair mask", 1, 2))


def test_a_long_derivation_is_that_of_rfc_5869() -> None:
    # Test case 3: no salt, no info, 42 bytes
    expected = (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )
    assert derive(b"\x0b" * 22, b"", 42).hex() == expected
