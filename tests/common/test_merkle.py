"""The tree against published roots, and proofs that prove one leaf in one place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.merkle import climb, leaf, root, tree

# Inputs and roots of the reference tests of Certificate Transparency (merkle_tree_test).
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
INPUTS += ["606162636465666768696a6b6c6d6e6f"]
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


@pytest.mark.parametrize("count", sorted(ROOTS))
def test_root_is_the_published_one(count: int) -> None:
    assert root([leaf(bytes.fromhex(data)) for data in INPUTS[:count]]).hex() == ROOTS[count]


@given(count=st.integers(1, 70), data=st.data())
def test_path_proves_its_leaf_in_its_place_and_nothing_else(
    count: int, data: st.DataObject
) -> None:
    leaves = [leaf(bytes([number])) for number in range(count)]
    place = data.draw(st.integers(0, count - 1))
    whole, paths = tree(leaves)
    proof = paths[place]
    assert whole == root(leaves)
    assert len(paths) == count
    assert len(proof) <= (count - 1).bit_length()
    assert climb(leaves[place], place, count=count, path=proof) == whole
    assert climb(leaf(b"other"), place, count=count, path=proof) != whole
    for other in set(range(count)) - {place}:
        assert climb(leaves[place], other, count=count, path=proof) != whole
    assert climb(leaves[place], place, count=count, path=(*proof, bytes(32))) is None
    if proof:
        assert climb(leaves[place], place, count=count, path=proof[1:]) is None
        changed = (bytes(32), *proof[1:])
        assert climb(leaves[place], place, count=count, path=changed) != whole
