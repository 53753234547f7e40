"""How many neighbours, shares and drops: exact integer arithmetic, no rounding in anyone's favour.

What must hold, for a cohort of n with c corrupt members that an active server plays with:

- Complete graph (up to 64 members): an owner's secrets have n holders, itself among them. A server
  that tells some holders "it survived" and others "it dropped" gets t shares of both secrets only
  if 2t <= (n - c) + 2c, so t > (n + c) / 2. As many signatures make a survivor set the only one.
- k-regular ring: c_q of the k neighbours are corrupt, save with probability 2^-sigma over all
  members (a hypergeometric quantile), so t > (k + c_q) / 2. And drops are chosen by the server: it
  cuts the ring where it removes k/2 consecutive members twice. The member beside such a gap has at
  most k/2 live neighbours on its other side and the corrupt ones in the gap, so t > k/2 + c_h,
  with c_h the 2^-(sigma/2) quantile among k/2 (there are two gaps), makes every client refuse it.
- Liveness: after the tolerated drops each member keeps t live neighbours, save with probability
  2^-eta over all members.

sigma is 64 because the ring comes from the cohort hash and a server can try many cohorts; eta is
20.
Bell et al. 2020 (https://eprint.iacr.org/2020/704, section 3.4) is the analysis without the cuts.

The plan is made before the adverts come, for the n members that are *asked*. Whoever sends no
advert is a drop like any other: `max_drops` of the n may be missing in all, from the first message
to the last, so a cohort below n - max_drops is not begun, and corrupt members are counted in the
smallest cohort that could come of it.

The smallest cohorts, with the least floor (2 honest members) and max_drop=.5; k is n - 1, and t is
also the quorum of signatures:

    n                          2   3   4   5   6   7
    no corrupt member:   t     2   2   3   3   4   4
                     drops     0   1   1   2   2   3
    one corrupt member:  t     -   3   3   4   4   5
                     drops     -   0   1   1   2   2

With one corrupt member two are no cohort: its vector is the sum less what the other one sent. Below
4 members only a simulation begins a round (client/policy.py).
"""

from dataclasses import dataclass
from fractions import Fraction
from math import comb

from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import UsageError
from fedoppu.common.graph import COMPLETE_UP_TO, is_complete

SECURITY_BITS = 64
CORRECTNESS_BITS = 20


@dataclass(frozen=True)
class Thresholds:
    """What goes into a plan.

    Attributes:
        neighbours: k.
        threshold: t.
        max_drops: Members that may be missing in all, of those asked.
        min_cohort: Fewest members in the cohort and in the survivor set.
    """

    neighbours: int
    threshold: int
    max_drops: int
    min_cohort: int


def quorum(size: int, corrupt: int) -> int:
    """Signatures that make a survivor set the only one: more than (n + c) / 2.

    Two sets would share more than c signers, so an honest member would have signed both.
    """
    return (size + min(size, corrupt)) // 2 + 1


def allowed_drops(size: int, share: float) -> int:
    """floor(size * share), the share read as the decimal that was written."""
    return int(size * Fraction(str(share)))


def corrupt_quantile(population: int, draws: int, corrupt: int, *, bits: int, members: int) -> int:
    """Most corrupt ones among `draws` neighbours: more have probability <= 2^-bits for any member.

    Args:
        population: Others that neighbours are drawn from.
        draws: Number of neighbours.
        corrupt: Corrupt ones in the population.
        bits: Security.
        members: Union bound over so many members.
    """
    ways, tail = comb(population, draws), 0
    for count in range(min(corrupt, draws), -1, -1):
        tail += comb(corrupt, count) * comb(population - corrupt, draws - count)
        if (tail * members) << bits > ways:
            return count
    return 0


def split_threshold(neighbours: int, corrupt_neighbours: int) -> int:
    """Least t against split views: t > (k + c_q) / 2."""
    return (neighbours + corrupt_neighbours) // 2 + 1


def least_threshold(
    size: int,
    neighbours: int,
    corrupt: int,
    *,
    members: int | None = None,
    bits: int = SECURITY_BITS,
) -> int:
    """Least safe t for a cohort.

    Args:
        size: Members of the cohort.
        neighbours: k of the plan.
        corrupt: Members of the roster that are assumed corrupt; all may be in the cohort.
        members: For the union bound; the cohort by default.
        bits: Security.
    """
    corrupt = min(size, corrupt)
    if is_complete(size, neighbours):
        return quorum(size, corrupt)
    union, others = members or size, min(size - 1, corrupt)
    around = corrupt_quantile(size - 1, neighbours, others, bits=bits, members=union)
    half = neighbours // 2
    beside = corrupt_quantile(size - 1, half, others, bits=bits // 2, members=union)
    return max(split_threshold(neighbours, around), half + beside + 1)


def survives(size: int, neighbours: int, threshold: int, *, drops: int) -> bool:
    """Whether all keep `threshold` live neighbours after `drops` random drops, save 2^-20."""
    others, live = size - 1, size - 1 - drops
    ways = sum(comb(live, i) * comb(drops, neighbours - i) for i in range(min(threshold, live + 1)))
    return (ways * size) << CORRECTNESS_BITS <= comb(others, neighbours)


def plan_thresholds(n: int, settings: ThresholdSettings, *, graph: bool = True) -> Thresholds:
    """k, t and drops for a round in which n members are asked.

    The tolerated drops are settings.max_drop of n, but never so many that fewer than a quorum is
    left, whatever the setting: the table above has the most for 2 to 7.

    Args:
        n: Members that are asked.
        settings: Of the federation.
        graph: False in the two-server mode: nobody holds a share, k and t say nothing and are 1.

    Raises:
        UsageError: n members cannot hold the floor of honest members and the corrupt ones.
    """
    least = settings.least
    if n < least:
        raise UsageError(
            f"a cohort needs thresholds.floor + thresholds.corrupt = {least} members, got {n}",
            hint="ask more members in a round (cohort=), or lower thresholds.floor",
        )
    drops = min(allowed_drops(n, settings.max_drop), n - least)
    if not graph:
        return Thresholds(1, 1, drops, n - drops)
    ring = None if n <= COMPLETE_UP_TO else _ring(n, drops, settings.corrupt)
    if ring is not None:
        return Thresholds(*ring, drops, n - drops)
    threshold = quorum(n, settings.corrupt)
    drops = max(min(drops, n - threshold), 0)
    return Thresholds(n - 1, threshold, drops, n - drops)


def _ring(n: int, drops: int, corrupt: int) -> tuple[int, int] | None:
    """Least even k and its t, or None if only the complete graph will do."""
    smallest = n - drops
    for neighbours in range(2, n - 1, 2):
        threshold = _ring_threshold(n, smallest, neighbours, corrupt)
        enough = threshold <= min(neighbours, smallest)
        if enough and survives(n, neighbours, threshold, drops=drops):
            return neighbours, threshold
    return None


def _ring_threshold(n: int, smallest: int, neighbours: int, corrupt: int) -> int:
    """Least t that is safe for every cohort between `smallest` and n.

    Corruption weighs most in the smallest ring; a cohort so small that its graph is complete needs
    its quorum, which is largest for the largest such cohort.
    """
    complete = min(n, max(COMPLETE_UP_TO, neighbours + 1))
    small_ring = max(smallest, COMPLETE_UP_TO + 1, neighbours + 2)
    threshold = least_threshold(small_ring, neighbours, corrupt, members=n)
    return max(threshold, quorum(complete, corrupt)) if smallest <= complete else threshold
