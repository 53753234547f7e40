"""Settings of adapters: of the shared LoRA, and of a personal adapter of any kind."""

from dataclasses import dataclass, fields
from typing import Literal

from fedoppu.common.errors import UsageError
from fedoppu.common.setting_checks import require

AdapterKind = Literal["lora", "ia3", "prompt"]


@dataclass(frozen=True)
class AdapterSettings:
    """Shape of a LoRA adapter; None is replaced by the default for the task and the size of the base.

    Attributes:
        targets: Endings of the names of the adapted modules, or all-linear.
        rank: Columns of B; at least 1.
        alpha: The update is scaled by alpha / rank.
    """

    targets: tuple[str, ...] | None = None
    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("adapter.rank", self.rank, 1, 4096)
        require("adapter.alpha", self.alpha, 1e-6)


# settings of a personal adapter that one kind alone has, or two
KIND_SETTINGS = {
    "targets": ("lora", "ia3"),
    "rank": ("lora",),
    "alpha": ("lora",),
    "feedforward": ("ia3",),
    "tokens": ("prompt",),
    "text": ("prompt",),
}


@dataclass(frozen=True)
class PersonalAdapterSettings:
    """Kind and shape of a personal adapter; None is replaced by the default for the kind, the task and the base.

    Attributes:
        kind: lora; ia3: vectors that scale keys, values and the input of the MLP's last layer; prompt: virtual tokens
            before the text.
        targets: lora, ia3: endings of the names of the adapted modules, or all-linear.
        rank: lora: columns of B; at least 1.
        alpha: lora: the update is scaled by alpha / rank.
        feedforward: ia3: endings of the names of those targets whose input is scaled instead of the output.
        tokens: prompt: number of virtual tokens; at least 1.
        text: prompt: they begin as the embeddings of this text, repeated or cut; empty draws tokens of the vocabulary.
    """

    kind: AdapterKind = "lora"
    targets: tuple[str, ...] | None = None
    rank: int = 8
    alpha: float = 8.0
    feedforward: tuple[str, ...] = ("down_proj",)
    tokens: int = 20
    text: str = ""

    def __post_init__(self) -> None:
        """Check the ranges, and that nothing is set that the kind does not have."""
        require("adapter.rank", self.rank, 1, 4096)
        require("adapter.alpha", self.alpha, 1e-6)
        require("adapter.tokens", self.tokens, 1, 4096)
        for item in fields(self):
            kinds = KIND_SETTINGS.get(item.name, (self.kind,))
            if self.kind not in kinds and vars(self)[item.name] != item.default:
                raise UsageError(
                    f"personal.adapter.kind={self.kind} has no {item.name}, got {vars(self)[item.name]}",
                    hint=f"set personal.adapter.kind={kinds[0]}, or leave {item.name} out",
                )
