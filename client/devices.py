"""Where tensors meet numpy: the one way onto the base's device and the one way back.

Tokens, orders and masks are made in numpy; everything that goes through the base lies on its device.
"""

import os
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fedoppu.common.config import Device
from fedoppu.common.errors import UsageError

CPU = torch.device("cpu")


def chosen_device(wanted: Device) -> torch.device:
    """The device that a setting means on this machine.

    Raises:
        UsageError: CUDA was asked for, and torch finds none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError(
            "device=cuda was asked for, but torch finds no CUDA device on this machine",
            hint="set device=cpu, or install a build of torch with CUDA and its driver",
        )
    return torch.device("cuda") if available and wanted != "cpu" else CPU


def settled(wanted: Device) -> Device:
    """The same as a setting, never auto: a run keeps it, since its bytes are those of its device.

    Raises:
        UsageError: CUDA was asked for, and torch finds none.
    """
    return "cuda" if chosen_device(wanted).type == "cuda" else "cpu"


def make_deterministic(device: torch.device) -> None:
    """From now on this process computes the same bytes from the same input, on CUDA too.

    There kernels that add up in any order are replaced by slower ones, and cuBLAS gets a workspace
    of its own, as https://docs.pytorch.org/docs/stable/notes/randomness.html says. A CPU needs nothing.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on a device; on the CPU both share their memory."""
    return torch.from_numpy(array).to(device)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's values as an array; on the CPU both share their memory."""
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
