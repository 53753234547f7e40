"""Shamir's secret sharing of 32-byte secrets over GF(2^256 + 297).

Shamir 1979, https://doi.org/10.1145/359168.359176. Any `threshold` shares restore the secret, fewer
say nothing about it. Plain interpolation cannot tell a wrong share from a right one: `restore`
refuses what it can see (too few, two of one holder, malformed), and `restore_checked` finds the
secret among wrong shares with the help of a commitment.

Arithmetic is on Python integers, so it takes no constant time and leaves copies in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb, prod

from fedoppu.common.errors import ProtocolError

PRIME = 2**256 + 297  # the least prime above 2^256
SECRET_BYTES = 32
SHARE_BYTES = 33
_COEFFICIENT_BYTES = 48  # 128 bits more than the prime: the bias of the remainder is below 2^-127
_MOST_SUBSETS = 1000

Entropy = Callable[[int], bytes]
Point = tuple[int, int]
Polynomial = list[int]  # coefficients, constant first


@dataclass(frozen=True)
class Share:
    """One share.

    Attributes:
        holder: Member who holds it, at least 0; the polynomial is taken at holder + 1.
        value: 33 bytes, big-endian.
    """

    holder: int
    value: bytes = field(repr=False)


@dataclass(frozen=True)
class Restored:
    """A secret that fits its commitment, and the holders whose shares are off its polynomial."""

    secret: bytes = field(repr=False)
    wrong: tuple[int, ...]


def split(
    secret: bytes | bytearray, holders: Sequence[int], *, threshold: int, entropy: Entropy
) -> dict[int, Share]:
    """Deals shares of a secret.

    Args:
        secret: 32 bytes.
        holders: Unique members, at least `threshold` of them.
        threshold: Shares that restore the secret, at least 1.
        entropy: Uniform bytes of a given number, from the owner's key source.

    Raises:
        ProtocolError: There are fewer holders than the threshold, or one twice.
    """
    if len(set(holders)) != len(holders) or not 1 <= threshold <= len(holders):
        raise ProtocolError(
            f"a secret needs between 1 and {len(holders)} shares of unique holders to be "
            f"restored, got a threshold of {threshold} for {len(set(holders))} holders"
        )
    drawn = entropy((threshold - 1) * _COEFFICIENT_BYTES)
    polynomial = [int.from_bytes(secret, "big")] + [
        int.from_bytes(drawn[start : start + _COEFFICIENT_BYTES], "big") % PRIME
        for start in range(0, len(drawn), _COEFFICIENT_BYTES)
    ]
    return {
        holder: Share(holder, _evaluate(polynomial, holder + 1).to_bytes(SHARE_BYTES, "big"))
        for holder in holders
    }


def restore(shares: Iterable[Share], threshold: int) -> bytes:
    """Restores a secret from shares that are all right.

    Raises:
        ProtocolError: There are fewer shares than the threshold, two of one holder, or a malformed
            one; or the result is no secret, so that some share is wrong.
    """
    points = _points(shares, threshold)[:threshold]
    secret = _secret(_Weights.of(points).value_at_zero(points))
    if secret is None:
        raise ProtocolError("the shares restore no 32-byte secret: at least one of them is wrong")
    return secret


def restore_checked(
    shares: Iterable[Share], threshold: int, *, check: Callable[[bytes], bool]
) -> Restored | None:
    """Restores a secret although some shares may be wrong.

    Shares that are all on one polynomial are seen to be. Otherwise up to (shares - threshold) / 2
    wrong ones are found by decoding, more by leaving some out as long as there are few ways to.
    Errors that were made to cancel in the secret leave it right, and `wrong` may then name the others.

    Args:
        shares: Of unique holders.
        threshold: Shares that restore the secret.
        check: Whether a candidate fits its commitment.

    Returns:
        The secret that fits, or None if no candidate does.

    Raises:
        ProtocolError: There are fewer shares than the threshold, or two of one holder.
    """
    points = _points(shares, threshold)
    weights = _Weights.of(points)
    if weights.on_one_polynomial(points, threshold):
        # Every choice of shares says the same: right, or dealt wrong as a whole.
        whole = _secret(weights.value_at_zero(points))
        return Restored(whole, ()) if whole is not None and check(whole) else None
    for value, fitting in _candidates(points, threshold, weights):
        secret = _secret(value)
        if secret is not None and check(secret):
            polynomial = _interpolate(fitting[:threshold])
            wrong = tuple(x - 1 for x, y in points if _evaluate(polynomial, x) != y)
            return Restored(secret, wrong)
    return None


def is_share(value: bytes) -> bool:
    """Whether bytes can be a share."""
    return len(value) == SHARE_BYTES and int.from_bytes(value, "big") < PRIME


def _points(shares: Iterable[Share], threshold: int) -> list[Point]:
    ordered = sorted(shares, key=lambda share: share.holder)
    if len({share.holder for share in ordered}) != len(ordered):
        raise ProtocolError("a secret cannot be restored from two shares of one holder")
    if threshold < 1 or len(ordered) < threshold:
        raise ProtocolError(f"a secret needs {threshold} shares, got {len(ordered)}")
    points = [(share.holder + 1, int.from_bytes(share.value, "big")) for share in ordered]
    for share, (_, value) in zip(ordered, points, strict=True):
        if len(share.value) != SHARE_BYTES or value >= PRIME or share.holder < 0:
            raise ProtocolError(
                f"the share of holder {share.holder} is not {SHARE_BYTES} bytes of a field element"
            )
    return points


def _secret(value: int) -> bytes | None:
    return value.to_bytes(SECRET_BYTES, "big") if value < 1 << 256 else None


@dataclass(frozen=True)
class _Weights:
    """What the values at some points count for (barycentric form of Lagrange's interpolation).

    Attributes:
        inner: For each point 1 / (product of its differences to the others).
        at_zero: For each point its share of the value at 0.
        inverses: For each point 1 / x.
    """

    inner: list[int]
    at_zero: list[int]
    inverses: list[int]

    @classmethod
    def of(cls, points: Sequence[Point]) -> "_Weights":
        """For points with unique x, at least 1."""
        xs = [x for x, _ in points]
        gaps = [prod(x - other for other in xs if other != x) % PRIME for x in xs]
        inverted = _invert_all([*gaps, *xs])
        inner, inverses = inverted[: len(xs)], inverted[len(xs) :]
        vanishing = -prod(-x for x in xs) % PRIME
        at_zero = [
            vanishing * weight % PRIME * inverse % PRIME
            for weight, inverse in zip(inner, inverses, strict=True)
        ]
        return cls(inner, at_zero, inverses)

    def value_at_zero(self, points: Sequence[Point]) -> int:
        """Value at 0 of the least polynomial through all points."""
        terms = zip(self.at_zero, points, strict=True)
        return sum(weight * y for weight, (_, y) in terms) % PRIME

    def value_without(self, points: Sequence[Point], left_out: Sequence[int]) -> int:
        """Value at 0 of the least polynomial through all points but those in these places."""
        total = 0
        for place, (x, y) in enumerate(points):
            if place not in left_out:
                gaps = prod(x - points[out][0] for out in left_out)
                total += self.at_zero[place] * gaps % PRIME * y
        scale = prod(-self.inverses[out] for out in left_out)
        return total * scale % PRIME

    def on_one_polynomial(self, points: Sequence[Point], threshold: int) -> bool:
        """Whether all points are on one polynomial with `threshold` coefficients.

        They are if their syndromes, as a Reed-Solomon word, are zero: one for each surplus point.
        """
        terms = [weight * y % PRIME for weight, (_, y) in zip(self.inner, points, strict=True)]
        for _ in range(len(points) - threshold):
            if sum(terms) % PRIME:
                return False
            terms = [term * x % PRIME for term, (x, _) in zip(terms, points, strict=True)]
        return True


def _invert_all(values: Sequence[int]) -> list[int]:
    """Inverses of values other than zero, at the cost of one (Montgomery's trick)."""
    products = [1]
    for value in values:
        products.append(products[-1] * value % PRIME)
    inverse, inverses = pow(products[-1], -1, PRIME), []
    for value, before in zip(reversed(values), reversed(products[:-1]), strict=True):
        inverses.append(inverse * before % PRIME)
        inverse = inverse * value % PRIME
    return inverses[::-1]


def _candidates(
    points: list[Point], threshold: int, weights: _Weights
) -> Iterator[tuple[int, list[Point]]]:
    """Values at 0, each with points that it follows from, the likeliest first.

    Their number is bounded, so that a lying dealer cannot keep a server busy.
    """
    decoded = _decode(points, threshold)
    if decoded is not None:
        yield _evaluate(decoded, 0), [(x, y) for x, y in points if _evaluate(decoded, x) == y]
    surplus = len(points) - threshold
    if comb(len(points), surplus) > _MOST_SUBSETS:
        return
    for left_out in combinations(range(len(points)), surplus):
        kept = [point for place, point in enumerate(points) if place not in left_out]
        yield weights.value_without(points, left_out), kept


# --- polynomials over the field ------------------------------------------------------------------


def _evaluate(polynomial: Polynomial, x: int) -> int:
    result = 0
    for coefficient in reversed(polynomial):
        result = (result * x + coefficient) % PRIME
    return result


def _interpolate(points: list[Point]) -> Polynomial:
    """The least polynomial through the points (Newton's divided differences)."""
    divided = [y for _, y in points]
    for order in range(1, len(points)):
        for i in range(len(points) - 1, order - 1, -1):
            gap = pow(points[i][0] - points[i - order][0], -1, PRIME)
            divided[i] = (divided[i] - divided[i - 1]) * gap % PRIME
    polynomial: Polynomial = []
    for (x, _), coefficient in zip(reversed(points), reversed(divided), strict=True):
        polynomial = _add([coefficient], _times_root(polynomial, x))
    return polynomial


def _times_root(polynomial: Polynomial, root: int) -> Polynomial:
    """The product of a polynomial and X - root."""
    return _add([0, *polynomial], [-root * c % PRIME for c in polynomial]) if polynomial else []


def _add(left: Polynomial, right: Polynomial) -> Polynomial:
    longer, shorter = (left, right) if len(left) >= len(right) else (right, left)
    head = [(a + b) % PRIME for a, b in zip(longer, shorter, strict=False)]
    return head + longer[len(shorter) :]


def _multiply(left: Polynomial, right: Polynomial) -> Polynomial:
    product = [0] * (len(left) + len(right) - 1) if left and right else []
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return [value % PRIME for value in product]


def _divide(above: Polynomial, below: Polynomial) -> tuple[Polynomial, Polynomial]:
    """Quotient and remainder; `below` has a leading coefficient other than zero."""
    rest, lead = list(above), pow(below[-1], -1, PRIME)
    quotient = [0] * max(len(above) - len(below) + 1, 0)
    for shift in range(len(quotient) - 1, -1, -1):
        factor = rest[shift + len(below) - 1] * lead % PRIME
        quotient[shift] = factor
        for i, coefficient in enumerate(below):
            rest[shift + i] = (rest[shift + i] - factor * coefficient) % PRIME
    return quotient, _trim(rest[: len(below) - 1])


def _trim(polynomial: Polynomial) -> Polynomial:
    while polynomial and polynomial[-1] == 0:
        polynomial = polynomial[:-1]
    return polynomial


def _decode(points: list[Point], threshold: int) -> Polynomial | None:
    """Gao's decoder of Reed-Solomon codes: right if at most half the surplus points are wrong.

    Gao 2003, "A new algorithm for decoding Reed-Solomon codes", algorithm 1.
    """
    if len(points) < threshold + 2:
        return None
    vanishing: Polynomial = [1]
    for x, _ in points:
        vanishing = _times_root(vanishing, x)
    before, rest = vanishing, _trim(_interpolate(points))
    factor_before, factor = [], [1]
    while 2 * (len(rest) - 1) >= len(points) + threshold:
        quotient, remainder = _divide(before, rest)
        negative = [-value % PRIME for value in _multiply(quotient, factor)]
        factor_before, factor = factor, _trim(_add(factor_before, negative))
        before, rest = rest, remainder
    polynomial, remainder = _divide(rest, factor)
    return polynomial if not remainder and len(polynomial) <= threshold else None
