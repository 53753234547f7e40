"""Keys, members and plans that the test vectors are made of. They are published, so they are worthless as keys."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedoppu.common.roster import Roster
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.signing import Identity, Scope

Case = dict[str, Any]
CONFIG = b'{"a federation":"a config would stand here, see config.json"}'
SCOPE = Scope(bytes(range(32)), bytes(range(32, 64)))
MODEL = np.array([0.5, -1.0, 2.0], np.float32)


def secret(purpose: str, length: int = 32) -> bytes:
    """Published bytes for a purpose: SHAKE256 of its name."""
    return hashlib.shake_256(b"fedoppu test vector " + purpose.encode()).digest(length)


def person(index: int) -> Identity:
    """A member, whose signing key is SHA-256 of "identity INDEX"."""
    return Identity(index, hashlib.sha256(b"identity %d" % index).digest())


def roster_of(size: int) -> Roster:
    """The first members."""
    return Roster(tuple(person(index).enrolled for index in range(size)))


def make_plan(size: int = 4, **changes: Any) -> RoundPlan:
    """A plan for four members, of whom one may drop."""
    plan = RoundPlan(
        run_id="ab" * 16,
        round=3,
        attempt=1,
        config_hash=hashlib.sha256(CONFIG).hexdigest(),
        roster_hash=roster_of(size).hash(),
        model_hash="cd" * 32,
        num_params=3,
        factors="B",
        clip=1.0,
        value_range=0.5,
        word_bits=32,
        level_bits=16,
        max_weight=64,
        threshold=3,
        neighbours=3,
        min_cohort=3,
        max_drops=1,
    )
    return replace(plan, **changes)


def scoped() -> Case:
    """Context and cohort hash of `SCOPE`."""
    return {"context": SCOPE.context, "cohort_hash": SCOPE.cohort}


def plain(value: Any) -> Any:
    """A case as JSON has it: bytes as hex, arrays as lists."""
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {
            str(key): plain(entry) for key, entry in value.items() if not str(key).startswith("_")
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return value
