"""How a client follows a roster from the epoch that its owner pinned, and what a restored vault starts with.

Guarantee (spec of secure aggregation, rule 13): this client uses an epoch only if it follows the one
before by the rules of `common/epochs.py`, members of the one before countersigned it, it grew by
no more than the owner allows, and a round lies between its announcement to this client and its
first use. It countersigns one epoch per number, which is stored before the signature exists, and
one in so many hours: a chain that honest members must sign grows no faster than most of their
clocks let it. Members that joined a short while ago count as corrupt.

A vault that is restored from a backup enrols anew: protocol state is in no backup, because one that
is rolled back would answer a round twice. Its old identity is to be revoked, it gets a new index,
and `restored` charges it for all that the old one may have spent.

Not guaranteed: those hours, where a server sets this device's clock. Nor the round in between, where
a server begins a run that this client never saw: there the newest epoch holds from the first round.
What a client sees before is the announcement alone.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedoppu.client.ledger import VaultLedger
from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.vault import StateStore
from fedoppu.common.accounting import gaussian_epsilon
from fedoppu.common.config import FederationConfig
from fedoppu.common.epochs import (
    EpochAnswer,
    RosterEpoch,
    countersign,
    countersigners,
    require_authority,
    require_successor,
)
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.plain import dump_plain, load_plain
from fedoppu.common.roster import Roster
from fedoppu.common.signing import Identity
from fedoppu.common.thresholds import allowed_drops

CHAIN, COUNTERSIGNED = "chain", "countersigned"


@dataclass(frozen=True)
class Link:
    """An epoch that was accepted, and where the client stood then.

    Attributes:
        epoch: The epoch.
        run_id: Run of the last attempt that this client had sent keys for; empty if none.
        round: Its round.
    """

    epoch: RosterEpoch
    run_id: str = ""
    round: int = 0

    def holds(self, run_id: str, round: int) -> bool:
        """Whether a round uses this epoch, or one before it.

        A client that heard late of an epoch starts to use it late, and is not locked out.
        """
        announced = run_id != self.epoch.run_id or round >= self.epoch.first_round
        return announced and (run_id != self.run_id or round >= self.round + 2)


@dataclass(frozen=True)
class Chain:
    """Epochs in their order: the one in use, and those that were announced for later rounds."""

    links: tuple[Link, ...]

    @property
    def newest(self) -> RosterEpoch:
        """The epoch that the next one must follow."""
        return self.links[-1].epoch

    def at(self, run_id: str, round: int) -> RosterEpoch:
        """The newest epoch that holds for a round.

        Raises:
            RefusedByPolicy: None does yet.
        """
        for link in reversed(self.links):
            if link.holds(run_id, round):
                return link.epoch
        raise RefusedByPolicy(
            f"roster epoch {self.newest.number}, which this client pins, does not hold before round "
            f"{self.newest.first_round}",
            hint="wait for that round",
        )


@dataclass(frozen=True)
class Countersigned:
    """The last epoch that was countersigned.

    Attributes:
        number: Its number.
        digest: Its hash.
        time: When, seconds since 1970 by this device's clock.
    """

    number: int
    digest: bytes
    time: float


def check_growth(before: RosterEpoch, epoch: RosterEpoch, policy: ClientPolicy) -> None:
    """Refuses an epoch with more newcomers than the owner allows.

    Raises:
        RefusedByPolicy: It enrols too many at once.
    """
    size = len(before.members)
    most = max(1, allowed_drops(size, policy.roster_growth)) if policy.roster_growth else 0
    if len(epoch.newcomers) > most:
        raise RefusedByPolicy(
            f"roster epoch {epoch.number} adds {len(epoch.newcomers)} members to {size}, this "
            f"client takes {most} (policy.roster_growth is {policy.roster_growth:g})",
            hint="spread them over several epochs",
        )


def is_countersigned(before: RosterEpoch, epoch: RosterEpoch, policy: ClientPolicy) -> bool:
    """Whether more than (m + c) / 2 of the m members before countersigned, c with the young."""
    needed = for_epoch(policy, before).quorum(before.members)
    return len(countersigners(before, epoch)) >= needed


def follow(pin: RosterEpoch, epoch: RosterEpoch, policy: ClientPolicy) -> RosterEpoch:
    """The epoch, if a client that pins the one before may go on to it.

    Raises:
        ProtocolError: It is not the next of this chain.
        RefusedByPolicy: It grows too fast, or too few members countersigned.
    """
    require_successor(pin, epoch)
    check_growth(pin, epoch, policy)
    if not is_countersigned(pin, epoch, policy):
        raise RefusedByPolicy(
            f"{len(countersigners(pin, epoch))} of {len(pin.members)} members countersigned roster "
            f"epoch {epoch.number}, {for_epoch(policy, pin).quorum(pin.members)} must have"
        )
    return epoch


def for_epoch(policy: ClientPolicy, epoch: RosterEpoch) -> ClientPolicy:
    """The policy with the young members of this epoch, who count as corrupt."""
    return replace(policy, young=epoch.young(policy.young_epochs))


@dataclass(frozen=True)
class Enrolment:
    """A member's memory of its federation's roster.

    Attributes:
        store: Where it is kept: the member's protocol state.
        clock: Seconds since 1970.
    """

    store: StateStore = field(repr=False)
    clock: Callable[[], float] = field(default=time.time, repr=False)

    @property
    def chain(self) -> Chain | None:
        """What was accepted; None where the owner pinned a roster without epochs."""
        data = self.store.get(CHAIN)
        return load_plain(Chain, data) if data else None

    def begin(self, anchor: RosterEpoch, digest: str) -> None:
        """Pins the epoch that this client begins with.

        Args:
            anchor: The epoch, from whomever.
            digest: Hex, its hash as the owner got it out of band: the root of all trust.

        Raises:
            ProtocolError: It has another hash, or its authority did not sign it.
            RefusedByPolicy: An epoch is pinned already.
        """
        if anchor.digest.hex() != digest:
            raise ProtocolError(
                f"roster epoch {anchor.number} has hash {anchor.digest.hex()[:12]}, the owner "
                f"pinned {digest[:12]}"
            )
        require_authority(anchor)
        if self.chain is not None:
            raise RefusedByPolicy(
                "this client follows a roster already",
                hint="another roster is another federation: join it anew",
            )
        self._put(Chain((Link(anchor),)))

    def consider(
        self,
        epoch: RosterEpoch,
        identity: Identity,
        policy: ClientPolicy,
        *,
        last: LastRound | None,
    ) -> EpochAnswer:
        """Follows an epoch that has its countersignatures, or countersigns one that has not.

        Args:
            epoch: As it was announced.
            identity: This member's signing key.
            policy: The owner's.
            last: The last attempt that this client sent keys for.

        Raises:
            ProtocolError: It is not the next of this client's chain, or holds too soon.
            RefusedByPolicy: The owner's limits forbid it, or another one was countersigned.
        """
        chain = self.chain
        if chain is None:
            raise RefusedByPolicy("this client's owner pinned a roster that has no epochs")
        before, followed = chain.newest, EpochAnswer(identity.member, epoch.number, b"")
        if epoch.digest in {link.epoch.digest for link in chain.links}:
            return followed
        require_successor(before, epoch)
        check_growth(before, epoch, policy)
        if is_countersigned(before, epoch, policy):
            self._accept(chain, epoch, last)
            return followed
        _require_notice(epoch, last)
        self._remember(epoch, policy)
        return replace(followed, countersignature=countersign(epoch, identity))

    def _accept(self, chain: Chain, epoch: RosterEpoch, last: LastRound | None) -> None:
        """Stores the epoch; those before the one of the last attempt are needed no more."""
        link = Link(epoch, last.run_id, last.round) if last else Link(epoch)
        links = chain.links
        if last is not None:
            used = chain.at(last.run_id, last.round)
            links = tuple(one for one in links if one.epoch.number >= used.number)
        self._put(Chain((*links, link)))

    def _remember(self, epoch: RosterEpoch, policy: ClientPolicy) -> None:
        """Stores what is about to be countersigned."""
        data, now = self.store.get(COUNTERSIGNED), self.clock()
        known = load_plain(Countersigned, data) if data else None
        if known and known.digest == epoch.digest:
            return
        if known and known.number == epoch.number:
            raise RefusedByPolicy(
                f"this client countersigned another roster epoch {epoch.number}, "
                f"{known.digest.hex()[:12]}: two would fork the roster",
                hint="the authority completes the epoch that it proposed first",
            )
        if known and now < known.time + policy.epoch_hours * 3600:
            raise RefusedByPolicy(
                f"this client countersigned roster epoch {known.number} less than "
                f"{policy.epoch_hours:g} hours ago (policy.epoch_hours)",
                hint="propose one epoch for all changes of a day, or wait",
            )
        self.store.put(COUNTERSIGNED, dump_plain(Countersigned(epoch.number, epoch.digest, now)))

    def _put(self, chain: Chain) -> None:
        self.store.put(CHAIN, dump_plain(chain))

    def standing(
        self, pinned: tuple[Roster, ClientPolicy], run_id: str, round: int
    ) -> tuple[Roster, ClientPolicy]:
        """Roster and policy for one round: what was pinned, where there are no epochs.

        Args:
            pinned: The owner's roster and policy.
            run_id: Hex, of the run.
            round: From 1.

        Raises:
            RefusedByPolicy: The epoch that this client pins does not hold yet.
        """
        chain = self.chain
        if chain is None:
            return pinned
        epoch = chain.at(run_id, round)
        return epoch.roster, for_epoch(pinned[1], epoch)


def _require_notice(epoch: RosterEpoch, last: LastRound | None) -> None:
    """A whole round lies between the last one that this client knows and the first of the epoch."""
    known = last.round if last and last.run_id == epoch.run_id else 0
    if epoch.run_id and epoch.first_round < known + 2:
        raise ProtocolError(
            f"roster epoch {epoch.number} holds from round {epoch.first_round}, but round {known} "
            "was the last: an epoch is announced at least one round before it holds"
        )


# --- a restored vault ----------------------------------------------------------------------------


def restored(
    ledger: VaultLedger, config: FederationConfig, *, rounds: int, delta: float = 1e-5
) -> float:
    """Charges a restored vault as if its owner had taken part in every round of a federation so far.

    What the lost vault had spent is not known, and the owner is the same person under whatever
    index: the same history stands behind the vectors of both. Call it once for each federation
    that the owner ever joined, before the new vault's first round.

    A member is unmasked at most once a round, so a round is charged once, whatever its attempts.
    Not covered: a server that broke the thresholds of its config. It may have cost the lost vault
    more, but no more than that one's budget allowed.

    Args:
        ledger: Of the new vault.
        config: Of the federation.
        rounds: Rounds of all its runs until now, at least 0; where that is not known, as many as
            there can have been.
        delta: At which the charge is told.

    Returns:
        Epsilon of the charge, by itself; 0 where the federation adds no noise. Such rounds are not
        charged to any vault, because nothing bounds what they say.

    Raises:
        RefusedByPolicy: Nothing bounds the charge: the config names no noise multiplier, or with so
            many corrupt members the noise of the others may have been none.
    """
    privacy = config.privacy
    if privacy.mechanism == "none":
        return 0.0
    parts = math.ceil(rounds / privacy.separation) if privacy.mechanism == "dp_ftrl" else rounds
    epsilon = gaussian_epsilon(_least_multiplier(config, ledger.corrupt), parts, delta)
    if epsilon > 0:
        ledger.burden(epsilon, delta)
    return epsilon


def _least_multiplier(config: FederationConfig, corrupt: int) -> float:
    privacy = config.privacy
    if privacy.noise_multiplier is None:
        raise RefusedByPolicy(
            "the federation's config names no privacy.noise_multiplier, so nothing bounds what a "
            "lost vault may have spent",
            hint="ask for the config that its rounds were run with",
        )
    share = _honest_share(config, corrupt) if privacy.mechanism == "distributed" else 1.0
    return privacy.noise_multiplier * math.sqrt(share)


def _honest_share(config: FederationConfig, corrupt: int) -> float:
    """Share of the promised variance that is surely there, in whatever cohort there was.

    Of a smallest cohort of m, m - corrupt add noise where m - assumed were counted on. If more are
    corrupt than assumed, that is least for the least m; if fewer are, it tends to 1 from above.
    """
    floor, assumed = config.thresholds.floor, config.thresholds.corrupt
    if floor + assumed <= corrupt:
        raise RefusedByPolicy(
            f"the noise of a cohort of {floor + assumed} is not bounded if {corrupt} members of it "
            "are corrupt",
            hint="lower the ledger's corrupt, or give the new vault no budget to keep",
        )
    return min(1.0, (floor + assumed - corrupt) / floor)
