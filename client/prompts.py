"""From a history and a query to token ids, within budgets, the answer never cut.

A prompt is: beginning-of-text token, profile, retrieved items (the most relevant first), the item
or the query. The answer is the tokens of " " + answer and the end token. What does not fit goes in
this order: retrieved items, the least relevant first; the profile; the end of the text. Labels and
a generated answer are accounted for, so a query's prompt and each of its answers fit the base.

Causal rule: the prompt of history item i holds text of the items before i and i's own input, and
nothing else of the history. A profile is the caller's, who answers for what it was made from.

Each text is tokenised by itself, with the space before it, and the parts are joined. So a budget is
exact, and the tokens are those of the whole string where a tokenizer splits at spaces and newlines
first, as byte-level BPE does. White space in a text becomes single spaces.

Source: OPPU, https://arxiv.org/abs/2402.04401, whose order of a prompt's parts this keeps.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fedoppu.client.jobs import Example, Tokens
from fedoppu.client.retrieval import CausalIndex
from fedoppu.client.tasks import PromptFormat, Task
from fedoppu.client.vault import HistoryItem
from fedoppu.common.config import PromptSettings, RetrieverSettings
from fedoppu.common.errors import DataError, UsageError

WRITE_PROFILE = (
    "Below are things that one person wrote or chose, the newest first. Describe in one or two "
    "sentences what this person likes and how they write."
)


class PromptTokenizer(Protocol):
    """What a prompt needs of a base's tokenizer."""

    @property
    def bos(self) -> int | None:
        """Token at the beginning of a text, or None."""

    @property
    def eos(self) -> int:
        """Token at the end of an answer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""

    def chat(self, user_text: str) -> list[int]:
        """Token ids of a user's turn in the base's chat template, up to where the answer begins."""


@dataclass(frozen=True)
class PreparedQuery:
    """A query as the model meets it.

    Attributes:
        id: Of the query.
        prompt: (prompt_tokens,) int32.
        labels: Token ids of the task's labels, end token included, in the task's order; () for
            generation.
        gold: The answer that was given; empty where it is not known.
        gold_tokens: Its token ids, end token included; (0,) where it is not known.
    """

    id: str
    prompt: Tokens = field(repr=False)
    labels: tuple[Tokens, ...] = field(repr=False)
    gold: str = field(repr=False)
    gold_tokens: Tokens = field(repr=False)


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: fixed words, or a text that may be cut.

    Attributes:
        tokens: Token ids.
        text: What they say, with the space before it; None once it has been cut.
        fixed: Whether these are words of a format, which are never cut.
    """

    tokens: tuple[int, ...] = field(repr=False)
    text: str | None = field(repr=False)
    fixed: bool


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class _Plan:
    """What goes into one prompt before it is cut to the room that there is.

    Attributes:
        id: Of the item or the query, for errors.
        instruction: For the chat style.
        profile: The profile's pieces, or none.
        blocks: Retrieved items, the most relevant first.
        core: The item or the query.
        limit: Tokens of each text of `core`.
    """

    id: str
    instruction: str
    profile: Pieces
    blocks: tuple[Pieces, ...]
    core: Pieces
    limit: int


class PromptBuilder:
    """Makes the examples and queries of one task for one base; holds no user's data."""

    def __init__(
        self,
        task: Task,
        tokenizer: PromptTokenizer,
        *,
        prompt: PromptSettings,
        retriever: RetrieverSettings,
        k: int,
        max_tokens: int,
    ) -> None:
        """Keeps the settings.

        Args:
            task: Formats and labels.
            tokenizer: Of the base.
            prompt: Style and budgets.
            retriever: Of the retrieved items.
            k: Retrieved items a prompt, at least 0.
            max_tokens: Longest prompt with its answer, the base's context.

        Raises:
            UsageError: k is negative, or max_tokens is not positive.
        """
        if k < 0 or max_tokens < 1:
            raise UsageError(f"k must be at least 0 and max_tokens 1, got {k} and {max_tokens}")
        self._task, self._tokenizer = task, tokenizer
        self._prompt, self._retriever = prompt, retriever
        self._k, self._max_tokens = k, max_tokens
        self._newline = pieces(tokenizer, "\n", {})
        self._labels = tuple(self._answer(label) for label in task.labels)
        generated = prompt.answer_tokens if task.kind == "generation" else 0
        self._reserved = max([generated, *map(len, self._labels)])

    def history_examples(
        self, history: Sequence[HistoryItem], *, profile: str | None
    ) -> list[Example]:
        """Each history item as a training example; item i sees only the items before i.

        Where the task's items are not in the format of its queries (LaMP_1, LaMP_7), neither
        retrieved items nor a profile precede them.

        Args:
            history: The task's items, oldest first; any number.
            profile: Text about the user, or None. Whatever it tells of later items leaks into
                earlier ones.

        Returns:
            (num_items,) examples, in the order of the history.

        Raises:
            DataError: An item is not of the task, has no answer, or does not fit the base.
        """
        alike = self._task.items_are_queries
        picks: list[tuple[int, ...]] = [()] * len(history)
        if alike and self._k:
            lookups = [self._task.lookup(item.fields) for item in history]
            picks = self._index(history).causal_top_k(lookups, self._k)
        blocks = self._blocks(history, picks)
        head = self._profile(profile) if alike else ()
        examples = []
        for item, pick in zip(history, picks, strict=True):
            shape = self._item_format(item)
            plan = self._plan(item.id, shape, item.fields)
            plan = replace(plan, profile=head, blocks=tuple(blocks[at] for at in pick))
            if alike:
                self._check_label(item.id, item.fields[shape.target])
            answer = self._answer(item.fields[shape.target])
            examples.append(Example(self._fit(plan, len(answer)), answer))
        return examples

    def query_examples(
        self,
        history: Sequence[HistoryItem],
        queries: Sequence[HistoryItem],
        *,
        profile: str | None,
    ) -> list[Example]:
        """Each query with its gold as a training example; retrieval sees the whole history.

        Raises:
            DataError: A query cannot be read, has no gold, or does not fit the base.
        """
        prepared = self.queries(history, queries, profile=profile)
        for query in prepared:
            if not query.gold:
                raise DataError(f"{self._task.name}: query {query.id} has no gold to train on")
        return [Example(query.prompt, query.gold_tokens) for query in prepared]

    def queries(
        self,
        history: Sequence[HistoryItem],
        queries: Sequence[HistoryItem],
        *,
        profile: str | None,
    ) -> list[PreparedQuery]:
        """Prepares queries of one user, whose history is indexed once.

        Args:
            history: The task's items, all older than the queries; any number.
            queries: Items with the fields "input" and, where it is known, "gold".
            profile: Text about the user, or None.

        Raises:
            DataError: A query cannot be read, or does not fit the base.
        """
        fields = [self._parse(query) for query in queries]
        picks: list[tuple[int, ...]] = [()] * len(queries)
        if self._k and history:
            index = self._index(history)
            picks = [index.top_k(self._task.lookup(found), self._k) for found in fields]
        blocks = self._blocks(history, picks)
        head = self._profile(profile)
        prepared = []
        for query, found, pick in zip(queries, fields, picks, strict=True):
            plan = self._plan(query.id, self._task.query, found)
            plan = replace(plan, profile=head, blocks=tuple(blocks[at] for at in pick))
            prepared.append(self._prepare(plan, query.fields.get("gold", "")))
        return prepared

    def query(
        self, history: Sequence[HistoryItem], query: HistoryItem, *, profile: str | None
    ) -> PreparedQuery:
        """Prepares one query; see `queries`."""
        return self.queries(history, [query], profile=profile)[0]

    @property
    def profile_tokens(self) -> int:
        """Budget of a profile."""
        return self._prompt.profile_tokens

    def label_tokens(self) -> tuple[Tokens, ...]:
        """Token ids of the task's labels, end token included, in the task's order."""
        return self._labels

    def profile_prompt(self, history: Sequence[HistoryItem]) -> Tokens:
        """Asks the base to describe the user in words, from items of the history.

        Args:
            history: Items to show, the oldest first; as many of the newest as fit are shown.

        Returns:
            (prompt_tokens,) int32, which leave room for `prompt.profile_tokens` of answer.

        Raises:
            DataError: An item is not of the task, or the base cannot hold the question alone.
        """
        for item in history:
            self._item_format(item)
        blocks = self._blocks(history, [tuple(range(len(history)))])
        newest_first = tuple(blocks[at] for at in reversed(range(len(history))))
        words = PromptFormat("profile:", "", WRITE_PROFILE)
        plan = replace(self._plan("the profile", words, {}), blocks=newest_first)
        return self._fit(plan, self._prompt.profile_tokens + 1)

    def answer(self, tokens: Sequence[int]) -> str:
        """The text of a generated answer: up to the end token, without space around it."""
        ids = list(tokens)
        end = ids.index(self._tokenizer.eos) if self._tokenizer.eos in ids else len(ids)
        return self._tokenizer.decode(ids[:end]).strip()

    def _prepare(self, plan: _Plan, gold: str) -> PreparedQuery:
        if not gold.strip():
            nothing = np.zeros(0, dtype=np.int32)
            return PreparedQuery(plan.id, self._fit(plan, 0), self._labels, "", nothing)
        self._check_label(plan.id, gold)
        tokens = self._answer(gold)
        return PreparedQuery(plan.id, self._fit(plan, len(tokens)), self._labels, gold, tokens)

    def _parse(self, query: HistoryItem) -> dict[str, str]:
        try:
            return self._task.parse_input(query.fields["input"])
        except KeyError:
            raise DataError(f"{self._task.name}: query {query.id} has no input") from None
        except DataError as error:
            raise DataError(f"query {query.id}: {error}") from None

    def _item_format(self, item: HistoryItem) -> PromptFormat:
        if item.kind != self._task.name:
            raise DataError(f"{self._task.name}: item {item.id} is of the kind {item.kind}")
        try:
            return self._task.item_format(item.fields)
        except DataError as error:
            raise DataError(f"item {item.id}: {error}") from None

    def _index(self, history: Sequence[HistoryItem]) -> CausalIndex:
        documents = [self._task.document(item.fields) for item in history]
        return CausalIndex(documents, self._retriever)

    def _blocks(
        self, history: Sequence[HistoryItem], picks: Sequence[tuple[int, ...]]
    ) -> dict[int, Pieces]:
        """Pieces of the items that were retrieved at least once, by position."""
        budget = self._prompt.retrieved_tokens
        picked = sorted({position for pick in picks for position in pick})
        return {at: block(self._task, self._tokenizer, history[at], tokens=budget) for at in picked}

    def _profile(self, profile: str | None) -> Pieces:
        if not profile or not profile.strip():
            return ()
        parts = pieces(self._tokenizer, "profile: {profile}", {"profile": profile})
        return cut(parts, self._prompt.profile_tokens) + self._newline

    def _plan(self, name: str, shape: PromptFormat, fields: Mapping[str, str]) -> _Plan:
        try:
            core = pieces(self._tokenizer, shape.prompt, fields)
        except DataError as error:
            raise DataError(f"{self._task.name}: item {name}: {error}") from None
        return _Plan(name, shape.instruction, (), (), core, self._prompt.text_tokens)

    def _check_label(self, name: str, answer: str) -> None:
        if self._task.labels and answer not in self._task.labels:
            raise DataError(f"{self._task.name}: the answer of {name} is none of the labels")

    def _answer(self, text: str) -> Tokens:
        space = "" if self._prompt.style == "chat" else " "
        ids = self._tokenizer.encode(space + " ".join(text.split()))
        return np.array([*ids, self._tokenizer.eos], dtype=np.int32)

    def _fit(self, plan: _Plan, answer_tokens: int) -> Tokens:
        """The prompt, cut until it and the longest of its answers fit the base."""
        room = self._max_tokens - max(self._reserved, answer_tokens)
        while True:
            tokens = self._assemble(plan)
            excess = len(tokens) - room
            if excess <= 0:
                return np.array(tokens, dtype=np.int32)
            plan = self._shrink(plan, excess)

    def _shrink(self, plan: _Plan, excess: int) -> _Plan:
        if plan.blocks:
            return replace(plan, blocks=plan.blocks[:-1])
        if plan.profile:
            return replace(plan, profile=())
        sizes = [min(plan.limit, len(part.tokens)) for part in plan.core if not part.fixed]
        if not any(sizes):
            raise DataError(
                f"{self._task.name}: {plan.id} does not fit: its format and its answer need "
                f"{self._max_tokens + excess} tokens, the base has {self._max_tokens}",
                hint="use a base with a longer context, or lower prompt.answer_tokens",
            )
        return replace(plan, limit=max(0, max(sizes) - -(-excess // len(sizes))))

    def _assemble(self, plan: _Plan) -> list[int]:
        parts = [*plan.profile]
        for retrieved in plan.blocks:
            parts += retrieved
        parts += cut(plan.core, plan.limit)
        if self._prompt.style == "chat":
            words = "".join(self._words(part) for part in parts)
            return self._tokenizer.chat(f"{plan.instruction}\n\n{words}")
        first = [] if self._tokenizer.bos is None else [self._tokenizer.bos]
        return first + [token for part in parts for token in part.tokens]

    def _words(self, part: Piece) -> str:
        if part.text is not None:
            return part.text
        # The replacement character is what a tokenizer makes of a torn one.
        return " " + self._tokenizer.decode(part.tokens).strip().rstrip("\ufffd")


def pieces(tokenizer: PromptTokenizer, template: str, fields: Mapping[str, str]) -> Pieces:
    r"""A template with {field} places as pieces; a space before a place goes with the text.

    Args:
        tokenizer: Of the base.
        template: For example "article: {text}\ncategory:".
        fields: Values of the places.

    Raises:
        DataError: A field is missing.
    """
    parts: list[Piece] = []
    for words, name, _, _ in string.Formatter().parse(template):
        fixed = words.removesuffix(" ") if name else words
        if fixed:
            parts.append(Piece(tuple(tokenizer.encode(fixed)), fixed, fixed=True))
        if name and name not in fields:
            raise DataError(f"the field {name} is missing")
        value = " ".join(fields[name].split()) if name else ""
        if value:
            text = words[len(fixed) :] + value
            parts.append(Piece(tuple(tokenizer.encode(text)), text, fixed=False))
    return tuple(parts)


def cut(parts: Pieces, limit: int) -> Pieces:
    """Cuts each text to its first `limit` tokens; fixed words stay."""
    return tuple(
        part
        if part.fixed or len(part.tokens) <= limit
        else Piece(part.tokens[:limit], None if limit else "", fixed=False)
        for part in parts
    )


def block(task: Task, tokenizer: PromptTokenizer, item: HistoryItem, *, tokens: int) -> Pieces:
    """A retrieved item with its answer and a newline, in at most `tokens` tokens.

    The text is cut first; the answer only if it does not fit by itself.

    Raises:
        DataError: The item lacks a field.
        UsageError: `tokens` cannot hold the format's own words.
    """
    values = {**item.fields, "target": item.fields[task.item_format(item.fields).target]}
    head = task.block.partition(" {target}")[0]
    before = pieces(tokenizer, head, values)
    after = pieces(tokenizer, task.block[len(head) :] + "\n", values)
    room = tokens - sum(len(part.tokens) for part in before + after if part.fixed)
    if room < 0:
        least = tokens - room
        raise UsageError(f"prompt.retrieved_tokens must be at least {least}, got {tokens}")
    after = cut(after, room)
    room -= sum(len(part.tokens) for part in after if not part.fixed)
    return cut(before, room) + after
