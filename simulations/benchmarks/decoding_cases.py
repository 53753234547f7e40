"""Queries of mixed users, and how a user of peft would answer them: one at a time.

`PeftWay` injects the adapters of all users once, before anything is timed, and switches between
them for each query. It scores a query's labels as one padded batch of full sequences, with logits
at the labels alone, and answers with transformers' own greedy `generate` and its cache. Both sides
answer the same queries, and `check_scores` and `check_answers` hold them to each other.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model

from fedoppu.client.jobs import ModelQuery
from fedoppu.client.model import LoadedBase
from fedoppu.common.adapters import Adapter, AdapterSpec
from fedoppu.common.errors import FedoppuError
from fedoppu.simulations.benchmarks.personal_cases import Case
from fedoppu.simulations.benchmarks.personal_sides import PEFT_PREFIX, lora_config

# of B, so that the adapters matter: those that training starts from are zero
SPREAD = 0.02
# float32 scores of both sides, nats
TOLERANCE = 1e-4

Scores = NDArray[np.float64]
Answer = tuple[int, ...]


def questions(case: Case, *, max_tokens: int) -> list[ModelQuery]:
    """The queries of all users of a case, each with its user's own adapter.

    Args:
        case: The base and the users.
        max_tokens: Longest answer.
    """
    queries = []
    for number, (job, asked) in enumerate(zip(case.jobs, case.asked, strict=True)):
        stack = (_moved(job.start, number),)
        queries += [
            ModelQuery(f"{job.id}, {place}", one.prompt, stack, one.labels, max_tokens)
            for place, one in enumerate(asked)
        ]
    return queries


def _moved(start: Adapter, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    tensors = {
        name: values if name.endswith("A") else draw.normal(0.0, SPREAD, values.shape)
        for name, values in start.tensors.items()
    }
    return replace(start, tensors={name: v.astype(np.float32) for name, v in tensors.items()})


@dataclass(frozen=True)
class PeftWay:
    """A base with the adapters of some users.

    Attributes:
        base: The base that was copied.
        model: The copy, with an adapter for each user.
        names: Id of an adapter: its name in the model.
    """

    base: LoadedBase
    model: PeftModel = field(repr=False)
    names: dict[int, str] = field(repr=False)

    @classmethod
    def of(cls, base: LoadedBase, spec: AdapterSpec, queries: Sequence[ModelQuery]) -> "PeftWay":
        """Injects the adapter of each query's user."""
        own = {id(query.adapters[-1]): query.adapters[-1] for query in queries}
        names = {key: f"user{number}" for number, key in enumerate(own)}
        first, *others = names.values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what transformers says of peft is not ours to show
            model = get_peft_model(copy.deepcopy(base.model), lora_config(spec), first)
            for name in others:
                model.add_adapter(name, lora_config(spec))
        for key, adapter in own.items():
            for tensor, values in adapter.tensors.items():
                module, _, factor = tensor.rpartition(".")
                place = f"{PEFT_PREFIX}{module}.lora_{factor}.{names[key]}.weight"
                model.get_parameter(place).data.copy_(torch.from_numpy(values))
        model.train(False)
        return cls(base, cast(PeftModel, model), names)

    def score(self, query: ModelQuery) -> Scores:
        """(num_labels,) log-likelihoods of the labels, nats."""
        self.model.set_adapter(self.names[id(query.adapters[-1])])
        prompt, longest = len(query.prompt), max(len(label) for label in query.labels)
        rows = np.full((len(query.labels), prompt + longest), self.base.tokenizer.pad, np.int64)
        rows[:, :prompt] = query.prompt
        for row, label in zip(rows, query.labels, strict=True):
            row[prompt : prompt + len(label)] = label
        tokens = torch.from_numpy(rows)
        with torch.no_grad():
            output = self.model(input_ids=tokens, use_cache=False, logits_to_keep=longest + 1)
        likely = torch.log_softmax(output.logits[:, :-1].float(), -1)
        chosen = likely.gather(2, tokens[:, prompt:, None])[..., 0].double().numpy()
        pairs = zip(chosen, query.labels, strict=True)
        return np.array([row[: len(label)].sum() for row, label in pairs])

    def answer(self, query: ModelQuery) -> Answer:
        """The greedy answer, without the end token."""
        self.model.set_adapter(self.names[id(query.adapters[-1])])
        tokens = torch.from_numpy(query.prompt.astype(np.int64)[None])
        output = cast(Any, self.model).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=query.max_tokens,
            do_sample=False,
            eos_token_id=self.base.tokenizer.eos,
            pad_token_id=self.base.tokenizer.pad,
        )
        found = output[0, len(query.prompt) :].tolist()
        end = self.base.tokenizer.eos
        return tuple(found[: found.index(end)] if end in found else found)


def check_scores(ours: Sequence[Scores], theirs: Sequence[Scores]) -> None:
    """Checks that both sides scored the same.

    Raises:
        FedoppuError: Float32 scores differ by more than rounding.
    """
    apart = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    if not apart <= TOLERANCE:
        raise FedoppuError(f"scores differ by {apart:.2g} nats from peft's, more than {TOLERANCE}")


def check_answers(ours: Sequence[Answer], theirs: Sequence[Answer]) -> None:
    """Checks that both sides answered the same.

    Raises:
        FedoppuError: Float32 answers differ.
    """
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=True))
    if wrong:
        raise FedoppuError(f"{wrong} of {len(ours)} answers differ from peft's")
