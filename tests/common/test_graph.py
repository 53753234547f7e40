import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.graph import Graph
from fedoppu.common.randomness import encode_key

HASH = hashlib.sha256(b"cohort").digest()


@pytest.mark.parametrize(("size", "neighbours"), [(2, 1), (64, 8), (65, 64), (80, 90)])
def test_small_cohorts_are_complete_whatever_the_plan_says(size: int, neighbours: int) -> None:
    graph = Graph(HASH, range(size), neighbours)
    assert graph.complete
    assert graph.neighbours(0) == tuple(range(1, size))


@given(size=st.integers(65, 200), half=st.integers(1, 25), seed=st.binary(max_size=8))
@settings(max_examples=30, deadline=None)
def test_ring_is_regular_symmetric_and_without_loops(size: int, half: int, seed: bytes) -> None:
    graph = Graph(hashlib.sha256(seed).digest(), range(size), 2 * half)
    around = {member: graph.neighbours(member) for member in range(size)}
    for member, others in around.items():
        assert len(set(others)) == 2 * half
        assert list(others) == sorted(others)
        assert member not in others
        assert all(member in around[other] for other in others)


def test_ring_is_the_order_of_the_hashes() -> None:
    members = range(0, 210, 3)

    def rank(member: int) -> bytes:
        return hashlib.sha256(encode_key(("fedoppu graph", HASH, member))).digest()

    ring = sorted(members, key=rank)
    graph = Graph(HASH, members, 4)
    place = ring.index(9)
    expected = [ring[(place + step) % 70] for step in (-2, -1, 1, 2)]
    assert graph.neighbours(9) == tuple(sorted(expected))
    assert graph.neighbours(9) == KNOWN


KNOWN = (0, 57, 87, 204)


def test_another_cohort_hash_gives_other_neighbours() -> None:
    one, two = Graph(HASH, range(100), 10), Graph(bytes(32), range(100), 10)
    assert any(one.neighbours(member) != two.neighbours(member) for member in range(100))


def test_live_holders_count_the_owner_in_a_complete_graph_alone() -> None:
    complete, ring = Graph(HASH, range(5), 4), Graph(HASH, range(100), 6)
    assert complete.live_holders(2, {1, 2, 4}) == 3
    live = set(ring.neighbours(2)[:4])
    assert ring.live_holders(2, live | {2}) == 4
