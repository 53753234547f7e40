"""Strict reading of the fields of a message from a peer: exact names, types and sizes.

Guarantee: what passes has no unknown field, no text, no number that is not finite and no list out
of order. A fault is always a `ProtocolError` that names the message, the field, the bound and the
value's kind; of its content it tells a whole number at most.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from fedoppu.common.errors import ProtocolError

MAX_MEMBERS = 1 << 20


@dataclass(frozen=True)
class Fields:
    """The fields of one message.

    Attributes:
        where: Names the sender and the stage, for messages of errors.
        values: The fields as they came.
    """

    where: str
    values: Mapping[str, object]

    def require(self, *names: str) -> "Fields":
        """Returns itself if it has these fields and no other.

        Raises:
            ProtocolError: A field is missing or unknown.
        """
        missing = sorted(set(names) - set(self.values))
        if missing:
            self.refuse(missing[0], "is missing")
        unknown = len(set(self.values) - set(names))
        if unknown:
            # an unknown name may itself be text: it is counted, not repeated
            raise ProtocolError(
                f"{self.where}: {unknown} unknown fields; allowed are {', '.join(names)}"
            )
        return self

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Raises the ProtocolError that names the message and the field."""
        raise ProtocolError(f"{self.where}: field {name} {problem}")

    def integer(self, name: str, low: int = 0, high: int = 1 << 62) -> int:
        """An integer, low <= value <= high."""
        value = self.values[name]
        if type(value) is not int:
            self.refuse(name, f"must be an integer, got {type(value).__name__}")
        if not low <= value <= high:
            self.refuse(name, f"must be between {low} and {high}, got {value}")
        return value

    def member(self) -> int:
        """The field member: an index in a roster."""
        return self.integer("member", 0, MAX_MEMBERS)

    def number(self, name: str) -> float:
        """A finite float."""
        value = self.values[name]
        if type(value) is not float:
            self.refuse(name, f"must be a float, got {type(value).__name__}")
        if not math.isfinite(value):
            self.refuse(name, "must be finite")
        return value

    def blob(self, name: str, low: int, high: int | None = None) -> bytes:
        """Bytes, as many as `low`, or between `low` and `high`."""
        return self._sized(name, self.values[name], low, low if high is None else high)

    def _sized(self, name: str, value: object, low: int, high: int) -> bytes:
        if type(value) is not bytes:
            self.refuse(name, f"must be bytes, got {type(value).__name__}")
        if not low <= len(value) <= high:
            bound = f"{low}" if low == high else f"{low} to {high}"
            self.refuse(name, f"must have {bound} bytes, got {len(value)}")
        return value

    def _list(self, name: str, count: int | None) -> Sequence[object]:
        value = self.values[name]
        if not isinstance(value, list):
            self.refuse(name, f"must be a list, got {type(value).__name__}")
        if len(value) > MAX_MEMBERS or (count is not None and len(value) != count):
            bound = f"at most {MAX_MEMBERS}" if count is None else f"{count}"
            self.refuse(name, f"must have {bound} entries, got {len(value)}")
        return value

    def integers(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """A list of integers, each 0 to `MAX_MEMBERS`."""
        values = self._list(name, count)
        checked = tuple(
            value for value in values if type(value) is int and 0 <= value <= MAX_MEMBERS
        )
        if len(checked) != len(values):
            self.refuse(name, f"must hold integers from 0 to {MAX_MEMBERS}")
        return checked

    def members(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """A list of members, strictly ascending."""
        values = self.integers(name, count)
        if any(left >= right for left, right in pairwise(values)):
            self.refuse(name, "must be strictly ascending")
        return values

    def blobs(
        self, name: str, low: int, high: int | None = None, *, count: int
    ) -> tuple[bytes, ...]:
        """A list of `count` byte strings, each of the given size."""
        upper = low if high is None else high
        return tuple(self._sized(name, value, low, upper) for value in self._list(name, count))

    def mapping(self, name: str, low: int, high: int | None = None) -> dict[int, bytes]:
        """Bytes by member, sent as the lists `{name}_of` (ascending) and `{name}`."""
        members = self.members(f"{name}_of")
        return dict(zip(members, self.blobs(name, low, high, count=len(members)), strict=True))
