"""The parts of the protocol one by one: encodings, cohort, keys, shares, masks, numbers."""

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedoppu.common import merkle
from fedoppu.common.config import (
    EncodingSettings,
    FederationConfig,
    PromptSettings,
    RetrieverSettings,
    SharedSettings,
    ThresholdSettings,
)
from fedoppu.common.event_fields import pack_members
from fedoppu.common.graph import Graph
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.common.masking import KeyAgreement, Mask, add_masks, public_key, self_mask
from fedoppu.common.pairwise import PLAIN_BYTES, X25519, Link
from fedoppu.common.plan_fields import plan_values
from fedoppu.common.quantization import (
    CLIPPED,
    LOSS,
    LOSS_COUNT,
    WEIGHT,
    VectorLayout,
    round_to_levels,
    write_scalars,
)
from fedoppu.common.randomness import encode_key
from fedoppu.common.rotation import rotate
from fedoppu.common.rounds import Advert, ShareBundle
from fedoppu.common.secret_sharing import split
from fedoppu.common.signing import (
    advert_bytes,
    bundle_bytes,
    commit_seed,
    dealt_leaves,
    hash_cohort,
    hash_share,
)
from fedoppu.common.vectors import write_vector
from fedoppu.simulations.vectors.material import (
    MODEL,
    SCOPE,
    Case,
    make_plan,
    person,
    scoped,
    secret,
)

STREAM_BYTES = 1 << 19  # long enough for whichever way a machine makes the stream

# --- encodings -----------------------------------------------------------------------------------


def encoding() -> Case:
    """Canonical encodings: of keys, members and vectors."""
    keys: list[tuple[str | int | bytes, ...]] = [
        (),
        ("fedoppu", 0, -1, b""),
        ("é", 1_000_000, b"\x00\xff", "ab"),
        ("a", "b"),
    ]
    sets: list[list[int]] = [[], [0], [0, 1, 2], [5, 132, 133], [300, 70_000, 1_048_575]]
    vectors: list[NDArray[np.generic]] = [
        MODEL,
        np.array([1, 65535], np.uint16),
        np.array([1, 2**32 - 1], np.uint32),
    ]
    return {
        "encode_key": [
            {"parts": [_typed(part) for part in key], "bytes": encode_key(key)} for key in keys
        ],
        "pack_members": [{"members": members, "bytes": pack_members(members)} for members in sets],
        "npy": [
            {"dtype": vector.dtype.name, "values": vector, "bytes": write_vector(vector)}
            for vector in vectors
        ],
    }


def _typed(part: str | int | bytes) -> Case:
    return {{str: "text", int: "integer", bytes: "bytes"}[type(part)]: part}


def config() -> Case:
    """Canonical bytes of a config with the defaults of this version of the software."""
    made = FederationConfig(
        task="LaMP_3",
        k=0,
        profile="none",
        base_hash="ab" * 32,
        rounds=2,
        cohort=5,
        public_seed=7,
        dtype="float32",
        shared=SharedSettings(max_weight=8),
        prompt=PromptSettings(),
        retriever=RetrieverSettings(),
        encoding=EncodingSettings(level_bits=16, clip=10.0, value_range=0.5),
        thresholds=ThresholdSettings(floor=2, corrupt=0, max_drop=0.3),
    )
    return {"canonical": made.canonical().decode(), "config_hash": made.hash()}


def plan() -> Case:
    """Plans as fields, as canonical text, and their contexts."""
    private = make_plan(
        value_range=1e-07, noise_scale=2.5e16, max_weight=1, metrics=False, rotation="0f" * 32
    )
    plans = [make_plan(), make_plan(word_bits=16, level_bits=8, factors="AB", hybrid=True), private]
    return {
        "plans": [
            {
                "fields": plan_values(made),
                "canonical": made.canonical().decode(),
                "context": made.context,
            }
            for made in plans
        ]
    }


# --- cohort and graph ----------------------------------------------------------------------------


def advert(member: int, context: bytes) -> tuple[Advert, Case]:
    """A signed advert, and how it was made."""
    channel, mask, seed = (secret(f"{use} {member}") for use in ("channel", "mask", "seed"))
    commitment = commit_seed(context, member, seed)
    made = Advert(member, public_key(channel), public_key(mask), commitment, b"")
    message = advert_bytes(context, made)
    made = replace(made, signature=person(member).sign(message))
    told = {
        "identity_private": hashlib.sha256(b"identity %d" % member).digest(),
        "identity": person(member).enrolled.identity,
        "channel_private": channel,
        "mask_private": mask,
        "seed": seed,
        "signed": message,
    }
    return made, told | vars(made)


def cohort() -> Case:
    """Five adverts and their hash; the complete graph, and a ring of seventy."""
    context = make_plan(5).context
    made = [advert(member, context) for member in range(5)]
    hashed = hash_cohort(context, [one for one, _ in made])
    complete, ring = Graph(hashed, range(5), 4), Graph(hashed, range(0, 140, 2), 6)
    return {
        "context": context,
        "adverts": [told for _, told in made],
        "cohort_hash": hashed,
        "complete": {
            "members": complete.members,
            "k": 4,
            "neighbours": [complete.neighbours(m) for m in complete.members],
        },
        "ring": {
            "members": ring.members,
            "k": 6,
            "neighbours": [ring.neighbours(m) for m in ring.members],
        },
    }


# --- keys, shares and masks ----------------------------------------------------------------------


def channel() -> Case:
    """A sealed package of member 1 for member 4."""
    own, peer, plain = secret("channel 1"), secret("channel 4"), secret("package", PLAIN_BYTES)
    link = Link(SCOPE, 1, 4, public_key(peer))
    bound = link.sent("package")
    return scoped() | {
        "dealer": 1,
        "recipient": 4,
        "dealer_private": own,
        "dealer_public": public_key(own),
        "recipient_private": peer,
        "recipient_public": link.key,
        "info_and_associated_data": bound,
        "key": KeyAgreement(own).channel_key(link.key, bound),
        "plain": plain,
        "package": X25519.load(own).seal(plain, link),
    }


def shares() -> Case:
    """Shares of one secret, threshold 3, and their hashes."""
    drawn, holders, shared = secret("coefficients", 96), (0, 2, 5, 9), secret("shared secret")
    dealt = split(shared, holders, threshold=3, entropy=lambda size: drawn[:size])
    hashes = {
        kind: [hash_share(SCOPE, kind, 7, holder=h, share=dealt[h].value) for h in holders]
        for kind in ("seed", "key")
    }
    return scoped() | {
        "secret": shared,
        "entropy": drawn,
        "threshold": 3,
        "owner": 7,
        "holders": holders,
        "shares": [dealt[holder].value for holder in holders],
        "seed_hashes": hashes["seed"],
        "key_hashes": hashes["key"],
    }


def bundle() -> Case:
    """The Merkle tree of what is dealt to three members, and its signature."""
    parts = {
        name: {to: secret(f"{name} {to}", size) for to in (1, 3, 6)}
        for name, size in {"packages": 82, "share_hashes": 20}.items()
    }
    offers = {6: secret("offer", 40)}
    made = ShareBundle(4, parts["packages"], parts["share_hashes"], b"", offers)
    leaves = dealt_leaves(made)
    root, paths = merkle.tree(leaves)
    message = bundle_bytes(SCOPE, made)
    return scoped() | {
        "dealer": 4,
        "recipients": sorted(made.packages),
        "packages": list(made.packages.values()),
        "share_hashes": list(made.share_hashes.values()),
        "offers": [offers.get(to, b"") for to in sorted(made.packages)],
        "leaves": leaves,
        "root": root,
        "paths": paths,
        "signed": message,
        "signature": person(4).sign(message),
    }


def masks() -> Case:
    """A self mask, a pair mask from both sides, and their streams."""
    seed, low, high = secret("seed"), secret("mask 2"), secret("mask 9")
    own = self_mask(seed, SCOPE, 5)
    lower = KeyAgreement(low).mask(public_key(high), SCOPE, owner=2, other=9)
    upper = KeyAgreement(high).mask(public_key(low), SCOPE, owner=9, other=2)
    pair = {
        "members": (2, 9),
        "private": (low, high),
        "public": (public_key(low), public_key(high)),
        "info": SCOPE.bind("pair mask", 2, 9),
    }
    return scoped() | {
        "self_mask": {
            "member": 5,
            "seed": seed,
            "info": SCOPE.bind("self mask", 5),
            **_stream(own),
        },
        "pair_mask": pair | {"negative": (lower.negative, upper.negative)} | _stream(lower),
    }


def _stream(mask: Mask) -> Case:
    words = np.zeros(STREAM_BYTES // 4, np.uint32)
    add_masks(words, [mask])
    made = words.astype("<u4").tobytes()
    digest = hashlib.sha256(made).digest()
    return {"key": mask.key, "stream": made[:64], "bytes": STREAM_BYTES, "stream_sha256": digest}


# --- numbers -------------------------------------------------------------------------------------


def rotation() -> Case:
    """Rotated vectors, float32."""
    seed = bytes(range(32))
    vectors = [(np.arange(length) % 7 - 3).astype(np.float32) for length in (1, 5, 12, 40)]
    return {
        "seed": seed,
        "cases": [{"vector": vector, "rotated": rotate(vector, seed.hex())} for vector in vectors],
    }


def rounding() -> Case:
    """Levels of a few coordinates under a given key, limbs of scalars, and integer noise."""
    key, values = secret("dither"), np.array([0, 0.5, -0.5, 0.1, -0.3, 1e-6], np.float32)
    layouts = [
        VectorLayout.of(make_plan(word_bits=bits, level_bits=levels, num_params=values.size))
        for bits, levels in ((32, 16), (16, 8))
    ]
    scalars = {WEIGHT: 37, LOSS: 54_321, LOSS_COUNT: 1, CLIPPED: 2}
    return {
        "key": key,
        "values": values,
        "value_range": 0.5,
        "levels": [
            {"level_bits": each.level_bits, "levels": round_to_levels(values, each, key=key)}
            for each in layouts
        ],
        "scalars": {
            "max_weight": 64,
            "num_params": values.size,
            "values": scalars,
            "limbs": write_scalars(layouts[0], scalars),
        },
        "discrete_gaussian": [
            {"key": key, "scale": scale, "samples": discrete_gaussian(key, scale, 24)}
            for scale in (0.4, 3.5, 1000.0)
        ],
    }
