"""Trains `pocket`: `python -m fedoppu.simulations.pocket.train --seed 0 --out FOLDER`.

A Llama of 1.1 million parameters with a byte-level BPE of 2,560 tokens, trained from scratch on the
documents of `corpus.py`, in float32 on one thread: first reading documents alone, then all kinds.
The same seed gives the same files on the same build of torch; the command prints what it cost. The
folder is an ordinary transformers folder with weights in half precision.

Matrices are trained by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), which
needs about half the steps of AdamW here; embeddings and norms by AdamW.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedoppu.common.randomness import Randomness
from fedoppu.simulations.pocket.corpus import PURPOSE, Document, documents

SPECIAL: Final = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = range(3)
CONTEXT: Final = 1024


@dataclass(frozen=True)
class Settings:
    """How pocket is made.

    Attributes:
        vocabulary: Tokens of the BPE, the special ones included.
        tokenizer_documents: Documents that the BPE is trained on; the model starts after them.
        readings: Documents at the start that only read.
        width: Of the residual stream.
        layers: Number of layers.
        heads: Attention heads.
        feedforward: Width of the gated layer.
        steps: Optimiser steps.
        batch_tokens: Tokens a step, padding included.
        matrix_rate: Peak learning rate of Muon.
        vector_rate: Peak learning rate of AdamW.
        text_weight: Weight of a prompt's token in the loss; an answer's token has 1.
    """

    vocabulary: int = 2560
    tokenizer_documents: int = 2000
    readings: int = 7000
    width: int = 128
    layers: int = 4
    heads: int = 4
    feedforward: int = 352
    steps: int = 1800
    batch_tokens: int = 2048
    matrix_rate: float = 0.01
    vector_rate: float = 3e-3
    text_weight: float = 0.1


@dataclass(frozen=True)
class Cost:
    """What a training took: tokens read, CPU seconds, and the mean loss of its last fifty steps."""

    tokens: int
    cpu_seconds: float
    loss: float


@dataclass(frozen=True)
class Encoded:
    """A document as (tokens,) token ids and (tokens,) weights in the loss."""

    tokens: list[int]
    weights: list[float]


def train_tokenizer(seed: int, settings: Settings) -> PreTrainedTokenizerFast:
    """Trains the BPE on the first documents of the seed."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read = itertools.islice(documents(seed), settings.tokenizer_documents)
    texts = ("\n".join(part.prompt + part.answer for part in parts) for parts in read)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        model_max_length=CONTEXT,
        padding_side="left",
    )


def encode(parts: Document, tokenizer: PreTrainedTokenizerFast, text_weight: float) -> Encoded:
    """Encodes a document: beginning token, examples divided by line breaks, end token."""
    tokens, weights = [BOS], [0.0]
    for position, part in enumerate(parts):
        prompt = tokenizer.encode("\n" * (position > 0) + part.prompt, add_special_tokens=False)
        answer = tokenizer.encode(part.answer, add_special_tokens=False) if part.answer else []
        # What follows an answer is part of it: the model must learn where an answer ends.
        tokens += prompt + answer
        weights += [text_weight] * len(prompt) + [1.0] * len(answer)
        if position > 0:
            weights[-len(prompt) - len(answer)] = 1.0
    return Encoded([*tokens, EOS][:CONTEXT], [*weights, 1.0][:CONTEXT])


def batches(
    encoded: Iterator[Encoded], batch_tokens: int, randomness: Randomness
) -> Iterator[list[Encoded]]:
    """Batches of like length: pools of 512 documents are sorted by length, cut and shuffled."""
    for pool_number in itertools.count():
        pool = sorted(itertools.islice(encoded, 512), key=lambda each: len(each.tokens))
        cuts: list[list[Encoded]] = [[]]
        for each in pool:
            if cuts[-1] and (len(cuts[-1]) + 1) * len(each.tokens) > batch_tokens:
                cuts.append([])
            cuts[-1].append(each)
        yield from (
            cuts[i] for i in randomness.stream("batches", pool_number).permutation(len(cuts))
        )


def padded(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """(documents, tokens) int64 ids and float32 weights; right padding is never attended."""
    longest = max(len(each.tokens) for each in batch)
    tokens = np.full((len(batch), longest), PAD, dtype=np.int64)
    weights = np.zeros((len(batch), longest), dtype=np.float32)
    for row, each in enumerate(batch):
        tokens[row, : len(each.tokens)] = each.tokens
        weights[row, : len(each.weights)] = each.weights
    return torch.from_numpy(tokens), torch.from_numpy(weights)


def _randomness(seed: int) -> Randomness:
    return Randomness.from_seed(seed).child(PURPOSE)


def build_model(seed: int, settings: Settings) -> LlamaForCausalLM:
    """A fresh model, initialised from the seed."""
    torch.manual_seed(int(_randomness(seed).stream("initial weights").integers(2**62)))
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.feedforward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean loss per token, nats."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    kept = weights[:, 1:].flatten()
    return (losses * kept).sum() / kept.sum()


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear over 5 % of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_optimizers(model: LlamaForCausalLM, settings: Settings) -> tuple[Optimizer, ...]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    return (
        torch.optim.Muon(matrices, lr=settings.matrix_rate, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=settings.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    )


def fit(model: LlamaForCausalLM, read: Iterator[list[Encoded]], settings: Settings) -> Cost:
    """Trains the model in place on the first `settings.steps` batches."""
    optimizers = build_optimizers(model, settings)
    schedules = [
        LambdaLR(optimizer, partial(rate_at, steps=settings.steps)) for optimizer in optimizers
    ]
    losses: list[float] = []
    tokens, started = 0, time.process_time()
    for batch in itertools.islice(read, settings.steps):
        loss = loss_of(model, *padded(batch))
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(float(loss.detach()))
        tokens += sum(len(each.tokens) for each in batch)
        if len(losses) % 50 == 0:
            typer.echo(f"step {len(losses)}: loss {np.mean(losses[-50:]):.4f}")
    return Cost(tokens, time.process_time() - started, float(np.mean(losses[-50:])))


def make(seed: int, out: Path, settings: Settings) -> Cost:
    """Trains tokenizer and model, and writes the folder."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(seed, settings)
    model = build_model(seed, settings)
    parts = documents(seed, settings.tokenizer_documents, readings=settings.readings)
    encoded = (encode(each, tokenizer, settings.text_weight) for each in parts)
    cost = fit(model, batches(encoded, settings.batch_tokens, _randomness(seed)), settings)
    half = model.half()  # type: ignore[no-untyped-call]
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    return cost


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of text, initialisation and order.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = Settings.steps,
) -> None:
    """Train the embedded base `pocket` from generated text."""
    cost = make(seed, out, Settings(steps=steps))
    typer.echo(
        f"wrote {out}: loss {cost.loss:.4f}, {cost.tokens:,} tokens, {cost.cpu_seconds:.0f} CPU s"
    )


if __name__ == "__main__":
    typer.run(main)
