"""Hooks that change what a frozen module is given or gives, for the time of one call.

A hook acts only in the thread that registered it, so that a daemon can answer from a model while it
trains on it. Nothing is injected into the model: whoever registers a hook removes it.
"""

import threading
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedoppu.common.errors import BaseModelError


def before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """From now on, in this thread, a module gets `change(input)` as its first argument."""
    owner = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (change(args[0]), *args[1:]) if threading.get_ident() == owner else None

    return module.register_forward_pre_hook(hook)


def after(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> RemovableHandle:
    """From now on, in this thread, a module gives `change(output, input)`; earlier hooks act first."""
    owner = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return change(output, args[0]) if threading.get_ident() == owner else None

    return module.register_forward_hook(hook)


def linear_module(model: PreTrainedModel, name: str) -> nn.Linear:
    """A linear layer of a model.

    Raises:
        BaseModelError: There is no such module, or it is no `nn.Linear`.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise BaseModelError(f"a {type(model).__name__} has no module {name}") from None
    if not isinstance(module, nn.Linear):
        raise BaseModelError(
            f"module {name} is a {type(module).__name__}; only nn.Linear can be adapted",
            hint="choose other targets or another base",
        )
    return module


def require_rows(name: str, x: Tensor, rows: int) -> None:
    """Checks that a module sees (rows, tokens, features).

    Raises:
        BaseModelError: It sees something else, so that it is not known whose tokens they are.
    """
    if x.dim() != 3 or x.shape[0] != rows:
        raise BaseModelError(
            f"module {name} got an input of shape {tuple(x.shape)}, not (rows, tokens,"
            " features): it cannot be adapted",
            hint="choose other targets",
        )
