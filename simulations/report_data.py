"""What a report is made of, and what it may claim.

A finding is a claim with the interval that decides it: shown if the interval leaves zero out on the
right side, against if on the wrong side, else open. An open finding is printed like the others:
nothing is left out because it failed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedoppu.simulations.panels import ALL, Unit
from fedoppu.simulations.table import Row, Table

State = Literal["shown", "open", "against"]


@dataclass(frozen=True)
class RoundPoint:
    """One committed round of a shared phase.

    Attributes:
        federation: Names the line, for example "LaMP_2N k=0 profile=none seed=0".
        round: From 1.
        held_out_loss: Federated mean, nats per answer token; None if no member had held-out items.
        bytes_up: Of this round, all members together; None where the cohort is not published.
        bytes_down: Likewise.
        asked: Members in the cohort, likewise.
        dropped: Of them, without a part in the sum, likewise.
    """

    federation: str
    round: int
    held_out_loss: float | None
    bytes_up: int | None
    bytes_down: int | None
    asked: int | None
    dropped: int | None


@dataclass(frozen=True)
class Recall:
    """How many scored texts base users have too: the shared model may recall their answers.

    Attributes:
        task: LaMP's name.
        queries: That were scored.
        seen: Of them, texts that are in a base user's history.
        asked: Further ones, that are in a base user's query only.
    """

    task: str
    queries: int
    seen: int
    asked: int = 0


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        table: Rows and comparisons of all tasks.
        config: The resolved settings, YAML.
        command: The command line that gives the same numbers.
        rounds: Of all federations.
        lengths: Items in each user's own history.
        recalls: On data, one for each task; empty for generated users.
        costs: (what, how much), for people: parameters, seconds a user, memory.
        environment: (what, which): versions, processor, seeds.
        warnings: Switches that weaken a promise, and whatever failed.
        confidence: Of the intervals.
        plain_updates: Updates travelled in clear.
        privacy: What each federation spent, one line each; empty without differential privacy.
        generated: The users are generated, not data.
    """

    table: Table
    config: str
    command: str
    rounds: Sequence[RoundPoint] = ()
    lengths: Mapping[Unit, int] = field(default_factory=dict)
    recalls: Sequence[Recall] = ()
    costs: Sequence[tuple[str, str]] = ()
    environment: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    confidence: float = 0.95
    plain_updates: bool = False
    privacy: Sequence[str] = ()
    generated: bool = True


@dataclass(frozen=True)
class Finding:
    """A claim and the row that decides it."""

    claim: str
    row: Row
    state: State


@dataclass(frozen=True)
class Traffic:
    """Sums over the rounds of one federation, None where they are not published.

    The losses are the first and the last that are known.
    """

    federation: str
    rounds: int
    asked: int | None
    dropped: int | None
    bytes_up: int | None
    bytes_down: int | None
    first_loss: float | None
    last_loss: float | None


CLAIMS = (
    ("personal-shared", "A personal adapter is better than the shared adapter alone."),
    ("personal-wrong_user", "The effect is personal: one's own adapter is better than others'."),
    ("personal-prior_shift", "It knows more than how often a user gives each answer."),
    ("personal-population", "It is the user's own data, not more data, that helps."),
    ("shared-base", "The federation's shared adapter is better than the base."),
)
MASKED = (
    "A member's only message with model data is one masked vector of integers: a server that "
    "follows the protocol learns of the updates their sum, the total weight, the clamp count and the "
    "mean held-out loss, and who took part."
)
PRIVATE = (
    "Neither a shared adapter nor a figure of the shared phase was computed from an exact sum. "
    "The first epsilon bounds what whoever gets the adapters learns of one user's whole history, the "
    "others what members and the server learn beside it. They hold for the users' part in the shared "
    "phase, not for personal adapters or scores."
)
NO_PRIVACY = (
    "No differential privacy: the sums and the shared adapter may still reveal something about the "
    "members' texts."
)
SEED = (
    "The noise came from the seed: whoever knows the seed can take it off again. A deployed server "
    "and its clients take secrets of their own."
)
CONTENT = "It reads the text: permuting a user's answers makes them worse."


def headline(rows: Sequence[Row]) -> str:
    """The metric that findings and figures speak of: accuracy, MAE, or loss for generation.

    A small base writes poor text, so that ROUGE says less than the loss of the gold answer.
    """
    present = {row.metric for row in rows}
    if "mae" in present and rows[0].task != ALL:
        return "mae"
    return "accuracy" if "accuracy" in present else "loss"


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The claims that a cell's rows decide, in a fixed order."""
    metric = headline(rows)
    by_key = {(row.arm, row.control, row.metric): row for row in rows}
    found = [(claim, by_key.get((arm, None, metric))) for arm, claim in CLAIMS]
    found.insert(3, (CONTENT, by_key.get(("personal", None, "content_gain"))))
    return [
        Finding(claim, row, state_of(row)) for claim, row in found if row and row.low is not None
    ]


def state_of(row: Row) -> State:
    """Where a row's interval lies: right of zero, left of it, or over it."""
    if row.low is not None and row.low > 0:
        return "shown"
    return "against" if row.high is not None and row.high < 0 else "open"


def traffic(rounds: Sequence[RoundPoint]) -> list[Traffic]:
    """Sums the rounds of each federation, in the order of their first appearance."""
    lines: dict[str, list[RoundPoint]] = {}
    for point in rounds:
        lines.setdefault(point.federation, []).append(point)
    return [_sum(name, sorted(own, key=lambda point: point.round)) for name, own in lines.items()]


def _sum(name: str, points: Sequence[RoundPoint]) -> Traffic:
    losses = [point.held_out_loss for point in points if point.held_out_loss is not None]
    return Traffic(
        name,
        len(points),
        _total(point.asked for point in points),
        _total(point.dropped for point in points),
        _total(point.bytes_up for point in points),
        _total(point.bytes_down for point in points),
        losses[0] if losses else None,
        losses[-1] if losses else None,
    )


def _total(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def guaranteed(data: ReportData) -> list[str]:
    """What holds of this run, against whom."""
    promises = [
        "The personal phase sends nothing: personal adapters, indexes and profiles stay with "
        "their users.",
        "The same settings give the same numbers, for any number of worker processes, on the same "
        "machine and build.",
        "No adapter was trained on a scored query: queries are split off first. The same text may "
        "be in another user's history; on data the recall count says how often.",
    ]
    if data.plain_updates:
        return promises
    return [PRIVATE if data.privacy else MASKED, *promises]


def not_guaranteed(data: ReportData) -> list[str]:
    """What does not hold of this run."""
    limits = [
        SEED if data.privacy else NO_PRIVACY,
        "A simulation is one trusted process that holds all virtual users; only the messages are "
        "those of a deployment.",
        "Intervals cover the choice of users; they cover the randomness of training only as far "
        "as several seeds were run.",
        "Whoever holds a personal adapter may draw texts of its user from it.",
    ]
    if data.plain_updates:
        limits.insert(0, "Updates travelled in clear: whoever ran the server saw each of them.")
    if data.generated:
        limits.append(
            "The users are generated: a gain here shows that the method works where preferences "
            "exist, not how large it is for people."
        )
    return limits
