"""The rules of the protocol, each with the one check that a test switches off to see what it is for.

`without("floor")` runs a block against a protocol that lacks that rule. A switch is a patch of
named functions, made here and nowhere else: production code has no way to turn a rule off.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedoppu.client import secagg
from fedoppu.client.dealing import Taken, Taking
from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.seat import Seat
from fedoppu.client.secagg import Phase, SecAggClient
from fedoppu.client.secagg_state import State
from fedoppu.common import masking
from fedoppu.common.cohort import Cohort, form_cohort
from fedoppu.common.errors import RoundAborted
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.masking import Mask
from fedoppu.common.messages import Stage
from fedoppu.common.randomness import Key, encode_key
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    Exchange,
    RoundPlan,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskRequested,
    UpdateReady,
)
from fedoppu.common.secret_sharing import Restored, Share, restore
from fedoppu.common.signing import Scope, survivors_bytes
from fedoppu.server.checkpoint import AttemptState
from fedoppu.server.rounds import Rounds
from fedoppu.server.secagg import SecAggServer
from fedoppu.server.tally import Tally
from fedoppu.simulations.key_source import SeededKeySource

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        says: What it demands.
        patch: Takes it away.
    """

    says: str
    patch: Patch


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Takes rules away for a block."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in names:
            RULES[name].patch(monkeypatch)
        yield


def _set(*targets: str, value: Any) -> Patch:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        for target in targets:
            monkeypatch.setattr(target, value)

    return apply


def _all(*patches: Patch) -> Patch:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        for patch in patches:
            patch(monkeypatch)

    return apply


def _never_objects(*args: Any, **kwargs: Any) -> None:
    """In place of a check that raises."""


def _always(*args: Any, **kwargs: Any) -> bool:
    """In place of a check that answers."""
    return True


# --- what is bound to what -----------------------------------------------------------------------


def _same_context_for_any_range(plan: RoundPlan) -> bytes:
    return hashlib.sha256(replace(plan, value_range=1.0, clip=1.0).canonical()).digest()


def _bind_no_round(scope: Scope, tag: str, *parts: Key) -> bytes:
    return encode_key((f"fedoppu {tag}", *parts))


def _bind_no_members(scope: Scope, tag: str, *parts: Key) -> bytes:
    """Packages, their keys and the hashes of shares say no more whose they are and for whom."""
    if tag in ("package", "share"):
        parts = tuple(part for part in parts if not isinstance(part, int))
    return encode_key((f"fedoppu {tag}", scope.context, scope.cohort, *parts))


def _mask_of_any_pair(secret: bytes, scope: Scope, *, owner: int, other: int) -> Mask:
    return Mask(masking.derive(secret, scope.bind("pair mask")), negative=owner > other)


def _unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundPlan, "context", property(lambda plan: bytes(32)))
    monkeypatch.setattr(Scope, "bind", _bind_no_round)


def _with_any_keys(
    plan: RoundPlan, adverts: Iterable[Advert], roster: Roster
) -> tuple[Cohort, dict[int, str]]:
    """`form_cohort` that takes keys which two members share."""
    valid: dict[int, Advert] = {}
    for advert in sorted(adverts, key=lambda advert: advert.member):
        cohort, _ = form_cohort(plan, [advert], roster)
        valid |= cohort.adverts
    return Cohort(plan, valid), {}


# --- once ----------------------------------------------------------------------------------------


def _sign_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = {SurvivorsProposed: (Phase.SIGNED, Phase.EXCLUDED), UnmaskRequested: (Phase.DONE,)}
    monkeypatch.setattr(secagg, "TRANSITIONS", {**secagg.TRANSITIONS, Phase.SIGNED: again})


def _answer_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = {SurvivorsProposed: (Phase.SIGNED, Phase.EXCLUDED)}
    monkeypatch.setattr(secagg, "TRANSITIONS", {**secagg.TRANSITIONS, Phase.DONE: again})


def _signs_outside(
    client: SecAggClient, event: SurvivorsProposed
) -> tuple[State, list[ClientEvent]]:
    """A client that signs any survivor set, whether or not it is in it."""
    message = survivors_bytes(client._formed().scope, event.dealers, event.survivors)
    signed = SurvivorSignature(client.member, client._identity.sign(message))
    state = replace(client._state, phase=Phase.SIGNED.value, survivors=event.survivors)
    return state, [signed]


def _keeps_pairs(mask: Callable[..., Any]) -> Callable[..., Any]:
    """A client that does not let go of the keys of its pairwise masks."""

    def keep(client: SecAggClient, event: UpdateReady) -> Any:
        pairs = {peer: bytearray(key) for peer, key in client._state.pairs.items()}
        state, answer = mask(client, event)
        return replace(state, pairs=pairs), answer

    return keep


def _keeps_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(State, "without_secrets", lambda state: state)
    monkeypatch.setattr(SecAggClient, "_mask", _keeps_pairs(SecAggClient._mask))


def _forgets_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vector goes out, then the power fails before anything of it is on the disk."""
    save, keep = Seat.save, Seat.keep

    def save_all_but(seat: Seat, machine: bytes, last: LastRound | None) -> None:
        if b'"phase":"masked"' not in machine.replace(b" ", b""):
            save(seat, machine, last)

    def keep_all_but(seat: Seat, stage: Stage, request: RecordDict, reply: RecordDict) -> None:
        if stage != "train.masked":
            keep(seat, stage, request, reply)

    monkeypatch.setattr(Seat, "save", save_all_but)
    monkeypatch.setattr(Seat, "keep", keep_all_but)


def _forgets_the_asked(rounds: Rounds, state: AttemptState, tally: Tally) -> AttemptState:
    after = replace(state, sitting_out=(), asked=(), machine=b"")
    rounds.runtime.attempts.save(after)
    return after


def _aborts_for_now(server: SecAggServer, stage: Exchange, lack: str) -> None:
    raise RoundAborted(f"ended in {stage.value}: {lack}")


def _no_self_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self mask is one that everyone knows."""
    real = masking.self_mask
    for module in (CLIENT, "tests.attacks.attacker"):
        monkeypatch.setattr(
            f"{module}.self_mask", lambda _, scope, member: real(bytes(32), scope, member)
        )


def _simple_majority(policy: ClientPolicy, members: Collection[int]) -> int:
    return len(members) // 2 + 1


def _of_the_cohort(cls: type[ClientPolicy], size: int) -> ClientPolicy:
    return cls(corrupt=1)


def _interpolated(
    shares: Iterable[Share], threshold: int, *, check: Callable[[bytes], bool]
) -> Restored | None:
    """Whatever the first shares give."""
    return Restored(restore(list(shares)[:threshold], threshold), ())


def _masks_of_what_opened(take: Callable[..., Taken]) -> Callable[..., Taken]:
    def taken(taking: Taking, event: SharesDelivered) -> Taken:
        result = take(taking, event)
        for dealer in result.complaints:
            del result.pairs[dealer]
        return result

    return taken


def _seeded_anywhere(source: SeededKeySource, purpose: str, length: int) -> bytes:
    seed = source.randomness.secret("protocol key", source.member, purpose)
    return hashlib.shake_256(seed).digest(length)


def _fresh_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each release draws anew."""
    calls = count()

    def noise(key: bytes, scale: float, length: int) -> NDArray[np.int64]:
        fresh = hashlib.sha256(key + b"%d" % next(calls)).digest()
        return discrete_gaussian(fresh, scale, length)

    monkeypatch.setattr("fedoppu.server.privacy.discrete_gaussian", noise)


HELPER = "fedoppu.server.helper.Helper"
UNMASKING = "fedoppu.server.unmasking"
SEAT = "fedoppu.client.seat.Seat"
POLICY = "fedoppu.client.policy.ClientPolicy"
CLIENT = "fedoppu.client.secagg"
VERIFY_ADVERT = "fedoppu.common.cohort.verify_public"

RULES: Mapping[str, Rule] = {
    # --- plan and cohort
    "signed adverts": Rule("an advert is its member's", _set(VERIFY_ADVERT, value=_always)),
    "signatures": Rule(
        "adverts and survivor sets are signed by enrolled identities",
        _set(VERIFY_ADVERT, f"{CLIENT}.verify_public", value=_always),
    ),
    "range in context": Rule(
        "the plan's range and clip bound are in the context",
        lambda m: m.setattr(RoundPlan, "context", property(_same_context_for_any_range)),
    ),
    "context": Rule("context and cohort hash are in everything that is signed", _unbound),
    "range change": Rule(
        "range and clip bound change by a bounded factor",
        _set(f"{POLICY}.check_plan", value=_never_objects),
    ),
    "unique keys": Rule(
        "no two members share a key", _set(f"{CLIENT}.form_cohort", value=_with_any_keys)
    ),
    "sorted": Rule(
        "lists name each member once", _set(f"{CLIENT}._require_sorted", value=_never_objects)
    ),
    "pair in mask": Rule(
        "a pairwise mask names its two members",
        _set("fedoppu.common.masking.pair_mask", value=_mask_of_any_pair),
    ),
    "unique identities": Rule(
        "a roster holds each identity once",
        _set("fedoppu.common.roster.Roster.__post_init__", value=_never_objects),
    ),
    "corruption of the roster": Rule(
        "corrupt members are counted in the roster, not in the cohort",
        lambda m: m.setattr(ClientPolicy, "for_roster", classmethod(_of_the_cohort)),
    ),
    "model in plan": Rule(
        "a model is the one that the plan names",
        _set("fedoppu.common.adapters.Adapter.digest", value=lambda _: "00" * 32),
    ),
    # --- thresholds and drops
    "floor": Rule(
        "cohort and survivors hold a floor of honest members",
        _set(f"{POLICY}._require_floor", value=_never_objects),
    ),
    "thresholds": Rule(
        "t and k follow from n and c", _set(f"{POLICY}.check_cohort", value=_never_objects)
    ),
    "live holders": Rule(
        "each survivor keeps t live neighbours",
        _set("fedoppu.common.graph.Graph.live_holders", value=lambda *_: 1 << 20),
    ),
    "drops": Rule(
        "a survivor set has few drops", _set(f"{POLICY}.check_live", value=_never_objects)
    ),
    "quorum": Rule("one survivor set for all", _set(f"{POLICY}.quorum", value=lambda *_: 1)),
    "corrupt in quorum": Rule(
        "more than (n + c) / 2 of the cohort signed",
        _set(f"{POLICY}.quorum", value=_simple_majority),
    ),
    # --- once
    "memory": Rule(
        "an attempt is taken once, a round answered once",
        _set("fedoppu.client.policy._require_succession", value=_never_objects),
    ),
    "one survivor set": Rule("a client signs one survivor set", _sign_again),
    "one reply": Rule("a client unmasks once", _answer_again),
    "erasure": Rule("secrets are overwritten when their use is over", _keeps_secrets),
    "one round for a model": Rule(
        "one model is answered for once", _set(f"{SEAT}.require_unanswered", value=_never_objects)
    ),
    "durable state at training": Rule("a vector is stored before it is sent", _forgets_training),
    "the asked sit out": Rule(
        "who was asked to unmask sits out until the model has changed",
        _set("fedoppu.server.rounds.Rounds._give_up", value=_forgets_the_asked),
    ),
    "giving up is final": Rule(
        "a round that is given up has no sum",
        _set("fedoppu.server.secagg.SecAggServer._abort", value=_aborts_for_now),
    ),
    "silence of the excluded": Rule(
        "outside the survivor set nobody unmasks",
        _set(f"{CLIENT}.SecAggClient._sign", value=_signs_outside),
    ),
    "self mask": Rule("a vector has a mask of its own beside the pairwise ones", _no_self_mask),
    # --- shares
    "who a package is for": Rule(
        "a package is bound to dealer and holder",
        lambda m: m.setattr(Scope, "bind", _bind_no_members),
    ),
    "signed offers": Rule(
        "in the hybrid exchange a recipient uses what its dealer signed, alone",
        _set("fedoppu.client.dealing.is_signed", value=_always),
    ),
    "keys need a grid": Rule(
        "keys from a seed work in a simulation's Grid alone",
        _set("fedoppu.simulations.key_source.SeededKeySource.secret", value=_seeded_anywhere),
    ),
    # --- liars
    "seed commitment": Rule(
        "a revealed self seed fits its commitment",
        _set(f"{UNMASKING}.own_seed_fits", value=_always),
    ),
    "share hashes": Rule(
        "a revealed share fits the hash that its dealer signed",
        _set(f"{UNMASKING}.share_fits", value=_always),
    ),
    "checked secrets": Rule(
        "a restored secret fits the advert",
        _set(f"{UNMASKING}.restore_checked", value=_interpolated),
    ),
    "masks of the share set": Rule(
        "pairwise masks follow the share set",
        lambda m: m.setattr(Taking, "take", _masks_of_what_opened(Taking.take)),
    ),
    "judged complaints": Rule(
        "who complains of too many is named",
        _set("fedoppu.server.secagg.judge", value=lambda *_: {}),
    ),
    "low order": Rule(
        "keys of low order are no keys",
        _set("fedoppu.common.pairwise.is_low_order", value=lambda _: False),
    ),
    "signed answers": Rule(
        "every message is signed, the masked vector too",
        _set("fedoppu.server.answers.verify", value=_always),
    ),
    "reachable totals": Rule(
        "totals are in [0, n max]",
        _set("fedoppu.common.quantization._require_range", value=_never_objects),
    ),
    # --- two servers
    "one set a round": Rule(
        "the helper answers one set for a round and for a model",
        _set(f"{HELPER}._require_only", value=lambda *_: False),
    ),
    "helper's floor": Rule(
        "a set has the helper's floor",
        _all(
            _set(f"{HELPER}._require_size", value=_never_objects),
            _set(f"{HELPER}._least", value=lambda *_: 0),
        ),
    ),
    "signed claims": Rule(
        "members sign what the helper gets", _set("fedoppu.server.helper.verify", value=_always)
    ),
    "seed is bound": Rule(
        "a sealed seed is bound to round and member",
        _all(
            _set(
                "fedoppu.common.two_server.seal_info",
                "fedoppu.server.helper.seal_info",
                value=lambda *_: b"",
            ),
            _set(
                "fedoppu.client.two_server.seed_mask",
                "fedoppu.server.helper.seed_mask",
                value=lambda seed, *_: Mask(bytes(seed)),
            ),
        ),
    ),
    "pinned config": Rule(
        "the owner's config is the only one",
        _set(f"{SEAT}.require_pinned", f"{POLICY}.check_config", value=_never_objects),
    ),
    "answers of the helper": Rule(
        "the helper answers for what it was asked",
        _set("fedoppu.server.two_server.SealedServer._require_answer", value=_never_objects),
    ),
    "signed mask sums": Rule(
        "the helper signs its sums", _set("fedoppu.server.two_server.verify", value=_always)
    ),
    "salted hash": Rule(
        "the hash of masked words is salted", _set("fedoppu.client.two_server.SALT_BYTES", value=0)
    ),
    # --- numbers
    "overflow": Rule(
        "a sum fits its words",
        _set(
            f"{CLIENT}.require_no_overflow",
            "fedoppu.server.masked_sum.require_no_overflow",
            value=_never_objects,
        ),
    ),
    "masks": Rule("a vector is masked", _set(f"{CLIENT}.add_masks", value=_never_objects)),
    # --- differential privacy
    "agreed noise": Rule(
        "the plan's noise is the config's",
        _set("fedoppu.client.handler._noise", value=lambda _, plan: plan.noise_scale),
    ),
    "agreed plan": Rule(
        "a plan follows from the config",
        _set("fedoppu.client.handler._require", value=_never_objects),
    ),
    "one noise for a sum": Rule("the same sum gets the same noise", _fresh_noise),
    "charge": Rule(
        "every masked vector is charged",
        _set("fedoppu.client.ledger.VaultLedger.charge", value=_never_objects),
    ),
}
