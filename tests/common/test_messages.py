"""The wire form: every event comes back as it was, and nothing else is accepted."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from fedoppu.common.config import (
    EncodingSettings,
    FederationConfig,
    PromptSettings,
    RetrieverSettings,
    SharedSettings,
    ThresholdSettings,
)
from fedoppu.common.errors import ProtocolError
from fedoppu.common.fields import Fields
from fedoppu.common.messages import (
    ROUND,
    Hello,
    Opening,
    PlainTraining,
    PlainUpdate,
    Training,
    read_reply,
    read_request,
    write_reply,
    write_request,
)
from fedoppu.common.plan_fields import read_config
from fedoppu.common.rounds import (
    Advert,
    CohortFixed,
    MaskedUpdate,
    RoundOpened,
    RoundPlan,
    ShareBundle,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
)
from fedoppu.common.vectors import read_vector, write_vector

MEMBERS = st.integers(0, 1 << 20)
DIGESTS = st.binary(min_size=32, max_size=32)
SIGNATURES = st.binary(min_size=64, max_size=64)
HEX = DIGESTS.map(bytes.hex)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(1, 1 << 20)
PLANS = st.builds(
    RoundPlan,
    run_id=HEX,
    round=COUNTS,
    attempt=st.integers(0, 9),
    config_hash=HEX,
    roster_hash=HEX,
    model_hash=HEX,
    num_params=COUNTS,
    factors=st.sampled_from(["A", "B", "AB"]),
    clip=FINITE,
    value_range=FINITE,
    word_bits=st.sampled_from([16, 32]),
    level_bits=st.integers(2, 30),
    max_weight=COUNTS,
    threshold=COUNTS,
    neighbours=COUNTS,
    min_cohort=COUNTS,
    max_drops=st.integers(0, 1 << 20),
    noise_scale=FINITE,
)
SHARES = st.dictionaries(MEMBERS, st.binary(min_size=1, max_size=128), max_size=4)
ADVERTS = st.builds(Advert, MEMBERS, DIGESTS, DIGESTS, DIGESTS, SIGNATURES)
PATHS = st.lists(DIGESTS, max_size=3).map(tuple)
BLOBS = st.binary(min_size=1, max_size=20)


@st.composite
def bundles(draw: st.DrawFn) -> ShareBundle:
    """A dealer's bundle: each recipient gets a package and hashes, those above it may an offer."""
    member, recipients = draw(MEMBERS), draw(st.lists(MEMBERS, unique=True, max_size=4))
    heirs = [peer for peer in recipients if peer > member] if draw(st.booleans()) else []
    return ShareBundle(
        member,
        {peer: draw(BLOBS) for peer in recipients},
        {peer: draw(st.binary(min_size=20, max_size=20)) for peer in recipients},
        draw(SIGNATURES),
        {peer: draw(BLOBS) for peer in heirs},
    )


BUNDLES = bundles()
SORTED = st.lists(MEMBERS, unique=True, max_size=6).map(lambda members: tuple(sorted(members)))
WORDS = st.sampled_from([np.uint16, np.uint32]).flatmap(
    lambda dtype: nps.arrays(dtype, st.integers(0, 40))
)
FLOATS = nps.arrays(
    np.float32, st.integers(0, 20), elements=st.floats(-8, 8, width=32, allow_nan=False)
)
CONFIG = FederationConfig(
    task="LaMP_3",
    k=0,
    profile="none",
    base_hash="ab" * 32,
    rounds=2,
    cohort=3,
    public_seed=1,
    dtype="float32",
    shared=SharedSettings(),
    prompt=PromptSettings(),
    retriever=RetrieverSettings(),
    encoding=EncodingSettings(),
    thresholds=ThresholdSettings(),
)
PLAN = RoundPlan(
    "ab" * 16, 1, 0, "ab" * 32, "cd" * 32, "ef" * 32, 5, "B", 1.0, 0.5, 32, 16, 8, 2, 2, 2, 1
)


def by_member(items: list[Any]) -> dict[int, Any]:
    return {item.member: item for item in items}


DELIVERED = st.builds(lambda bundle, path: replace(bundle, path=path), BUNDLES, PATHS)
DELIVERIES = st.builds(SharesDelivered, SORTED, st.lists(DELIVERED, max_size=4).map(by_member))


def travelled(content: RecordDict) -> RecordDict:
    """Through protobuf, as Flower sends it."""
    return recorddict_from_proto(recorddict_to_proto(content))


@given(PLANS)
def test_plan_keeps_its_context_on_the_wire(plan: RoundPlan) -> None:
    content = travelled(write_request(Opening(RoundOpened(plan), b"{}")))
    opening = read_request("query.keys", content)
    assert isinstance(opening, Opening)
    assert opening.event.plan.context == plan.context
    assert opening.config == b"{}"


@given(st.lists(ADVERTS, max_size=5).map(by_member))
def test_cohort_comes_back_as_it_was(adverts: dict[int, Advert]) -> None:
    event = CohortFixed(tuple(adverts[member] for member in sorted(adverts)))
    assert read_request("query.shares", travelled(write_request(event))) == event


@settings(max_examples=60)
@given(DELIVERIES, FLOATS)
def test_bundles_and_model_come_back_as_they_were(event: SharesDelivered, model: Any) -> None:
    training = read_request("train.masked", travelled(write_request(Training(event, model))))
    assert isinstance(training, Training)
    assert training.event == event
    np.testing.assert_array_equal(training.model, model)


@given(SORTED, SORTED)
def test_survivors_come_back_as_they_were(dealers: Any, survivors: Any) -> None:
    event = SurvivorsProposed(dealers, survivors)
    assert read_request("query.consistency", travelled(write_request(event))) == event


@given(st.dictionaries(MEMBERS, SIGNATURES, max_size=5))
def test_signatures_come_back_as_they_were(signatures: dict[int, bytes]) -> None:
    event = UnmaskRequested(signatures)
    assert read_request("query.unmask", travelled(write_request(event))) == event


@given(ADVERTS)
def test_advert_comes_back_as_it_was(advert: Advert) -> None:
    assert read_reply("query.keys", travelled(write_reply(advert)), "member 1") == advert


@given(BUNDLES)
def test_bundle_comes_back_as_it_was(bundle: ShareBundle) -> None:
    assert read_reply("query.shares", travelled(write_reply(bundle)), "member 1") == bundle


@given(MEMBERS, WORDS, SIGNATURES, SORTED)
def test_masked_update_comes_back_as_it_was(
    member: int, words: Any, signature: bytes, complaints: tuple[int, ...]
) -> None:
    sent = MaskedUpdate(member, words, signature, complaints)
    reply = read_reply("train.masked", travelled(write_reply(sent)), "member 1")
    assert isinstance(reply, MaskedUpdate)
    assert (reply.member, reply.signature, reply.complaints) == (member, signature, complaints)
    assert reply.words.dtype == words.dtype
    np.testing.assert_array_equal(reply.words, words)


@given(st.builds(UnmaskReply, MEMBERS, SHARES, SHARES, DIGESTS, SIGNATURES))
def test_unmask_reply_comes_back_as_it_was(reply: UnmaskReply) -> None:
    assert read_reply("query.unmask", travelled(write_reply(reply)), "member 1") == reply


@given(MEMBERS, SIGNATURES)
def test_survivor_signature_and_hello_come_back(member: int, signature: bytes) -> None:
    signed = SurvivorSignature(member, signature)
    assert read_reply("query.consistency", travelled(write_reply(signed)), "member 1") == signed
    hello = Hello(member)
    assert read_reply("query.hello", travelled(write_reply(hello)), "node 1") == hello


@given(MEMBERS, FLOATS, st.integers(0, 99), st.booleans(), FINITE)
def test_plain_messages_come_back(
    member: int, vector: Any, weight: int, held_out: bool, loss: float
) -> None:
    sent = PlainUpdate(member, vector, weight, held_out, loss)
    reply = read_reply("train.plain", travelled(write_reply(sent)), "member 1")
    assert isinstance(reply, PlainUpdate)
    np.testing.assert_array_equal(reply.vector, vector)
    assert replace(reply, vector=vector) == sent
    request = PlainTraining(RoundOpened(PLAN), b"{}", vector)
    read = read_request("train.plain", travelled(write_request(request)))
    assert isinstance(read, PlainTraining)
    assert read.event == request.event


def advert_record(**changes: Any) -> RecordDict:
    advert = Advert(3, b"c" * 32, b"m" * 32, b"s" * 32, b"x" * 64)
    values = dict(vars(advert)) | changes
    return RecordDict({"event": ConfigRecord({k: v for k, v in values.items() if v is not None})})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mask_key": None}, r"query\.keys of member 3: field mask_key is missing"),
        ({"note": "my diary"}, r"query\.keys of member 3: 1 unknown fields"),
        ({"mask_key": "m" * 32}, r"field mask_key must be bytes, got str"),
        ({"mask_key": b"m" * 31}, r"field mask_key must have 32 to 1216 bytes, got 31"),
        ({"member": True}, r"field member must be an integer, got bool"),
        ({"member": -1}, r"field member must be between 0 and 1048576, got -1"),
        ({"member": 1.0}, r"field member must be an integer, got float"),
    ],
)
def test_malformed_field_is_named_with_stage_and_sender(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ProtocolError, match=problem):
        read_reply("query.keys", advert_record(**changes), "member 3")


def test_text_of_an_unknown_field_is_not_repeated() -> None:
    with pytest.raises(ProtocolError) as caught:
        read_reply("query.keys", advert_record(**{"my diary": b""}), "member 3")
    assert "diary" not in str(caught.value)


def test_a_second_record_is_refused() -> None:
    content = advert_record()
    content["more"] = MetricRecord({"loss": 1.0})
    with pytest.raises(ProtocolError, match="must hold the records event, got 2 records"):
        read_reply("query.keys", content, "member 3")


def test_event_must_be_a_config_record() -> None:
    with pytest.raises(ProtocolError, match="event must be a ConfigRecord, got MetricRecord"):
        read_reply("query.keys", RecordDict({"event": MetricRecord({"a": 1})}), "member 3")


def masked_record(array: Array | None) -> RecordDict:
    content = write_reply(MaskedUpdate(1, np.arange(4, dtype=np.uint32), b"x" * 64))
    content["arrays"] = ArrayRecord({"words": array}) if array else ArrayRecord()
    return content


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (None, "with the one array words"),
        (Array(np.zeros(4, np.float32)), "must be a vector of uint16 or uint32"),
        (Array(np.zeros((2, 2), np.uint32)), "must be a vector of uint16 or uint32"),
        (Array("uint32", (4,), "pickle", b"x"), "must be a vector of uint16 or uint32"),
        (
            Array("uint32", (1 << 40,), "numpy.ndarray", b"x"),
            "must have .* with their header",
        ),
        (
            Array("uint32", (4,), "numpy.ndarray", b"x" * 144),
            "must have .* with their header",
        ),
    ],
)
def test_malformed_array_is_refused(array: Array | None, problem: str) -> None:
    with pytest.raises(ProtocolError, match=rf"train\.masked of member 1: .*{problem}"):
        read_reply("train.masked", masked_record(array), "member 1")


def test_model_that_is_not_finite_is_refused() -> None:
    content = write_request(Training(SharesDelivered((), {}), np.array([np.nan], np.float32)))
    with pytest.raises(ProtocolError, match="of the server: array model must be finite"):
        read_request("train.masked", content)


def doctored(**changes: Any) -> RecordDict:
    bundle = ShareBundle(1, {0: b"p"}, {0: b"h" * 20, 2: b"h" * 20}, b"x" * 64)
    content = write_request(Training(SharesDelivered((1,), {1: bundle}), np.zeros(2, np.float32)))
    content.config_records["event"].update(changes)
    return content


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"share_hashes_of": [2, 0]}, "field share_hashes_of must be strictly ascending"),
        ({"packages_count": [2]}, "field packages_of must have 2 entries, got 1"),
        ({"packages": b"p"}, "field packages must be a list, got bytes"),
        ({"dealers": [-1]}, "field dealers must hold integers from 0 to 1048576"),
        ({"signatures": []}, "field signatures must have 1 entries, got 0"),
    ],
)
def test_malformed_bundles_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        read_request("train.masked", doctored(**changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_is_not_finite_is_refused(value: float) -> None:
    content = write_request(Opening(RoundOpened(replace(PLAN, clip=value)), b"{}"))
    with pytest.raises(ProtocolError, match="field clip must be finite"):
        read_request("query.keys", content)


def test_integer_where_a_float_belongs_is_refused() -> None:
    with pytest.raises(ProtocolError, match="field clip must be a float, got int"):
        Fields("here", {"clip": 1}).number("clip")


def test_config_is_read_back_from_its_canonical_bytes() -> None:
    assert read_config("here", CONFIG.canonical()) == CONFIG


@pytest.mark.parametrize(
    "data",
    [
        CONFIG.canonical().replace(b'"k":0', b'"k": 0'),
        CONFIG.canonical().replace(b'"LaMP_3"', b'"${oc.env:HOME}"'),
        b"[]",
    ],
)
def test_config_in_another_form_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="field config is not"):
        read_config("here", data)


@pytest.mark.parametrize("data", [b"\xff", b"{", b"&a [*a]", b'{"task":"LaMP_3","diary":1}'])
def test_config_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="field config is not a federation's config"):
        read_config("here", data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@settings(deadline=None)
@given(st.sampled_from(sorted(json.loads(CONFIG.canonical()))), JSON)
def test_config_with_any_other_value_is_refused_or_differs(key: str, value: Any) -> None:
    changed = json.loads(CONFIG.canonical()) | {key: value}
    data = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
    try:
        config = read_config("here", data)
    except ProtocolError:
        return
    assert config.canonical() == data


@given(WORDS)
def test_vector_has_the_bytes_of_numpys_own_file(words: Any) -> None:
    assert write_vector(words) == Array(words).data
    np.testing.assert_array_equal(
        read_vector("x", write_vector(words), dtype=words.dtype.name, length=len(words)), words
    )


def test_every_stage_of_a_round_can_be_read_and_written() -> None:
    for stage in ROUND:
        with pytest.raises(ProtocolError, match=stage):
            read_request(stage, RecordDict())
        with pytest.raises(ProtocolError, match=stage):
            read_reply(stage, RecordDict(), "member 0")
