"""What the federations of a run left, and what the report shows of it."""

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from fedoppu.common.config import RunConfig, as_flat, to_yaml
from fedoppu.common.privacy import PrivacySpent, spent
from fedoppu.server.metrics import privacy_data, privacy_text, read_privacy
from fedoppu.server.privacy import participation
from fedoppu.simulations.costs import total
from fedoppu.simulations.evaluation import Arm
from fedoppu.simulations.panels import Unit
from fedoppu.simulations.report_data import Recall, ReportData, RoundPoint
from fedoppu.simulations.shared import SharedPhase
from fedoppu.simulations.table import Table

Record = dict[str, Any]
VERSIONS = ("fedoppu", "torch", "transformers", "flwr", "numpy")


@dataclass(frozen=True)
class FederationResult:
    """What one federation left.

    Attributes:
        phase: Its settings, users and folder.
        rounds: Deterministic metrics of each round.
        timing: Wall times of each round; then what each process spent in each phase.
        arms: Scores of each arm.
        lengths: User: items in the own history.
        tokens: That the adapters of single users were trained on, repetitions included.
    """

    phase: SharedPhase
    rounds: tuple[Record, ...]
    timing: tuple[Record, ...]
    arms: tuple[Arm, ...] = field(repr=False)
    lengths: Mapping[str, int] = field(repr=False)
    tokens: int = 0

    @property
    def metrics(self) -> tuple[Record, ...]:
        """What metrics.jsonl holds: the rounds, and what they spent of a privacy budget."""
        total = self.privacy
        return self.rounds if total is None else (*self.rounds, total)

    @property
    def spent(self) -> PrivacySpent | None:
        """What the whole shared phase spent; None without a mechanism."""
        config = self.phase.config
        if config.privacy.mechanism == "none":
            return None
        if self.rounds:
            return read_privacy(self.rounds[-1]["privacy"])
        return spent(config.privacy, participation(config, len(self.phase.users.base), []))

    @property
    def privacy(self) -> Record | None:
        """The same for files, and how many of the planned rounds the budget allowed."""
        config, total = self.phase.config, self.spent
        if total is None:
            return None
        return {
            "kind": "privacy",
            "mechanism": config.privacy.mechanism,
            "noise_multiplier": config.privacy.noise_multiplier,
            "rounds_done": len(self.rounds),
            "rounds_planned": config.rounds,
            **privacy_data(total),
        }


def privacy_records(results: Sequence[FederationResult]) -> list[Record]:
    """What each private federation spent, with its names."""
    return [
        record
        for result in results
        for record in named(result, [result.privacy] if result.privacy else [])
    ]


def privacy_lines(results: Sequence[FederationResult]) -> list[str]:
    """The same for people, one line a federation."""
    return [
        f"{result.phase.name}: {privacy_text(result.spent)} after {len(result.rounds)} of "
        f"{result.phase.config.rounds} rounds"
        for result in results
        if result.spent is not None
    ]


def named(result: FederationResult, records: Sequence[Record]) -> list[Record]:
    """Records with the names of their federation."""
    config = result.phase.config
    names = {
        "task": config.task,
        "k": config.k,
        "profile": config.profile,
        "seed": result.phase.seed,
    }
    return [names | record for record in records]


def report_data(
    run: RunConfig, table: Table, results: Sequence[FederationResult], *, resumed: int = 0
) -> ReportData:
    """Everything that the report of a run shows; `resumed` is how many times it was."""
    return ReportData(
        table=table,
        config=to_yaml(as_flat(run)),
        command=command_line(run),
        rounds=[point for result in results for point in _points(result)],
        lengths=_lengths(run, results),
        recalls=_recalls(results),
        costs=_costs(results, resumed),
        environment=_environment(run),
        warnings=_warnings(run, results),
        confidence=run.confidence,
        plain_updates=run.research.plain_updates,
        privacy=privacy_lines(results),
        generated=run.data is None,
    )


def command_line(run: RunConfig) -> str:
    """The command that gives the same numbers: every setting that is not a default."""
    changed = sorted(_changed(as_flat(run), as_flat(RunConfig())))
    words = [f"{key}={value}" for key, value in changed if key != "out"]
    return shlex.join(["fedoppu", "simulate", *words])


def _changed(
    own: Mapping[str, Any], default: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    for key, value in own.items():
        if isinstance(value, dict):
            yield from _changed(value, default[key], f"{prefix}{key}.")
        elif value != default[key]:
            yield prefix + key, _as_setting(value)


def _as_setting(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_as_setting, value))
    return "null" if value is None else str(value)


def _points(result: FederationResult) -> Iterator[RoundPoint]:
    for record in result.rounds:
        yield RoundPoint(
            federation=result.phase.name,
            round=record["round"],
            held_out_loss=record["held_out_loss"],
            bytes_up=record["bytes_up"],
            bytes_down=record["bytes_down"],
            asked=None if record["cohort"] is None else len(record["cohort"]),
            dropped=record["dropped"],
        )


def _lengths(run: RunConfig, results: Sequence[FederationResult]) -> dict[Unit, int]:
    """On data, the seeds are the same people: they are counted under the first."""
    first = min(result.phase.seed for result in results)
    return {
        Unit(result.phase.config.task, first if run.data else result.phase.seed, user): length
        for result in results
        for user, length in result.lengths.items()
    }


def _recalls(results: Sequence[FederationResult]) -> list[Recall]:
    found = {}
    for result in results:
        users = result.phase.users
        if users.recalled is not None:
            asked = next((int(arm.users.queries.sum()) for arm in result.arms if len(arm.users)), 0)
            found[result.phase.config.task] = Recall(
                result.phase.config.task, asked, users.recalled, users.recalled_from_queries
            )
    return list(found.values())


def _costs(results: Sequence[FederationResult], resumed: int) -> list[tuple[str, str]]:
    """Of all processes that worked on the run."""
    costs = [("parameters of the base", f"{results[0].phase.base.num_parameters:,}")]
    for result in results:
        shared, personal = (
            total(result.timing, f"{phase}_seconds") for phase in ("shared", "personal")
        )
        per_user = personal / len(result.phase.users.target)
        costs.append((f"{result.phase.name}: shared phase", f"{shared:.0f} s"))
        costs.append((f"{result.phase.name}: a target user, all arms", f"{per_user:.1f} s"))
    wall, cpu = (_all_phases(results, figure) for figure in ("seconds", "cpu_seconds"))
    costs.append(("all phases", f"{wall:.0f} s of wall time, {cpu:.0f} s of CPU time"))
    tokens = sum(result.tokens for result in results)
    costs.append(("tokens that adapters of single users were trained on", f"{tokens:,}"))
    costs.append(("times that the run was resumed", str(resumed)))
    return costs


def _all_phases(results: Sequence[FederationResult], figure: str) -> float:
    return sum(
        total(result.timing, f"{phase}_{figure}")
        for result in results
        for phase in ("shared", "personal")
    )


def _environment(run: RunConfig) -> list[tuple[str, str]]:
    return [
        ("python", platform.python_version()),
        *((name, version(name)) for name in VERSIONS),
        ("processor", platform.machine()),
        ("workers", str(run.workers)),
        ("seeds", ", ".join(str(seed) for seed in range(run.seed, run.seed + run.seeds))),
    ]


def _warnings(run: RunConfig, results: Sequence[FederationResult]) -> list[str]:
    users = {result.phase.config.task: result.phase.users for result in results}
    told = [
        note for task, own in users.items() if (note := control_note(run, task, len(own.target)))
    ]
    for result in results:
        total = result.privacy
        if total and total["rounds_done"] < total["rounds_planned"]:
            told.append(
                f"{result.phase.name}: the privacy budget ended the shared phase after "
                f"{total['rounds_done']} of {total['rounds_planned']} rounds."
            )
    if run.research.plain_updates:
        told.insert(0, "research.plain_updates was on: the server saw each update in clear.")
    return told


def control_note(run: RunConfig, task: str, users: int) -> str:
    """Why the line of the wrong-user control is empty, or an empty string."""
    needed = run.personal.wrong_users + 1
    if users >= needed or not {"all", "personal"} & set(run.arms):
        return ""
    return f"{task}: no wrong-user control: {users} target users, {needed} are needed."
