"""The test vectors in tests/vectors/ are what our code makes, and what a second program makes that follows the page."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from typer.testing import CliRunner

from fedoppu.common.pairwise import HYBRID, Link
from fedoppu.common.plan_fields import read_config
from fedoppu.common.signing import Scope
from fedoppu.simulations.vectors.__main__ import FILES, RECORDED, app, text_of
from tests.integration import second_protocol as second

VECTORS = Path(__file__).resolve().parents[1] / "vectors"


def load(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def raw(value: Any) -> Any:
    """A case with its hex as bytes."""
    if isinstance(value, str):
        try:
            return bytes.fromhex(value)
        except ValueError:
            return value
    if isinstance(value, list):
        return [raw(entry) for entry in value]
    return {key: raw(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def case(name: str) -> Any:
    return raw(load(name))


def scope_of(told: Any) -> second.Scope:
    return second.Scope(told["context"], told["cohort_hash"])


def identity(member: int) -> bytes:
    return second.sha(b"identity %d" % member)


# --- our code --------------------------------------------------------------------------------------


def test_the_folder_holds_the_files_of_the_command_and_no_other() -> None:
    assert {path.stem for path in VECTORS.iterdir()} == {*FILES, *RECORDED}


@pytest.mark.parametrize("name", FILES)
def test_our_code_makes_the_same_file_again(name: str) -> None:
    assert text_of(FILES[name]()) == (VECTORS / f"{name}.json").read_text(encoding="utf-8"), (
        "the wire protocol changed: see Version in docs/protocol.md, then "
        "python -m fedoppu.simulations.vectors --out tests/vectors"
    )


@pytest.mark.parametrize("recorded", [False, True])
def test_the_command_writes_them(tmp_path: Path, recorded: bool) -> None:
    words = ["--out", str(tmp_path), *(["--recorded"] if recorded else [])]
    assert CliRunner().invoke(app, words).exit_code == 0
    written = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(written) == {*FILES, *(RECORDED if recorded else ())}
    same = {
        name for name, data in written.items() if data == (VECTORS / f"{name}.json").read_bytes()
    }
    assert same == set(FILES)


@pytest.mark.parametrize(
    "make",
    [
        lambda: case("hybrid_recorded"),
        lambda: raw(json.loads(text_of(RECORDED["hybrid_recorded"]()))),
    ],
)
def test_our_code_opens_a_recorded_package_and_offer(make: Callable[[], Any]) -> None:
    told = make()
    scope, dealer, recipient = (
        Scope(told["context"], told["cohort_hash"]),
        told["dealer"],
        told["recipient"],
    )
    lower = case("hybrid_keys")["public"][0]
    channel, mask = (HYBRID.load(told[f"recipient_{use}_master"]) for use in ("channel", "mask"))
    link = Link(scope, recipient, dealer, lower)
    assert channel.unseal(told["package"], link) == told["plain"]
    found = mask.mask(link, told["offer"])
    assert found is not None
    assert (found.key, found.negative) == (case("hybrid_keys")["mask_key"], True)


def test_the_config_is_one_that_a_client_takes() -> None:
    told = load("config")
    assert read_config("the page", told["canonical"].encode()).hash().hex() == told["config_hash"]


# --- the second program ----------------------------------------------------------------------------


def test_the_second_program_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(second.__file__).read_text())
    froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    plain = [
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    ]
    assert not [name for name in (*froms, *plain) if name.split(".")[0] in ("fedoppu", "tests")]


def test_encodings() -> None:
    told = load("encoding")
    for one in told["encode_key"]:
        parts = [
            bytes.fromhex(p["bytes"]) if "bytes" in p else next(iter(p.values()))
            for p in one["parts"]
        ]
        assert second.encode(*parts).hex() == one["bytes"]
    for one in told["pack_members"]:
        assert second.packed(one["members"]).hex() == one["bytes"]
    for one in told["npy"]:
        assert second.npy(np.array(one["values"], one["dtype"])).hex() == one["bytes"]


def test_config_and_plans() -> None:
    config = load("config")
    assert second.sha(config["canonical"].encode()).hex() == config["config_hash"]
    for told in load("plan")["plans"]:
        fields = raw(told["fields"])
        assert second.canonical(fields).decode() == told["canonical"]
        assert second.context_of(fields).hex() == told["context"]


def test_adverts_cohort_and_graphs() -> None:
    told = case("cohort")
    context = told["context"]
    for one in told["adverts"]:
        assert one["identity_private"] == identity(one["member"])
        assert one["identity"] == second.identity_of(identity(one["member"]))
        assert one["channel_key"] == second.public(one["channel_private"])
        assert one["mask_key"] == second.public(one["mask_private"])
        assert one["seed_commitment"] == second.commitment(context, one["member"], one["seed"])
        assert one["signed"] == second.advert_signed(context, one)
        assert one["signature"] == second.sign(one["identity_private"], one["signed"])
        assert second.signs(one["identity"], one["signature"], one["signed"])
    assert told["cohort_hash"] == second.cohort_hash(context, told["adverts"])
    for name in ("complete", "ring"):
        graph = told[name]
        assert second.ring(told["cohort_hash"], graph["members"], graph["k"]) == graph["neighbours"]


def test_sealed_package() -> None:
    told = case("channel")
    info = scope_of(told).scoped("package", told["dealer"], told["recipient"])
    assert told["info_and_associated_data"] == info
    sealed = second.seal(told["dealer_private"], told["recipient_public"], info, told["plain"])
    assert sealed == told["package"]
    opened = second.unseal(told["recipient_private"], told["dealer_public"], info, sealed)
    assert opened == told["plain"]
    assert told["key"] == second.hkdf(
        second.dh(told["recipient_private"], told["dealer_public"]), info
    )


def test_shares() -> None:
    told = case("shares")
    dealt = second.deal(told["secret"], told["entropy"], told["holders"])
    assert list(dealt.values()) == told["shares"]
    for kind in ("seed", "key"):
        made = [
            scope_of(told).share_hash(kind, told["owner"], h, share) for h, share in dealt.items()
        ]
        assert made == told[f"{kind}_hashes"]
    assert second.restore({h: dealt[h] for h in told["holders"][1:]}) == told["secret"]


def test_bundle() -> None:
    told = case("bundle")
    rows = zip(
        *(told[name] for name in ("recipients", "packages", "share_hashes", "offers")), strict=True
    )
    leaves = [second.leaf(*row) for row in rows]
    assert leaves == told["leaves"]
    assert second.root(leaves) == told["root"]
    assert told["paths"] == [
        [leaves[1], leaves[2]],
        [leaves[0], leaves[2]],
        [second.root(leaves[:2])],
    ]
    assert told["signed"] == scope_of(told).scoped("bundle", told["dealer"], told["root"])
    assert told["signature"] == second.sign(identity(told["dealer"]), told["signed"])


def test_masks() -> None:
    told = case("masks")
    own, pair, scope = told["self_mask"], told["pair_mask"], scope_of(told)
    assert own["key"] == second.self_key(scope, own["seed"], own["member"])
    for mine, theirs in ((0, 1), (1, 0)):
        shared = second.dh(pair["private"][mine], pair["public"][theirs])
        assert pair["key"] == second.pair_key(scope, shared, *pair["members"])
    assert pair["negative"] == [False, True]
    for each in (own, pair):
        made = second.stream(each["key"], each["bytes"])
        assert made[:64] == each["stream"]
        assert second.sha(made) == each["stream_sha256"]


def test_rotation_to_the_bit() -> None:
    told = load("rotation")
    for one in told["cases"]:
        made = second.rotate(np.array(one["vector"], np.float32), bytes.fromhex(told["seed"]))
        assert made.tolist() == one["rotated"]


def test_rounding_and_limbs() -> None:
    told = load("rounding")
    values, key = np.array(told["values"], np.float32), bytes.fromhex(told["key"])
    for one in told["levels"]:
        assert second.levels(values, told["value_range"], one["level_bits"], key) == one["levels"]
    scalars = told["scalars"]
    largest = (scalars["max_weight"], 65535, 1, scalars["num_params"])
    pairs = zip(scalars["values"].values(), largest, strict=True)
    assert [limb for pair in pairs for limb in second.limbs(*pair)] == scalars["limbs"]


def test_hybrid_keys_and_what_was_sealed() -> None:
    told, sealed = case("hybrid_keys"), case("hybrid_recorded")
    scope, (low, high) = scope_of(told), told["members"]
    assert [second.hybrid_keys(master)[0] for master in told["masters"]] == told["public"]
    shared = second.hkdf(told["masters"][0], scope.scoped("pair secret", low, high))
    assert shared == told["pair_secret"]
    hashed = second.sha(scope.scoped("pair hash", low, high, shared))[:16]
    assert hashed == told["pair_secret_hash"] == sealed["offer"][-16:]
    assert told["mask_key"] == second.pair_key(scope, shared, low, high)
    _, channel = second.hybrid_keys(sealed["recipient_channel_master"])
    _, mask = second.hybrid_keys(sealed["recipient_mask_master"])
    package = scope.scoped("package", low, high)
    assert second.HYBRID_SUITE.decrypt(sealed["package"], channel, info=package) == sealed["plain"]
    offer = scope.scoped("pair secret", low, high)
    assert second.HYBRID_SUITE.decrypt(sealed["offer"][:-16], mask, info=offer) == shared


def test_two_servers() -> None:
    told = case("two_server")
    context, helper = told["context"], told["helper_identity_private"]
    assert second.context_of(told["plan"]) == context
    total, parts = np.zeros(len(told["mask_sum"]), np.uint32), list[bytes]()
    for one in told["updates"]:
        member, words = one["member"], np.array(one["words"], np.uint32)
        key = second.hkdf(one["seed"], second.encode("fedoppu sealed mask", context, member))
        assert key == one["mask_key"]
        masked = words + second.mask(key, words)
        assert masked.tolist() == one["masked_words"]
        head = second.encode("fedoppu sealed words", one["salt"], 4, masked.size)
        hashed = second.sha(head + masked.astype("<u4").tobytes())
        assert hashed == one["words_hash"]
        claim = second.encode("fedoppu sealed", context, member, hashed, second.sha(one["sealed"]))
        assert claim == one["signed"]
        assert one["signature"] == second.sign(identity(member), claim)
        total, parts = total + second.mask(key, words), [*parts, claim, one["signature"]]
    assert second.sha(second.encode("fedoppu mask request", *parts)) == told["request_digest"]
    assert total.tolist() == told["mask_sum"]
    words_hash = second.sha(second.encode(4, total.size) + total.astype("<u4").tobytes())
    sets = (second.encode(0, 2), second.encode())
    message = second.encode("fedoppu mask sum", context, *sets, words_hash)
    assert message == told["mask_sum_signed"]
    assert told["mask_sum_signature"] == second.sign(helper, message)
    assert told["helper"][32:] == second.identity_of(helper)


def test_seeds_that_were_sealed_to_the_helper() -> None:
    for one in case("two_server_recorded")["cases"]:
        info = second.encode("fedoppu sealed seed", one["context"], one["member"])
        assert info == one["info"]
        key: Any = X25519PrivateKey.from_private_bytes(one["helper_private"][-32:])
        suite = second.X25519_SUITE
        if one["hybrid"]:
            lattice = MLKEM768PrivateKey.from_seed_bytes(one["helper_private"][:64])
            key, suite = hpke.MLKEM768X25519PrivateKey(lattice, key), second.HYBRID_SUITE
        assert suite.decrypt(one["sealed"], key, info=info) == one["seed"]
        assert len(one["sealed"]) == (1168 if one["hybrid"] else 80)


def test_roster_and_epochs() -> None:
    told = case("roster")
    flat = [part for one in told["members"] for part in (one["index"], one["identity"])]
    assert second.sha(second.encode("fedoppu roster", *flat)) == told["roster_hash"]
    for epoch in told["epochs"]:
        entries = [
            part
            for one in epoch["entries"]
            for part in (one["index"], one["identity"], one["epoch"], one["revoked"])
        ]
        head = (epoch["number"], epoch["previous"], epoch["authority"], epoch["run_id"].hex())
        digest = second.sha(
            second.encode("fedoppu roster epoch", *head, epoch["first_round"], *entries)
        )
        assert digest == epoch["digest"]
        signed = second.encode("fedoppu roster authority", epoch["number"], digest)
        assert epoch["signature"] == second.sign(told["authority_private"], signed)
        signed = second.encode("fedoppu roster countersignature", epoch["number"], digest)
        assert epoch["countersignature_of_member_1"] == second.sign(identity(1), signed)


# --- a whole attempt -------------------------------------------------------------------------------


class Attempt:
    """The vector of an attempt, its messages by stage and member."""

    def __init__(self, name: str) -> None:
        self.told = case(name)
        self.dtype = np.dtype(np.uint32 if name == "attempt_u32" else np.uint16)
        stages = {each["stage"]: each["messages"] for each in self.told["exchanges"]}
        self.down = {
            stage: {m["member"]: m["down"] for m in each} for stage, each in stages.items()
        }
        self.up = {stage: {m["member"]: m["up"] for m in each} for stage, each in stages.items()}
        self.signed = {
            stage: {m["member"]: m["signed"] for m in each if m["up"]}
            for stage, each in stages.items()
        }
        plan = {
            name: value for name, value in self.down["query.keys"][0].items() if name != "config"
        }
        self.plan, self.context = plan, second.context_of(plan)
        self.adverts = [self.up["query.keys"][member] for member in range(4)]
        self.scope = second.Scope(self.context, second.cohort_hash(self.context, self.adverts))

    def words(self, fields: Any) -> Any:
        """The words in a masked vector."""
        return np.frombuffer(fields["words"][128:], self.dtype.newbyteorder("<")).astype(self.dtype)

    def shared(self, private: bytes, peer: int) -> bytes:
        return second.dh(private, self.adverts[peer]["mask_key"])


@pytest.fixture(params=["attempt_u32", "attempt_u16"])
def attempt(request: pytest.FixtureRequest) -> Attempt:
    return Attempt(request.param)


def with_signature(attempt: Attempt, stage: str, member: int, message: bytes) -> bytes:
    """Signs, after a look at what the vector says is signed."""
    assert message == attempt.signed[stage][member]
    return second.sign(identity(member), message)


def test_second_client_sends_the_same_adverts_and_bundles(attempt: Attempt) -> None:
    assert (attempt.told["context"], attempt.told["cohort_hash"]) == (
        attempt.context,
        attempt.scope.cohort,
    )
    for me, given in enumerate(attempt.told["secrets"]):
        assert attempt.told["identities"][me] == second.identity_of(identity(me))
        made: Any = {
            "member": me,
            "seed_commitment": second.commitment(attempt.context, me, given["seed"]),
        }
        made |= {f"{use}_key": second.public(given[use]) for use in ("channel", "mask")}
        message = second.advert_signed(attempt.context, made)
        made["signature"] = with_signature(attempt, "query.keys", me, message)
        assert made == attempt.up["query.keys"][me]
        assert bundle_of(attempt, me, given) == attempt.up["query.shares"][me]


def bundle_of(attempt: Attempt, me: int, given: Any) -> Any:
    scope, others = attempt.scope, [other for other in range(4) if other != me]
    seeds = second.deal(given["seed"], given["seed shares"], range(4))
    keys = second.deal(given["mask"], given["key shares"], range(4))
    packages, hashed = [], []
    for to in others:
        info, peer = scope.scoped("package", me, to), attempt.adverts[to]["channel_key"]
        packages.append(second.seal(given["channel"], peer, info, seeds[to] + keys[to]))
        hashed.append(
            scope.share_hash("seed", me, to, seeds[to]) + scope.share_hash("key", me, to, keys[to])
        )
    leaves = [second.leaf(*row, b"") for row in zip(others, packages, hashed, strict=True)]
    message = scope.scoped("bundle", me, second.root(leaves))
    signature = with_signature(attempt, "query.shares", me, message)
    made = {"packages": packages, "share_hashes": hashed, "offers": [], "signature": signature}
    return {"member": me, "recipients": second.packed(others), **made}


def test_second_client_sends_the_same_vectors_and_signatures(attempt: Attempt) -> None:
    scope, dealers, survivors = attempt.scope, range(4), [0, 1, 2]
    for me in survivors:
        given = attempt.told["secrets"][me]
        words = np.array(attempt.told["words"][me], attempt.dtype)
        words = words + second.mask(second.self_key(scope, given["seed"], me), words)
        for peer in (other for other in dealers if other != me):
            key = second.pair_key(scope, attempt.shared(given["mask"], peer), me, peer)
            stream = second.mask(key, words)
            words = words + stream if me < peer else words - stream
        message = scope.masked_signed(me, dealers, [], words)
        signature = with_signature(attempt, "train.masked", me, message)
        made = {"member": me, "signature": signature, "complaints": [], "words": second.npy(words)}
        assert made == attempt.up["train.masked"][me]
        message = scope.survivors_signed(dealers, survivors)
        signature = with_signature(attempt, "query.consistency", me, message)
        assert attempt.up["query.consistency"][me] == {"member": me, "signature": signature}
    assert attempt.up["train.masked"][3] is None


def test_second_client_sends_the_same_unmask_replies(attempt: Attempt) -> None:
    scope, survivors = attempt.scope, [0, 1, 2]
    for me in survivors:
        given, delivered = attempt.told["secrets"][me], attempt.down["train.masked"][me]
        shares = {}
        for dealer, package in zip(delivered["bundles"], delivered["packages"], strict=True):
            info = scope.scoped("package", dealer, me)
            peer = attempt.adverts[dealer]["channel_key"]
            shares[dealer] = second.unseal(given["channel"], peer, info, package)
        alive = [owner for owner in shares if owner in survivors]
        made: Any = {"member": me, "own_seed": given["seed"]}
        made |= {"seed_shares_of": alive, "seed_shares": [shares[owner][:33] for owner in alive]}
        made |= {"key_shares_of": [3], "key_shares": [shares[3][33:]]}
        message = scope.reply_signed(survivors, made)
        made["signature"] = with_signature(attempt, "query.unmask", me, message)
        assert made == attempt.up["query.unmask"][me]


def test_second_server_finds_the_same_sum_and_mean(attempt: Attempt) -> None:
    """From what members sent, alone."""
    scope, replies = attempt.scope, attempt.up["query.unmask"]
    total = sum(
        (attempt.words(attempt.up["train.masked"][m]) for m in replies if m != 3),
        np.zeros(8, attempt.dtype),
    )
    for member, reply in replies.items():
        assert (
            second.commitment(attempt.context, member, reply["own_seed"])
            == attempt.adverts[member]["seed_commitment"]
        )
        total = total - second.mask(second.self_key(scope, reply["own_seed"], member), total)
    gone = second.restore({member: reply["key_shares"][0] for member, reply in replies.items()})
    assert second.public(gone) == attempt.adverts[3]["mask_key"]
    for member in replies:
        stream = second.mask(second.pair_key(scope, attempt.shared(gone, member), 3, member), total)
        total = total - stream  # each was the lower one, and added it
    assert total.tolist() == attempt.told["sum"]
    assert total.tolist() == np.sum(np.array(attempt.told["words"])[:3], axis=0).tolist()
    assert_decoded(attempt, total)


def assert_decoded(attempt: Attempt, total: Any) -> None:
    plan, decoded = attempt.plan, attempt.told["decoded"]
    m = (1 << (plan["level_bits"] - 1)) - 1
    weight, loss, count, clipped = (
        int(total[3]),
        int(total[4]) + 256 * int(total[5]),
        int(total[6]),
        int(total[7]),
    )
    assert (weight, clipped) == (decoded["total_weight"], decoded["clipped"])
    assert decoded["held_out_loss"] == pytest.approx(loss / count / 65535 * 16)
    centred = total[:3].astype(np.float64) - 3 * m
    mean = centred * (plan["value_range"] / m / (weight / plan["max_weight"]))
    shown = np.array(decoded["mean_update"], np.float32)
    if plan["rotation"]:  # the decoded mean was rotated back
        shown = second.rotate(shown, plan["rotation"])
    np.testing.assert_allclose(shown, mean, rtol=1e-5)
