"""The seven LaMP tasks as data: what a record holds, its labels, and how a text becomes a prompt.

Input strings of LaMP's files are parsed exactly, and one that does not match fails with the task
and what was expected. Parsing and rendering are inverse to each other: a text may hold quotes,
newlines, brackets and the instruction's own words. The one exception is LaMP_1, whose strings join
three titles without escapes: a title that holds a whole separator makes the string ambiguous, and
is refused both ways.

The prompts are in our own words. Source of the tasks: LaMP, Salemi et al. 2024,
https://arxiv.org/abs/2304.11406; of the history formats: OPPU, https://arxiv.org/abs/2402.04401.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from fedoppu.client.vault import QUERY, HistoryItem
from fedoppu.common.errors import DataError, UsageError

Kind = Literal["classification", "rating", "generation"]

NEWS_CATEGORIES = (
    "travel",
    "education",
    "parents",
    "style & beauty",
    "entertainment",
    "food & drink",
    "science & technology",
    "business",
    "sports",
    "healthy living",
    "women",
    "politics",
    "crime",
    "culture & arts",
    "religion",
)
MOVIE_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)


@dataclass(frozen=True)
class PromptFormat:
    """A prompt with {field} places, and the field whose value is the answer.

    Attributes:
        prompt: Plain prompt; the value of a field is cut in tokens by the prompt builder.
        target: Field of the answer.
        instruction: What to do, in words, for the chat style.
    """

    prompt: str
    target: str
    instruction: str


@dataclass(frozen=True)
class Task:
    """One LaMP task.

    Attributes:
        name: As in the configuration, "LaMP_2N".
        kind: classification, rating (labels are numbers) or generation.
        labels: In LaMP's order, which is also the order of scores; empty for generation.
        literals: Fixed parts of an input string, one more than `input_fields`.
        input_fields: Fields between the literals.
        item_fields: Fields that each history item of LaMP's files has, beside "id" and "date".
        text: The field that says what an item or a query is about.
        query: Format of a query; its target is "gold".
        items: Formats of a history item; the first one whose target the item has is used.
        block: A retrieved item in a prompt, {target} being its answer; a newline follows.
        query_keys: Fields of a query that are looked up in the history.
        document_keys: Fields of an item that are looked up in, never its answer.
        items_are_queries: Whether an item has the format of a query. Where it has not (LaMP_1,
            LaMP_7), personal training uses neither retrieval nor profile, and no item can become
            a query.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    literals: tuple[str, ...]
    input_fields: tuple[str, ...]
    item_fields: tuple[str, ...]
    text: str
    query: PromptFormat
    items: tuple[PromptFormat, ...]
    block: str
    query_keys: tuple[str, ...]
    document_keys: tuple[str, ...]
    items_are_queries: bool = True

    def parse_input(self, text: str) -> dict[str, str]:
        """Reads one of LaMP's input strings into its fields.

        Raises:
            DataError: The string is not of this task, its label list differs from the task's, or it
                can be read in two ways.
        """
        head, last = self.literals[0], self.literals[-1]
        fits = text.startswith(head) and text.endswith(last) and len(text) >= len(head + last)
        if not fits:
            raise DataError(f"{self.name}: {self._what_was_expected(text)}")
        rest = text[len(head) : len(text) - len(last)]
        values = []
        for separator in self.literals[1:-1]:
            value, rest = self._split_once(rest, separator)
            values.append(value)
        return dict(zip(self.input_fields, [*values, rest], strict=True))

    def render_input(self, fields: Mapping[str, str]) -> str:
        """Writes the input string with these fields: the inverse of `parse_input`.

        Raises:
            DataError: A field is missing, or holds a separator and could not be read back.
        """
        missing = [name for name in self.input_fields if name not in fields]
        if missing:
            raise DataError(f"{self.name}: an input needs {', '.join(missing)}")
        values = {name: fields[name] for name in self.input_fields}
        pairs = zip(self.literals, [*values.values(), ""], strict=True)
        text = "".join(literal + value for literal, value in pairs)
        if len(values) > 1 and self.parse_input(text) != values:
            raise DataError(
                f"{self.name}: a field holds {self.literals[1]!r}, which separates fields"
            )
        return text

    def as_query(self, fields: Mapping[str, str]) -> tuple[str, str] | None:
        """A history item as (input string, gold), or None where the task's items are no queries."""
        if not self.items_are_queries:
            return None
        return self.render_input(fields), fields[self.item_format(fields).target]

    def item_format(self, fields: Mapping[str, str]) -> PromptFormat:
        """How personal training reads an item: the first format whose answer the item has.

        Raises:
            DataError: The item has no answer (an empty answer would give an empty loss).
        """
        for shape in self.items:
            if fields.get(shape.target, "").strip():
                return shape
        raise DataError(f"{self.name}: an item needs a {self.items[-1].target} that is not empty")

    def history_label(self, fields: Mapping[str, str]) -> str | None:
        """The label of a history item, or None where the task's items carry none of its labels."""
        if not self.labels or not self.items_are_queries:
            return None
        return fields[self.item_format(fields).target]

    def check_target(self, value: str) -> None:
        """Checks that a gold or an item's answer is one that the task knows.

        Raises:
            DataError: It is empty, or none of the labels.
        """
        if not value.strip():
            raise DataError(f"{self.name}: an answer must not be empty")
        if self.labels and value not in self.labels:
            known = ", ".join(self.labels)
            raise DataError(f"{self.name}: an answer must be one of {known}, got {value[:40]!r}")

    def document(self, fields: Mapping[str, str], *, with_answer: bool = False) -> str:
        """The text of an item in the retriever's index, by default without its answer."""
        target = self.items[0].target
        extra = (target,) if with_answer and target not in self.document_keys else ()
        return " ".join(fields[key] for key in self.document_keys + extra if fields.get(key))

    def lookup(self, fields: Mapping[str, str]) -> str:
        """The retriever's query for the fields of a query, or of an item that is read as one."""
        return " ".join(fields[key] for key in self.query_keys if fields.get(key))

    def history(self, owned: Iterable[HistoryItem]) -> tuple[HistoryItem, ...]:
        """Of all that a vault holds, the items that this task can use; order kept."""
        return tuple(item for item in owned if item.kind == self.name)

    def queries(self, owned: Iterable[HistoryItem]) -> tuple[HistoryItem, ...]:
        """Of all that a vault holds, this task's queries; order kept."""
        head = self.literals[0]
        return tuple(
            item
            for item in owned
            if item.kind == QUERY and item.fields.get("input", "").startswith(head)
        )

    def _split_once(self, text: str, separator: str) -> tuple[str, str]:
        at = text.find(separator)
        if at < 0:
            raise DataError(f"{self.name}: the input lacks {separator!r}")
        if text.find(separator, at + 1) >= 0:
            raise DataError(
                f"{self.name}: the input holds {separator!r} twice and reads in two ways"
            )
        return text[:at], text[at + len(separator) :]

    def _what_was_expected(self, text: str) -> str:
        """Says what is wrong with an input string, without repeating its text."""
        head = self.literals[0]
        before, bracket, after = head.partition("[")
        if self.labels and bracket and text.startswith(before + "["):
            found = text[len(before) + 1 :].partition(after.partition("]")[2])[0].removesuffix("]")
            listed = tuple(found.split(", "))
            if listed != self.labels:
                return _label_complaint(listed, self.labels)
        if not text.startswith(head):
            return f"an input must begin with {head!r}"
        return f"an input must end with {self.literals[-1]!r}"


def _label_complaint(listed: tuple[str, ...], labels: tuple[str, ...]) -> str:
    missing = [label for label in labels if label not in listed]
    unknown = [label[:40] for label in listed if label not in labels]
    if not missing and not unknown:
        return f"an input's label list must be in the order {', '.join(labels)}"
    return f"an input's label list lacks {missing} and has the unknown {unknown[:5]}"


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        UsageError: There is no such task.
    """
    if name not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, got {name}")
    return TASKS[name]


_JUST = "Just answer with the {0} name without further explanation."
_TAG_IT = "Which one of these fits best? Answer with it alone, as written here: {0}."
_STARS = "How many stars, 1 to 5, did the author of this review give? Answer with the number alone."


def _labelled(question: str, listed: str, labels: tuple[str, ...], text: str) -> tuple[str, str]:
    """Literals of an input that lists the labels before its one field."""
    return f"{question} {listed}: [{', '.join(labels)}] {text}: ", ""


def _alike(prompt: str, target: str, instruction: str) -> tuple[PromptFormat, PromptFormat]:
    """Formats of a query and of an item, where they differ in the answer's field only."""
    return PromptFormat(prompt, "gold", instruction), PromptFormat(prompt, target, instruction)


def _lamp_1() -> Task:
    return Task(
        name="LaMP_1",
        kind="classification",
        labels=("[1]", "[2]"),
        literals=(
            'For an author who has written the paper with the title "',
            '", which reference is related? '
            'Just answer with [1] or [2] without explanation. [1]: "',
            '" [2]: "',
            '"',
        ),
        input_fields=("title", "option_1", "option_2"),
        item_fields=("title", "abstract"),
        text="title",
        query=PromptFormat(
            "paper: {title}\n[1] {option_1}\n[2] {option_2}\nreference:",
            "gold",
            "Which of two works would the author of this paper cite? Answer with [1] or [2] alone.",
        ),
        items=(
            PromptFormat(
                "paper: {title}\nreference:",
                "citation",
                "Name a work that this paper's author cites.",
            ),
            PromptFormat("paper:", "title", "Write the title of a paper by this author."),
        ),
        block="paper: {title}",
        query_keys=("option_1", "option_2"),
        document_keys=("title", "abstract"),
        items_are_queries=False,
    )


def _lamp_2n() -> Task:
    query, item = _alike(
        "article: {text}\ncategory:", "category", _TAG_IT.format(", ".join(NEWS_CATEGORIES))
    )
    return Task(
        name="LaMP_2N",
        kind="classification",
        labels=NEWS_CATEGORIES,
        literals=_labelled(
            "Which category does this article relate to among the following categories? "
            + _JUST.format("category"),
            "categories",
            NEWS_CATEGORIES,
            "article",
        ),
        input_fields=("text",),
        item_fields=("text", "title", "category"),
        text="text",
        query=query,
        items=(item,),
        block="article: {text}\ncategory: {target}",
        query_keys=("text",),
        document_keys=("title", "text"),
    )


def _lamp_2m() -> Task:
    query, item = _alike("movie: {description}\ntag:", "tag", _TAG_IT.format(", ".join(MOVIE_TAGS)))
    return Task(
        name="LaMP_2M",
        kind="classification",
        labels=MOVIE_TAGS,
        literals=_labelled(
            "Which tag does this movie relate to among the following tags? " + _JUST.format("tag"),
            "tags",
            MOVIE_TAGS,
            "description",
        ),
        input_fields=("description",),
        item_fields=("description", "tag"),
        text="description",
        query=query,
        items=(item,),
        block="movie: {description}\ntag: {target}",
        query_keys=("description",),
        document_keys=("description",),
    )


def _lamp_3() -> Task:
    query, item = _alike("review: {text}\nscore:", "score", _STARS)
    return Task(
        name="LaMP_3",
        kind="rating",
        labels=("1", "2", "3", "4", "5"),
        literals=(
            "What is the score of the following review on a scale of 1 to 5? "
            "just answer with 1, 2, 3, 4, or 5 without further explanation. review: ",
            "",
        ),
        input_fields=("text",),
        item_fields=("text", "score"),
        text="text",
        query=query,
        items=(item,),
        block="review: {text}\nscore: {target}",
        query_keys=("text",),
        document_keys=("text",),
    )


def _lamp_4() -> Task:
    query, item = _alike(
        "article: {text}\nheadline:",
        "title",
        "Write the headline that the author gave this article.",
    )
    return Task(
        name="LaMP_4",
        kind="generation",
        labels=(),
        literals=("Generate a headline for the following article: ", ""),
        input_fields=("text",),
        item_fields=("text", "title"),
        text="text",
        query=query,
        items=(item,),
        block="article: {text}\nheadline: {target}",
        query_keys=("text",),
        document_keys=("text",),
    )


def _lamp_5() -> Task:
    query, item = _alike(
        "abstract: {abstract}\ntitle:", "title", "Write the title of the paper with this abstract."
    )
    return Task(
        name="LaMP_5",
        kind="generation",
        labels=(),
        literals=("Generate a title for the following abstract of a paper: ", ""),
        input_fields=("abstract",),
        item_fields=("title", "abstract"),
        text="abstract",
        query=query,
        items=(item,),
        block="abstract: {abstract}\ntitle: {target}",
        query_keys=("abstract",),
        document_keys=("abstract",),
    )


def _lamp_7() -> Task:
    return Task(
        name="LaMP_7",
        kind="generation",
        labels=(),
        literals=(
            "Paraphrase the following tweet without any explanation before or after it: ",
            "",
        ),
        input_fields=("text",),
        item_fields=("text",),
        text="text",
        query=PromptFormat(
            "tweet: {text}\nparaphrase:", "gold", "Say this tweet as its reader would write it."
        ),
        items=(PromptFormat("tweet:", "text", "Write a tweet by this author."),),
        block="tweet: {text}",
        query_keys=("text",),
        document_keys=("text",),
        items_are_queries=False,
    )


def _by_name(*tasks: Task) -> Mapping[str, Task]:
    return MappingProxyType({task.name: task for task in tasks})


TASKS: Mapping[str, Task] = _by_name(
    _lamp_1(), _lamp_2n(), _lamp_2m(), _lamp_3(), _lamp_4(), _lamp_5(), _lamp_7()
)
