"""With differential privacy, what the server writes, logs and sends is a function of noised sums alone."""

import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedoppu.client import handler
from fedoppu.client.jobs import ClientFailure, LocalUpdate
from fedoppu.client.release import release
from fedoppu.common.config import (
    FederationConfig,
    PrivacySettings,
    ResearchSettings,
    SecAggSettings,
)
from fedoppu.common.messages import pack
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import RoundPlan, SumReady
from fedoppu.common.shared_adapter import apply_mean
from fedoppu.server import privacy
from fedoppu.server.attempt import Outcome
from fedoppu.server.checkpoint import AttemptLog, AttemptState
from fedoppu.server.metrics import RoundRecord
from fedoppu.simulations.capture import CaptureGrid
from fedoppu.simulations.console import Console
from fedoppu.simulations.helper import pinned_helper
from tests.fake_federation import (
    CONFIG,
    SPEC,
    FakeExecutor,
    Federation,
    federation,
    files,
    shared_config,
)

SHIFTED = 3  # the member whose data differ
SECRET_WEIGHT, SECRET_LOSS = 7919, 3.0271
Noise = NDArray[np.int64]


def private(mechanism: Any = "central", **changes: Any) -> FederationConfig:
    """The small federation with differential privacy; everybody is asked."""
    settings = PrivacySettings(mechanism, noise_multiplier=1.0)
    config = shared_config(replace(CONFIG, cohort=8), max_weight=1)
    return replace(config, privacy=replace(settings, **changes))


def secret_update(member: int, plan: RoundPlan) -> LocalUpdate:
    """An update whose weight and loss are easy to find again."""
    stream = Randomness.from_seed(5).stream("update", plan.round, member)
    vector = (stream.standard_normal(plan.num_params) * 0.02).astype(np.float32)
    return LocalUpdate(plan.context, vector, SECRET_WEIGHT + member, SECRET_LOSS + member)


@dataclass
class Output:
    """All that a server let out: files, what was durable before unmasking, logs, console, messages."""

    files: Mapping[str, bytes]
    attempts: Sequence[AttemptState]
    logs: Sequence[str]
    sent: Sequence[tuple[str, int, bytes]]
    made: Federation


class RecordingLog(AttemptLog):
    """An AttemptLog that remembers all states."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.states: list[AttemptState] = []

    def save(self, state: AttemptState) -> None:
        super().save(state)
        self.states.append(state)


@pytest.fixture
def run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Runs a federation as a deployed server would and collects its output."""
    caplog.set_level(logging.DEBUG)

    def go(name: str, config: FederationConfig, **changes: Any) -> Output:
        caplog.clear()
        made = federation(
            tmp_path / name,
            config,
            executor=FakeExecutor(secret_update),
            wrap_grid=CaptureGrid,
            replays=False,
            **changes,
        )
        log = RecordingLog(made.runtime.books)
        made.runtime.__dict__["attempts"] = log
        made.run()
        for record in made.records:
            Console(progress=True, table=False).round_done(record.as_data(), config.rounds)
        lines = [entry.getMessage() for entry in caplog.records]
        lines += capsys.readouterr().err.splitlines()
        captured = made.grid.messages  # type: ignore[attr-defined]
        sent = [(m.stage, m.node, pack(m.content)) for m in captured if m.direction == "down"]
        return Output(files(tmp_path / name), log.states, lines, sent, made)

    return go


# --- the output is a function of the noised sum --------------------------------------------------


def shift_of(plan: RoundPlan) -> Noise:
    """How much the data of one member differ, in levels: far more than any noise."""
    return np.arange(1, plan.num_params + 1, dtype=np.int64) * (7 + plan.round)


def shift_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(update: LocalUpdate, plan: RoundPlan, dither: Randomness) -> Any:
        words = release(update, plan, dither)
        if update.weight == SECRET_WEIGHT + SHIFTED:
            words[: plan.num_params] += shift_of(plan).astype(words.dtype)
        return words

    monkeypatch.setattr(handler, "release", shifted)


def shift_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = privacy.GaussianPrivacy._noise

    def shifted(self: Any, plan: RoundPlan, survivors: Sequence[int]) -> Noise:
        return noise(self, plan, survivors) - shift_of(plan)

    monkeypatch.setattr(privacy.GaussianPrivacy, "_noise", shifted)


def without_masked_sum(states: Sequence[AttemptState]) -> list[AttemptState]:
    """What was durable, without the machine: it holds the masked sum, and signatures of masked vectors."""
    return [replace(state, machine=b"") for state in states]


@pytest.mark.parametrize(
    "config",
    [
        private(),
        private(sampling="poisson", delta=1e-2),
        private("dp_ftrl"),
    ],
    ids=["central", "poisson", "dp_ftrl"],
)
def test_other_data_and_as_much_other_noise_change_no_byte_of_the_output(
    run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch, config: FederationConfig
) -> None:
    plain = run("a", config)
    shift_data(monkeypatch)
    shift_noise(monkeypatch)
    shifted = run("b", config)
    # The data did differ: masked sums are durable before anybody is asked to unmask.
    masked = [
        [state.machine for state in out.attempts if state.machine] for out in (plain, shifted)
    ]
    assert len(masked[0]) == len(masked[1]) == config.rounds
    assert masked[0] != masked[1]
    assert shifted.files == plain.files
    assert shifted.sent == plain.sent
    assert shifted.logs == plain.logs
    assert without_masked_sum(shifted.attempts) == without_masked_sum(plain.attempts)
    assert [r.as_data() for r in shifted.made.records] == [r.as_data() for r in plain.made.records]


def test_other_data_alone_change_the_output(
    run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the comparison above would see a difference."""
    plain = run("a", private())
    shift_data(monkeypatch)
    shifted = run("b", private())
    assert shifted.files["0001/shared.npy"] != plain.files["0001/shared.npy"]
    assert shifted.sent != plain.sent


Decode = Callable[[Any, SumReady, RoundPlan], Outcome]


def leak_weight(decode: Decode) -> Decode:
    """A server that notes how large the exact sum was before it adds noise."""

    def leaking(self: Any, ready: SumReady, plan: RoundPlan) -> Outcome:
        exact = int(ready.words.astype(np.int64).sum())
        return replace(decode(self, ready, plan), weight=exact)

    return leaking


def leak_log(decode: Decode) -> Decode:
    """One that logs it."""

    def leaking(self: Any, ready: SumReady, plan: RoundPlan) -> Outcome:
        logging.getLogger("fedoppu").debug("largest total %d", int(ready.words.max()))
        return decode(self, ready, plan)

    return leaking


@pytest.mark.parametrize("leak", [leak_weight, leak_log])
def test_server_that_looks_before_the_noise_is_seen(
    run: Callable[..., Output],
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[Decode], Decode],
) -> None:
    monkeypatch.setattr(privacy.GaussianPrivacy, "decode", leak(privacy.GaussianPrivacy.decode))
    plain = run("a", private())
    shift_data(monkeypatch)
    shift_noise(monkeypatch)
    shifted = run("b", private())
    assert (shifted.files, shifted.logs) != (plain.files, plain.logs)


# --- a training that fails ------------------------------------------------------------------------


def failing(how: str) -> FakeExecutor:
    """Everybody trains but one, whose data let training fail, diverge, or move nothing."""

    def update(member: int, plan: RoundPlan) -> LocalUpdate | ClientFailure:
        trained = secret_update(member, plan)
        if member != SHIFTED or how == "trains":
            return trained
        if how == "fails":
            return ClientFailure(str(member), "ClientFailed: training diverged")
        value = np.nan if how == "diverges" else 0.0
        return replace(trained, vector=np.full_like(trained.vector, value))

    return FakeExecutor(update)


@pytest.mark.parametrize("mode", ["graph", "two_server"])
def test_member_whose_training_fails_sends_zeros_and_is_no_drop(tmp_path: Path, mode: str) -> None:
    config = private("distributed")
    if mode == "two_server":
        secagg = SecAggSettings("two_server")
        config = pinned_helper(replace(config, secagg=secagg), Randomness.from_seed(3))
    made = {}
    for how in ("zeros", "fails", "diverges", "trains"):
        made[how] = federation(tmp_path / how, config, executor=failing(how))
        made[how].run()
    assert files(tmp_path / "fails") == files(tmp_path / "diverges") == files(tmp_path / "zeros")
    assert files(tmp_path / "trains") != files(tmp_path / "zeros")
    assert all(record.drops == {} for record in made["fails"].records)
    assert len(made["diverges"].users.failures) == config.rounds  # its owner is told


# --- no number of it is one of the exact sum -----------------------------------------------------

NUMBER = re.compile(r"-?\d+\.?\d*(?:[eE][-+]?\d+)?")


def plan_of(made: Federation, number: int) -> RoundPlan:
    """As much of a round's plan as `secret_update` looks at."""
    assert made.users._plan is not None
    return replace(made.users._plan, round=number)


def exact_figures(made: Federation) -> set[float]:
    """What anybody who has the clients' data can compute: norms, totals, weights, losses, clamp counts."""
    found: list[float] = []
    for number in range(1, made.config.rounds + 1):
        plan = plan_of(made, number)
        updates = [secret_update(member, plan) for member in range(8)]
        vectors = np.stack([update.vector.astype(np.float64) for update in updates])
        weights = np.array([update.weight for update in updates], float)
        means = [vectors.mean(0), np.average(vectors, axis=0, weights=weights), vectors.sum(0)]
        for mean in (*means, *vectors):
            found += [float(np.linalg.norm(mean)), *mean.tolist(), float(np.abs(mean).max())]
        found += [*weights, weights.sum(), float(len(updates))]
        losses = [float(update.held_out_loss or 0) for update in updates]
        found += [*losses, sum(losses), sum(losses) / len(losses)]
    return {value for value in found if value != 8.0}  # the number of members is no secret here


def common(exact: set[float], seen: Iterable[float]) -> set[float]:
    """Exact figures that were seen, to rounding: 24-bit levels move none by more."""
    others = np.array(sorted(seen))
    return {value for value in exact if np.isclose(others, value, rtol=3e-6, atol=0).any()}


def numbers_of(out: Output) -> Iterator[float]:
    """Every number in texts of files, logs and messages, and every element of an array in them."""
    for name, data in out.files.items():
        if name.endswith(".npy"):
            yield from np.load(io.BytesIO(data)).astype(float).tolist()
        else:
            yield from _numbers(data.decode())
    for line in out.logs:
        yield from _numbers(line)
    for message in out.made.grid.messages:  # type: ignore[attr-defined]
        if message.direction == "down":
            for record in message.content.array_records.values():
                for array in record.values():
                    yield from array.numpy().reshape(-1).astype(float).tolist()
            for config in message.content.config_records.values():
                yield from _numbers(str(dict(config)))


def _numbers(text: str) -> Iterator[float]:
    yield from (float(found) for found in NUMBER.findall(text))


def released_sums(out: Output) -> list[float]:
    """By how much each round moved the adapter."""
    start = out.made.runtime.initial
    moved: list[float] = []
    for number in out.made.runtime.checkpoints.rounds():
        after = out.made.runtime.checkpoints.load(number).adapter
        change = SPEC.flatten(after.tensors, ("B",)) - SPEC.flatten(start.tensors, ("B",))
        moved += [*change.tolist(), float(np.linalg.norm(change))]
        start = after
    return moved


def exact_hashes(out: Output) -> set[str]:
    """Digests of the adapters that exact means would have given."""
    adapter, hashes = out.made.runtime.initial, set()
    for number in range(1, out.made.config.rounds + 1):
        updates = [secret_update(member, plan_of(out.made, number)) for member in range(8)]
        mean = np.mean([update.vector for update in updates], axis=0)
        adapter = apply_mean(adapter, mean, ("B",))
        hashes.add(adapter.digest())
    return hashes


FINE = replace(private(), encoding=replace(CONFIG.encoding, level_bits=24))


def test_no_number_that_leaves_is_an_exact_one(run: Callable[..., Output]) -> None:
    out = run("dp", FINE)
    seen = {*numbers_of(out), *released_sums(out)}
    assert len(seen) > 100
    assert common(exact_figures(out.made), seen) == set()
    everything = b"".join(out.files.values()) + "\n".join(out.logs).encode()
    everything += b"".join(content for _, _, content in out.sent)
    assert not any(digest.encode() in everything for digest in exact_hashes(out))


def test_without_noise_the_same_search_finds_the_exact_numbers(run: Callable[..., Output]) -> None:
    """The control: the norm is in the record, the coordinates of the mean are in the next model."""
    out = run("plain", replace(FINE, privacy=PrivacySettings()))
    found = common(exact_figures(out.made), {*numbers_of(out), *released_sums(out)})
    assert len(found) > 20
    assert any(abs(value - out.made.records[0].update_norm) < 1e-6 for value in found)


def test_a_private_record_has_no_figure_of_the_exact_sum(run: Callable[..., Output]) -> None:
    for record in run("dp", private()).made.records:
        assert (record.weight, record.held_out_loss, record.held_out_clients) == (None, None, None)
        assert record.clipped_share is None
        assert record.next_range == record.value_range == CONFIG.encoding.value_range


def test_the_masked_vector_has_no_element_beside_the_parameters(run: Callable[..., Output]) -> None:
    out = run("dp", private())
    plan = plan_of(out.made, 1)
    assert VectorLayout.of(plan).length == plan.num_params


# --- a Poisson cohort is not published -----------------------------------------------------------

POISSON = private(sampling="poisson", delta=1e-2)


def test_what_counts_a_poisson_cohort_is_in_the_private_file_alone(
    run: Callable[..., Output],
) -> None:
    out = run("dp", replace(POISSON, cohort=5), research=ResearchSettings(dropout=0.05))
    hidden = (
        "attempt",
        "cohort",
        "survivors",
        "drops",
        "bytes_up",
        "bytes_down",
        "liars",
        "aborted",
    )
    for number, record in enumerate(out.made.records, 1):
        assert all(getattr(record, name) is None for name in hidden)
        kept = json.loads(out.files[f"private/{number:04d}.json"])
        own = RoundRecord.from_data(kept)
        assert own.cohort is not None
        assert len(own.cohort) >= 2
        assert own.bytes_up is not None
        assert own.published() == record
        assert json.loads(out.files[f"{number:04d}/round.json"])["record"] == record.as_data()
    assert all(timing.stages == () for timing in out.made.timings)
    folder = out.made.runtime.folder / "private"
    assert folder.stat().st_mode & 0o077 == 0
    assert not any("cohort" in line or "survivors" in line for line in out.logs)


def drawn_cohorts(out: Output) -> list[tuple[int, ...] | None]:
    """Who was asked in each round, as the operator's files say."""
    kept = [out.files[f"private/{n:04d}.json"] for n in range(1, out.made.config.rounds + 1)]
    return [RoundRecord.from_data(json.loads(data)).cohort for data in kept]


def test_poisson_cohorts_of_two_federations_and_of_two_runs_of_one_server_are_independent(
    run: Callable[..., Output],
) -> None:
    """With the same draws, two amplified epsilons would not compose."""
    config = replace(POISSON, cohort=5, rounds=3)
    first = drawn_cohorts(run("a", config))
    assert drawn_cohorts(run("b", config)) == first  # what does not change is the same run
    assert drawn_cohorts(run("c", replace(config, k=1))) != first
    assert drawn_cohorts(run("d", config, run_id="cd" * 16)) != first


def test_poisson_cohorts_have_many_sizes_and_the_mean_one_divisor(
    run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divide by q N: the noise in the model is the same whatever the cohort."""
    monkeypatch.setattr(
        privacy.GaussianPrivacy, "_noise", lambda self, plan, survivors: np.zeros(24, np.int64)
    )
    out = run("dp", replace(POISSON, cohort=5, rounds=4))
    start = out.made.runtime.initial
    sizes = set()
    for number in range(1, 5):
        kept = RoundRecord.from_data(json.loads(out.files[f"private/{number:04d}.json"]))
        plan = plan_of(out.made, number)
        assert kept.survivors is not None
        sizes.add(len(kept.survivors))
        total = np.sum([secret_update(m, plan).vector for m in kept.survivors], axis=0)
        after = out.made.runtime.checkpoints.load(number).adapter
        change = SPEC.flatten(after.tensors, ("B",)) - SPEC.flatten(start.tensors, ("B",))
        np.testing.assert_allclose(change, total / 5, atol=1e-4)
        start = after
    assert len(sizes) > 1


# --- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["central", "distributed", "dp_ftrl"])
def test_same_seed_gives_the_same_bytes(run: Callable[..., Output], mechanism: str) -> None:
    first, again = run("a", private(mechanism)), run("b", private(mechanism))
    assert first.files == again.files
    other = run("c", private(mechanism), seed=4)
    assert first.files["0001/shared.npy"] != other.files["0001/shared.npy"]


def test_no_two_federations_share_their_noise(run: Callable[..., Output]) -> None:
    """One root serves several federations of a run; a common noise would cancel in their difference."""
    outs = [run(task, replace(private("dp_ftrl"), task=task)) for task in ("LaMP_3", "LaMP_2N")]
    vectors = [np.array(released_sums(out)) for out in outs]
    # the same updates on both sides, rounded by other dither: a common noise would leave nearly nothing
    difference = np.linalg.norm(vectors[0] - vectors[1])
    assert difference > 0.5 * np.linalg.norm(vectors[0])
