"""The helper of the two-server mode: a second operator that knows the masks and sees no vector.

It answers one question a round: the sum of the mask streams of one set of members. What that
guarantees and against whom is told in `common/two_server.py`.

Guaranteed by an honest helper, whatever the server does (spec of secure aggregation, rule 4): for
each (run, round) and for each model it sums over one set, of distinct roster members, each of whom
signed its seed for exactly this plan, at least the plan's `min_cohort` of them and at least its own
floor of honest ones. The set is remembered before the sum goes out; the same request is answered
again, byte for byte, and no other: sums over {a, b, c} and {a, b} would reveal c.
A seed that does not open leaves its member out, by name, and the set that is summed over is then
the rest, fixed like any other; if that is too few, there is no sum.

Not guaranteed: that a seed belongs to the words that came with it. A member that seals another seed
than it masked with spoils the sum, as it could with any vector.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

from fedoppu.common.commit import commit_file
from fedoppu.common.config import FederationConfig, require
from fedoppu.common.errors import ProtocolError, RefusedByPolicy, UsageError
from fedoppu.common.masking import KEY_BYTES, add_masks
from fedoppu.common.plain import dump_plain, load_plain
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import RoundPlan, Words
from fedoppu.common.signing import verify
from fedoppu.common.two_server import (
    SEED_BYTES,
    HelperKeys,
    MaskSum,
    MaskSumRequest,
    SealedClaim,
    claim_bytes,
    mask_sum_bytes,
    seal_info,
    seed_mask,
    suite,
)

MLKEM_SEED_BYTES = 64


class HelperLink(Protocol):
    """How a server reaches the helper."""

    def ask(self, request: MaskSumRequest) -> MaskSum:
        """The helper's answer.

        Raises:
            ProtocolError: The helper refuses: the request breaks the protocol, or the round was
                answered for another set.
            RefusedByPolicy: The set is below the helper's own floor.
            ConnectionFailed: The helper cannot be reached; the same request may be sent again.
        """


@dataclass(frozen=True)
class HelperSecrets:
    """The helper's private keys.

    Attributes:
        seal: X25519 private key, 32 bytes; or the ML-KEM-768 seed followed by it, 96 bytes.
        identity: Ed25519 private key, 32 bytes.
    """

    seal: bytes = field(repr=False)
    identity: bytes = field(repr=False)

    @classmethod
    def make(cls, secret: Callable[[str, int], bytes], *, hybrid: bool) -> "HelperSecrets":
        """New keys.

        Args:
            secret: Gives so many uniform bytes for a purpose; the operating system's generator but
                in a simulation.
            hybrid: Whether for MLKEM768-X25519.
        """
        size = (MLKEM_SEED_BYTES if hybrid else 0) + KEY_BYTES
        return cls(secret("helper seal key", size), secret("helper identity", KEY_BYTES))

    def public(self) -> HelperKeys:
        """What a federation's config pins."""
        seal = X25519PrivateKey.from_private_bytes(self.seal[-KEY_BYTES:]).public_key()
        identity = Ed25519PrivateKey.from_private_bytes(self.identity).public_key()
        lattice = self.seal[:-KEY_BYTES]
        head = (
            MLKEM768PrivateKey.from_seed_bytes(lattice).public_key().public_bytes_raw()
            if lattice
            else b""
        )
        return HelperKeys(head + seal.public_bytes_raw(), identity.public_bytes_raw())


@dataclass(frozen=True)
class HelperPolicy:
    """What a helper insists on, whatever a server says.

    Attributes:
        floor: Fewest honest members in a set, at least 2.
        corrupt: Members of the roster that are assumed corrupt; all may be in a set.
    """

    floor: int = 20
    corrupt: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("helper.floor", self.floor, 2)
        require("helper.corrupt", self.corrupt, 0)


@dataclass(frozen=True)
class _Answered:
    """A set that was summed over.

    Attributes:
        run_id: Hex, of the plan.
        round: Of the plan.
        model_hash: Hex, of the plan.
        request: Digest of the request.
    """

    run_id: str
    round: int
    model_hash: str
    request: bytes


@dataclass(frozen=True)
class _State:
    """Plain data.

    Attributes:
        answered: Every set, in the order of the answers.
    """

    answered: tuple[_Answered, ...] = ()


class Helper:
    """The helper of one federation, without input or output.

    The caller's part: `dump()` is stored before an answer goes out, and one request is handled at a
    time; `HelperService` does both.
    """

    def __init__(
        self,
        secrets: HelperSecrets,
        roster: Roster,
        config: FederationConfig,
        *,
        policy: HelperPolicy,
    ) -> None:
        """Starts with nothing answered.

        Args:
            secrets: The private keys to those that the config pins.
            roster: The members, pinned.
            config: Of the federation, pinned.
            policy: This operator's own floors.

        Raises:
            UsageError: The config pins other keys, or another mode.
        """
        hybrid = config.secagg.key_exchange == "hybrid"
        if config.secagg.mode != "two_server":
            raise UsageError(f"a helper needs secagg.mode=two_server, not {config.secagg.mode}")
        if HelperKeys.parse(config.secagg.helper, hybrid=hybrid) != secrets.public():
            raise UsageError("the config pins another helper's keys: no seed would open")
        self._keys = _Opener(secrets.seal)
        self._identity = Ed25519PrivateKey.from_private_bytes(secrets.identity)
        self._roster = roster
        self._config_hash = config.hash().hex()
        self._hybrid = hybrid
        self._policy = policy
        self._state = _State()

    def answer(self, request: MaskSumRequest) -> MaskSum:
        """The sum of the masks of a set, if that may be told.

        Raises:
            ProtocolError: The plan is of another federation, a claim is not its member's, or this
                round or model was answered for another set.
            RefusedByPolicy: The set is too small.

        After either, nothing has changed.
        """
        self._require_valid(request)
        known = self._require_only(request)
        seeds = {claim.member: self._open(request.plan, claim) for claim in request.claims}
        good = {member: seed for member, seed in seeds.items() if seed is not None}
        unsealed = tuple(member for member in seeds if member not in good)
        if len(good) < self._least(request.plan):
            return self._sign(request.plan, {}, unsealed)
        if not known:
            self._remember(request)
        return self._sign(request.plan, good, unsealed)

    def dump(self) -> bytes:
        """What was answered, as JSON. No key and no seed is in it."""
        return dump_plain(self._state)

    def restore(self, data: bytes) -> None:
        """Continues from a dump.

        Raises:
            DataError: The bytes are no dump.
        """
        self._state = load_plain(_State, data)

    # --- the checks ------------------------------------------------------------------------------

    def _require_valid(self, request: MaskSumRequest) -> None:
        plan, claims = request.plan, request.claims
        if (plan.config_hash, plan.roster_hash) != (self._config_hash, self._roster.hash()):
            raise ProtocolError("the plan is for another federation or roster than this helper's")
        members = [claim.member for claim in claims]
        if members != sorted(set(members)):
            raise ProtocolError("the claims must be sorted and name each member once")
        for claim in claims:
            message = claim_bytes(plan.context, claim)
            if not verify(self._roster.identity(claim.member), claim.signature, message):
                raise ProtocolError(f"member {claim.member} did not sign this claim for this plan")
        self._require_size(plan, len(claims))

    def _require_size(self, plan: RoundPlan, size: int) -> None:
        least, most = self._least(plan), plan.min_cohort + plan.max_drops
        if size < least:
            raise RefusedByPolicy(
                f"a set of {size} members is too small: the plan's min_cohort is "
                f"{plan.min_cohort}, this helper takes no fewer than {least}"
            )
        if size > most:
            raise ProtocolError(f"a set of {size} members: the plan asked {most}")

    def _least(self, plan: RoundPlan) -> int:
        """Fewest members of a set."""
        return max(plan.min_cohort, self._policy.floor + self._policy.corrupt)

    def _require_only(self, request: MaskSumRequest) -> bool:
        """Whether this very request was answered before; no other of its round or model may be."""
        plan, digest = request.plan, request.digest()
        for seen in self._state.answered:
            if seen.request == digest:
                return True
            same_round = (seen.run_id, seen.round) == (plan.run_id, plan.round)
            if same_round or seen.model_hash == plan.model_hash:
                what = f"round {plan.round}" if same_round else f"model {plan.model_hash[:12]}"
                raise ProtocolError(
                    f"{what} was answered for another set: two sums over nearly the same members "
                    "reveal the difference",
                    hint="a helper answers once for each round and for each model",
                )
        return False

    # --- the answer ------------------------------------------------------------------------------

    def _open(self, plan: RoundPlan, claim: SealedClaim) -> bytes | None:
        seed = self._keys.open(claim.sealed, seal_info(plan.context, claim.member))
        return seed if seed is not None and len(seed) == SEED_BYTES else None

    def _remember(self, request: MaskSumRequest) -> None:
        plan = request.plan
        new = _Answered(plan.run_id, plan.round, plan.model_hash, request.digest())
        self._state = replace(self._state, answered=(*self._state.answered, new))

    def _sign(
        self, plan: RoundPlan, seeds: Mapping[int, bytes], unsealed: tuple[int, ...]
    ) -> MaskSum:
        words = _sum_masks(plan, seeds)
        unsigned = MaskSum(plan.context, tuple(seeds), unsealed, words, b"")
        return replace(unsigned, signature=self._identity.sign(mask_sum_bytes(unsigned)))


def _sum_masks(plan: RoundPlan, seeds: Mapping[int, bytes]) -> Words:
    """(length,) sum of the mask streams; (0,) without seeds."""
    layout = VectorLayout.of(plan)
    words: Words = np.zeros(layout.length if seeds else 0, layout.dtype)
    add_masks(words, [seed_mask(seed, plan.context, member) for member, seed in seeds.items()])
    return words


class _Opener:
    """The private half of the seal key."""

    def __init__(self, seal: bytes) -> None:
        key = X25519PrivateKey.from_private_bytes(seal[-KEY_BYTES:])
        lattice = seal[:-KEY_BYTES]
        self._suite = suite(hybrid=bool(lattice))
        self._key = (
            MLKEM768X25519PrivateKey(MLKEM768PrivateKey.from_seed_bytes(lattice), key)
            if lattice
            else key
        )

    def open(self, sealed: bytes, info: bytes) -> bytes | None:
        """What was sealed, or None if it was sealed for another or changed."""
        try:
            return self._suite.decrypt(sealed, self._key, info=info)
        except (InvalidTag, ValueError):
            return None


class HelperService:
    """A HelperLink to a helper in this process: one request at a time, stored before it is told."""

    def __init__(self, helper: Helper, save: Callable[[bytes], None]) -> None:
        """Keep the parts.

        Args:
            helper: The role, restored from what was saved last.
            save: Makes a dump durable before it returns.
        """
        self._helper = helper
        self._save = save
        self._lock = Lock()

    @classmethod
    def stored(cls, helper: Helper, path: Path) -> "HelperService":
        """A service whose memory is a file; without that file a round could be answered twice.

        Args:
            helper: The role, fresh.
            path: Of the file; there is none before the first answer.

        Raises:
            DataError: The file was changed.
        """
        if path.exists():
            helper.restore(path.read_bytes())
        return cls(helper, lambda dump: commit_file(path, dump))

    def ask(self, request: MaskSumRequest) -> MaskSum:
        """The helper's answer; see `Helper.answer`."""
        with self._lock:
            answer = self._helper.answer(request)
            self._save(self._helper.dump())
            return answer
