"""A round's plan and a federation's config as fields of a message, read strictly.

The plan has no text on the wire: its hex travels as bytes, its factors as a number. The config is
the only text of the protocol; it goes from the server to the clients, and only its own canonical
bytes are accepted.
"""

import json
from functools import lru_cache

from omegaconf.errors import OmegaConfBaseException

from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import ProtocolError, UsageError
from fedoppu.common.fields import MAX_MEMBERS, Fields
from fedoppu.common.rounds import RoundPlan

HASH = 32
FACTORS = ("A", "B", "AB")
Value = int | float | bytes | list[int] | list[bytes]
_PLAN_INTEGERS = (
    "round",
    "attempt",
    "num_params",
    "word_bits",
    "level_bits",
    "max_weight",
    "threshold",
    "neighbours",
    "min_cohort",
    "max_drops",
)
_PLAN_FLOATS = ("clip", "value_range", "noise_scale")
_PLAN_HASHES = ("config_hash", "roster_hash", "model_hash")
_PLAN_FLAGS = ("metrics", "hybrid")
PLAN_FIELDS = (
    "run_id",
    *_PLAN_HASHES,
    *_PLAN_INTEGERS,
    *_PLAN_FLOATS,
    *_PLAN_FLAGS,
    "factors",
    "rotation",
)


def plan_values(plan: RoundPlan) -> dict[str, Value]:
    """A plan as integers, floats and bytes: its hex becomes bytes, its factors a number."""
    values: dict[str, Value] = {
        name: bytes.fromhex(vars(plan)[name]) for name in ("run_id", *_PLAN_HASHES)
    }
    values |= {name: vars(plan)[name] for name in _PLAN_INTEGERS}
    values |= {name: float(vars(plan)[name]) for name in _PLAN_FLOATS}
    values |= {name: int(vars(plan)[name]) for name in _PLAN_FLAGS}
    rotation = bytes.fromhex(plan.rotation)
    return values | {"factors": FACTORS.index(plan.factors), "rotation": rotation}


def read_plan(fields: Fields) -> RoundPlan:
    """The inverse of `plan_values`; the canonical bytes, and so the context, are the same."""
    return RoundPlan(
        run_id=fields.blob("run_id", 1, 32).hex(),
        round=fields.integer("round", 1),
        attempt=fields.integer("attempt"),
        config_hash=fields.blob("config_hash", HASH).hex(),
        roster_hash=fields.blob("roster_hash", HASH).hex(),
        model_hash=fields.blob("model_hash", HASH).hex(),
        num_params=fields.integer("num_params", 1, 1 << 40),
        factors=FACTORS[fields.integer("factors", 0, 2)],
        clip=fields.number("clip"),
        value_range=fields.number("value_range"),
        word_bits=fields.integer("word_bits", 16, 32),
        level_bits=fields.integer("level_bits", 1, 31),
        max_weight=fields.integer("max_weight", 1),
        threshold=fields.integer("threshold", 1, MAX_MEMBERS),
        neighbours=fields.integer("neighbours", 1, MAX_MEMBERS),
        min_cohort=fields.integer("min_cohort", 1, MAX_MEMBERS),
        max_drops=fields.integer("max_drops", 0, MAX_MEMBERS),
        noise_scale=fields.number("noise_scale"),
        rotation=fields.blob("rotation", 0, HASH).hex(),
        metrics=fields.integer("metrics", 0, 1) == 1,
        hybrid=fields.integer("hybrid", 0, 1) == 1,
    )


def read_config(where: str, data: bytes) -> FederationConfig:
    """The config whose canonical bytes these are, exactly.

    Raises:
        ProtocolError: They are not: another order or spelling, an unknown key, a value out of
            range.
    """
    try:
        config = _parse(data)
    except (ValueError, TypeError, RecursionError, UsageError, OmegaConfBaseException):
        raise ProtocolError(f"{where}: field config is not a federation's config") from None
    if config.canonical() != data:
        raise ProtocolError(f"{where}: field config is not in canonical form")
    return config


@lru_cache(maxsize=8)  # 20 ms, and the same bytes come to each member in each round
def _parse(data: bytes) -> FederationConfig:
    # JSON first: nothing of YAML beyond it (anchors, tags) gets near the parser of the settings
    if not isinstance(json.loads(data), dict):
        raise UsageError("a config is an object")
    return FederationConfig.from_canonical(data)
