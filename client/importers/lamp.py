"""LaMP's users: a history and the queries that come after it.

Reads LaMP's question and output files (user-based, and time-based with "user_id" and "date") and
OPPU's files, a record for each user. Values become strings; a history is sorted by date where its
items have dates, and keeps the file's order otherwise. What cannot be read is refused with file,
record and field; nothing is dropped, except the records that are known to be bad in LaMP's own
files, and those are listed in `LampData.left_out`.

Records of one user: several questions of the same "user_id" become one user with several queries,
and the history is the one before the earliest of them, so that it holds no query's answer and every
query comes after all of it.

Sources: LaMP, https://arxiv.org/abs/2304.11406; OPPU, https://arxiv.org/abs/2402.04401.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fedoppu.client.importers.records import read_object, stream_records
from fedoppu.client.tasks import TASKS, Task, get_task
from fedoppu.client.vault import QUERY, HistoryItem
from fedoppu.common.errors import DataError, UsageError

# LaMP's own output files call both of these by one name.
SHARED_NAME = {"LaMP_2": ("LaMP_2N", "LaMP_2M")}
# (file, question id): in LaMP's user-based LaMP_2 this record is damaged; left out if it is.
KNOWN_BAD = (("dev_questions.json", "110"),)
SOURCE = "lamp"
PARTS = ("dev", "train")
OPPU_FILES = ("user_top_100_history.json", "user_others.json")
_HALF = re.compile(r"[\ud800-\udfff]")  # JSON may write one; UTF-8 and tokenizers have none
_DATE = re.compile(r"\d{1,4}(-\d{1,2}){0,2}")


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


@dataclass(frozen=True)
class LampData:
    """What a folder or a file holds.

    Attributes:
        task: The LaMP task.
        target: Users of dev/ (or of OPPU's file of the longest histories), in the file's order.
        base: Users of train/ (or of OPPU's other users), in the file's order; may be empty.
        left_out: Records that are known to be bad, each with what is wrong with it.
    """

    task: str
    target: tuple[LampUser, ...]
    base: tuple[LampUser, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Question:
    """One record: a user's history, and what was asked after it."""

    user_id: str
    history: tuple[HistoryItem, ...]
    queries: tuple[HistoryItem, ...]


@dataclass(frozen=True)
class _Place:
    """Where a value is, for errors."""

    file: Path
    path: str

    def at(self, part: str) -> "_Place":
        return _Place(self.file, f"{self.path}: {part}")

    def error(self, problem: str) -> DataError:
        hint = "repair the record, or take it out of the file"
        return DataError(f"{self.file}: {self.path}: {problem}", hint=hint)


@dataclass
class _Golds:
    """The answers of an outputs file; each is taken once.

    Attributes:
        file: For errors.
        left: Answers by question id that no question has taken.
    """

    file: Path
    left: dict[str, str]

    def take(self, id: str, place: _Place) -> str:
        if id not in self.left:
            raise place.error(f"{self.file.name} has no output for it, or it is there twice")
        return self.left.pop(id)

    def require_empty(self, questions: Path) -> None:
        if self.left:
            raise DataError(
                f"{self.file}: {len(self.left)} outputs have no question in {questions.name}, "
                f"the first has id {next(iter(self.left))}"
            )


def read_lamp(path: Path, task: str, *, limit: int | None = None) -> LampData:
    """Reads a data set.

    Args:
        path: A folder with dev/ and train/ as LaMP has them (dev/dev_questions.json, ...), or one
            that has such a folder called like the task; a folder with OPPU's two files; or one file
            in OPPU's layout, whose users are all target users.
        task: The LaMP task, as in the configuration.
        limit: At most so many records of each file, for files that are larger than memory; None
            for all. With a limit, outputs without a question are not noticed.

    Raises:
        UsageError: A file or folder is missing, or there is no such task.
        DataError: A file is malformed, or of another task.
    """
    get_task(task)
    if path.is_file():
        return LampData(task, read_oppu(path, task=task, limit=limit), (), ())
    if not path.is_dir():
        raise UsageError(f"there is no file or folder {path}")
    for folder in (path / task, path):
        if all((folder / part).is_dir() for part in PARTS):
            return _read_parts(folder, task, limit)
        if all((folder / name).is_file() for name in OPPU_FILES):
            users = [read_oppu(folder / name, task=task, limit=limit) for name in OPPU_FILES]
            return LampData(task, users[0], users[1], ())
    raise UsageError(
        f"{path} holds neither dev/ and train/, nor a folder {task} with them, nor OPPU's "
        + " and ".join(OPPU_FILES)
    )


def _read_parts(folder: Path, task: str, limit: int | None) -> LampData:
    left_out: list[str] = []
    users = [
        read_questions(
            folder / part / f"{part}_questions.json",
            folder / part / f"{part}_outputs.json",
            task=task,
            left_out=left_out,
            limit=limit,
        )
        for part in PARTS
    ]
    return LampData(task, users[0], users[1], tuple(left_out))


def read_questions(
    questions: Path,
    outputs: Path,
    *,
    task: str,
    left_out: list[str] | None = None,
    limit: int | None = None,
) -> tuple[LampUser, ...]:
    """Reads one pair of LaMP's files.

    Args:
        questions: For example dev_questions.json.
        outputs: Of the same questions.
        task: The LaMP task.
        left_out: Gets a line for each known bad record; without it such a record is refused too.
        limit: At most so many records; None for all.

    Raises:
        UsageError: A file is missing, or there is no such task.
        DataError: A file is malformed or of another task, or the two files have different ids.
    """
    wanted = get_task(task)
    golds = _read_golds(outputs, wanted)
    records: list[_Question] = []
    for place, raw in _places(questions, limit):
        try:
            records.append(_question(raw, place, wanted, golds))
        except DataError as error:
            if left_out is None or not _known_bad(questions, raw, wanted):
                raise
            left_out.append(str(error))
            golds.left.pop(str(raw["id"]), None)
    if limit is None:
        golds.require_empty(questions)
    return _users(records, wanted)


def read_oppu(file: Path, *, task: str, limit: int | None = None) -> tuple[LampUser, ...]:
    """Reads a file in OPPU's layout: a list of {user_id, profile, query: [{id, input, gold}]}.

    Golds may also be in a file beside it, called like it with "_label" at the end of its name, in
    the form of LaMP's outputs.

    Args:
        file: The users.
        task: The LaMP task.
        limit: At most so many users; None for all.

    Raises:
        UsageError: The file is missing, or there is no such task.
        DataError: It is malformed or of another task, or has a user, a query or a gold twice.
    """
    wanted = get_task(task)
    beside = file.with_name(f"{file.stem}_label.json")
    golds = _read_golds(beside, wanted) if beside.is_file() else None
    records = []
    for place, raw in _places(file, limit):
        user = _text(raw, "user_id", place)
        history = _history(raw, place, wanted)
        asked = _list(raw, "query", place)
        queries = [
            _query(query, place.at(f"query {number}"), wanted, golds)
            for number, query in enumerate(asked)
        ]
        _refuse_twice((item.id for item in queries), place, "query")
        records.append(_Question(user, history, tuple(queries)))
    if golds and limit is None:
        golds.require_empty(file)
    _refuse_twice((record.user_id for record in records), _Place(file, "users"), "user")
    return _users(records, wanted)


def detect_tasks(outputs: Path) -> tuple[str, ...]:
    """The tasks that an outputs file can be of: one, or both LaMP_2, which share a name.

    Raises:
        UsageError: There is no such file.
        DataError: It is malformed, or names no task of LaMP.
    """
    return _named_tasks(read_object(outputs), outputs)


def _named_tasks(raw: Mapping[str, Any], outputs: Path) -> tuple[str, ...]:
    named = raw.get("task")
    if isinstance(named, str) and named in TASKS:
        return (named,)
    if isinstance(named, str) and named in SHARED_NAME:
        return SHARED_NAME[named]
    raise DataError(f"{outputs}: task must be one of {', '.join(TASKS)}, got {str(named)[:40]!r}")


def _known_bad(questions: Path, raw: Mapping[str, Any], task: Task) -> bool:
    named = (questions.name, str(raw.get("id")))
    return task.name in SHARED_NAME["LaMP_2"] and named in KNOWN_BAD


def _places(file: Path, limit: int | None) -> Iterator[tuple[_Place, dict[str, Any]]]:
    for number, raw in enumerate(islice(stream_records(file), limit)):
        id = raw.get("id", raw.get("user_id", "missing"))
        yield _Place(file, f"record {number} (id {str(id)[:40]})"), raw


def _read_golds(outputs: Path, task: Task) -> _Golds:
    whole = read_object(outputs)
    named = _named_tasks(whole, outputs)
    if task.name not in named:
        raise DataError(f"{outputs}: holds {' or '.join(named)}, not {task.name}")
    golds = _Golds(outputs, {})
    for number, raw in enumerate(_list(whole, "golds", _Place(outputs, "outputs"))):
        place = _Place(outputs, f"gold {number}")
        if not isinstance(raw, dict):
            raise place.error("must be an object")
        id = _text(raw, "id", place)
        if id in golds.left:
            raise place.error(f"the id {id} is there twice")
        golds.left[id] = _text(raw, "output", place)
    return golds


def _question(raw: Mapping[str, Any], place: _Place, task: Task, golds: _Golds) -> _Question:
    query = _query(raw, place, task, golds)
    history = _history(raw, place, task)
    user = _text(raw, "user_id", place) if "user_id" in raw else query.id
    return _Question(user, history, (query,))


def _query(raw: object, place: _Place, task: Task, golds: _Golds | None) -> HistoryItem:
    if not isinstance(raw, dict):
        raise place.error("must be an object")
    id = _text(raw, "id", place)
    text = _text(raw, "input", place)
    gold = golds.take(id, place) if golds else _text(raw, "gold", place)
    if "gold" in raw and _text(raw, "gold", place) != gold:
        raise place.error("field gold: differs from the one in the file of golds")
    try:
        task.parse_input(text)
        task.check_target(gold)
    except DataError as error:
        raise place.error(str(error)) from None
    return HistoryItem(id, _date(raw, place), SOURCE, QUERY, {"input": text, "gold": gold})


def _history(raw: Mapping[str, Any], place: _Place, task: Task) -> tuple[HistoryItem, ...]:
    items = [
        _item(item, place.at(f"profile {number}"), task)
        for number, item in enumerate(_list(raw, "profile", place))
    ]
    _refuse_twice((item.id for item in items), place, "profile item")
    dated = [item for item in items if item.time]
    if dated and len(dated) < len(items):
        raise place.error(f"{len(items) - len(dated)} of {len(items)} profile items have no date")
    return tuple(sorted(items, key=lambda item: item.time))


def _item(raw: object, place: _Place, task: Task) -> HistoryItem:
    if not isinstance(raw, dict):
        raise place.error("must be an object")
    id = _text(raw, "id", place)
    place = place.at(f"id {id}")
    missing = [name for name in task.item_fields if name not in raw]
    if missing:
        raise place.error(f"field {missing[0]}: is missing")
    fields = {str(name): _text(raw, name, place) for name in raw if name not in ("id", "date")}
    try:
        shape = task.item_format(fields)
        if task.items_are_queries:
            task.check_target(fields[shape.target])
    except DataError as error:
        raise place.error(str(error)) from None
    return HistoryItem(id, _date(raw, place), SOURCE, task.name, fields)


def _text(raw: Mapping[str, Any], name: str, place: _Place) -> str:
    """A value as a string: numbers are written out, 5.0 as "5"."""
    value = raw.get(name)
    if isinstance(value, str):
        if not value.isascii() and _HALF.search(value):
            raise place.error(f"field {name}: holds half of a surrogate pair, which is no text")
        return value
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    problem = "is missing" if name not in raw else f"must be text, got {type(value).__name__}"
    raise place.error(f"field {name}: {problem}")


def _list(raw: Mapping[str, Any], name: str, place: _Place) -> list[Any]:
    value = raw.get(name)
    if not isinstance(value, list):
        found = "nothing" if name not in raw else type(value).__name__
        raise place.error(f"field {name}: must be a list, got {found}")
    return value


def _date(raw: Mapping[str, Any], place: _Place) -> str:
    """The date with its parts padded, so that dates sort as text; "" where there is none."""
    if raw.get("date") in (None, ""):
        return ""
    text = _text(raw, "date", place)
    if not _DATE.fullmatch(text):
        raise place.error(f"field date: must be numbers with dashes, got {text[:40]!r}")
    year, *rest = text.split("-")
    return "-".join([year.zfill(4), *(part.zfill(2) for part in rest)])


def _refuse_twice(ids: Iterable[str], place: _Place, what: str) -> None:
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise place.error(f"the {what} with id {twice[0]} is there twice")


def _users(records: Sequence[_Question], task: Task) -> tuple[LampUser, ...]:
    """Makes one user of all records with the same user id, in the order of their first records."""
    by_user: dict[str, list[_Question]] = {}
    for record in records:
        by_user.setdefault(record.user_id, []).append(record)
    return tuple(LampUser(user, task.name, *_merge(group, task)) for user, group in by_user.items())


def _merge(
    records: Sequence[_Question], task: Task
) -> tuple[tuple[HistoryItem, ...], tuple[HistoryItem, ...]]:
    """The history before the earliest query, and all queries."""
    asked = {_about(query, task) for record in records for query in record.queries}

    def age(record: _Question) -> tuple[str, int]:
        return max((item.time for item in record.history), default=""), len(record.history)

    def answers(record: _Question) -> int:
        # A later record's history holds the earlier record's query, with its answer.
        return sum(item.fields.get(task.text) in asked for item in record.history)

    in_time = sorted(records, key=age)
    history = min(in_time, key=answers).history if len(records) > 1 else records[0].history
    taken = {item.id for item in history}
    queries = [query for record in in_time for query in record.queries]
    renamed = [replace(query, id=f"query {query.id}") for query in queries]
    pairs = zip(queries, renamed, strict=True)
    return history, tuple(new if old.id in taken else old for old, new in pairs)


def _about(query: HistoryItem, task: Task) -> str:
    return task.parse_input(query.fields["input"])[task.text]
