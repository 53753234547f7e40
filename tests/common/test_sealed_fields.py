"""The wire form of the two-server mode: what is written is read back, and nothing else is read."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedoppu.common.errors import ProtocolError
from fedoppu.common.messages import (
    SealedTraining,
    pack,
    payload_bytes,
    read_mask_request,
    read_mask_sum,
    read_reply,
    read_request,
    unpack,
    write_mask_request,
    write_mask_sum,
    write_reply,
    write_request,
    write_requests,
)
from fedoppu.common.rounds import RoundOpened
from fedoppu.common.two_server import MaskSum, SealedUpdate
from tests.integration.two_server_harness import TwoServers

MADE = TwoServers()
MODEL = np.arange(4, dtype=np.float32)


def travelled(content: RecordDict) -> RecordDict:
    return unpack(pack(content))


def training() -> SealedTraining:
    return SealedTraining(RoundOpened(MADE.plan), b"{}", MODEL)


def update() -> SealedUpdate:
    return MADE.update(2)


def answer() -> MaskSum:
    return MADE.new_helper().answer(MADE.asking([0, 1, 2, 3]).request())


def test_training_is_read_back() -> None:
    read = read_request("train.sealed", travelled(write_request(training())))
    assert isinstance(read, SealedTraining)
    assert (read.event.plan, read.config) == (MADE.plan, b"{}")
    np.testing.assert_array_equal(read.model, MODEL)


def test_model_that_all_share_is_written_once() -> None:
    request = training()
    contents = write_requests(dict.fromkeys(range(3), request))
    assert contents[0]["arrays"] is contents[2]["arrays"]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("hybrid", [False, True])
def test_update_is_read_back(narrow: bool, hybrid: bool) -> None:
    made = TwoServers(narrow=narrow, hybrid=hybrid)
    sent = made.update(2)
    read = cast(SealedUpdate, read_reply("train.sealed", travelled(write_reply(sent)), "member 2"))
    np.testing.assert_array_equal(read.words, sent.words)
    assert read.words.dtype == sent.words.dtype
    assert read.claim() == sent.claim()
    assert read.salt == sent.salt


def test_update_costs_little_more_than_its_words() -> None:
    made = TwoServers(num_params=1000)
    sent = made.update(2)
    assert (
        payload_bytes(write_reply(sent)) - sent.words.nbytes == 128 + 8 + 32 + 80 + 64
    )  # a header


def test_question_to_the_helper_is_read_back_and_holds_no_words() -> None:
    server = MADE.asking([0, 1, 2, 3])
    content = travelled(write_mask_request(server.request()))
    assert read_mask_request(content) == server.request()
    assert not content.array_records


def test_answer_of_the_helper_is_read_back() -> None:
    told = answer()
    read = read_mask_sum(travelled(write_mask_sum(told)))
    np.testing.assert_array_equal(read.words, told.words)
    assert (read.context, read.survivors, read.unsealed) == (
        told.context,
        told.survivors,
        told.unsealed,
    )
    assert read.signature == told.signature


def test_answer_without_a_sum_is_read_back() -> None:
    empty = MaskSum(b"c" * 32, (), (1, 2), np.zeros(0, np.uint32), b"s" * 64)
    read = read_mask_sum(travelled(write_mask_sum(empty)))
    assert (read.survivors, read.unsealed, read.words.shape) == ((), (1, 2), (0,))


# --- what is refused ------------------------------------------------------------------------------

READERS: dict[str, tuple[Callable[[], RecordDict], Callable[[RecordDict], Any]]] = {
    "training": (
        lambda: write_request(training()),
        lambda content: read_request("train.sealed", content),
    ),
    "update": (
        lambda: write_reply(update()),
        lambda content: read_reply("train.sealed", content, "member 2"),
    ),
    "question": (
        lambda: write_mask_request(MADE.asking([0, 1, 2]).request()),
        read_mask_request,
    ),
    "answer": (lambda: write_mask_sum(answer()), read_mask_sum),
}


@pytest.mark.parametrize("name", READERS)
def test_unknown_fields_and_text_are_refused(name: str) -> None:
    write, read = READERS[name]
    content = write()
    content.config_records["event"]["diary"] = "dear diary"
    with pytest.raises(ProtocolError, match="1 unknown fields") as caught:
        read(content)
    assert "diary" not in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_every_field_must_be_there_and_be_no_text(name: str) -> None:
    write, read = READERS[name]
    for key in list(write()["event"]):
        missing = write()
        del missing.config_records["event"][key]
        with pytest.raises(ProtocolError, match=f"field {key}.* is missing"):
            read(missing)
        text = write()
        text.config_records["event"][key] = "dear diary"
        with pytest.raises(ProtocolError, match=f"field {key}"):
            read(text)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("update", "salt", b"s" * 31, "field salt must have 32 bytes, got 31"),
        ("update", "sealed", b"", "field sealed must have 1 to 2048 bytes"),
        ("update", "sealed", b"s" * 2049, "field sealed must have 1 to 2048 bytes"),
        ("update", "signature", b"s" * 63, "field signature must have 64 bytes"),
        ("update", "member", -1, "field member must be between"),
        ("question", "members", [1, 0, 2], "field members must be strictly ascending"),
        ("question", "members", [0, 1], "field word_hashes must have 2 entries"),
        ("question", "sealed", [b"s" * 80] * 2, "field sealed must have 3 entries"),
        ("question", "signatures", [b"s"] * 3, "field signatures must have 64 bytes"),
        ("answer", "survivors", [1, 0], "field survivors must be strictly ascending"),
        ("answer", "context", b"c", "field context must have 32 bytes"),
    ],
)
def test_wrong_sizes_and_orders_are_refused(name: str, key: str, value: Any, message: str) -> None:
    write, read = READERS[name]
    content = write()
    content.config_records["event"][key] = value
    with pytest.raises(ProtocolError, match=message):
        read(content)


@pytest.mark.parametrize("name", ["update", "answer"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_only_words_are_read(name: str, dtype: type) -> None:
    write, read = READERS[name]
    content = write()
    content["arrays"] = ArrayRecord({"words": Array(np.zeros(7, dtype))})
    with pytest.raises(ProtocolError, match="must be a vector of uint16 or uint32"):
        read(content)


@pytest.mark.parametrize("name", ["update", "answer", "training"])
def test_records_beside_the_two_are_refused(name: str) -> None:
    write, read = READERS[name]
    content = write()
    content["more"] = ConfigRecord({})
    with pytest.raises(ProtocolError, match="must hold the records event, arrays"):
        read(content)
