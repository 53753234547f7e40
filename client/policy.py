"""What a client insists on, whatever a server says.

Each floor is local: no plan and no message can lower one (rules 1, 3 and 6 of the protocol's
specification). A check that fails raises `RefusedByPolicy`, before anything is sent.

Guaranteed to an owner whose policy holds, against an active server and at most `corrupt` members of
the roster that work with it: the server learns the sum over at least `floor` honest members, and
nothing else of the owner's vector. Not guaranteed: that a sum over few says little. Membership in a
sum of ten can still be guessed well (AUC .71), so the default floor is twenty.
"""

from dataclasses import dataclass

from fedoppu.common.config import require
from fedoppu.common.errors import RefusedByPolicy, UsageError
from fedoppu.common.graph import Graph, is_complete
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.thresholds import allowed_drops, least_threshold, quorum

SMALLEST_COHORT = 4  # outside a simulation
HONEST_FLOOR = 20
MOST_MISSED = 32  # rounds, for the bound of range_change


@dataclass(frozen=True)
class LastRound:
    """What a client remembers of the last attempt that it sent keys for; stored before they go out.

    Attributes:
        run_id: Of its plan.
        round: Of its plan.
        attempt: Of its plan.
        answered: Whether an unmask reply was made: then no other attempt at that round is taken.
        clip: Of its plan.
        value_range: Of its plan.
    """

    run_id: str
    round: int
    attempt: int
    answered: bool
    clip: float
    value_range: float

    @classmethod
    def of(cls, plan: RoundPlan, *, answered: bool) -> "LastRound":
        """The memory of an attempt."""
        where = (plan.run_id, plan.round, plan.attempt)
        return cls(*where, answered, plan.clip, plan.value_range)


@dataclass(frozen=True)
class ClientPolicy:
    """The owner's floors.

    Attributes:
        floor: Fewest honest members in a cohort and among survivors, at least 2.
        corrupt: Members of the roster that are assumed corrupt; all may be in a cohort.
        max_drop: Largest share of a cohort that may be missing from a survivor set, 0 to .5.
        least_threshold: t must be more than this share of an owner's holders.
        range_change: Clip bound and range may change by at most this factor a round.
        simulation: Whether all clients are virtual: then cohorts below 4 are taken.

    Raises:
        UsageError: A value is out of range, or a floor below 4 is asked for outside a simulation.
    """

    floor: int = HONEST_FLOOR
    corrupt: int = 1
    max_drop: float = 0.3
    least_threshold: float = 0.5
    range_change: float = 4.0
    simulation: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("policy.floor", self.floor, 2)
        require("policy.corrupt", self.corrupt, 0)
        require("policy.max_drop", self.max_drop, 0, 0.5)
        require("policy.least_threshold", self.least_threshold, 0.5, 1)
        require("policy.range_change", self.range_change, 1)
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
        return cls(floor=2, corrupt=0, max_drop=0.5, simulation=True)

    def check_plan(self, plan: RoundPlan, last: LastRound | None) -> None:
        """Whether a plan may follow the last one.

        Raises:
            RefusedByPolicy: It is for an attempt that was taken or answered, or it moves the clip
                bound or the range too far.
        """
        _require_sane(plan)
        if last is None:
            return
        if plan.run_id == last.run_id:
            _require_succession(plan, last)
        # a client that was not asked for some rounds has missed as many changes
        rounds = plan.round - (last.round if plan.run_id == last.run_id else 0)
        most = self.range_change ** min(max(rounds, 1), MOST_MISSED)
        for name, now, before in (
            ("clip", plan.clip, last.clip),
            ("value_range", plan.value_range, last.value_range),
        ):
            if not before / most <= now <= before * most:
                raise RefusedByPolicy(
                    f"the plan's {name} is {now:g}, the last was {before:g}: a plan may change it "
                    f"by a factor of at most {most:g}"
                )

    def check_cohort(self, plan: RoundPlan, size: int) -> None:
        """Whether a cohort is large enough, and its thresholds are high enough.

        Raises:
            RefusedByPolicy: It is smaller than the floor or the plan's own; or t or k is too low.
        """
        self._require_floor("cohort", size)
        if size < plan.min_cohort:
            raise RefusedByPolicy(
                f"the cohort has {size} members, the plan's min_cohort is {plan.min_cohort}"
            )
        ring = not is_complete(size, plan.neighbours)
        if ring and plan.neighbours % 2:
            raise RefusedByPolicy(f"the plan's neighbours must be even, got {plan.neighbours}")
        holders = plan.neighbours if ring else size
        safe = least_threshold(size, plan.neighbours, self.corrupt)
        least = max(safe, int(holders * self.least_threshold) + 1)
        if not least <= plan.threshold <= holders:
            raise RefusedByPolicy(
                f"the plan's threshold is {plan.threshold}; with {holders} holders and "
                f"{self.corrupt} corrupt members it must be between {least} and {holders}"
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
        self._require_floor("survivor set", len(live))
        for member in sorted(live):
            holders = graph.live_holders(member, live)
            if holders < plan.threshold:
                raise RefusedByPolicy(
                    f"member {member} keeps {holders} live holders of its shares, the threshold "
                    f"is {plan.threshold}"
                )

    def quorum(self, size: int) -> int:
        """Signatures over one survivor set that this client needs before it reveals anything."""
        return quorum(size, self.corrupt)

    def _require_floor(self, what: str, size: int) -> None:
        honest = size - min(size, self.corrupt)
        if honest < self.floor or (not self.simulation and size < SMALLEST_COHORT):
            raise RefusedByPolicy(
                f"a {what} of {size} has {honest} honest members if {self.corrupt} are corrupt; "
                f"this client's floor is {self.floor}",
                hint="join a larger federation; only the owner can lower the floor",
            )


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
