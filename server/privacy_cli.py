"""The `fedoppu privacy` command: what differential privacy would take, before a federation is begun."""

import math
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal

import typer

from fedoppu.common.cli import run_command
from fedoppu.common.config import PrivacySettings
from fedoppu.common.defaults import fitting_range
from fedoppu.common.merging import Settings, build, read_dotlist
from fedoppu.common.privacy import Adjacency
from fedoppu.common.setting_checks import check_settings
from fedoppu.server.metrics import rounded_up
from fedoppu.server.privacy_plan import Federation, PrivacyPlan, plan_privacy

app = typer.Typer()

COUNTS = ("users", "cohort", "rounds", "parameters")
DEFAULT_EPSILON = 8.0
ADJACENCY: dict[Adjacency, str] = {
    "add_remove": "one user is in the federation, or not",
    "zero_out": "one user's updates, or zeros in their place",
}


@app.callback()
def privacy_options() -> None:
    """Differential privacy of the shared phase; the unit of privacy is one user."""


@app.command()
def plan(
    settings: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    output: Annotated[
        Literal["text", "json"],
        typer.Option("--format", help="json prints one object on standard output."),
    ] = "text",
) -> None:
    """Say which noise a federation needs, what that promises to whom, and whether a signal is left.

    Settings: users, cohort, rounds, parameters; epsilon or noise_multiplier, delta; mechanism
    (central, distributed, dp_ftrl), sampling (poisson, fixed), separation; and thresholds.floor,
    encoding.clip and so on, as for simulate. For example

    fedoppu privacy plan users=1000 cohort=100 rounds=100 parameters=10000 epsilon=8
    """

    def command() -> dict[str, Any]:
        federation = read_federation(settings or [])
        answer = plan_privacy(federation)
        if output == "text":
            typer.echo("\n".join(describe(federation, answer)))
        return as_plain(federation, answer)

    run_command(command, output)


# --- settings ------------------------------------------------------------------------------------


def read_federation(overrides: list[str]) -> Federation:
    """The federation that settings name; what they leave out has a default that fits the rest.

    Raises:
        UsageError: A key is unknown or a value cannot be.
    """
    given = _nested(read_dotlist(overrides))
    check_settings(Federation, given)
    federation = build(Federation, [given])
    named = given.get("privacy", {}).keys()
    privacy, encoding = federation.privacy, federation.encoding
    if "sampling" not in named and privacy.mechanism != "dp_ftrl":
        privacy = replace(privacy, sampling="poisson")
    if "separation" not in named and privacy.mechanism == "dp_ftrl":
        privacy = replace(privacy, separation=federation.users // federation.cohort)
    if not named & {"epsilon", "noise_multiplier"}:
        privacy = replace(privacy, epsilon=DEFAULT_EPSILON)
    if "value_range" not in given.get("encoding", {}):
        fitting = fitting_range(encoding.clip, federation.parameters)
        encoding = replace(encoding, value_range=fitting)
    return replace(federation, privacy=privacy, encoding=encoding)


def _nested(given: Settings) -> Settings:
    """epsilon=8 as privacy.epsilon=8, and 1e6 users as 1000000."""
    short = {item.name for item in fields(PrivacySettings)}
    nested = {key: value for key, value in given.items() if key not in short}
    privacy = {key: value for key, value in given.items() if key in short}
    if privacy:
        nested["privacy"] = {**nested.get("privacy", {}), **privacy}
    for name in COUNTS:
        value = nested.get(name)
        if isinstance(value, float) and value.is_integer():
            nested[name] = int(value)
    return nested


# --- what is printed -----------------------------------------------------------------------------


def as_plain(federation: Federation, answer: PrivacyPlan) -> dict[str, Any]:
    """The answer for machines; an infinite epsilon is null."""
    spent = {
        name: None if value == math.inf else value for name, value in asdict(answer.spent).items()
    }
    return {
        "federation": asdict(federation),
        **asdict(answer),
        "spent": spent,
        "fits": answer.fits,
        "survives": answer.survives,
    }


def describe(federation: Federation, answer: PrivacyPlan) -> Iterator[str]:
    """The answer for people, line by line."""
    privacy = federation.privacy
    yield (
        f"{federation.users:,} users, cohorts of {federation.cohort:,} ({privacy.sampling}), "
        f"{federation.rounds:,} rounds, {federation.parameters:,} parameters a round"
    )
    yield ""
    yield from _noise(federation, answer)
    yield ""
    yield from _epsilons(federation, answer)
    yield ""
    yield from _signal(federation, answer)


def _noise(federation: Federation, answer: PrivacyPlan) -> Iterator[str]:
    encoding, mechanism = federation.encoding, federation.privacy.mechanism
    yield _line(
        "noise", f"z = {answer.noise_multiplier:g} times the most that one user can change a sum by"
    )
    if mechanism == "distributed":
        yield _line("  each client", f"adds {_levels(answer.client_scale)} inside the masks")
    if mechanism == "distributed" and answer.amplified:
        total = _levels(answer.total_scale)
        yield _line("  the server", f"tops a sum up to {total}, so that it tells no cohort's size")
    elif mechanism == "distributed":
        yield _line("  in a sum", f"{_levels(answer.total_scale)}, if nobody drops")
    else:
        turns = federation.privacy.separation
        how = "" if mechanism == "central" else f", correlated over {turns} rounds, as turns are"
        yield _line("  the server", f"adds {_levels(answer.total_scale)} to a sum{how}")
    yield _line(
        "one user",
        f"at most {answer.sensitivity:,.0f} levels (clip {encoding.clip:g}, range "
        f"{encoding.value_range:g}, {encoding.level_bits} bits, rounding included)",
    )
    share = answer.used_values / answer.word_values
    verdict = "no overflow" if answer.fits else "OVERFLOW: use more word_bits or fewer level_bits"
    yield _line("words", f"sums and noise take {share:.2%} of {encoding.word_bits} bits: {verdict}")


def _epsilons(federation: Federation, answer: PrivacyPlan) -> Iterator[str]:
    spent, privacy = answer.spent, federation.privacy
    budget = "" if privacy.epsilon is None else f", of a budget of {privacy.epsilon:g}"
    yield _line("epsilon", f"after {spent.rounds:,} rounds, at delta {spent.delta:.3g}{budget}")
    yield _epsilon("  released", spent.released, "who gets the models", spent.adjacency)
    yield _epsilon("  members", spent.peers, "who also sees the cohorts", "zero_out")
    yield _epsilon("  server", spent.server, "who also sees each sum as sent", "zero_out")
    if answer.affordable_rounds < federation.rounds:
        last = answer.affordable_rounds
        yield _line(
            "stops",
            f"after round {last:,}"
            if last
            else "before the first round: one costs more than the budget",
        )
    if spent.delta > privacy.delta:
        share = spent.delta - privacy.delta
        floor = federation.thresholds.least
        yield _line("delta", f"{share:.2g} of it for cohorts below the floor of {floor}")
    if answer.amplified and not answer.exact_accounting:
        yield _line("accounting", "by Renyi bounds; pip install 'fedoppu[dp]' shows less epsilon")


def _signal(federation: Federation, answer: PrivacyPlan) -> Iterator[str]:
    z = answer.effective_multiplier
    yield _line("signal", f"n / (z sqrt(d)) = {answer.signal:.3g}, with {_why(federation, z)}")
    noise = 1 / answer.signal
    if answer.survives:
        yield _line(
            "verdict",
            f"the signal survives: in a round's mean the noise is {noise:.2g} of an update at the clip bound",
        )
    else:
        who = "more users" if answer.least_cohort > federation.users else "larger cohorts"
        yield _line(
            "verdict",
            f"the noise is {noise:.3g} times the update: use rank 1, fewer modules, or {who}",
        )
    yield _line(
        "",
        f"noise and update are equal with {answer.most_parameters:,} parameters, or cohorts of "
        f"{answer.least_cohort:,}",
    )


def _why(federation: Federation, z: float) -> str:
    """What z the signal is measured with."""
    mechanism = federation.privacy.mechanism
    if mechanism == "dp_ftrl":
        return f"z = {z:.3g}: correlated noise leaves the sums of the rounds so much"
    if mechanism == "distributed":
        return f"z = {z:.3g}: clients add noise for those who may drop or be corrupt"
    return f"z = {z:.3g}"


def _epsilon(name: str, value: float, who: str, adjacency: Adjacency) -> str:
    return _line(name, f"{rounded_up(value):<9} {who}; {ADJACENCY[adjacency]}")


def _levels(scale: float) -> str:
    return f"discrete Gaussian noise of {scale:,.0f} levels"


def _line(name: str, text: str) -> str:
    return f"{name:<14}{text}"
