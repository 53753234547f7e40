"""What travels: nothing of a user in a real run, and a detector that would see it."""

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedoppu.client.jobs import LocalUpdate
from fedoppu.common.config import ResearchSettings
from fedoppu.common.messages import write_reply
from fedoppu.common.rounds import MaskedUpdate, RoundPlan
from fedoppu.simulations.capture import Captured, CaptureGrid, Detector, Finding
from tests.fake_federation import CONFIG, FakeExecutor, federation, made_up

TEXTS = ("On Tuesday I met Ada at the harbour café and we spoke of the lighthouse.",)


def captured_run(folder: Path, **changes: Any) -> tuple[Sequence[Captured], dict[str, Any]]:
    """A run's messages, and the updates that were made in it."""
    updates: dict[str, Any] = {}

    def update(member: int, plan: RoundPlan) -> LocalUpdate:
        made = made_up(member, plan)
        updates[f"round {plan.round} member {member}"] = made.vector
        return made

    config = replace(CONFIG, plain_updates=changes.pop("plain", False))
    made = federation(
        folder,
        config,
        executor=FakeExecutor(update),
        wrap_grid=CaptureGrid,
        warn=lambda line: None,
        **changes,
    )
    made.run()
    return made.grid.messages, updates  # type: ignore[attr-defined]


def test_real_run_is_clean(tmp_path: Path) -> None:
    messages, updates = captured_run(tmp_path, research=ResearchSettings(dropout=0.1))
    stages = {(message.direction, message.stage) for message in messages}
    assert len(stages) == 12
    assert Detector(texts=TEXTS, updates=updates).findings(messages) == []


def test_clear_updates_are_found_each_one(tmp_path: Path) -> None:
    messages, updates = captured_run(tmp_path, plain=True)
    findings = Detector(updates=updates).findings(messages)
    assert {finding.kind for finding in findings} == {"plain update"}
    assert {f.detail for f in findings if f.detail.startswith("round")} == set(updates)


def message(content: RecordDict, *, error: str = "", direction: Any = "up") -> Captured:
    return Captured(direction, "query.keys", 1003, "1", content, error)


def with_bytes(data: bytes) -> RecordDict:
    return RecordDict({"event": ConfigRecord({"signature": data})})


NOISE = np.random.default_rng(0).bytes(4096)


@pytest.mark.parametrize(
    "hidden",
    [
        TEXTS[0].encode(),
        TEXTS[0][5:60].encode(),
        TEXTS[0].encode("utf-16-le"),
        TEXTS[0].encode().hex().encode(),
        base64.b64encode(TEXTS[0].encode()),
        base64.b64encode(b"x" + TEXTS[0].encode()),
        base64.b64encode(b"xy" + TEXTS[0].encode()),
    ],
)
def test_text_is_found_in_whatever_encoding_and_never_repeated(hidden: bytes) -> None:
    content = with_bytes(NOISE + hidden + NOISE)
    (finding,) = Detector(texts=TEXTS).findings([message(content)])
    assert finding == Finding("text", 0, "query.keys", 1003, "text 0")


def test_text_in_an_error_or_to_a_client_is_found() -> None:
    told = message(RecordDict(), error=f"ValueError: {TEXTS[0]}")
    sent = message(with_bytes(TEXTS[0].encode()), direction="down")
    kinds = [(f.kind, f.message) for f in Detector(texts=TEXTS).findings([told, sent])]
    assert kinds == [("text", 0), ("text", 1)]


@pytest.mark.parametrize("kind", ["<f4", "<f2", "<f8"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_personal_tensor_is_found_in_any_float_and_direction(kind: str, direction: str) -> None:
    tensor = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
    content = with_bytes(NOISE + tensor.astype(kind).tobytes())
    (finding,) = Detector(tensors={"me": tensor}).findings([message(content, direction=direction)])
    assert (finding.kind, finding.detail) == ("tensor", "me")


def test_shared_tensor_is_not_taken_for_a_personal_one() -> None:
    rng = np.random.default_rng(1)
    mine, other = (rng.standard_normal((8, 16)).astype(np.float32) for _ in range(2))
    mine[0, 0] = other[0, 0]
    assert Detector(tensors={"me": mine}).findings([message(with_bytes(other.tobytes()))]) == []
    zeros = np.zeros((8, 16), np.float32)
    assert Detector(tensors={"me": zeros}).findings([message(with_bytes(bytes(512)))]) == []


def test_text_field_and_floats_from_a_client_are_found_whatever_they_say() -> None:
    content = RecordDict(
        {
            "event": ConfigRecord({"note": "hi", "notes": ["hi"]}),
            "arrays": ArrayRecord({"update": Array(np.zeros(3, np.float32))}),
        }
    )
    kinds = sorted(finding.kind for finding in Detector().findings([message(content)]))
    assert kinds == ["plain update", "text field", "text field"]
    assert Detector().findings([message(content, direction="down")]) == []


def test_integers_that_were_not_masked_are_found() -> None:
    rng = np.random.default_rng(2)
    levels = (rng.normal(0, 500, 5000) + 32767).astype(np.uint32)
    masked = rng.integers(0, 1 << 32, 5000, dtype=np.uint32)
    clear = message(write_reply(MaskedUpdate(1, levels, b"s" * 64)))
    hidden = message(write_reply(MaskedUpdate(1, masked, b"s" * 64)))
    (finding,) = Detector().findings([clear, hidden])
    assert (finding.kind, finding.message) == ("not uniform", 0)


def test_capture_allows_no_way_round_it(tmp_path: Path) -> None:
    made = federation(tmp_path, wrap_grid=CaptureGrid)
    with pytest.raises(NotImplementedError, match="push_messages and pull_messages alone"):
        made.grid.send_and_receive([])
    assert made.grid.run.run_id == 1
    made.grid.set_run(made.grid.run)
    assert made.grid.create_message(RecordDict(), "query.keys", 1000, "1").metadata.group_id == "1"
