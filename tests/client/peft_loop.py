"""OPPU's own way in the tests: one user, trained alone by peft and torch's AdamW, one example at a time."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional

from fedoppu.client.jobs import ClientJob, Example
from fedoppu.client.model import LoadedBase
from fedoppu.common.adapter_kinds import VIRTUAL, Ia3Spec, PromptSpec
from fedoppu.common.adapters import Adapter, AdapterSpec
from tests.client.engine import merged, movement, row


def rate(job: ClientJob, step: int, steps: int) -> float:
    settings = job.settings
    warm = int(np.ceil(settings.warmup * steps))
    if step < warm:
        return step / warm
    return 1.0 if settings.schedule == "constant" else (steps - step) / (steps - warm)


def peft_config_of(job: ClientJob) -> PeftConfig:
    spec = job.start.spec
    if isinstance(spec, PromptSpec):
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=spec.tokens)
    if isinstance(spec, Ia3Spec):
        inputs = [one.name for one in spec.inputs]
        outputs = [one.name for one in spec.outputs]
        return IA3Config(target_modules=[*outputs, *inputs], feedforward_modules=inputs)
    assert isinstance(spec, AdapterSpec)
    return LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha),
        target_modules=[target.name for target in spec.targets],
    )


def own_name(name: str) -> str | None:
    """Our name of a parameter of peft's model, or None if it is the base's."""
    if name.startswith("prompt_encoder"):
        return VIRTUAL
    module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
    if rest:
        return f"{module}.{rest[0]}"
    module, found, _ = module.partition(".ia3_l")
    return f"{module}.l" if found else None


class PeftUser:
    """One user; in float64, since Adam amplifies the rounding of gradients near zero."""

    def __init__(
        self, base: LoadedBase, job: ClientJob, dtype: torch.dtype = torch.float64
    ) -> None:
        self.job = job
        self.model = get_peft_model(merged(base, job.frozen), peft_config_of(job)).to(dtype)
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            own = own_name(name)
            if own is not None:
                parameter.data = torch.tensor(job.start.tensors[own]).to(dtype)
                parameter.requires_grad_(own[-1] in (*job.trainable, "l") or own == VIRTUAL)
                if parameter.requires_grad:
                    self.parameters[own] = parameter

    def loss(self, examples: Sequence[Example]) -> torch.Tensor:
        losses = []
        for example in examples:
            logits = self.model(row(example.prompt, example.answer)).logits[0]
            answers = torch.from_numpy(example.answer.astype(np.int64))
            predicted = logits[-1 - len(answers) : -1]  # virtual tokens come first
            losses.append(functional.cross_entropy(predicted, answers, reduction="none"))
        return torch.cat(losses).mean() + self.pull()

    def pull(self) -> torch.Tensor:
        anchor = self.job.anchor
        if anchor is None:
            return torch.zeros((), dtype=torch.float64)
        squares = [
            (parameter - torch.tensor(anchor.tensors[name])).square().sum()
            for name, parameter in self.parameters.items()
        ]
        return self.job.settings.proximal / 2 * torch.stack(squares).sum()

    def train(self) -> Adapter:
        job, settings = self.job, self.job.settings
        examples = job.examples[-(settings.newest or 0) :]
        size = settings.batch_size
        per_epoch = -(-len(examples) // size)
        steps = per_epoch * (settings.epochs or 0)
        learning_rate = settings.learning_rate or 0.0
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, weight_decay=settings.weight_decay
        )
        for step in range(steps):
            order = job.randomness.stream("order", step // per_epoch).permutation(len(examples))
            batch = order[step % per_epoch * size : (step % per_epoch + 1) * size]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate(job, step, steps)
            optimizer.zero_grad()
            torch.autograd.backward(self.loss([examples[index] for index in batch]))
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip_norm)
            optimizer.step()
        trained = {name: value.detach().float().numpy() for name, value in self.parameters.items()}
        return replace(job.start, tensors={**job.start.tensors, **trained})


def distance(job: ClientJob, found: Adapter, expected: Adapter) -> float:
    """L2 norm of the difference, relative to the adapter's own movement."""
    moved = movement(job, expected)
    return float(np.linalg.norm(movement(job, found) - moved) / np.linalg.norm(moved))


def bulk_distance(job: ClientJob, found: Adapter, expected: Adapter) -> float:
    """L2 norm of the difference relative to the movement, but for one coordinate of a thousand.

    Where a gradient is within rounding of zero, Adam makes a step of any size of it; which
    coordinates those are is chance, and there are a few in every group.
    """
    moved = movement(job, expected)
    differences = np.sort(np.abs(movement(job, found) - moved))
    kept = differences[: -max(1, len(differences) // 1000)]
    return float(np.linalg.norm(kept) / np.linalg.norm(moved))
