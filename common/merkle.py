"""A Merkle tree: one hash for many leaves, and a short proof that one of them is in it.

The tree of RFC 9162 (section 2.1), over SHA-256. Leaves and nodes are hashed with different
prefixes, so that no node passes for a leaf. Who knows a leaf's place and the number of leaves can
be shown neither another leaf nor the same leaf elsewhere.
"""

import hashlib
from collections.abc import Sequence

HASH_BYTES = 32


def leaf(data: bytes) -> bytes:
    """The hash of one leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The hash of all leaves, given their hashes."""
    return tree(leaves)[0]


def tree(leaves: Sequence[bytes]) -> tuple[bytes, list[tuple[bytes, ...]]]:
    """The root, and for each leaf its path: the siblings on the way to the root, from below."""
    if len(leaves) <= 1:
        return (leaves[0], [()]) if leaves else (hashlib.sha256().digest(), [])
    half = _left(len(leaves))
    left, left_paths = tree(leaves[:half])
    right, right_paths = tree(leaves[half:])
    paths = [(*path, right) for path in left_paths] + [(*path, left) for path in right_paths]
    return _node(left, right), paths


def climb(hashed: bytes, place: int, *, count: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a leaf's hash and its path lead to, or None if the path has another length."""
    if count <= 1 or not path:
        return hashed if count == 1 and not path else None
    left, sibling = _left(count), path[-1]
    inside = place < left
    below = climb(
        hashed,
        place if inside else place - left,
        count=left if inside else count - left,
        path=path[:-1],
    )
    if below is None:
        return None
    return _node(below, sibling) if inside else _node(sibling, below)


def _left(count: int) -> int:
    """Leaves of the left half: the largest power of two below the count."""
    return 1 << (count - 1).bit_length() - 1


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
