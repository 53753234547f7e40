"""The rotation is orthogonal, keeps the length, spreads energy over the whole vector, and is what its page says."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedoppu.common import rotation
from fedoppu.common.errors import ProtocolError
from fedoppu.common.rotation import rotate, rotate_back, rotation_seed
from tests.fake_federation import CONFIG

SEED = "5a" * 32
AWKWARD = [1, 2, 3, 5, 8, 1000, 65_535, 65_536, 65_537, 100_000, 131_073]
Vector = NDArray[np.float32]


def normal(length: int, seed: int = 0) -> Vector:
    return np.random.default_rng([length, seed]).standard_normal(length).astype(np.float32)


def norm(vector: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.sum(np.square(vector, dtype=np.float64))))


def check_orthogonal(vector: Vector, seed: str) -> None:
    before = vector.copy()
    turned = rotate(vector, seed)
    assert turned.shape == vector.shape
    assert turned.dtype == np.float32
    assert (vector == before).all()
    assert norm(turned) == pytest.approx(norm(vector), rel=5e-7)
    assert norm(rotate_back(turned, seed) - vector) <= 5e-7 * norm(vector)
    assert norm(rotate(rotate_back(vector, seed), seed) - vector) <= 5e-7 * norm(vector)


@given(length=st.integers(1, 600), seed=st.binary(min_size=32, max_size=32))
@settings(max_examples=60, deadline=None)
def test_any_vector_keeps_length_and_norm_and_is_rotated_back(length: int, seed: bytes) -> None:
    check_orthogonal(normal(length), seed.hex())


@pytest.mark.parametrize("length", AWKWARD)
def test_awkward_lengths_do_not_grow(length: int) -> None:
    check_orthogonal(normal(length), SEED)


def hadamard(order: int) -> NDArray[np.float64]:
    """Sylvester's matrix: the sign of row i and column j is the parity of the bits that they share."""
    parity = [[(-1) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    return np.array(parity, np.float64)


def reference(vector: Vector, seed: str) -> NDArray[np.float64]:
    """The rotation by its definition: index sets, matrices, double precision."""
    size, turned = vector.size, vector.astype(np.float64)
    window = min(1 << 16, 1 << (size.bit_length() - 1))
    rows = 1
    while rows * window < 8 * size and 2 * rows <= size:
        rows *= 2
    columns, left = divmod(size, rows)
    steps = np.arange(rows)
    across = [steps * columns + column for column in range(columns)]
    last = [left + steps * columns + column for column in range(max(0, columns - left), columns)]
    starts = [*range(0, size - window, window), size - window]
    along = [np.arange(start, start + window) for start in starts]
    stream = Cipher(AES256(bytes.fromhex(seed)), CTR(bytes(16))).encryptor().update(bytes(8 * size))
    bits = iter(np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little").tolist())
    for group in (across, last if left else []):
        # one bit for each coordinate, row by row
        signs = np.array([[1 - 2 * next(bits) for _ in group] for _ in range(rows if group else 0)])
        for place, column in enumerate(group):
            turned[column] = hadamard(rows) @ (signs[:, place] * turned[column]) / np.sqrt(rows)
    for places in along:
        flipped = np.array([1 - 2 * next(bits) for _ in places]) * turned[places]
        turned[places] = hadamard(window) @ flipped / np.sqrt(window)
    return turned


@pytest.mark.parametrize("length", [1, 2, 3, 7, 11, 32, 100, 1000])
def test_rotation_is_the_one_that_is_written_down(length: int) -> None:
    vector = normal(length)
    np.testing.assert_allclose(rotate(vector, SEED), reference(vector, SEED), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("length", "digest"),
    [
        (1000, "b6c095802a2487c0dac3cb3011a3928cc249facbffde78e34f935e65f7a71d87"),
        (70_001, "67f3a69b384ee39a3c230cabf56ac0a35b43d3a76d5f490f44e4053bf88e85d9"),
    ],
)
def test_bytes_are_the_same_on_every_machine(length: int, digest: str) -> None:
    """Test vectors: coordinates 0, 1, 2, ... modulo 17, minus 8; SHA-256 of little-endian float32."""
    vector = (np.arange(length) % 17 - 8).astype(np.float32)
    rotated = rotate(vector, bytes(range(32)).hex())
    assert hashlib.sha256(rotated.astype("<f4").tobytes()).hexdigest() == digest


def test_size_of_a_panel_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = normal(70_001)
    turned, back = rotate(vector, SEED), rotate_back(vector, SEED)
    monkeypatch.setattr(rotation, "PANEL", 1 << 11)
    assert (rotate(vector, SEED) == turned).all()
    assert (rotate_back(vector, SEED) == back).all()


def test_sum_of_rotated_vectors_is_the_rotated_sum() -> None:
    one, two = normal(3000, 1), normal(3000, 2)
    added = rotate(one, SEED) + rotate(two, SEED)
    np.testing.assert_allclose(rotate_back(added, SEED), one + two, rtol=0, atol=1e-5)


def test_another_seed_is_another_rotation() -> None:
    vector = normal(1000)
    other = rotate(vector, "5b" * 32)
    assert abs(float(np.dot(rotate(vector, SEED), other))) < 0.2 * norm(vector) ** 2


def test_empty_seed_is_no_rotation() -> None:
    vector = normal(10)
    assert rotate(vector, "") is vector
    assert rotate_back(vector, "") is vector


@pytest.mark.parametrize("turn", [rotate, rotate_back])
def test_seed_of_another_length_is_refused(turn: Callable[[Vector, str], Vector]) -> None:
    with pytest.raises(ProtocolError, match="seed must have 32 bytes, got 5"):
        turn(normal(10), "5a" * 5)


def test_rotation_seed_is_public_and_of_one_round() -> None:
    seeds = [rotation_seed(CONFIG, number) for number in (1, 2, 1)]
    assert seeds[0] == seeds[2] != seeds[1]
    assert len(bytes.fromhex(seeds[0])) == 32
    assert rotation_seed(replace(CONFIG, public_seed=CONFIG.public_seed + 1), 1) != seeds[0]


def test_there_is_no_seed_without_rotation() -> None:
    encoding = replace(CONFIG.encoding, rotation=False)
    assert rotation_seed(replace(CONFIG, encoding=encoding), 1) == ""


# --- energy --------------------------------------------------------------------------------------


def scattered(length: int) -> Vector:
    large = np.random.default_rng(1).random(length) < 0.1
    return normal(length) * np.where(large, 100, 1).astype(np.float32)


def layer(length: int, start: float, share: float = 0.1) -> Vector:
    scale = np.ones(length, np.float32)
    scale[int(start * length) : int((start + share) * length)] = 100
    return normal(length) * scale


def periodic(length: int) -> Vector:
    """As the rank components of a factor: one of eight is thirty times larger."""
    return normal(length) * np.where(np.arange(length) % 8 == 3, 30, 1).astype(np.float32)


FAMILIES: dict[str, Callable[[int], Vector]] = {
    "normal": normal,
    "student t3": lambda n: np.random.default_rng(2).standard_t(3, n).astype(np.float32),
    "scattered": scattered,
    "first layer": lambda n: layer(n, 0),
    "layer within": lambda n: layer(n, 0.37, 0.02),
    "last layer": lambda n: layer(n, 0.9),
    "periodic": periodic,
    "constant": lambda n: np.ones(n, np.float32),
    "one coordinate": lambda n: np.eye(1, n, n // 3, dtype=np.float32)[0],
    "last coordinate": lambda n: np.eye(1, n, n - 1, dtype=np.float32)[0],
}


def unevenness(vector: Vector, blocks: int = 100) -> float:
    """The largest root mean square of a block, in those of the whole."""
    square = np.square(vector.astype(np.float64))
    return float(
        np.sqrt(max(part.mean() for part in np.array_split(square, blocks)) / square.mean())
    )


@pytest.mark.parametrize("length", [65_537, 100_000, 131_071])
@pytest.mark.parametrize("family", FAMILIES)
def test_energy_is_spread_over_the_whole_vector(family: str, length: int) -> None:
    turned = rotate(FAMILIES[family](length), SEED)
    assert unevenness(turned) <= 1.15
    assert np.abs(turned).max() <= 6.5 * norm(turned) / np.sqrt(length)


def test_layers_are_uneven_before_the_rotation() -> None:
    """The control: the measure sees what the rotation takes away."""
    assert unevenness(layer(100_000, 0.9)) > 3
    assert np.abs(scattered(100_000)).max() > 10 * norm(scattered(100_000)) / np.sqrt(100_000)
