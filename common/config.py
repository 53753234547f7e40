"""Configuration: plain frozen dataclasses, merged and checked once, before anything is built.

`RunConfig` is what a user of `fedoppu simulate` sets. `FederationConfig` is what all parties of one federation must
agree on: its canonical bytes travel in the first message and their hash is in every round's plan.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf

from fedoppu.common.adapter_settings import AdapterSettings, PersonalAdapterSettings
from fedoppu.common.errors import UsageError
from fedoppu.common.merging import as_meant, build, read_dotlist, read_yaml
from fedoppu.common.setting_checks import INTERPOLATION, check_settings
from fedoppu.common.setting_checks import require as require  # every module of settings has it

Device = Literal["auto", "cpu", "cuda"]
Aggregation = Literal["ffa", "fedavg", "alternating"]
Examples = Literal["queries", "history", "both"]
ProfileKind = Literal["none", "template", "llm"]
TASKS = ("LaMP_1", "LaMP_2N", "LaMP_2M", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7")


def _require_different(name: str, values: Sequence[object]) -> None:
    given = [str(value) for value in values]
    if not given or len(set(given)) < len(given):
        raise UsageError(
            f"{name} must be one value or several different ones, got {', '.join(given) or 'nothing'}"
        )


@dataclass(frozen=True)
class TrainingSettings:
    """How one adapter is trained; None is replaced by the default for the task and the size of the base.

    Attributes:
        learning_rate: Of AdamW.
        epochs: Passes over the examples.
        batch_size: Examples a step.
        weight_decay: Decoupled; never applied to a frozen factor.
        clip_norm: Bound of the L2 norm of one user's gradient.
        schedule: linear (to zero) or constant, after the warm-up.
        warmup: Share of the steps in which the learning rate rises from zero.
        dropout: Of the adapter's input.
        newest: Only the newest so many examples are used; 0 means all.
        proximal: Weight of the squared distance to the anchor; 0 means none (Ditto, FedProx).
    """

    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int = 8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    schedule: Literal["linear", "constant"] = "linear"
    warmup: float = 0.0
    dropout: float = 0.0
    newest: int | None = None
    proximal: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("training.learning_rate", self.learning_rate, 0, 10)
        require("training.epochs", self.epochs, 1)
        require("training.batch_size", self.batch_size, 1)
        require("training.weight_decay", self.weight_decay, 0)
        require("training.clip_norm", self.clip_norm, 1e-9)
        require("training.warmup", self.warmup, 0, 1)
        require("training.dropout", self.dropout, 0, 0.99)
        require("training.newest", self.newest, 0)
        require("training.proximal", self.proximal, 0)


@dataclass(frozen=True)
class PromptSettings:
    """How a base is prompted.

    Attributes:
        style: plain (short prompts) or chat (the base's chat template).
        text_tokens: The text of an item or a query is cut to so many tokens.
        retrieved_tokens: Each retrieved item is cut to so many tokens.
        profile_tokens: The profile is cut to so many tokens.
        answer_tokens: A generated answer ends after so many tokens.
    """

    style: Literal["plain", "chat"] = "plain"
    text_tokens: int = 64
    retrieved_tokens: int = 48
    profile_tokens: int = 48
    answer_tokens: int = 32

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("text_tokens", "retrieved_tokens", "profile_tokens", "answer_tokens"):
            require(f"prompt.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class RetrieverSettings:
    """BM25 (Robertson and Zaragoza 2009); idf is Lucene's log(1 + (N - n + .5) / (n + .5)), never negative.

    Attributes:
        k1: Saturation of the term frequency.
        b: Strength of the length normalisation, 0 to 1.
    """

    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("retriever.k1", self.k1, 0)
        require("retriever.b", self.b, 0, 1)


@dataclass(frozen=True)
class EncodingSettings:
    """How an update becomes integers: clip, rotate, scale, clamp, round, integer noise, wrap.

    Attributes:
        word_bits: Sums are taken modulo 2 ** word_bits: 32 or 16.
        level_bits: A coordinate is rounded to 2 ** level_bits levels.
        clip: Bound of the L2 norm of an update.
        value_range: Coordinates are clamped to +- this before rounding, in the first round.
        rotation: Whether a vector is rotated by a public random rotation first, so that no coordinate stands out.
    """

    word_bits: int = 32
    level_bits: int = 16
    clip: float = 10.0
    value_range: float = 0.5
    rotation: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.word_bits not in (16, 32):
            raise UsageError(f"encoding.word_bits must be 16 or 32, got {self.word_bits}")
        require("encoding.level_bits", self.level_bits, 2, self.word_bits - 2)
        require("encoding.clip", self.clip, 1e-9)
        require("encoding.value_range", self.value_range, 1e-9)


@dataclass(frozen=True)
class ThresholdSettings:
    """Floors of a round. A client applies its own, whatever a server says.

    Attributes:
        floor: Fewest members in a cohort, and fewest survivors, beyond those assumed corrupt.
        corrupt: Members of the roster that are assumed corrupt.
        max_drop: Share of the cohort that may drop from the first message to the last, 0 to .5.
        attempts: A round is tried so many times with new cohorts before the run stops.
    """

    floor: int = 2
    corrupt: int = 0
    max_drop: float = 0.3
    attempts: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("thresholds.floor", self.floor, 2)
        require("thresholds.corrupt", self.corrupt, 0)
        require("thresholds.max_drop", self.max_drop, 0, 0.5)
        require("thresholds.attempts", self.attempts, 1)

    @property
    def least(self) -> int:
        """Fewest members of a cohort, and fewest survivors: the floor, and those assumed corrupt."""
        return self.floor + self.corrupt


@dataclass(frozen=True)
class SecAggSettings:
    """How masks are made and taken off again.

    Attributes:
        mode: graph (clients mask in pairs; one server; survives drops), or two_server (each client's mask seed goes to
            a helper; one message; one of server and helper must be honest).
        key_exchange: x25519, or hybrid (MLKEM768 with X25519: recorded rounds stay secret from quantum computers).
        helper: Hex of the helper's public keys, pinned in the federation's config; empty in graph mode. A simulation
            makes its own.
    """

    mode: Literal["graph", "two_server"] = "graph"
    key_exchange: Literal["x25519", "hybrid"] = "x25519"
    helper: str = ""


@dataclass(frozen=True)
class PrivacySettings:
    """User-level differential privacy of the shared phase: one client is one user.

    Attributes:
        mechanism: none; central (the server adds discrete Gaussian noise to the sum); distributed (each client adds its
            part of it inside the masked sum); dp_ftrl (the server adds noise that is correlated over the rounds).
        noise_multiplier: Standard deviation of the noise in a sum, in sensitivities of one user's vector; null for
            the least that keeps all rounds within epsilon.
        epsilon: Budget: the run stops before it would be exceeded; null for none.
        delta: Of epsilon.
        sampling: poisson (each member by itself with rate cohort / members; the cohort is not published; amplifies), or
            fixed (cohort members, uniform; claims no amplification).
        separation: dp_ftrl only: a member takes part at most once in so many rounds; also the bands of the noise.
    """

    mechanism: Literal["none", "central", "distributed", "dp_ftrl"] = "none"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    sampling: Literal["poisson", "fixed"] = "fixed"
    separation: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("privacy.noise_multiplier", self.noise_multiplier, 1e-3, 1e6)
        require("privacy.epsilon", self.epsilon, 1e-6, 1e6)
        require("privacy.delta", self.delta, 1e-12, 0.1)  # the sampler is not exact below
        require("privacy.separation", self.separation, 1, 10_000)


@dataclass(frozen=True)
class SharedSettings:
    """The shared phase.

    Attributes:
        examples: What a base user trains on: the queries, the history, or both.
        aggregation: ffa (A frozen, B travels), fedavg (both), alternating (B and A in turns).
        adapter: The shared adapter.
        training: Local training in one round.
        max_weight: An update is weighted by its number of examples, at most this; 1 means equal weights.
        held_out: Items of each base user that are held out for the federated validation loss.
    """

    examples: Examples = "both"
    aggregation: Aggregation = "ffa"
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(epochs=1))
    max_weight: int = 64
    held_out: int = 4

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("shared.max_weight", self.max_weight, 1)
        require("shared.held_out", self.held_out, 0)


@dataclass(frozen=True)
class PersonalSettings:
    """The personal phase.

    Attributes:
        adapter: A personal adapter, of any kind; the shared one is a LoRA, since sums of those have a meaning.
        training: Its training.
        wrong_users: Number of other users' adapters in the wrong-user control.
    """

    adapter: PersonalAdapterSettings = field(default_factory=PersonalAdapterSettings)
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(batch_size=4, schedule="constant")
    )
    wrong_users: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("personal.wrong_users", self.wrong_users, 1)


@dataclass(frozen=True)
class ResearchSettings:
    """Switches that weaken a promise; each prints a warning.

    Attributes:
        plain_updates: Updates travel in clear, without secure aggregation.
        dropout: Chance that a virtual user drops out of a round, at a random stage.
    """

    plain_updates: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("research.dropout", self.dropout, 0, 1)


@dataclass(frozen=True)
class RaySettings:
    """Where engine=ray works.

    Attributes:
        address: host:port of a cluster, or auto; null starts Ray on this machine.
    """

    address: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything a simulated run depends on.

    Attributes:
        task: LaMP tasks, each a federation of its own.
        data: Folder or file of LaMP records, or null for generated users.
        base: pocket, a transformers folder, or a GGUF file.
        population: Generated users: preferences, or null (exchangeable users).
        users: Target users a task: they get personal adapters and are scored.
        base_users: Base users a task: they train the shared adapter.
        queries: Queries scored for each target user; on data, the newest items are held out to reach so many.
        rounds: Rounds of the shared phase; null for three passes over the base users.
        cohort: Members asked in a round.
        k: Retrieved items; each value is a federation of its own.
        profile: none, template or llm; each value is a federation of its own.
        seed: Root of all random choices.
        seeds: Number of seeds, pooled in one table: seed, seed + 1, ...
        engine: local, ray (groups as Ray tasks), or flower (Flower's simulation engine).
        workers: Processes that train and score.
        threads: Intra-op threads of each; part of the result.
        group_users: Users trained in one pass; part of the result.
        dtype: Of the products with the frozen base.
        device: Where the base computes: cpu, cuda, or auto (cuda where there is one). Part of the result.
        checkpointing: Recompute each layer in the backward pass: less memory, more time, the same result.
        confidence: Of the intervals.
        resamples: Of the bootstrap.
        arms: Rows of the table, or all.
        out: Run folder; null for runs/<time>.
    """

    task: tuple[str, ...] = ("LaMP_2N", "LaMP_3")
    data: str | None = None
    base: str = "pocket"
    population: Literal["preferences", "null"] = "preferences"
    users: int = 30
    base_users: int = 60
    queries: int = 10
    rounds: int | None = None
    cohort: int = 18
    k: tuple[int, ...] = (0,)
    profile: tuple[ProfileKind, ...] = ("none",)
    seed: int = 0
    seeds: int = 1
    engine: Literal["local", "ray", "flower"] = "local"
    workers: int = 1
    threads: int = 1
    group_users: int = 6
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Device = "cpu"
    checkpointing: bool = False
    confidence: float = 0.95
    resamples: int = 10_000
    arms: tuple[str, ...] = ("all",)
    out: str | None = None
    ray: RaySettings = field(default_factory=RaySettings)
    shared: SharedSettings = field(default_factory=SharedSettings)
    personal: PersonalSettings = field(default_factory=PersonalSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    retriever: RetrieverSettings = field(default_factory=RetrieverSettings)
    encoding: EncodingSettings = field(default_factory=EncodingSettings)
    thresholds: ThresholdSettings = field(default_factory=ThresholdSettings)
    secagg: SecAggSettings = field(default_factory=SecAggSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    research: ResearchSettings = field(default_factory=ResearchSettings)

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("task", "k", "profile", "arms"):
            _require_different(name, getattr(self, name))
        for task in self.task:
            if task not in TASKS:
                raise UsageError(f"task must be one of {', '.join(TASKS)}, got {task}")
        for name in ("users", "queries", "seeds", "group_users"):
            require(name, getattr(self, name), 1)
        for name in ("workers", "threads"):
            require(name, getattr(self, name), 1, 256)
        require("resamples", self.resamples, 1, 1_000_000)
        require("base_users", self.base_users, 2)
        require("cohort", self.cohort, 2)
        require("rounds", self.rounds, 0)
        require("confidence", self.confidence, 0.5, 0.9999)
        for k in self.k:
            require("k", k, 0, 64)
        if self.device != "cpu" and self.engine != "local":
            raise UsageError(
                f"device={self.device} is for engine=local, got engine={self.engine}",
                hint="set engine=local or device=cpu",
            )


@dataclass(frozen=True)
class FederationConfig:
    """What all parties of one federation must agree on.

    Attributes:
        task: The LaMP task.
        k: Retrieved items a prompt.
        profile: Whether and which profile precedes a prompt.
        base_hash: Hash of the base.
        rounds: Rounds of the shared phase.
        cohort: Members asked in a round.
        public_seed: Seed of what all parties share: the frozen A, the graph.
        dtype: Of the products with the frozen base.
        shared: The shared phase, without any null.
        prompt: How the base is prompted.
        retriever: How items are retrieved.
        encoding: How updates become integers.
        thresholds: Floors of a round.
        secagg: How masks are made.
        privacy: Differential privacy; its noise_multiplier is set where there is a mechanism.
        plain_updates: Research only: updates travel in clear.
    """

    task: str
    k: int
    profile: ProfileKind
    base_hash: str
    rounds: int
    cohort: int
    public_seed: int
    dtype: str
    shared: SharedSettings
    prompt: PromptSettings
    retriever: RetrieverSettings
    encoding: EncodingSettings
    thresholds: ThresholdSettings
    secagg: SecAggSettings = field(default_factory=SecAggSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    plain_updates: bool = False

    def canonical(self) -> bytes:
        """JSON with sorted keys and no spaces: the bytes that travel and that are hashed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    def hash(self) -> bytes:
        """SHA-256 of the canonical bytes."""
        return hashlib.sha256(self.canonical()).digest()

    @classmethod
    def from_canonical(cls, data: bytes) -> "FederationConfig":
        """Reads canonical bytes.

        Raises:
            UsageError: A key is unknown, missing or out of range.
        """
        values = json.loads(data)
        if INTERPOLATION in str(values):  # it would read the environment of whoever gets the bytes
            raise UsageError(f"a federation's config takes no {INTERPOLATION}...}}")
        return build(cls, [values])


def load_run_config(overrides: Iterable[str] = (), file: Path | None = None) -> RunConfig:
    """Merges defaults, a YAML file and key=value settings.

    Args:
        overrides: For example ["shared.adapter.rank=4", "k=0,2"].
        file: YAML of the same keys.

    Raises:
        UsageError: A key names no field (the message suggests the nearest), or a value has the wrong type or range.
    """
    layers = [read_yaml(file)] if file else []
    meant = [as_meant(RunConfig, layer) for layer in [*layers, read_dotlist(overrides)]]
    for layer in meant:
        _check_shared_kind(layer)
        check_settings(RunConfig, layer)
    return build(RunConfig, meant)


def _check_shared_kind(layer: Mapping[str, Any]) -> None:
    """The one setting that a personal adapter has and that must not be looked for in the shared one."""
    shared = layer.get("shared")
    adapter = shared.get("adapter") if isinstance(shared, Mapping) else None
    if isinstance(adapter, Mapping) and "kind" in adapter:
        raise UsageError(
            f"shared.adapter takes no kind, got {adapter['kind']}: what a federation sums is a LoRA",
            hint="set personal.adapter.kind",
        )


def as_flat(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as nested plain values, for config.yaml."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(config))))


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `load_run_config(file=...)` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))
