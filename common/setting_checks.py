"""What can be wrong with one setting, in one line: its key, what it takes, and what it got.

Each setting is tried alone, so that a message names the whole key, and never shows the inside of the
library that merges. What two settings forbid together is found when the configuration is built.
"""

import difflib
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedoppu.common.errors import UsageError

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
INTERPOLATION = "${"
INFINITE = float("inf")


def require(name: str, value: float | None, low: float, high: float = INFINITE) -> None:
    """Checks low <= value <= high, and that it is finite; None passes.

    Raises:
        UsageError: The value is out of the range; the message names it and the bound.
    """
    if value is None or (low <= value <= high and value != INFINITE):
        return
    bound = f"at least {low:g}" if high == INFINITE else f"between {low:g} and {high:.9g}"
    finite = "finite and " if value == high == INFINITE else ""
    raise UsageError(f"{name} must be {finite}{bound}, got {value}")


def check_settings(schema: type, values: Mapping[Any, Any]) -> None:
    """Checks each setting of one layer by itself.

    Args:
        schema: A dataclass whose fields all have defaults.
        values: Settings by key, nested like the schema; plain values.

    Raises:
        UsageError: A key names no field (the message suggests the nearest), or a value has the wrong
            type or range.
    """
    _check(schema, values, "", _keys(schema))


def _check(schema: type, values: Mapping[Any, Any], prefix: str, known: list[str]) -> None:
    own: dict[Any, Field[Any]] = {item.name: item for item in fields(schema)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in own:
            raise _unknown(key, known)
        kind = cast(Any, own[name].type)
        if not is_dataclass(kind):
            _check_one(schema, name, value, (key, kind))
        elif isinstance(value, Mapping):
            _check(cast(type, kind), value, f"{key}.", known)
        else:
            raise UsageError(
                f"{key} holds settings and takes no value of its own, got {_shown(value)}",
                hint=f"set one of {', '.join(f'{key}.{item.name}' for item in fields(kind))}",
            )


def _check_one(schema: type, name: str, value: Any, where: tuple[str, Any]) -> None:
    key, kind = where
    if INTERPOLATION in str(value):
        raise UsageError(f"{key} takes no {INTERPOLATION}...}}, got {_shown(value)}")
    try:
        merged = OmegaConf.merge(schema, {name: value})
        converted = cast(dict[str, Any], OmegaConf.to_container(merged))[name]
        values = converted if isinstance(converted, list | tuple) else ()
        if any(isinstance(one, list | tuple | dict) for one in values):
            raise TypeError("a list in a list")
    except (OmegaConfBaseException, TypeError, ValueError):
        raise UsageError(f"{key} must be {_described(kind)}, got {_shown(value)}") from None
    try:
        schema(**{name: tuple(values) if values else converted})
    except UsageError as error:
        # the dataclass does not know in which section it is: adapter.rank is shared.adapter.rank
        named, _, told = str(error).partition(" ")
        if f".{key}".endswith(f".{named}"):  # else it is about this value and another's default
            raise UsageError(f"{key} {told}", hint=error.hint) from None


def _described(kind: Any) -> str:
    origin, inner = get_origin(kind), [one for one in get_args(kind) if one is not Ellipsis]
    if origin in (Union, UnionType):
        return " or ".join("null" if one is type(None) else _described(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"{_described(inner[0])}, or several with commas between"
    return NAMES[kind]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "nothing"
    return "nothing" if value in (None, "") else str(value)[:80]


def _nested(key: str) -> str:
    *sections, name = key.split(".")
    return (
        f"write {''.join(f'{section}: {{' for section in sections)}{name}: ...{'}' * len(sections)}"
    )


def _keys(schema: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for item in fields(schema):
        kind = cast(Any, item.type)
        keys.append(prefix + item.name)
        if is_dataclass(kind):
            keys += _keys(cast(type, kind), f"{prefix}{item.name}.")
    return keys


def _unknown(key: str, known: list[str]) -> UsageError:
    """Suggests keys that end alike, or else the nearest."""
    if key in known:
        return UsageError(f"{key}: in a file, keys with dots are nested", hint=_nested(key))
    alike = [one for one in known if one.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1].lower()]
    near = alike or difflib.get_close_matches(key.lower(), known, n=1)
    suggestion = f". Did you mean: {' or '.join(repr(one) for one in near)}?" if near else ""
    return UsageError(
        f"unknown key: {key}{suggestion}", hint="fedoppu simulate --list prints all keys"
    )
