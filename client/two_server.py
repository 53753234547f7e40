"""A client's part in the two-server mode: one message, after which it is never needed again.

What is guaranteed and against whom is told in `common/two_server.py`. There is no state between
messages: sending the masked words counts as having unmasked (spec of secure aggregation, rule 4),
so the caller marks the round as answered before the message goes out.
"""

from dataclasses import replace

from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.secagg import KeySource
from fedoppu.common.errors import ProtocolError, RefusedByPolicy, UsageError
from fedoppu.common.masking import add_masks
from fedoppu.common.quantization import require_no_overflow
from fedoppu.common.rounds import RoundPlan, Words
from fedoppu.common.signing import Identity
from fedoppu.common.thresholds import allowed_drops
from fedoppu.common.two_server import (
    SALT_BYTES,
    SEED_BYTES,
    HelperKeys,
    SealedUpdate,
    claim_bytes,
    seed_mask,
)


def require_sealed_plan(plan: RoundPlan, policy: ClientPolicy, last: LastRound) -> None:
    """Whether a plan of this mode may follow the last one.

    There is no graph, so neighbours and threshold say nothing and are 1.

    Raises:
        RefusedByPolicy: The policy forbids it, or its words could overflow.
        ProtocolError: It speaks of a graph.
    """
    policy.check_plan(plan, last)
    policy.check_sealed(plan)
    if (plan.neighbours, plan.threshold) != (1, 1):
        raise ProtocolError(
            f"a two-server plan has neighbours and threshold 1, got {plan.neighbours} and "
            f"{plan.threshold}"
        )
    asked = plan.min_cohort + plan.max_drops
    most = allowed_drops(asked, policy.max_drop)
    if plan.max_drops > most:
        raise RefusedByPolicy(
            f"{plan.max_drops} of the {asked} members that the plan asks may be missing, this "
            f"client allows {most}: a server could choose the drops"
        )
    try:
        require_no_overflow(plan, asked)
    except UsageError as error:  # of a plan that came from a server
        raise RefusedByPolicy(str(error), hint=error.hint) from None


def seal_update(
    words: Words, plan: RoundPlan, identity: Identity, *, helper: HelperKeys, keys: KeySource
) -> SealedUpdate:
    """Masks released words, seals the seed to the helper and signs both.

    Args:
        words: (length,) of the plan's layout; masked in place, so that no clear copy is left.
        plan: Of the attempt.
        identity: The member's signing key.
        helper: The keys that the federation's config pins.
        keys: Source of seed and salt: the operating system on a device.

    Raises:
        ProtocolError: The plan wants another key exchange than the helper's key is for.
    """
    if helper.hybrid != plan.hybrid:
        raise ProtocolError(
            f"the plan's hybrid is {plan.hybrid}, the helper's key is "
            f"{'hybrid' if helper.hybrid else 'x25519'}"
        )
    context, member = plan.context, identity.member
    purpose = f"{context.hex()} {member}"
    seed = bytearray(keys.secret(f"sealed seed {purpose}", SEED_BYTES))
    salt = keys.secret(f"sealed salt {purpose}", SALT_BYTES)
    add_masks(words, [seed_mask(seed, context, member)])
    sealed = helper.seal_seed(seed, context, member)
    seed[:] = bytes(SEED_BYTES)
    unsigned = SealedUpdate(member, words, salt, sealed, b"")
    return replace(unsigned, signature=identity.sign(claim_bytes(context, unsigned.claim())))
