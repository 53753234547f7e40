"""Every tensor of a step lies on the base's device; CUDA that is not there is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedoppu.client.devices import CPU, as_array, chosen_device, make_deterministic, on_device
from fedoppu.client.model import load_base, resolve_base
from fedoppu.common.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_no_operation_of_training_or_scoring_is_over_two_devices(tiny_base: Path) -> None:
    """On a device that there is not: an operation over it and the CPU is refused, as on CUDA."""
    command = [sys.executable, "-m", "tests.client.fake_device", str(tiny_base)]
    kinds = ["lora", "ia3", "prompt"]
    done = subprocess.run(  # noqa: S603
        [*command, *kinds], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == chosen_device("cpu") == CPU
    with pytest.raises(UsageError, match="device=cuda was asked for, but torch finds no CUDA"):
        chosen_device("cuda")


def test_cuda_is_taken_where_it_is_there_and_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto").type == chosen_device("cuda").type == "cuda"
    assert chosen_device("cpu") == CPU


def test_only_cuda_is_made_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "kept")
    seen: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", seen.append)
    make_deterministic(CPU)
    assert seen == []
    make_deterministic(torch.device("cuda"))
    assert seen == [True]


def test_a_base_is_loaded_where_it_is_wanted(tiny_base: Path) -> None:
    facts = resolve_base(str(tiny_base))
    assert load_base(facts).device == CPU
    assert load_base(facts, device=torch.device("meta")).device.type == "meta"


def test_an_array_comes_back_as_it_went() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(as_array(on_device(array, CPU).requires_grad_()), array)
