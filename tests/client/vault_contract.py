"""What every `Vault` promises, whatever is behind it.

A test module makes a `make` function that opens a vault of a user with these items, in a folder,
and calls `check_vault`; opening the same folder again must find what was stored.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fedoppu.client.vault import QUERY, HistoryItem, Vault
from fedoppu.common.adapters import AdapterSpec, Target, initial_adapter
from fedoppu.common.randomness import Randomness

ITEMS = (
    HistoryItem(
        "1", "2020-01-01", "test", "LaMP_3", {"text": "naïve café 🙂 ünïcode", "score": "4"}
    ),
    HistoryItem(
        "2", "", "test", "LaMP_3", {"text": 'quotes " and \\ and\nnew lines', "score": "1"}
    ),
    HistoryItem("q1", "2021-05-05", "test", QUERY, {"input": "What score?", "gold": "5"}),
)
SPEC = AdapterSpec("ab" * 32, (Target("layer.q_proj", 6, 4),), rank=2)
Open = Callable[[Path, Sequence[HistoryItem]], Vault]


def check_vault(open_vault: Open, folder: Path) -> None:
    """Runs the whole contract in a folder."""
    _check_history(open_vault(folder / "history", ITEMS))
    _check_adapters(open_vault, folder / "adapters")
    _check_state(open_vault(folder / "state", ITEMS))
    _check_outbox(open_vault(folder / "outbox", ITEMS))
    _check_that_users_are_apart(open_vault, folder)


def _check_history(vault: Vault) -> None:
    assert tuple(vault.history()) == ITEMS
    assert tuple(vault.history()) == tuple(vault.history())
    assert vault.profile is None or isinstance(vault.profile, str)
    assert vault.user_id


def _check_adapters(open_vault: Open, folder: Path) -> None:
    vault = open_vault(folder, ITEMS)
    first, second = (initial_adapter(SPEC, Randomness.from_seed(seed), "own") for seed in (1, 2))
    assert vault.adapters.load("me") is None
    vault.adapters.save("me", first)
    vault.adapters.save("me/other name", second)
    vault.adapters.save("me", second)
    for each in (vault, open_vault(folder, ITEMS)):
        loaded = each.adapters.load("me")
        assert loaded is not None
        assert loaded.digest() == second.digest()
        np.testing.assert_array_equal(
            loaded.tensors["layer.q_proj.A"], second.tensors["layer.q_proj.A"]
        )
        assert each.adapters.load("me/other name") is not None


def _check_state(vault: Vault) -> None:
    assert vault.state.get("round") is None
    vault.state.put("round", b"\x00\xff" * 10)
    vault.state.put("a/b", b"")
    assert vault.state.get("round") == b"\x00\xff" * 10
    assert vault.state.get("a/b") == b""
    vault.state.put("round", b"new")
    assert vault.state.get("round") == b"new"


def _check_outbox(vault: Vault) -> None:
    for number in range(3):
        vault.outbox.append("query.keys", number, bytes([number]) * 32)


def _check_that_users_are_apart(open_vault: Open, folder: Path) -> None:
    one, other = open_vault(folder / "one", ITEMS), open_vault(folder / "other", ITEMS[:1])
    one.state.put("key", b"secret")
    assert other.state.get("key") is None
    assert tuple(other.history()) == ITEMS[:1]
