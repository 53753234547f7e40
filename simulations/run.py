"""The main job: every federation of a run, from users to a table, in a run folder.

    runs/<time>/                       config.yaml, run.json, metrics.jsonl, timing.jsonl, table.json, report.html
      seed-0/LaMP_2N/users/            the virtual users
      seed-0/LaMP_2N/k0-none/          one federation: config.yaml, metrics.jsonl, timing.jsonl, table.json
        rounds/                        a checkpoint for each round
        groups/                        a file for each group of users that is trained, or scored
        shared/                        the shared adapter, a PEFT folder
        adapters/{arm}/{user}/         personal adapters, PEFT folders

`metrics.jsonl`, `table.json` and the adapters depend on the settings alone: not on the number of workers, the load of
the machine or the time. What does is in `timing.jsonl`. A run that was killed, at any moment, can be resumed: durable
rounds and groups are kept, all else is a function of the settings and is done again.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedoppu.client.base_checks import generic_because, require_chat_template
from fedoppu.client.devices import settled
from fedoppu.client.model import resolve_base
from fedoppu.client.tasks import TASKS
from fedoppu.common.adapter_files import save_adapter
from fedoppu.common.base import BaseFacts
from fedoppu.common.commit import commit_file
from fedoppu.common.config import RunConfig, to_yaml
from fedoppu.common.defaults import federation, personal_settings
from fedoppu.common.errors import FedoppuError, UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.console import Console
from fedoppu.simulations.costs import TIMING, Costs, begin_process, processes, write_lines
from fedoppu.simulations.evaluation import Evaluation, chosen_arms, evaluate
from fedoppu.simulations.executors import Workforce
from fedoppu.simulations.helper import pinned_helper
from fedoppu.simulations.panels import ArmScores
from fedoppu.simulations.printing import print_table
from fedoppu.simulations.ray_executor import RayWorkforce, import_ray
from fedoppu.simulations.report import write_report
from fedoppu.simulations.results import (
    FederationResult,
    control_note,
    named,
    privacy_lines,
    privacy_records,
    report_data,
)
from fedoppu.simulations.run_folder import begin, held, is_finished, read_run, take_up
from fedoppu.simulations.shared import SharedPhase, train_shared
from fedoppu.simulations.statistics import BootstrapSettings
from fedoppu.simulations.table import Table, build_table, write_table
from fedoppu.simulations.users import history_lengths, prepare_users

SEED_NOTE = (
    "the noise of a simulation comes from its seed: whoever knows the seed can take it off again; "
    "with people's data, keep the seed and the run folder to yourself"
)


def simulate(run: RunConfig, console: Console) -> dict[str, Any]:
    """Runs every federation of a run and writes the run folder.

    Returns:
        What machines read: the folder and the rows of the table.

    Raises:
        FedoppuError: A setting, a record or a client stopped the run; the message says which.
    """
    run = replace(run, device=settled(run.device))
    base = _checked(run, place=run)
    folder = Path(run.out or f"runs/{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}")
    with held(folder):
        begin(folder, run, base.hash)
        return _work(Work(run, base, folder, run), console)


def resume(folder: Path, settings: Sequence[str], console: Console) -> dict[str, Any]:
    """Goes on with a run that was killed; its files end in the bytes of a run that was not.

    Args:
        folder: Of the run.
        settings: key=value; only what no result depends on may differ.
        console: Says how far it is.

    Returns:
        What machines read: the folder and the rows of the table.

    Raises:
        UsageError: There is no run, it is of another version, base or settings, or another process
            works on it.
        FedoppuError: A record or a client stopped the run; the message says which.
    """
    begun, place = read_run(folder, settings)
    if is_finished(folder):
        done = f"the run in {folder} is finished: nothing is left to do"
        console.tables.print(done, markup=False, soft_wrap=True)
        rows = json.loads((folder / "table.json").read_bytes())["rows"]
        return {"folder": str(folder), "rows": rows}
    base = _checked(begun, place=place)
    with held(folder):
        take_up(folder, base.hash)
        return _work(Work(begun, base, folder, place), console)


@dataclass(frozen=True)
class Work:
    """A run that is under way.

    Attributes:
        run: The settings that its results follow.
        base: Facts of the base.
        folder: Gets its results.
        place: The same settings, but for where its groups are worked on.
    """

    run: RunConfig
    base: BaseFacts
    folder: Path
    place: RunConfig


def _work(work: Work, console: Console) -> dict[str, Any]:
    with _resumable(work.folder, console):
        _warn(work.run, work.base, console)
        process = begin_process(work.folder, work.place)
        with _workforce(work.place) as workforce:
            results = [
                _run_federation(phase, workforce, Costs(phase.folder, process), console=console)
                for phase in _phases(work.run, work.base, work.folder, console)
            ]
        table = _finish(work.folder, work.run, results)
    for line in privacy_lines(results):
        console.tables.print(line, markup=False, soft_wrap=True)
    print_table(table, console.tables)
    console.say(f"run folder: {work.folder}")
    return {
        "folder": str(work.folder),
        "rows": [asdict(row) for row in table.rows],
        **({"privacy": privacy} if (privacy := privacy_records(results)) else {}),
    }


def _workforce(place: RunConfig) -> Workforce | RayWorkforce:
    if place.engine == "ray":
        return RayWorkforce(place.ray.address, place.workers)
    return Workforce(place.workers)


@contextmanager
def _resumable(folder: Path, console: Console) -> Iterator[None]:
    """Says how to go on with a run that ends early."""
    how = f"to go on: fedoppu simulate --resume {shlex.quote(str(folder))}"
    try:
        yield
    except FedoppuError:  # says itself what is to be repaired first
        console.say(how)
        raise
    except BaseException:
        console.tell(how)
        raise


def _checked(run: RunConfig, *, place: RunConfig) -> BaseFacts:
    """Everything that can be wrong with the settings is found before anything is written."""
    if place.engine == "ray":
        import_ray()
    chosen_arms(run)
    if run.data is not None and not Path(run.data).exists():
        raise UsageError(
            f"there is no data at {run.data}", hint="data= takes a folder of LaMP records"
        )
    settled(place.device)
    base = resolve_base(run.base)
    if run.prompt.style == "chat":
        require_chat_template(base)
    for task in run.task:
        probe = federation(
            run, base, task=task, k=0, profile="none", base_users=run.base_users, seed=run.seed
        )
        probe = pinned_helper(probe, Randomness.from_seed(run.seed))
        SharedPhase.check(probe, base, personal_settings(run, base, task))
        SharedPhase.check_noise(probe, base, run.base_users)
    return base


def _warn(run: RunConfig, base: BaseFacts, console: Console) -> None:
    """What weakens a promise, or takes longer; of updates in clear, the strategy warns itself."""
    reason = generic_because(base)
    if reason is not None:
        console.say(
            f"{base.name} takes the generic path, with the same results but slower: {reason}"
        )
    elif run.personal.adapter.kind != "lora":
        console.say(f"personal adapters of kind {run.personal.adapter.kind} take the generic path")
    if run.thresholds.floor < 20:
        console.say(
            f"floor of {run.thresholds.floor} members: for simulations; a device's own policy asks for 20 by default"
        )
    if run.privacy.mechanism != "none":
        console.say(SEED_NOTE)


def _phases(
    run: RunConfig, base: BaseFacts, folder: Path, console: Console
) -> Iterator[SharedPhase]:
    """Every federation of the run, in order: seed, task, k, profile."""
    for seed in range(run.seed, run.seed + run.seeds):
        for task in run.task:
            home = folder / f"seed-{seed}" / task
            users = prepare_users(run, task=task, seed=seed, folder=home / "users")
            console.say(
                f"{task}, seed {seed}: {len(users.target)} target users, {len(users.base)} base users"
            )
            control = control_note(run, task, len(users.target))
            for note in (*users.notes, *([control] if control else [])):
                console.say(f"  {note}")
            for k in run.k:
                for profile in run.profile:
                    config = federation(
                        run,
                        base,
                        task=task,
                        k=k,
                        profile=profile,
                        base_users=len(users.base),
                        seed=seed,
                    )
                    config = pinned_helper(config, Randomness.from_seed(seed))
                    # on data there may be fewer base users than were asked for
                    SharedPhase.check(config, base, personal_settings(run, base, task))
                    SharedPhase.check_noise(config, base, len(users.base))
                    yield SharedPhase(run, base, config, seed, users, home / f"k{k}-{profile}")


def _run_federation(
    phase: SharedPhase, workforce: Workforce | RayWorkforce, costs: Costs, *, console: Console
) -> FederationResult:
    """Shared phase, personal phase, scores; leaves everything but the table in the federation's folder."""
    executor = workforce.executor(phase.spec)
    console.say(
        f"{phase.name}: shared phase, {phase.config.rounds} rounds of {phase.config.cohort}"
    )
    if phase.noise_note:
        console.say(f"  {phase.noise_note}")
    shared, rounds = train_shared(phase, costs.metered(executor, "shared"), costs, console=console)
    save_adapter(phase.folder / "shared", shared, base_name=phase.base.name)
    costs.spend("shared")
    arms = evaluate(_evaluation(phase), costs.metered(executor, "personal"), console)
    costs.spend("personal")
    lengths = history_lengths(phase.users)
    tokens = _trained_tokens(phase.folder / "personal.jsonl")
    result = FederationResult(phase, rounds, costs.lines, arms, lengths, tokens)
    commit_file(phase.folder / "config.yaml", to_yaml(asdict(phase.config)).encode())
    write_lines(phase.folder / "metrics.jsonl", named(result, result.metrics))
    write_lines(phase.folder / TIMING, named(result, result.timing))
    write_table(phase.folder / "table.json", _table(phase.run, [result]))
    return result


def _trained_tokens(path: Path) -> int:
    with path.open(encoding="utf-8") as lines:
        return sum(json.loads(line)["tokens"] for line in lines)


def _evaluation(phase: SharedPhase) -> Evaluation:
    personal = personal_settings(phase.run, phase.base, phase.config.task)
    return Evaluation(
        run=phase.run,
        task=TASKS[phase.config.task],
        users=phase.users,
        newest=personal.training.newest or 0,
        randomness=phase.randomness,
        shared=phase.folder / "shared",
        folder=phase.folder,
    )


def _finish(folder: Path, run: RunConfig, results: Sequence[FederationResult]) -> Table:
    """Writes the files of the whole run."""
    table = _table(run, results)
    rounds = [record for result in results for record in named(result, result.metrics)]
    write_lines(folder / "metrics.jsonl", rounds)
    spent = [record for result in results for record in named(result, result.timing)]
    write_lines(folder / TIMING, [*processes(folder), *spent])
    write_table(folder / "table.json", table)
    resumed = len(processes(folder)) - 1
    write_report(folder / "report.html", report_data(run, table, results, resumed=resumed))
    return table


def _table(run: RunConfig, results: Sequence[FederationResult]) -> Table:
    settings = BootstrapSettings(
        Randomness.from_seed(run.seed).child("bootstrap"), run.resamples, run.confidence
    )
    scores = [one for result in results for one in _scores(result)]
    return build_table(scores, settings, same_users=run.data is not None)


def _scores(result: FederationResult) -> Iterator[ArmScores]:
    config = result.phase.config
    for arm in result.arms:
        yield ArmScores(
            task=config.task,
            kind=TASKS[config.task].kind,
            k=config.k,
            profile=config.profile,
            seed=result.phase.seed,
            arm=arm.arm,
            users=arm.users,
            control=arm.control,
        )
