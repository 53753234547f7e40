"""A client's half of a round of secure aggregation, as a state machine without any input or output.

SecAgg+ (Bell et al. 2020, https://eprint.iacr.org/2020/704) with the consistency round of Bonawitz
et al. 2017 (https://eprint.iacr.org/2017/281, section 6), hardened by the rules of the
specification.

Guaranteed, to an owner whose policy's assumptions hold, against a server that does anything and the
members that work with it: nobody learns more of the owner's vector than the sum over the agreed
survivor set, which has at least the policy's floor of honest members. A client

- takes no plan, cohort or survivor set below its own floors;
- follows the signed share set with its masks, whatever a peer sent, or sends no vector;
- signs one (cohort, share set, survivor set) and reveals nothing before more than (n + c) / 2 of
  the whole cohort signed the same;
- reveals at most one secret's share of each owner, once, and nothing outside the survivor set;
- treats a peer's bad input as that peer's drop.

Not guaranteed: that other clients' vectors are honest, and that the server publishes the true sum.
What Python cannot promise about keys in memory is said in `client/secagg_state.py`.

The caller's part: the model that was trained on must have the plan's model_hash; `last_round` must
be stored before a message goes out; a message is sent once, or repeated byte for byte.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from fedoppu.client.dealing import Secrets, Taking, deal, halves
from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.secagg_state import State, overwrite_dropped
from fedoppu.common.cohort import Cohort, form_cohort
from fedoppu.common.errors import ProtocolError, RefusedByPolicy, UsageError
from fedoppu.common.masking import Mask, add_masks, self_mask
from fedoppu.common.pairwise import key_exchange
from fedoppu.common.plain import dump_plain, load_plain
from fedoppu.common.quantization import VectorLayout, require_no_overflow
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    CohortFixed,
    MaskedUpdate,
    RoundOpened,
    RoundPlan,
    ServerEvent,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
    UpdateReady,
)
from fedoppu.common.signing import (
    Identity,
    advert_bytes,
    commit_seed,
    masked_bytes,
    reply_bytes,
    survivors_bytes,
    verify_public,
)

SECRET_BYTES = 32


class KeySource(Protocol):
    """Where a client's keys come from; a required argument: no message or setting picks it."""

    def secret(self, purpose: str, length: int) -> bytes:
        """`length` uniform bytes; `purpose` names the round and the use, and is used once."""


class OsKeySource:
    """The operating system's generator: the only source on a device."""

    def secret(self, purpose: str, length: int) -> bytes:
        """Bytes of the operating system, different at every call."""
        return secrets.token_bytes(length)


@dataclass(frozen=True)
class Pins:
    """What a client knows before any message, and holds every plan against.

    Attributes:
        roster: The members and their identities.
        config_hash: Hex, of the FederationConfig that the owner consented to.
        last: The last attempt that keys were sent for, or None on the first.
    """

    roster: Roster
    config_hash: str
    last: LastRound | None = None


class Phase(Enum):
    """Where a client is."""

    NEW = "new"
    ADVERTISED = "advertised"
    SHARED = "shared"
    READY = "ready"
    MASKED = "masked"
    SIGNED = "signed"
    DONE = "done"
    EXCLUDED = "excluded"


InputEvent = ServerEvent | UpdateReady
# Every transition there is. SurvivorsProposed has two outcomes: a client that is not in the
# survivor set is out, for good, with its secrets erased.
TRANSITIONS: Mapping[Phase, Mapping[type[InputEvent], tuple[Phase, ...]]] = {
    Phase.NEW: {RoundOpened: (Phase.ADVERTISED,)},
    Phase.ADVERTISED: {CohortFixed: (Phase.SHARED,)},
    Phase.SHARED: {SharesDelivered: (Phase.READY,)},
    Phase.READY: {UpdateReady: (Phase.MASKED,)},
    Phase.MASKED: {SurvivorsProposed: (Phase.SIGNED, Phase.EXCLUDED)},
    Phase.SIGNED: {UnmaskRequested: (Phase.DONE,)},
    Phase.DONE: {},
    Phase.EXCLUDED: {},
}


class SecAggClient:
    """One client in one attempt at one round."""

    def __init__(
        self, identity: Identity, pins: Pins, *, policy: ClientPolicy, keys: KeySource
    ) -> None:
        """Starts before the first message.

        Args:
            identity: The member's signing key, enrolled in the roster.
            pins: What every plan is held against.
            policy: The owner's floors.
            keys: Source of this attempt's keys.

        Raises:
            ProtocolError: The roster has another key for this member, or none.
        """
        if pins.roster.identity(identity.member) != identity.enrolled.identity:
            raise ProtocolError(
                f"the roster does not hold the identity key of member {identity.member}"
            )
        self._identity = identity
        self._pins = pins
        self._policy = policy
        self._keys = keys
        self._state = State(Phase.NEW.value)
        self._cohort: Cohort | None = None

    @property
    def member(self) -> int:
        """Index in the roster."""
        return self._identity.member

    @property
    def phase(self) -> Phase:
        """Where the client is."""
        return Phase(self._state.phase)

    @property
    def plan(self) -> RoundPlan:
        """The attempt's plan.

        Raises:
            ProtocolError: No plan was taken yet.
        """
        if self._state.plan is None:
            raise ProtocolError("no round was opened yet: there is no plan")
        return self._state.plan

    @property
    def members(self) -> tuple[int, ...]:
        """Members of the cohort, sorted; none before it is fixed."""
        return tuple(advert.member for advert in self._state.adverts)

    @property
    def last_round(self) -> LastRound | None:
        """What to store before the message that `receive` returned is sent."""
        if self._state.plan is None:
            return self._pins.last
        return LastRound.of(self._state.plan, answered=self.phase is Phase.DONE)

    def receive(self, event: InputEvent) -> list[ClientEvent]:
        """Takes one event and returns what to send.

        Raises:
            ProtocolError: The event does not belong here, or the server broke a rule.
            RefusedByPolicy: The owner's policy forbids it.

        After either, nothing has changed.
        """
        outcomes = TRANSITIONS[self.phase].get(type(event))
        if outcomes is None:
            raise ProtocolError(
                f"{type(event).__name__} does not belong after {self.phase.value}: member "
                f"{self.member} takes each step of an attempt once, in order"
            )
        state, answer = self._step(event)
        if Phase(state.phase) not in outcomes:
            raise ProtocolError(f"{type(event).__name__} cannot lead to {state.phase}")
        overwrite_dropped(self._state, state)
        self._state = state
        return answer

    def erase(self) -> None:
        """Overwrites all secrets, for a round that is given up; nothing is received after it.

        A round that was answered stays so: `last_round` must not forget it.
        """
        phase = Phase.DONE if self.phase is Phase.DONE else Phase.EXCLUDED
        after = replace(self._state.without_secrets(), phase=phase.value)
        overwrite_dropped(self._state, after)
        self._state = after

    def dump(self) -> bytes:
        """Everything but identity, pins and policy, as JSON, secrets too: store it encrypted."""
        return dump_plain(self._state)

    @classmethod
    def load(
        cls, data: bytes, identity: Identity, pins: Pins, *, policy: ClientPolicy, keys: KeySource
    ) -> "SecAggClient":
        """Continues from a dump.

        Raises:
            DataError: The bytes are no dump.
        """
        client = cls(identity, pins, policy=policy, keys=keys)
        client._state = load_plain(State, data)
        return client

    def _step(self, event: InputEvent) -> tuple[State, list[ClientEvent]]:
        match event:
            case RoundOpened(plan):
                return self._advertise(plan)
            case CohortFixed(adverts):
                return self._share(adverts)
            case SharesDelivered():
                return self._take_shares(event), []
            case UpdateReady():
                return self._mask(event)
            case SurvivorsProposed():
                return self._sign(event)
            case UnmaskRequested():
                return self._unmask(event)

    # --- query.keys ------------------------------------------------------------------------------

    def _advertise(self, plan: RoundPlan) -> tuple[State, list[ClientEvent]]:
        """Makes this attempt's keys, if the plan is for this federation and the policy allows it."""
        if plan.config_hash != self._pins.config_hash:
            raise ProtocolError(
                f"the plan is for federation config {plan.config_hash[:12]}, this client "
                f"consented to {self._pins.config_hash[:12]}"
            )
        roster_hash = self._pins.roster.hash()
        if plan.roster_hash != roster_hash:
            raise ProtocolError(
                f"the plan is for roster {plan.roster_hash[:12]}, this client pins "
                f"{roster_hash[:12]}"
            )
        self._policy.check_plan(plan, self._pins.last)
        made = [bytearray(self._secret(plan, use)) for use in ("channel", "mask", "seed")]
        channel, mask, seed = made
        commitment = commit_seed(plan.context, self.member, seed)
        shown = [key_exchange(plan).load(key).public for key in (channel, mask)]
        unsigned = Advert(self.member, shown[0], shown[1], commitment, b"")
        signature = self._identity.sign(advert_bytes(plan.context, unsigned))
        advert = replace(unsigned, signature=signature)
        return State(Phase.ADVERTISED.value, plan, channel, mask, seed, advert), [advert]

    def _secret(self, plan: RoundPlan, use: str, length: int = SECRET_BYTES) -> bytes:
        return self._keys.secret(f"{use} {plan.context.hex()} {self.member}", length)

    # --- query.shares ----------------------------------------------------------------------------

    def _share(self, adverts: tuple[Advert, ...]) -> tuple[State, list[ClientEvent]]:
        """Deals shares of the two secrets to the neighbours in the cohort."""
        state, plan = self._state, self.plan
        members = tuple(advert.member for advert in adverts)
        _require_sorted("adverts", members)
        cohort, _ = form_cohort(plan, adverts, self._pins.roster)
        if cohort.adverts.get(self.member) != state.own:
            raise ProtocolError(
                f"the cohort does not hold the advert that member {self.member} sent"
            )
        self._policy.check_cohort(plan, cohort.adverts)
        _require_no_overflow(plan, len(cohort))
        bundle = deal(
            cohort,
            self._identity,
            Secrets(state.channel, state.mask, state.seed),
            entropy=lambda use, length: self._secret(plan, use, length),
        )
        self._cohort = cohort
        kept = tuple(cohort.adverts.values())
        return replace(state, phase=Phase.SHARED.value, adverts=kept), [bundle]

    # --- train.masked ----------------------------------------------------------------------------

    def _take_shares(self, event: SharesDelivered) -> State:
        """Opens the packages, and learns the mask with each neighbour in the share set."""
        state, cohort = self._state, self._formed()
        dealers = frozenset(event.dealers)
        _require_sorted("share set", event.dealers)
        if self.member not in dealers or not dealers <= cohort.adverts.keys():
            raise ProtocolError(
                f"the share set must hold member {self.member} and members of the cohort alone"
            )
        self._policy.check_live(self.plan, cohort.graph, dealers)
        channel, mask = (cohort.exchange.load(key) for key in (state.channel, state.mask))
        taking = Taking(cohort, self._pins.roster, self.member, channel, mask)
        taken = taking.take(event)
        return replace(
            state,
            phase=Phase.READY.value,
            dealers=event.dealers,
            held=taken.held,
            pairs=taken.pairs,
            complaints=tuple(taken.complaints),
            channel=bytearray(),
            mask=bytearray(),
        )

    def _mask(self, event: UpdateReady) -> tuple[State, list[ClientEvent]]:
        """Adds the self mask, and a pairwise mask for each neighbour in the share set."""
        state, cohort = self._state, self._formed()
        layout = VectorLayout.of(self.plan)
        if event.words.shape != (layout.length,) or event.words.dtype != layout.dtype:
            raise ProtocolError(
                f"the update must have ({layout.length},) words of {layout.dtype}, got "
                f"{event.words.shape} of {event.words.dtype}"
            )
        words = event.words.copy()
        add_masks(words, self._masks(cohort))
        unsigned = MaskedUpdate(self.member, words, b"", state.complaints)
        message = masked_bytes(cohort.scope, state.dealers, unsigned)
        masked = replace(unsigned, signature=self._identity.sign(message))
        return replace(state, phase=Phase.MASKED.value, pairs={}), [masked]

    def _masks(self, cohort: Cohort) -> list[Mask]:
        state, me = self._state, self.member
        pairwise = [Mask(bytes(key), negative=me > peer) for peer, key in state.pairs.items()]
        return [self_mask(state.seed, cohort.scope, me), *pairwise]

    # --- query.consistency and query.unmask ------------------------------------------------------

    def _sign(self, event: SurvivorsProposed) -> tuple[State, list[ClientEvent]]:
        """Signs the one survivor set of this attempt, or leaves it if this client is not in it."""
        state, cohort = self._state, self._formed()
        _require_sorted("survivor set", event.survivors)
        survivors = frozenset(event.survivors)
        if event.dealers != state.dealers or not survivors <= frozenset(state.dealers):
            raise ProtocolError("the survivor set is not of the share set that the masks follow")
        if self.member not in survivors:
            return replace(state.without_secrets(), phase=Phase.EXCLUDED.value), []
        self._policy.check_live(self.plan, cohort.graph, survivors)
        message = survivors_bytes(cohort.scope, event.dealers, event.survivors)
        signature = SurvivorSignature(self.member, self._identity.sign(message))
        return replace(state, phase=Phase.SIGNED.value, survivors=event.survivors), [signature]

    def _unmask(self, event: UnmaskRequested) -> tuple[State, list[ClientEvent]]:
        """Reveals one secret's share of each owner, once enough of the cohort signed one set."""
        state, cohort = self._state, self._formed()
        message = survivors_bytes(cohort.scope, state.dealers, state.survivors)
        # A bad signature is not counted and harms no one else's.
        valid = sum(
            member in cohort.adverts
            and verify_public(self._pins.roster.identity(member), signature, message)
            for member, signature in event.signatures.items()
        )
        needed = self._policy.quorum(cohort.adverts)
        if valid < needed:
            raise ProtocolError(
                f"{valid} members of {len(cohort)} signed this survivor set, {needed} must have"
            )
        reply = self._reply(cohort)
        return replace(state.without_secrets(), phase=Phase.DONE.value), [reply]

    def _reply(self, cohort: Cohort) -> UnmaskReply:
        state, survivors = self._state, frozenset(self._state.survivors)
        shares = {owner: halves(package) for owner, package in state.held.items()}
        unsigned = UnmaskReply(
            member=self.member,
            seed_shares={owner: share[0] for owner, share in shares.items() if owner in survivors},
            key_shares={
                owner: share[1] for owner, share in shares.items() if owner not in survivors
            },
            own_seed=bytes(state.seed),
            signature=b"",
        )
        message = reply_bytes(cohort.scope, state.survivors, unsigned)
        return replace(unsigned, signature=self._identity.sign(message))

    def _formed(self) -> Cohort:
        """The cohort, formed again after a load."""
        if self._cohort is None:
            self._cohort = Cohort(
                self.plan, {advert.member: advert for advert in self._state.adverts}
            )
        return self._cohort


def _require_no_overflow(plan: RoundPlan, members: int) -> None:
    try:
        require_no_overflow(plan, members)
    except UsageError as error:  # of a plan that came from a server
        raise RefusedByPolicy(str(error), hint=error.hint) from None


def _require_sorted(name: str, members: tuple[int, ...]) -> None:
    if list(members) != sorted(set(members)):
        raise ProtocolError(f"the {name} must be sorted and name each member once")
