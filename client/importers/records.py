"""Reads JSON files of records, one record at a time, and says where a file is malformed.

Memory: one record, whatever the size of the file (LaMP's largest have gigabytes). What is refused,
with file and line: a file that is not UTF-8 or not JSON, that ends early, or that is no list of
objects where a list was expected; NaN and infinities, which are not JSON.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fedoppu.common.errors import DataError, UsageError

CHUNK = 1 << 20
# A whole string, or a single character that changes the depth; a lone quote opens an unfinished string.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_BLACK = re.compile(r"\S")


def read_object(path: Path) -> dict[str, Any]:
    """Reads a whole file that holds one object.

    Raises:
        UsageError: There is no such file.
        DataError: It is malformed, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError:
        raise UsageError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from None
    loaded = _parse(text, path, 1)
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: must hold an object, got {_kind(loaded)}")
    return loaded


def stream_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file that holds a list of them.

    Raises:
        UsageError: There is no such file.
        DataError: It is malformed, or its list holds something else.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _Scanner(path, file).records()
    except OSError:
        raise UsageError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None


@dataclass
class _Scanner:
    """Cuts a list into the texts of its records without parsing the whole.

    Attributes:
        path: For errors.
        file: Where more text comes from.
        text: Read, and not yet dropped.
        at: What is before this position has been consumed.
        line: Line of that position.
    """

    path: Path
    file: TextIO
    text: str = ""
    at: int = 0
    line: int = 1

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields each object; consumes the file."""
        self._expect_open()
        first = True
        while self._next_is_record(first):
            length = self._record_length()
            loaded = _parse(self.text[self.at : self.at + length], self.path, self.line)
            if not isinstance(loaded, dict):
                raise DataError(f"{self.path}: line {self.line}: a record must be an object")
            self._consume(length)
            yield loaded
            first = False
        self._expect_end()

    def _fill(self) -> bool:
        """Reads on, at least doubling the text, so that scanning it anew stays linear."""
        left = self.text[self.at :]
        more = self.file.read(max(CHUNK, len(left)))
        self.text, self.at = left + more, 0
        return bool(more)

    def _consume(self, length: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + length)
        self.at += length

    def _peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            rest = _BLACK.search(self.text, self.at)
            self._consume((rest.start() if rest else len(self.text)) - self.at)
            if self.at < len(self.text) or not self._fill():
                return self.text[self.at : self.at + 1]

    def _expect_open(self) -> None:
        if self._peek() != "[":
            raise DataError(f"{self.path}: line {self.line}: a list of records must begin with [")
        self._consume(1)

    def _next_is_record(self, first: bool) -> bool:
        found = self._peek()
        if found == "]":
            self._consume(1)
            return False
        if not first:
            if found != ",":
                raise self._unexpected(found, "a comma or ]")
            self._consume(1)
            found = self._peek()
        if found not in ("{", "["):
            raise self._unexpected(found, "a record")
        return True

    def _record_length(self) -> int:
        depth, length = 0, 0
        while True:
            for token in _TOKEN.finditer(self.text, self.at + length):
                if token.group() == '"':
                    break  # unfinished so far: begin here again with more text
                length = token.end() - self.at
                depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token.group(), 0)
                if depth == 0:
                    return length
            if not self._fill():
                raise DataError(
                    f"{self.path}: line {self.line}: the file ends in the record that begins here"
                )

    def _expect_end(self) -> None:
        found = self._peek()
        if found:
            raise self._unexpected(found, "the end of the file")

    def _unexpected(self, found: str, expected: str) -> DataError:
        what = repr(found) if found else "the end of the file"
        return DataError(f"{self.path}: line {self.line}: expected {expected}, got {what}")


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"{path}: line {line + error.lineno - 1}"
        raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {line}: not JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")
