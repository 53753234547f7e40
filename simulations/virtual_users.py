"""Virtual users: a file of users, an index of where each begins, and a lazy `Vault` for each.

Memory stays flat: the index holds a few numbers a user, and a history is read when it is asked for
and kept by nobody. For simulations only: everything is in clear on the researcher's disk. A device
has an encrypted vault.

    users.jsonl             one user a line
    users.index.json        role: [[user id, first byte, bytes, items], ...]; written last, so that it
                            vouches for the other
    adapters/{user}/{name}  adapters that were saved through a vault
    state/{user}/{key}      protocol state, where it is kept in files
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fedoppu.client.importers.lamp import LampUser
from fedoppu.client.vault import AdapterStore, HistoryItem, Outbox, StateStore
from fedoppu.common.adapter_files import load_adapter, save_adapter
from fedoppu.common.adapters import Adapter
from fedoppu.common.commit import commit_file, fsync, naming
from fedoppu.common.errors import DataError

USERS = "users.jsonl"
INDEX = "users.index.json"
Place = tuple[int, int]


def write_users(folder: Path, target: Iterable[LampUser], base: Iterable[LampUser]) -> None:
    """Writes users and their index, one user at a time.

    Args:
        folder: Gets the two files.
        target: Users who get personal adapters.
        base: Users who train the shared adapter, in the order of their member numbers.

    Raises:
        DataError: A user id appears twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    seen: set[str] = set()
    index: dict[str, list[tuple[str, int, int, int]]] = {}
    with naming(folder / USERS), (folder / USERS).open("wb") as stream:
        for role, users in (("target", target), ("base", base)):
            index[role] = []
            for user in users:
                if user.user_id in seen:
                    raise DataError(f"user {user.user_id} appears twice among the {role} users")
                seen.add(user.user_id)
                start, line = stream.tell(), _line(user)
                stream.write(line)
                index[role].append((user.user_id, start, len(line), len(user.history)))
    fsync(folder / USERS)
    commit_file(folder / INDEX, json.dumps(index).encode())


def _line(user: LampUser) -> bytes:
    items = [_plain(item) for item in (*user.history, *user.queries)]
    return json.dumps({"user_id": user.user_id, "task": user.task, "items": items}).encode() + b"\n"


def _plain(item: HistoryItem) -> dict[str, Any]:
    # asdict copies dictionaries only: the fields may be any mapping
    return {**vars(item), "fields": dict(item.fields)}


class VirtualUsers:
    """The users of a folder."""

    def __init__(self, folder: Path, *, base_name: str = "", state_in_files: bool = False) -> None:
        """Reads the index.

        Args:
            folder: Written by `write_users`.
            base_name: Name of the base, for adapters saved through a vault.
            state_in_files: Keep protocol state and outbox in files; else each vault keeps its own
                in memory.

        Raises:
            DataError: The folder has no index, or one that cannot be read.
        """
        self._folder = folder
        self._base_name = base_name
        self._state_in_files = state_in_files
        roles = _read_index(folder)
        rows = [row for users in roles.values() for row in users]
        # ten thousand users are held by several processes: numbers lie in one array
        self._numbers = np.array([numbers for _, *numbers in rows], dtype=np.int64).reshape(-1, 3)
        self._row: Mapping[str, int] = {user: row for row, (user, *_) in enumerate(rows)}
        self.target: tuple[str, ...] = tuple(user for user, *_ in roles["target"])
        self.base: tuple[str, ...] = tuple(user for user, *_ in roles["base"])

    def vault(self, user_id: str) -> "VirtualVault":
        """The vault of a user; nothing is read yet.

        Raises:
            DataError: There is no such user.
        """
        if user_id not in self._row:
            raise DataError(f"{self._folder} has no user {user_id}")
        start, size, _ = self._numbers[self._row[user_id]].tolist()
        own = quote(user_id, safe="")
        files = FileState(self._folder / "state" / own) if self._state_in_files else None
        sent = self._folder / "state" / own / "outbox.jsonl"
        return VirtualVault(
            user_id,
            self._folder / USERS,
            (start, size),
            adapters=AdapterFolder(self._folder / "adapters" / own, self._base_name),
            state=files or MemoryState(),
            outbox=FileOutbox(sent) if files else MemoryOutbox(),
        )

    def length(self, user_id: str) -> int:
        """Number of items in a user's own history."""
        return int(self._numbers[self._row[user_id], 2])


def _read_index(folder: Path) -> dict[str, list[tuple[str, int, int, int]]]:
    try:
        roles = json.loads((folder / INDEX).read_bytes())
        return {
            role: [(sys.intern(u), int(a), int(n), int(h)) for u, a, n, h in roles[role]]
            for role in ("target", "base")
        }
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no users: it has no {INDEX}", hint="write the users again"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{folder / INDEX} is malformed", hint="write the users again") from None


@dataclass(frozen=True)
class VirtualVault:
    """One virtual user's `Vault`.

    Attributes:
        user_id: Name of the user.
        file: Holds all users.
        place: First byte and number of bytes of this user's line.
        adapters: The user's adapters.
        state: The user's protocol state.
        outbox: What left this client.
        profile: None: a virtual user has written none.
    """

    user_id: str
    file: Path
    place: Place
    adapters: AdapterStore
    state: StateStore = field(repr=False)
    outbox: Outbox = field(repr=False)
    profile: str | None = None

    def history(self) -> Sequence[HistoryItem]:
        """Items and queries, oldest first; read from the file with every call.

        Raises:
            DataError: The file was changed after its index was written.
        """
        start, size = self.place
        with self.file.open("rb") as stream:
            stream.seek(start)
            line = stream.read(size)
        try:
            record = json.loads(line)
            if record["user_id"] != self.user_id:
                raise ValueError("another user")
            return tuple(HistoryItem(**item) for item in record["items"])
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{self.file} was changed: user {self.user_id} is not where {INDEX} says"
            ) from None


class AdapterFolder:
    """Adapters as PEFT folders, one for each name."""

    def __init__(self, folder: Path, base_name: str) -> None:
        """Keep where they are, and the name of the base that they are for."""
        self._folder = folder
        self._base_name = base_name

    def load(self, name: str) -> Adapter | None:
        """The adapter called `name`, or None."""
        path = self._folder / quote(name, safe="")
        return load_adapter(path) if path.exists() else None

    def save(self, name: str, adapter: Adapter) -> None:
        """Commits an adapter atomically."""
        save_adapter(self._folder / quote(name, safe=""), adapter, base_name=self._base_name)


class MemoryState:
    """A StateStore that lives as long as its process; a simulation replays what is not committed."""

    def __init__(self) -> None:
        """Start empty."""
        self._values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        return self._values.get(key)

    def put(self, key: str, value: bytes) -> None:
        """Keeps a value."""
        self._values[key] = bytes(value)


class FileState:
    """A StateStore of files, one for each key."""

    def __init__(self, folder: Path) -> None:
        """Keep where they are."""
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        path = self._folder / f"{quote(key, safe='')}.bin"
        return path.read_bytes() if path.exists() else None

    def put(self, key: str, value: bytes) -> None:
        """Commits a value atomically."""
        commit_file(self._folder / f"{quote(key, safe='')}.bin", value)


@dataclass(frozen=True)
class Sent:
    """A message that left: stage, bytes, SHA-256, and the hash of the record before it."""

    kind: str
    size: int
    digest: str
    previous: str

    def chained(self) -> str:
        """Hash of this record, which the next one holds."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class MemoryOutbox:
    """An Outbox in memory."""

    def __init__(self) -> None:
        """Start empty."""
        self.sent: list[Sent] = []

    def append(self, kind: str, size: int, digest: bytes) -> None:
        """Records a message before it is sent."""
        previous = self.sent[-1].chained() if self.sent else ""
        self.sent.append(Sent(kind, size, digest.hex(), previous))


class FileOutbox:
    """An Outbox in a file, one record a line."""

    def __init__(self, path: Path) -> None:
        """Keep where it is."""
        self._path = path

    @property
    def sent(self) -> list[Sent]:
        """All records, oldest first."""
        if not self._path.exists():
            return []
        return [Sent(**json.loads(line)) for line in self._path.read_text().splitlines()]

    def append(self, kind: str, size: int, digest: bytes) -> None:
        """Records a message before it is sent."""
        last = self._last()
        record = Sent(kind, size, digest.hex(), last.chained() if last else "")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(record)) + "\n")

    def _last(self) -> Sent | None:
        """The newest record, without reading the others."""
        if not self._path.exists():
            return None
        with self._path.open("rb") as stream:
            stream.seek(max(0, self._path.stat().st_size - 1024))
            return Sent(**json.loads(stream.read().splitlines()[-1]))
