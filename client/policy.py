"""What a client insists on, whatever a server says.

Each floor is local: no plan and no message can lower one (rules 1, 3 and 6 of the protocol's
specification). A check that fails raises `RefusedByPolicy`, before anything is sent.

Guaranteed to an owner whose policy holds, against an active server and at most `corrupt` members of
the roster that work with it: the server learns the sum over at least `floor` honest members, and
nothing else of the owner's vector. Not guaranteed: that a sum over few says little. Membership in a
sum of ten can still be guessed well (AUC .71), so the default floor is twenty.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fedoppu.common.agreed import range_bounds
from fedoppu.common.config import require
from fedoppu.common.errors import RefusedByPolicy, UsageError
from fedoppu.common.graph import Graph, is_complete
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.thresholds import allowed_drops, least_threshold, quorum

SMALLEST_COHORT = 4  # outside a simulation
HONEST_FLOOR = 20


@dataclass(frozen=True)
class LastRound:
    """What a client remembers of the last attempt that it sent keys for; stored before they go out.

    Attributes:
        run_id: Of its plan.
        round: Of its plan.
        attempt: Of its plan.
        answered: Whether an unmask reply was made: then no other attempt at that round is taken.
        value_range: Of its plan.
    """

    run_id: str
    round: int
    attempt: int
    answered: bool
    value_range: float

    @classmethod
    def of(cls, plan: RoundPlan, *, answered: bool) -> "LastRound":
        """The memory of an attempt."""
        return cls(plan.run_id, plan.round, plan.attempt, answered, plan.value_range)


@dataclass(frozen=True)
class ClientPolicy:
    """The owner's word. Every field but `young` is a setting of the owner's.

    Attributes:
        floor: Fewest honest members in a cohort and among survivors, at least 2.
        corrupt: Members of the roster that are assumed corrupt; all may be in a cohort. Whoever
            rolls back a disk counts among them, known or not.
        max_drop: Largest share of a cohort that may be missing from a survivor set, 0 to .5.
        least_threshold: t must be more than this share of an owner's holders.
        range_change: The range may change by at most this factor for each round since the last.
        difference_floor: The survivor sets of two rounds of a task are equal, or at least so many
            honest members are in one of them alone; 0 asks for nothing.
        same_model: Whether a second round, of any run, is answered from a model that was answered
            for already. It reveals the difference of two nearly equal sums.
        config_hash: Hex, SHA-256 of the one config that the owner consented to; empty to take the
            first that comes.
        roster_growth: Most newcomers of an epoch, as a share of the epoch before; at least one
            unless it is 0.
        epoch_hours: Fewest hours between two epochs that this client countersigns. Without it
            neither growth nor age would be a bound: epochs cost nobody anything.
        young_epochs: Members enrolled fewer epochs ago than this count as corrupt too.
        young: Those members of the roster in use.
        simulation: Whether all clients are virtual: then cohorts below 4 are taken.

    Raises:
        UsageError: A value is out of range, or a floor below 4 is asked for outside a simulation.
    """

    floor: int = HONEST_FLOOR
    corrupt: int = 1
    max_drop: float = 0.3
    least_threshold: float = 0.5
    range_change: float = 16.0
    difference_floor: int = 0
    same_model: bool = False
    config_hash: str = ""
    roster_growth: float = 0.25
    epoch_hours: float = 24.0
    young_epochs: int = 2
    young: frozenset[int] = frozenset()
    simulation: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("policy.floor", self.floor, 2)
        require("policy.corrupt", self.corrupt, 0)
        require("policy.max_drop", self.max_drop, 0, 0.5)
        require("policy.least_threshold", self.least_threshold, 0.5, 1)
        require("policy.range_change", self.range_change, 1)
        require("policy.difference_floor", self.difference_floor, 0)
        require("policy.roster_growth", self.roster_growth, 0, 1)
        require("policy.epoch_hours", self.epoch_hours, 0)
        require("policy.young_epochs", self.young_epochs, 0)
        if not self.simulation and self.floor + self.corrupt < SMALLEST_COHORT:
            raise UsageError(
                f"policy.floor + policy.corrupt must be at least {SMALLEST_COHORT} outside a "
                f"simulation, got {self.floor + self.corrupt}"
            )

    @classmethod
    def for_roster(cls, size: int) -> "ClientPolicy":
        """The default on a device: a tenth of the roster, and at least one, is assumed corrupt."""
        return cls(corrupt=max(1, size // 10))

    @classmethod
    def for_simulation(cls) -> "ClientPolicy":
        """Virtual clients: the least floors that still exercise the protocol."""
        return cls(floor=2, corrupt=0, max_drop=0.5, epoch_hours=0, simulation=True)

    def corrupt_in(self, members: Collection[int]) -> int:
        """How many of these members are assumed corrupt, at most all: `corrupt`, and the young."""
        return min(len(members), self.corrupt + len(self.young.intersection(members)))

    def check_config(self, config_hash: str) -> None:
        """Whether this is the config that the owner consented to, if that was only one.

        Raises:
            RefusedByPolicy: It is another.
        """
        if self.config_hash not in ("", config_hash):
            raise RefusedByPolicy(
                f"the server's config is {config_hash[:12]}, the owner consented to "
                f"{self.config_hash[:12]} alone",
                hint="read the config, and consent to its hash to take part",
            )

    def check_plan(self, plan: RoundPlan, last: LastRound | None) -> None:
        """Whether a plan may follow the last one.

        The range moves by `range_change` a round, for as many rounds as were missed: whoever was
        away must not be locked out. So a server that jumps rounds has the whole interval of
        `range_bounds`, and no more. It gains nothing against one victim: the range is in the
        context, and a cohort has one.

        Raises:
            RefusedByPolicy: It is for an attempt that was taken or answered, or it moves the range
                too far. The clip bound is the config's, which is checked before.
        """
        _require_sane(plan)
        if last is None:
            return
        same = plan.run_id == last.run_id
        if same:
            _require_succession(plan, last)
        # another run begins with the range of the config or of the run that it goes on from
        rounds = plan.round - last.round if same else plan.round
        most = _power(self.range_change, max(rounds, 1))
        if not last.value_range / most <= plan.value_range <= last.value_range * most:
            raise RefusedByPolicy(
                f"the plan's value_range is {plan.value_range:g}, the last was "
                f"{last.value_range:g}: a plan may change it by a factor of at most {most:g}"
            )

    def check_cohort(self, plan: RoundPlan, members: Collection[int]) -> None:
        """Whether a cohort is large enough, and its thresholds are high enough.

        Raises:
            RefusedByPolicy: It is smaller than the floor or the plan's own; or t or k is too low.
        """
        size, corrupt = len(members), self.corrupt_in(members)
        self._require_floor("cohort", size, corrupt)
        if size < plan.min_cohort:
            raise RefusedByPolicy(
                f"the cohort has {size} members, the plan's min_cohort is {plan.min_cohort}"
            )
        ring = not is_complete(size, plan.neighbours)
        if ring and plan.neighbours % 2:
            raise RefusedByPolicy(f"the plan's neighbours must be even, got {plan.neighbours}")
        holders = plan.neighbours if ring else size
        safe = least_threshold(size, plan.neighbours, corrupt)
        least = max(safe, int(holders * self.least_threshold) + 1)
        if not least <= plan.threshold <= holders:
            raise RefusedByPolicy(
                f"the plan's threshold is {plan.threshold}; with {holders} holders and "
                f"{corrupt} corrupt members it must be between {least} and {holders}"
            )

    def check_live(self, plan: RoundPlan, graph: Graph, live: frozenset[int]) -> None:
        """Whether the members that are left, dealers or survivors, are enough.

        Raises:
            RefusedByPolicy: Too many dropped, too few are left, or one of them keeps fewer live
                holders of its shares than the threshold.
        """
        size = len(graph.members)
        missing = size - len(live)
        most = min(plan.max_drops, allowed_drops(size, self.max_drop))
        if missing > most:
            raise RefusedByPolicy(
                f"{missing} of {size} members are missing, at most {most} may be: a server could "
                "choose the drops"
            )
        if len(live) < plan.min_cohort:  # distributed noise counts on so many
            raise RefusedByPolicy(
                f"{len(live)} members are left, the plan's min_cohort is {plan.min_cohort}"
            )
        self._require_floor("survivor set", len(live), self.corrupt_in(live))
        for member in sorted(live):
            holders = graph.live_holders(member, live)
            if holders < plan.threshold:
                raise RefusedByPolicy(
                    f"member {member} keeps {holders} live holders of its shares, the threshold "
                    f"is {plan.threshold}"
                )

    def check_sealed(self, plan: RoundPlan) -> None:
        """What of a two-server plan takes the place of cohort and survivor set, which are not shown.

        `check_plan` holds for it too. As nobody shows this client the set, all young members of the
        roster may be in it. That the helper keeps to the plan's least set is its operator's word:
        this mode needs one honest of the two, and its key comes with the config: whoever takes the
        first config that comes takes the server's word for who the other one is.

        Raises:
            RefusedByPolicy: The owner consented to no config, or the helper may answer for fewer
                than the floor of honest members, or the owner asks for a difference of survivor
                sets that nobody shows this client.
        """
        if not (self.simulation or self.config_hash):
            raise RefusedByPolicy(
                "two-server rounds stand on the helper's key in the config, and this client's owner "
                "consented to no config",
                hint="read the config, compare the helper's key with its operator's word, and "
                "consent to the config's hash",
            )
        least = plan.min_cohort
        self._require_floor("helper's set", least, min(least, self.corrupt + len(self.young)))
        if self.difference_floor:
            raise RefusedByPolicy(
                f"policy.difference_floor is {self.difference_floor}, but two-server rounds show "
                "their survivors to no client",
                hint="join a federation with secagg.mode=graph, or set it to 0",
            )

    def check_difference(
        self, survivors: Collection[int], earlier: Iterable[Collection[int]]
    ) -> None:
        """Whether a survivor set equals each earlier one, or differs by enough honest members.

        Raises:
            RefusedByPolicy: It nearly equals one: the difference of the two sums is the sum over
                few (apart from what the model changed in between).
        """
        for before in earlier:
            apart = set(survivors).symmetric_difference(before)
            honest = len(apart) - self.corrupt_in(apart)
            if apart and honest < self.difference_floor:
                raise RefusedByPolicy(
                    f"the survivor set differs from an earlier one by {len(apart)} members, "
                    f"{honest} of them honest; this client's difference_floor is "
                    f"{self.difference_floor}",
                    hint="draw cohorts that are the same or far apart; only the owner can lower it",
                )

    def quorum(self, members: Collection[int]) -> int:
        """Signatures over one survivor set that this client needs before it reveals anything."""
        return quorum(len(members), self.corrupt_in(members))

    def _require_floor(self, what: str, size: int, corrupt: int) -> None:
        honest = size - corrupt
        if honest < self.floor or (not self.simulation and size < SMALLEST_COHORT):
            raise RefusedByPolicy(
                f"a {what} of {size} has {honest} honest members if {corrupt} are corrupt; "
                f"this client's floor is {self.floor}",
                hint="join a larger federation; only the owner can lower the floor",
            )


def _power(base: float, exponent: int) -> float:
    """A power, infinite where floats end."""
    try:
        return base**exponent
    except OverflowError:
        return float("inf")


def _require_sane(plan: RoundPlan) -> None:
    """Bounds that hold for every plan, so that nothing later divides or shifts by nonsense."""
    positive = {
        "round": plan.round,
        "num_params": plan.num_params,
        "max_weight": plan.max_weight,
        "threshold": plan.threshold,
        "neighbours": plan.neighbours,
        "min_cohort": plan.min_cohort,
    }
    for name, value in positive.items():
        if value < 1:
            raise RefusedByPolicy(f"the plan's {name} must be at least 1, got {value}")
    if plan.word_bits not in (16, 32) or not 2 <= plan.level_bits <= plan.word_bits - 2:
        raise RefusedByPolicy(
            f"the plan's words must have 16 or 32 bits and its levels 2 to two fewer, got "
            f"{plan.word_bits} and {plan.level_bits}"
        )
    if not (0 < plan.clip < float("inf") and 0 < plan.value_range < float("inf")):
        raise RefusedByPolicy(
            f"the plan's clip and value_range must be positive and finite, got {plan.clip:g} and "
            f"{plan.value_range:g}"
        )
    finest, coarsest = range_bounds(plan.clip)
    if not finest <= plan.value_range <= coarsest:
        raise RefusedByPolicy(
            f"the plan's value_range is {plan.value_range:g}, it must be between {finest:g} and "
            f"{coarsest:g}: 2 ** 24 around the clip bound"
        )


def _require_succession(plan: RoundPlan, last: LastRound) -> None:
    if (plan.round, plan.attempt) <= (last.round, last.attempt):
        raise RefusedByPolicy(
            f"round {plan.round} attempt {plan.attempt} is not after round {last.round} attempt "
            f"{last.attempt}, which this client took"
        )
    if plan.round == last.round and last.answered:
        raise RefusedByPolicy(
            f"round {plan.round} was answered at attempt {last.attempt}; a second sum over nearly "
            "the same members would reveal the difference"
        )
