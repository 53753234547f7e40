"""The hybrid key exchange, the two-server mode, and how a roster changes."""

import hashlib
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedoppu.common.epochs import countersign, found, propose
from fedoppu.common.masking import Mask, add_masks, derive, pair_mask
from fedoppu.common.pairwise import HYBRID, PLAIN_BYTES, Link
from fedoppu.common.plan_fields import plan_values
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.two_server import (
    MaskSum,
    MaskSumRequest,
    SealedUpdate,
    claim_bytes,
    mask_sum_bytes,
    seal_info,
    seed_mask,
)
from fedoppu.server.helper import HelperSecrets
from fedoppu.simulations.vectors.material import (
    SCOPE,
    Case,
    make_plan,
    person,
    roster_of,
    scoped,
    secret,
)


def hybrid_keys() -> Case:
    """A key pair of 32 bytes; the secret, hash and mask of the pair of members 2 and 9."""
    masters = secret("mask 2"), secret("mask 9")
    lower, upper = (HYBRID.load(master) for master in masters)
    link = Link(SCOPE, 2, 9, upper.public)
    info = SCOPE.bind("pair secret", 2, 9)
    agreed = derive(masters[0], info)
    return scoped() | {
        "members": (2, 9),
        "masters": masters,
        "public": (lower.public, upper.public),
        "pair_secret_info": info,
        "pair_secret": agreed,
        "pair_secret_hash": lower.offer(link)[-16:],
        "mask_key": pair_mask(agreed, SCOPE, owner=2, other=9).key,
    }


def hybrid_recorded() -> Case:
    """A package and an offer of member 2 for member 9, sealed by HPKE."""
    channels, masters = ((secret(f"{use} 2"), secret(f"{use} 9")) for use in ("channel", "mask"))
    plain = secret("package", PLAIN_BYTES)
    to_channel = Link(SCOPE, 2, 9, HYBRID.load(channels[1]).public)
    to_mask = Link(SCOPE, 2, 9, HYBRID.load(masters[1]).public)
    return scoped() | {
        "dealer": 2,
        "recipient": 9,
        "recipient_channel_master": channels[1],
        "recipient_mask_master": masters[1],
        "package_info": to_channel.sent("package"),
        "plain": plain,
        "package": HYBRID.load(channels[0]).seal(plain, to_channel),
        "offer_info": to_mask.sent("pair secret"),
        "offer": HYBRID.load(masters[0]).offer(to_mask),
    }


def helper_secrets(*, hybrid: bool) -> HelperSecrets:
    """The helper's keys."""
    return HelperSecrets.make(secret, hybrid=hybrid)


def sealed_plan(*, hybrid: bool = False) -> RoundPlan:
    """A two-server plan for three members."""
    return make_plan(3, neighbours=1, threshold=1, min_cohort=2, hybrid=hybrid)


def two_server() -> Case:
    """Masked words, claims, the request and the mask sum of two members; sealed seeds are stand-ins."""
    made, helper = sealed_plan(), helper_secrets(hybrid=False)
    length = VectorLayout.of(made).length
    total, updates = np.zeros(length, np.uint32), []
    for member in (0, 2):
        mask = seed_mask(secret(f"sealed seed {member}"), made.context, member)
        add_masks(total, [mask])
        updates.append(_sealed_update(made, member, mask))
    request = MaskSumRequest(made, tuple(update.claim() for update, _ in updates))
    answer = MaskSum(made.context, (0, 2), (), total, b"")
    message = mask_sum_bytes(answer)
    return {
        "context": made.context,
        "plan": plan_values(made),
        "helper": helper.public().text(),
        "helper_identity_private": helper.identity,
        "updates": [told for _, told in updates],
        "request_digest": request.digest(),
        "mask_sum": total,
        "mask_sum_signed": message,
        "mask_sum_signature": Ed25519PrivateKey.from_private_bytes(helper.identity).sign(message),
    }


def _sealed_update(made: RoundPlan, member: int, mask: Mask) -> tuple[SealedUpdate, Case]:
    words = np.arange(VectorLayout.of(made).length, dtype=np.uint32) + member
    told: Case = {
        "seed": secret(f"sealed seed {member}"),
        "mask_key": mask.key,
        "words": words.copy(),
    }
    add_masks(words, [mask])
    salt, sealed = secret(f"salt {member}"), secret(f"sealed {member}", 80)
    update = SealedUpdate(member, words, salt, sealed, b"")
    message = claim_bytes(made.context, update.claim())
    update = replace(update, signature=person(member).sign(message))
    claim = update.claim()
    told |= {"masked_words": words, "salt": salt, "words_hash": claim.words_hash, "sealed": sealed}
    return update, told | {"member": member, "signed": message, "signature": update.signature}


def two_server_recorded() -> Case:
    """Seeds that were sealed to the helper, in both suites."""
    cases = []
    for hybrid in (False, True):
        secrets, context = helper_secrets(hybrid=hybrid), sealed_plan(hybrid=hybrid).context
        seed, keys = secret("sealed seed 0"), secrets.public()
        case: Case = {"hybrid": hybrid, "helper_private": secrets.seal, "helper": keys.text()}
        case |= {"context": context, "member": 0, "info": seal_info(context, 0), "seed": seed}
        cases.append(case | {"sealed": keys.seal_seed(seed, context, 0)})
    return {"cases": cases}


def roster() -> Case:
    """A roster's hash; an epoch 0 of two members, and an epoch 1 that enrols one and revokes one."""
    authority = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"authority").digest())
    first = found(authority, [person(0).enrolled, person(1).enrolled])
    newcomers = [person(2).enrolled.identity]
    second = propose(authority, first, first=("ab" * 16, 4), newcomers=newcomers, revoked=[0])
    return {
        "members": [vars(member) for member in roster_of(3).members],
        "roster_hash": roster_of(3).hash(),
        "authority_private": hashlib.sha256(b"authority").digest(),
        "epochs": [
            {
                **{
                    name: vars(epoch)[name]
                    for name in ("number", "previous", "authority", "run_id")
                },
                "first_round": epoch.first_round,
                "entries": [vars(entry) for entry in epoch.entries],
                "digest": epoch.digest,
                "signature": epoch.signature,
                "countersignature_of_member_1": countersign(epoch, person(1)),
            }
            for epoch in (first, second)
        ],
    }
