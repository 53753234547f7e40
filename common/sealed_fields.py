"""The events of the two-server mode as fields of a message, and back, strictly.

See `common/fields.py` for what is refused, and `common/messages.py` for the records around them.
"""

from fedoppu.common.event_fields import HASH, SIGNATURE
from fedoppu.common.fields import Fields
from fedoppu.common.plan_fields import PLAN_FIELDS, Value, plan_values, read_plan
from fedoppu.common.rounds import Words
from fedoppu.common.two_server import (
    SALT_BYTES,
    MaskSum,
    MaskSumRequest,
    SealedClaim,
    SealedUpdate,
)

MAX_SEALED = 2048  # bytes of a sealed seed; its exact length follows from the plan
_CLAIMS = ("members", "word_hashes", "sealed", "signatures")
_ANSWER = ("context", "survivors", "unsealed", "signature")


def sealed_values(event: SealedUpdate) -> dict[str, Value]:
    """A sealed update without its words."""
    names = ("member", "salt", "sealed", "signature")
    return {name: vars(event)[name] for name in names}


def read_sealed(fields: Fields, words: Words) -> SealedUpdate:
    """The sealed update in these fields, around its words."""
    fields.require("member", "salt", "sealed", "signature")
    return SealedUpdate(
        fields.member(),
        words,
        fields.blob("salt", SALT_BYTES),
        fields.blob("sealed", 1, MAX_SEALED),
        fields.blob("signature", SIGNATURE),
    )


def mask_request_values(request: MaskSumRequest) -> dict[str, Value]:
    """A question to the helper: the plan, and the claims as lists."""
    claims = request.claims
    return plan_values(request.plan) | {
        "members": [claim.member for claim in claims],
        "word_hashes": [claim.words_hash for claim in claims],
        "sealed": [claim.sealed for claim in claims],
        "signatures": [claim.signature for claim in claims],
    }


def mask_request_from(fields: Fields) -> MaskSumRequest:
    """The question in these fields."""
    fields.require(*PLAN_FIELDS, *_CLAIMS)
    members = fields.members("members")
    rows = zip(
        members,
        fields.blobs("word_hashes", HASH, count=len(members)),
        fields.blobs("sealed", 1, MAX_SEALED, count=len(members)),
        fields.blobs("signatures", SIGNATURE, count=len(members)),
        strict=True,
    )
    return MaskSumRequest(read_plan(fields), tuple(SealedClaim(*row) for row in rows))


def mask_sum_values(answer: MaskSum) -> dict[str, Value]:
    """The helper's answer without its words."""
    return {
        "context": answer.context,
        "survivors": list(answer.survivors),
        "unsealed": list(answer.unsealed),
        "signature": answer.signature,
    }


def mask_sum_from(fields: Fields, words: Words) -> MaskSum:
    """The helper's answer in these fields, around its words."""
    fields.require(*_ANSWER)
    return MaskSum(
        fields.blob("context", HASH),
        fields.members("survivors"),
        fields.members("unsealed"),
        words,
        fields.blob("signature", SIGNATURE),
    )
