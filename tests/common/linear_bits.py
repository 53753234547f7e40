"""What finds a linear generator behind a stream of bits, and the Mersenne Twister to be found."""

import numpy as np
from numpy.typing import NDArray

TWISTER_DEGREE = 19937
_SIZE, _MIDDLE = 624, 397  # words of state of MT19937, and the recurrence's second tap
_TOP, _REST = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_TWIST = np.uint32(0x9908B0DF)

Bits = NDArray[np.uint8]
Words32 = NDArray[np.uint32]


class TwisterStream:
    """MT19937 in place of an AES-CTR cipher: the same calls, seeded with all bits of a key."""

    def __init__(self, key: bytes) -> None:
        self._generator = np.random.RandomState(np.frombuffer(key, "<u4").astype(np.uint32))

    def update(self, data: bytes) -> bytes:
        """Output as long as the data, of zeros; whole words only, so that no call wastes any."""
        assert not any(data)
        assert len(data) % 4 == 0
        return self._generator.bytes(len(data))

    def update_into(self, data: memoryview, buffer: bytearray | memoryview) -> int:
        """The same, into a buffer."""
        memoryview(buffer)[: len(data)] = self.update(bytes(data))
        return len(data)


def shortest_register(bits: Bits) -> tuple[int, int]:
    """Berlekamp-Massey over GF(2): length and polynomial of the shortest register that makes them.

    Massey 1969, https://doi.org/10.1109/TIT.1969.1054260. Bit i of the polynomial is set if the sum
    (XOR) of the bits at n - i is zero for all n from the length on.
    """
    length, shift, now, before, seen = 0, 1, 1, 1, 0
    for place, bit in enumerate(bits.tolist()):
        seen = seen << 1 | bit  # bit i is the sequence's at `place` - i
        if not (now & seen).bit_count() & 1:
            shift += 1
            continue
        kept = now
        now ^= before << shift
        if 2 * length <= place:
            length, before, shift = place + 1 - length, kept, 1
        else:
            shift += 1
    return length, now


def taps(polynomial: int) -> list[int]:
    """The powers that a polynomial holds."""
    return [power for power in range(polynomial.bit_length()) if polynomial >> power & 1]


def parity_rate(bits: Bits, polynomial: int) -> float:
    """How often the bits at a polynomial's taps sum to zero: 1 if it is theirs, else about 1/2."""
    places = taps(polynomial)
    count = bits.size - places[-1]
    total = np.zeros(count, np.uint8)
    for tap in places:
        total ^= bits[places[-1] - tap :][:count]
    return float(1 - total.mean())


def twist_rate(outputs: Words32) -> float:
    """How often a bit of 32-bit outputs is what the recurrence of MT19937 makes of earlier ones.

    Matsumoto and Nishimura 1998 (https://doi.org/10.1145/272991.272995), equation 2.1, after the
    tempering is undone.
    """
    state = untemper(outputs)
    count = state.size - _SIZE
    mixed = (state[:count] & _TOP) | (state[1:][:count] & _REST)
    made = state[_MIDDLE:][:count] ^ (mixed >> 1) ^ (mixed & 1) * _TWIST
    wrong = np.bitwise_count(made ^ state[_SIZE:])
    return float(1 - wrong.mean() / 32)


def untemper(outputs: Words32) -> Words32:
    """The words of state behind outputs of MT19937."""
    words = outputs ^ _right(outputs, 18)
    words = words ^ (_left(words, 15) & np.uint32(0xEFC60000))
    made = words
    for _ in range(4):  # seven more bits are right after each pass
        made = words ^ (_left(made, 7) & np.uint32(0x9D2C5680))
    words = made
    for _ in range(2):  # eleven more
        made = words ^ _right(made, 11)
    return made


def _left(words: Words32, bits: int) -> Words32:
    return np.left_shift(words, np.uint32(bits))


def _right(words: Words32, bits: int) -> Words32:
    return np.right_shift(words, np.uint32(bits))
