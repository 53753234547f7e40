"""What a user owns and what never leaves the device: history, profile, adapters, state.

`Vault` is a Protocol with two implementations behind one contract test suite: virtual users (plain files, read lazily)
and, on a device, an encrypted database.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedoppu.common.adapters import Adapter

QUERY = "query"


@dataclass(frozen=True)
class HistoryItem:
    """One thing that a user did, or a query with its gold answer.

    Attributes:
        id: Unique in the history.
        time: ISO date, or an empty string where the source has none; a history is sorted by it, stably.
        source: Where it was imported from.
        kind: The LaMP task whose item format `fields` has ("LaMP_2N"), or "query".
        fields: The record, all strings. A query has "input" and "gold".
    """

    id: str
    time: str
    source: str
    kind: str
    fields: Mapping[str, str] = field(repr=False)


class AdapterStore(Protocol):
    """Adapters of one user, by name."""

    def load(self, name: str) -> Adapter | None:
        """The adapter called `name`, or None."""

    def save(self, name: str, adapter: Adapter) -> None:
        """Commits an adapter atomically."""


class StateStore(Protocol):
    """Small durable values that a client must remember between rounds."""

    def get(self, key: str) -> bytes | None:
        """The value, or None."""

    def put(self, key: str, value: bytes) -> None:
        """Commits a value atomically, before it returns."""


class Outbox(Protocol):
    """A record of each message that left this client."""

    def append(self, kind: str, size: int, digest: bytes) -> None:
        """Records a message before it is sent: its stage, its bytes, its SHA-256.

        An Error is recorded too, as "{stage} error" and by its reason.
        """


class Vault(Protocol):
    """Everything that one user owns."""

    @property
    def user_id(self) -> str:
        """Name of the user on this machine; never sent."""

    @property
    def profile(self) -> str | None:
        """A profile text written beforehand, or None."""

    @property
    def adapters(self) -> AdapterStore:
        """The user's adapters."""

    @property
    def state(self) -> StateStore:
        """The user's protocol state."""

    @property
    def outbox(self) -> Outbox:
        """What left this client."""

    def history(self) -> Sequence[HistoryItem]:
        """Items and queries, oldest first."""
