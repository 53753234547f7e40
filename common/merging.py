"""Layers of settings: a file's and key=value ones, as plain values, merged onto a schema of dataclasses.

No object of OmegaConf leaves this module, and none of its errors.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from fedoppu.common.errors import UsageError

Settings = dict[str, Any]
T = TypeVar("T")


def read_dotlist(overrides: Iterable[str]) -> Settings:
    """Settings given as key=value.

    Raises:
        UsageError: One is no such pair, or cannot be read.
    """
    items = list(overrides)
    for item in items:
        if "=" not in item or item.startswith("="):
            raise UsageError(
                f"settings are key=value, got {item!r}", hint="no spaces around the equals sign"
            )
        try:
            OmegaConf.from_dotlist([item])
        except Exception as error:
            raise UsageError(f"the setting {item} cannot be read: {_one_line(error)}") from None
    return _plain(OmegaConf.from_dotlist(items))


def read_yaml(file: Path) -> Settings:
    """The settings in a file.

    Raises:
        UsageError: It cannot be read, or is not YAML of keys and values.
    """
    try:
        loaded = OmegaConf.load(file)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "there is no configuration file" if missing else "cannot read configuration file"
        raise UsageError(f"{problem} {file}" + ("" if missing else f": {error.strerror}")) from None
    except Exception as error:
        raise UsageError(f"{file} is not YAML: {_one_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{file} must hold keys and values")
    return _plain(loaded)


def _plain(layer: DictConfig) -> Settings:
    return cast(Settings, OmegaConf.to_container(layer, resolve=False))


def as_meant(schema: type, values: Settings) -> Settings:
    """Turns "0,2" and single values into lists where the schema wants a tuple, and YAML's null into a name."""
    meant = dict(values)
    for item in fields(schema):
        kind, value = cast(Any, item.type), values.get(item.name)
        if is_dataclass(kind) and isinstance(value, dict):
            meant[item.name] = as_meant(cast(type, kind), value)
        elif "tuple" in str(kind) and isinstance(value, str):
            meant[item.name] = [part.strip() for part in value.split(",") if part.strip()]
        elif "tuple" in str(kind) and isinstance(value, int | float):
            meant[item.name] = [value]
        elif item.name == "population" and item.name in values and value is None:
            meant[item.name] = "null"  # the population of that name; nothing is none
    return meant


def build(schema: type[T], layers: list[Settings]) -> T:
    """An object of the schema: its defaults, with each layer over those before.

    Raises:
        UsageError: A key is unknown or missing, or a value has the wrong type or range.
    """
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(schema, *layers)))
    except ConfigKeyError as error:
        raise UsageError(f"unknown key: {_first_line(error)}") from None
    except OmegaConfBaseException as error:
        path = f"{error.full_key}: " if error.full_key else ""
        raise UsageError(f"{path}{_first_line(error)}") from None


def _one_line(error: Exception) -> str:
    """Of a YAML error, whose line and column are in its middle."""
    return " ".join(str(error).split())[:300]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
