"""LaMP's users: a history and the queries that come after it."""

from dataclasses import dataclass, field

from fedoppu.client.vault import HistoryItem


@dataclass(frozen=True)
class LampUser:
    """One user of a LaMP task, imported or generated.

    Attributes:
        user_id: Unique in a data set.
        task: The LaMP task ("LaMP_2N").
        history: Oldest first; `kind` is the task, `fields` its item fields, all strings, without
            "id" and "date".
        queries: After the history; `kind` is "query", `fields` are "input" (LaMP's input string)
            and "gold".
    """

    user_id: str
    task: str
    history: tuple[HistoryItem, ...] = field(repr=False)
    queries: tuple[HistoryItem, ...] = field(repr=False)
