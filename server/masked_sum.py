"""What both modes of secure aggregation do with the members they invite and the sum that they keep."""

from collections.abc import Iterable

import numpy as np

from fedoppu.common.errors import DataError, ProtocolError
from fedoppu.common.quantization import VectorLayout, require_no_overflow
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import RoundPlan, Words


def require_invited(plan: RoundPlan, roster: Roster, invited: Iterable[int]) -> tuple[int, ...]:
    """The invited, sorted, if they are of the plan's roster and fit its words.

    Raises:
        UsageError: They are too many for the plan's words.
        ProtocolError: One of them is not in the roster, or the plan is for another roster.
    """
    members = tuple(sorted(set(invited)))
    strangers = [member for member in members if member not in roster]
    if strangers or plan.roster_hash != roster.hash():
        raise ProtocolError(f"the plan is for another roster, or members {strangers} are not in it")
    require_no_overflow(plan, len(members))
    return members


def zero_sum(plan: RoundPlan) -> Words:
    """(length,) zeros of the plan's layout."""
    layout = VectorLayout.of(plan)
    return np.zeros(layout.length, layout.dtype)


def dump_with_sum(state: bytes, total: Words) -> bytes:
    """A state machine's plain data, a line feed, the masked sum as little-endian words."""
    return state + b"\n" + total.astype(total.dtype.newbyteorder("<")).tobytes()


def split_dump(data: bytes) -> tuple[bytes, bytes]:
    """The plain data and the sum's bytes of a dump."""
    head, _, tail = data.partition(b"\n")
    return head, tail


def read_sum(total: Words, data: bytes) -> None:
    """Fills a sum from the bytes of a dump.

    Raises:
        DataError: They have another length.
    """
    if len(data) != total.nbytes:
        raise DataError(f"the stored sum has {len(data)} bytes, not {total.nbytes}")
    total[:] = np.frombuffer(data, total.dtype.newbyteorder("<"))
