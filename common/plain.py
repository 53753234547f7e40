"""Frozen dataclasses as JSON and back, for state that is stored between messages.

Guarantee: nothing but what the type says comes out of `read_plain`; no code is run, no class is
looked up by name (never pickle). Bytes are hex. Understood: dataclasses, int, float, bool, str,
bytes, tuples of one type, mappings from int, and None beside one of them.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fedoppu.common.errors import DataError

T = TypeVar("T")


def dump_plain(value: object) -> bytes:
    """A dataclass as JSON."""
    return json.dumps(_to_plain(value), separators=(",", ":")).encode()


def load_plain(kind: type[T], data: bytes) -> T:
    """The inverse of `dump_plain`.

    Raises:
        DataError: The bytes are not JSON of this dataclass.
    """
    try:
        return cast(T, _from_plain(kind, json.loads(data)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"stored state is not a {kind.__name__}: {error}") from None


def _to_plain(value: object) -> object:
    if is_dataclass(value):
        return {item.name: _to_plain(vars(value)[item.name]) for item in fields(value)}
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, Mapping):
        return [[key, _to_plain(entry)] for key, entry in value.items()]
    if isinstance(value, tuple):
        return [_to_plain(entry) for entry in value]
    return value


def _from_plain(kind: Any, plain: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if plain is None else _from_plain(inner, plain)
    if origin is tuple:
        return tuple(_from_plain(arguments[0], entry) for entry in plain)
    if origin is not None and issubclass(origin, Mapping):
        return {int(key): _from_plain(arguments[1], entry) for key, entry in plain}
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if set(plain) != set(hints):
            raise ValueError(f"the fields are {sorted(plain)}, not {sorted(hints)}")
        return cast(Any, kind)(**{name: _from_plain(hints[name], plain[name]) for name in hints})
    return _scalar(kind, plain)


def _scalar(kind: Any, plain: Any) -> Any:
    if kind in (bytes, bytearray):
        return kind.fromhex(plain)
    wanted = (int, float) if kind is float else kind
    if not isinstance(plain, wanted) or (isinstance(plain, bool) and kind is not bool):
        raise ValueError(f"{type(plain).__name__} where {kind.__name__} belongs")
    return kind(plain)
