"""Where tensors meet numpy: the one way onto the base's device and the one way back.

Tokens, orders and masks are made in numpy; everything that goes through the base lies on its device.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on a device; on the CPU both share their memory."""
    return torch.from_numpy(array).to(device)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's values as an array; on the CPU both share their memory."""
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
