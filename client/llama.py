"""The fast path for Llama-shaped bases (Llama, Mistral, Qwen2, SmolLM): a lean forward and backward.

The model's own weights are used as they are, and the model is never touched. What makes it fast,
each exact:

1. Frozen weights get no gradient, nothing below the first adapted module gets any, and each piece
   keeps only what its backward needs (`llama_ops`).
2. Logits and losses at answer tokens alone.
3. Rows back to back instead of padded (`llama_packing`).
4. In the last layer only the tokens at which an answer is predicted ask, and go through the output
   projection and the MLP; the others give keys and values alone.
5. What a user's rows begin with is computed once a step (`llama_packing`).
6. Attention written out over small groups of rows of similar length (`llama_attention`).
7. Passes and groups of few shapes, since a CPU makes a kernel for each (`llama_packing.filled`).

With checkpointing the backward computes each layer anew from its input: the same bits, and a third
to a half of the memory of a pass saved (8 users of a 6M base: 674 MB before, 454 MB after; 2 users
of SmolLM2-135M: 767 and 411 MB), for 1.3-1.45 times the time.

Adapters and losses are float32, whatever the base computes in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from fedoppu.client.batches import Row
from fedoppu.client.devices import on_device
from fedoppu.client.llama_adapters import PackedAdapters
from fedoppu.client.llama_attention import HeadShape, Indices, attention_plan
from fedoppu.client.llama_ops import attend, gated, norm, rotated
from fedoppu.client.llama_packing import Packed, filled, pack_rows, split_rows
from fedoppu.client.multi_lora import AnyLevel, Level, only_lora

FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
# rotary tables that depend on the length of the text are left to the generic path
ROTARY = ("default", "linear", "llama3", "yarn")
# bytes that one pass keeps for its backward, and the tokens that such a pass may have
PASS_BYTES = 600e6
FEWEST_TOKENS, MOST_TOKENS = 1024, 8192
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# target of an output that is padding: its loss and gradient are 0
IGNORED = -100


def fast_path(model: PreTrainedModel) -> str | None:
    """Why a base does not take the fast path, or None if it does."""
    if type(model) not in FAMILIES:
        return f"a {type(model).__name__} is not one of the Llama-shaped models"
    config = cast(Any, model).config
    rotary = config.rope_parameters.get("rope_type", "default")
    if rotary not in ROTARY:
        return f"its rotary positions are {rotary}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    if len(_windows(config)) > 1:
        return "its layers have different attention windows"
    if any(type(module) is not nn.Linear for module in _linears(model).values()):
        return "its linear layers are not plain ones"
    return None


def pass_tokens(model: PreTrainedModel) -> int:
    """Tokens of one pass: the more the faster, within memory.

    A layer keeps about eight tensors as wide as the base and three as its MLP, and the scores.
    """
    config = cast(Any, model).config
    scores = 256 * config.num_attention_heads
    kept = 8 * config.hidden_size + 3 * config.intermediate_size + scores
    token = config.num_hidden_layers * kept * model.dtype.itemsize
    return min(MOST_TOKENS, max(FEWEST_TOKENS, int(PASS_BYTES / token)))


def _windows(config: Any) -> set[int | None]:
    """Attention windows of the layers; Llama has none, Mistral one, Qwen2 one for each layer."""
    if config.model_type == "llama":
        return {None}
    if config.model_type == "mistral":
        return {config.sliding_window}
    kinds = set(config.layer_types)
    return {config.sliding_window if kind == "sliding_attention" else None for kind in kinds}


def _linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    layers = range(cast(Any, model).config.num_hidden_layers)
    names = [
        *(f"model.layers.{layer}.self_attn.{part}" for layer in layers for part in ATTENTION),
        *(f"model.layers.{layer}.mlp.{part}" for layer in layers for part in MLP),
    ]
    return {name: model.get_submodule(name) for name in names}


class Laid(Protocol):
    """Tokens of many rows back to back, and those whose outputs are wanted; see `Packed`."""

    @property
    def tokens(self) -> Indices:
        """(T,) int64."""

    @property
    def positions(self) -> Indices:
        """(T,) of each token in its own text."""

    @property
    def outputs(self) -> Indices:
        """(outputs,) tokens whose outputs are wanted."""


class Adapters(Protocol):
    """Adapters of the rows of one pass."""

    def added_to(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        """The (T, out) product of a module for input x (T, in), with the adapters' parts."""


# layer, (asking, heads, head width) queries, (T, key heads, head width) keys and values -> mixed
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Pass:
    """The tensors of one pass that all layers use.

    Attributes:
        adapters: Over all tokens, and over `outputs` alone.
        attend: Mixes the values of a layer; in the last one only `outputs` ask.
        turns: Rotary tables of keys, (T, key heads, head width) cosine and sine.
        asking: The same of queries, (T, heads, head width), divided by the root of the head
            width: the scale of the scores costs nothing there.
        outputs: (outputs,) tokens at which answers are predicted.
    """

    adapters: tuple[Adapters, Adapters]
    attend: Attend
    turns: tuple[Tensor, Tensor]
    asking: tuple[Tensor, Tensor]
    outputs: Tensor = field(repr=False)


class LlamaEngine:
    """Trains adapters on a Llama-shaped base; an `engine.Engine`."""

    def __init__(self, model: PreTrainedModel, *, checkpointing: bool = False) -> None:
        """Take the weights of a model.

        Args:
            model: One for which `fast_path` is None.
            checkpointing: Whether a backward computes each layer anew instead of keeping it.
        """
        config = cast(Any, model).config
        self._model = cast(Any, model)
        self._layers = list(self._model.model.layers[: config.num_hidden_layers])
        self._heads = HeadShape(
            config.num_attention_heads, config.num_key_value_heads, *_windows(config)
        )

        self._pass_tokens = pass_tokens(model)
        self._checkpointing = checkpointing

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def heads(self) -> HeadShape:
        """The attention heads of each layer."""
        return self._heads

    @property
    def head_width(self) -> int:
        """Coordinates of a head."""
        return int(self._layers[0].self_attn.head_dim)

    @property
    def embeddings(self) -> Tensor:
        """(vocabulary, width) of the tokens; all weights have their dtype and device."""
        weight: Tensor = self._model.model.embed_tokens.weight
        return weight

    def passes(self, rows: Sequence[Row], *, share: bool) -> "list[PackedPass]":
        """Rows as passes; with `share`, what a user's rows begin with is computed once."""
        return [
            PackedPass.of(self, [rows[index] for index in picked], np.array(picked), share=share)
            for picked in split_rows(rows, self._pass_tokens)
        ]

    def losses(self, packed: Packed, targets: Tensor, levels: Sequence[Level]) -> Tensor:
        """(outputs,) float32 losses of the answer tokens, nats."""
        everywhere = PackedAdapters(levels, packed.starts)
        asking = everywhere.at(self._tensor(packed.outputs), packed.output_starts)
        whole = filled(packed)
        hidden = self.hidden(whole, (everywhere, asking), self._attended(whole))
        wanted = functional.pad(targets, (0, len(hidden) - len(targets)), value=IGNORED)
        losses = functional.cross_entropy(self.logits(hidden), wanted, reduction="none")
        return losses[: len(targets)]

    def hidden(self, laid: Laid, adapters: tuple[Adapters, Adapters], attend: Attend) -> Tensor:
        """(outputs, width) what the output head reads.

        Args:
            laid: The tokens.
            adapters: Over all tokens, and over the outputs alone, for the last layer.
            attend: Mixes the values of a layer; its queries are those of all tokens, in the last
                layer those of the outputs, scaled already.
        """
        run = self._prepare(laid, adapters, attend)
        hidden = self._model.model.embed_tokens(self._tensor(laid.tokens))
        for index in range(len(self._layers)):
            hidden = self._kept(index, hidden, run)
        final = self._model.model.norm
        return norm(hidden, final.weight, final.variance_epsilon)

    def logits(self, hidden: Tensor) -> Tensor:
        """(outputs, vocabulary) float32."""
        head = self._model.lm_head
        return functional.linear(hidden, head.weight, head.bias).float()

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return on_device(array, self._model.device)

    def _attended(self, packed: Packed) -> Attend:
        """Attention over stretches of the rows, differentiable."""
        below, last = (
            attention_plan(
                stretches,
                packed.positions,
                self._heads,
                dtype=self._model.dtype,
                device=self._model.device,
            )
            for stretches in (packed.stretches, packed.last)
        )
        plans = (*[below] * (len(self._layers) - 1), last)
        return lambda layer, query, key, value: attend(query, key, value, plans[layer])

    def _prepare(self, laid: Laid, adapters: tuple[Adapters, Adapters], attend: Attend) -> _Pass:
        heads, scale = self._heads, self._layers[0].self_attn.scaling
        return _Pass(
            adapters=adapters,
            attend=attend,
            turns=self._turns(laid.positions, heads.key_heads),
            asking=self._turns(laid.positions, heads.heads, scale),
            outputs=self._tensor(laid.outputs),
        )

    def _turns(self, positions: Indices, heads: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(T, heads, head width) rotary tables times a scale; the sine with the sign of its half."""
        wide = torch.zeros(1, dtype=torch.float32, device=self._model.device)
        cosine, sine = self._model.model.rotary_emb(wide, self._tensor(positions)[None])
        first, second = sine[0].chunk(2, -1)
        signed = torch.cat((-first, second), -1)
        tables = [(table * scale).to(self._model.dtype) for table in (cosine[0], signed)]
        return tables[0][:, None].repeat(1, heads, 1), tables[1][:, None].repeat(1, heads, 1)

    def _kept(self, index: int, hidden: Tensor, run: _Pass) -> Tensor:
        """One layer; what its backward needs is kept, or computed anew from `hidden`.

        Passes are as large either way, so that the bits are the same. Nothing random happens in a
        layer: dropout masks are functions of their row, so that no generator's state is saved.
        """
        if not (self._checkpointing and torch.is_grad_enabled()):
            return self._layer(index, hidden, run)
        again: Tensor = checkpoint(
            self._layer, index, hidden, run, use_reentrant=False, preserve_rng_state=False
        )
        return again

    def _layer(self, index: int, hidden: Tensor, run: _Pass) -> Tensor:
        """(T, width) after one layer; after the last one (outputs, width)."""
        layer = self._layers[index]
        name = f"model.layers.{index}"
        last = index == len(self._layers) - 1
        attention = self._attention(index, hidden, run, last=last)
        hidden = (hidden.index_select(0, run.outputs) if last else hidden) + attention
        return hidden + _mlp(layer, hidden, run.adapters[last], name=f"{name}.mlp")

    def _attention(self, index: int, hidden: Tensor, run: _Pass, *, last: bool) -> Tensor:
        layer, name = self._layers[index], f"model.layers.{index}.self_attn"
        module = layer.self_attn
        everywhere, asking = run.adapters[0], run.adapters[last]
        x = norm(hidden, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        asked, turns = x, run.asking
        if last:
            asked = x.index_select(0, run.outputs)
            turns = (turns[0][run.outputs], turns[1][run.outputs])
        shape = (-1, self._heads.key_heads, module.head_dim)
        query = _product(module.q_proj, asked, asking, f"{name}.q_proj")
        key = _product(module.k_proj, x, everywhere, f"{name}.k_proj").view(shape)
        value = _product(module.v_proj, x, everywhere, f"{name}.v_proj").view(shape)
        query = rotated(query.view(-1, self._heads.heads, module.head_dim), *turns)
        mixed = run.attend(index, query, rotated(key, *run.turns), value)
        return _product(module.o_proj, mixed.flatten(1), asking, f"{name}.o_proj")


def _mlp(layer: Any, hidden: Tensor, adapters: Adapters, *, name: str) -> Tensor:
    module, scale = layer.mlp, layer.post_attention_layernorm
    x = norm(hidden, scale.weight, scale.variance_epsilon)
    gate = _product(module.gate_proj, x, adapters, f"{name}.gate_proj")
    up = _product(module.up_proj, x, adapters, f"{name}.up_proj")
    return _product(module.down_proj, gated(gate, up), adapters, f"{name}.down_proj")


def _product(module: nn.Linear, x: Tensor, adapters: Adapters, name: str) -> Tensor:
    """(T, out) of a frozen linear layer with its adapters; autograd keeps nothing for the former."""
    return adapters.added_to(functional.linear(x, module.weight, module.bias), x, name)


@dataclass(frozen=True)
class PackedPass:
    """Rows in one pass of the fast path; an `engine.Pass`.

    Attributes:
        picked: (rows,) index of each row among those that were packed.
        sources: (outputs,) the same of each target.
    """

    engine: LlamaEngine
    packed: Packed = field(repr=False)
    picked: NDArray[np.int64]
    targets: Tensor = field(repr=False)
    sources: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(
        cls, engine: LlamaEngine, rows: Sequence[Row], picked: NDArray[np.int64], *, share: bool
    ) -> "PackedPass":
        """Packs rows that follow each other."""
        packed = pack_rows(rows, share=share)
        answers = np.concatenate([row.example.answer for row in rows]).astype(np.int64)
        return cls(
            engine=engine,
            packed=packed,
            picked=picked,
            targets=engine._tensor(answers),
            sources=np.repeat(picked, np.diff(packed.output_starts)),
        )

    def spread(self, parts: Sequence[NDArray[np.float32]]) -> Tensor:
        """Lays out what each row has for each of its tokens, (T, width)."""
        return self.engine._tensor(np.concatenate(parts))

    def losses(self, levels: Sequence[AnyLevel]) -> Tensor:
        """(outputs,) float32 losses of the answer tokens, nats."""
        return self.engine.losses(self.packed, self.targets, only_lora(levels))
