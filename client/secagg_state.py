"""What a client's state machine holds between two messages: plain data, and buffers to overwrite.

What Python cannot promise: own key buffers are overwritten as soon as they are not needed, but
`cryptography`, OpenSSL and the interpreter keep copies of what passed through them (hex in a dump,
integers in secret sharing, immutable bytes of a hybrid master or a mask key), and the system may
have swapped them out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from fedoppu.common.rounds import Advert, RoundPlan


@dataclass(frozen=True)
class State:
    """One client in one attempt. The buffers are overwritten when their use is over, then empty.

    Attributes:
        phase: Value of the phase.
        plan: Of the attempt.
        channel: Private key for packages; gone when they are opened.
        mask: Private key for pairwise masks; gone when those are known.
        seed: Self seed.
        own: The advert that was sent.
        adverts: The cohort.
        dealers: The share set.
        held: Owner: its seed share and key share, in one buffer.
        pairs: Neighbour in the share set: key of the pairwise mask; gone when the vector is masked.
        complaints: Neighbours in the share set whose share is not held, sorted.
        survivors: The survivor set that was signed.
    """

    phase: str
    plan: RoundPlan | None = None
    channel: bytearray = field(default_factory=bytearray, repr=False)
    mask: bytearray = field(default_factory=bytearray, repr=False)
    seed: bytearray = field(default_factory=bytearray, repr=False)
    own: Advert | None = None
    adverts: tuple[Advert, ...] = ()
    dealers: tuple[int, ...] = ()
    held: Mapping[int, bytearray] = field(default_factory=dict, repr=False)
    pairs: Mapping[int, bytearray] = field(default_factory=dict, repr=False)
    complaints: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()

    def buffers(self) -> Iterator[bytearray]:
        """Everything secret."""
        yield from (self.channel, self.mask, self.seed)
        yield from self.held.values()
        yield from self.pairs.values()

    def without_secrets(self) -> "State":
        """The state with all of it gone, and not yet overwritten."""
        none = bytearray()
        return replace(self, channel=none, mask=none, seed=none, held={}, pairs={})


def overwrite_dropped(before: State, after: State) -> None:
    """Overwrites the buffers that the next state does not hold."""
    kept = {id(buffer) for buffer in after.buffers()}
    for buffer in before.buffers():
        if id(buffer) not in kept:
            buffer[:] = bytes(len(buffer))
