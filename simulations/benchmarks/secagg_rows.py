"""The lines of the secure aggregation benchmark, in groups that can be run alone."""

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedoppu.common.masking import CHUNK_BYTES, Mask, add_masks
from fedoppu.common.messages import Opening, Training, payload_bytes, write_reply, write_request
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    CohortFixed,
    Exchange,
    MaskedUpdate,
    RoundOpened,
    ServerEvent,
    ShareBundle,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
)
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.meters import (
    Paired,
    PeakMeter,
    Stopwatch,
    cpu_seconds,
    interleave,
    peak_bytes,
)
from fedoppu.simulations.benchmarks.secagg_cases import Case, active, semi_honest, short_count
from fedoppu.simulations.benchmarks.secagg_flower import FlowerClient, FlowerServer, FlowerTerms
from fedoppu.simulations.benchmarks.secagg_ours import (
    Cohort,
    OurClient,
    OurRound,
    OurTerms,
    TwoServerClient,
)

GOAL_CLIENT = GOAL_BYTES = (100, 10**6, 54)
GOAL_SERVER = (1000, 10**6, 68)
WHOLE_UP_TO = 100  # members of a cohort whose Flower server is run whole
SIGNATURE = 64
NAMES: Mapping[type[ServerEvent | ClientEvent], str] = {
    RoundOpened: "plan",
    Advert: "advert",
    CohortFixed: "adverts of the cohort",
    ShareBundle: "shares for its neighbours",
    SharesDelivered: "shares of its neighbours",
    MaskedUpdate: "masked vector",
    SurvivorsProposed: "survivor set",
    SurvivorSignature: "signature of the survivor set",
    UnmaskRequested: "signatures of the cohort",
    UnmaskReply: "unmask reply",
}

BESIDE: Mapping[type[ServerEvent | ClientEvent], str] = {
    RoundOpened: "without the federation's config, which is sent with it",
    SharesDelivered: "without the model, 4 bytes a parameter, which is sent with it",
}


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        sizes: Members of the cohorts.
        lengths: Parameters of the vectors.
        pairs: Measurements of each side.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    pairs: int

    @property
    def cases(self) -> Iterator[Case]:
        """Each size and length, at the k and t of the goals and at the calculator's."""
        for size in self.sizes:
            for choose in (semi_honest, active):
                for length in self.lengths:
                    yield choose(size, length)


def is_goal(case: Case, goal: tuple[int, int, int]) -> bool:
    """Whether a goal was set for this case."""
    return not case.corrupt and (case.size, case.num_params, case.neighbours) == goal


def paired_row(name: str, pair: Paired, *, goal: float | None = None, note: str = "") -> Row:
    """A cost that was measured by turns."""
    return Row(name, pair.ours, pair.theirs, goal=goal, low=pair.low, note=note)


# --- client --------------------------------------------------------------------------------------


def client_rows(scope: Scope) -> Iterator[Row]:
    """From the plan to the masked vector, one client."""
    for case in scope.cases:
        yield from _client_case(case, scope.pairs)


def _client_case(case: Case, pairs: int) -> Iterator[Row]:
    ours = OurClient(Cohort.of(case))
    theirs = FlowerClient(case, ours.update.vector)
    goals = (12.0, 7.0) if is_goal(case, GOAL_CLIENT) else (None, None)
    found = interleave(lambda: _our_client(ours), lambda: _flower_client(theirs), pairs)
    yield paired_row(f"client {case.name}", found["all"], goal=goals[0])
    yield paired_row(f"client, rotated {case.name}", found["rotated"], goal=goals[1])
    note = "Flower's adverts are not signed: ours without those checks"
    yield paired_row(f"- adverts unchecked {case.name}", found["unchecked"], note=note)
    yield paired_row(f"- share phase {case.name}", found["shares"])
    yield paired_row(f"- quantize and mask {case.name}", found["vector"])
    ours_peak, theirs_peak = peak_bytes(ours.run), peak_bytes(theirs.run)
    yield Row(f"client peak memory {case.name}", ours_peak, theirs_peak, unit="B")


def _our_client(client: OurClient) -> Mapping[str, float]:
    cost, rotated, checks = client.run(), client.run_rotated_release(), client.run_checks()
    shares, vector = cost["share phase"], cost["release"] + cost["masking"]
    return {
        "shares": shares,
        "vector": vector,
        "all": shares + vector,
        "rotated": shares + rotated + cost["masking"],
        "unchecked": max(shares - checks, 0) + vector,
    }


def _flower_client(client: FlowerClient) -> Mapping[str, float]:
    cost = client.run()
    shares, vector = cost["share phase"], cost["masking"]
    both = dict.fromkeys(("all", "rotated", "unchecked"), shares + vector)
    return {"shares": shares, "vector": vector, **both}


# --- mask stream ---------------------------------------------------------------------------------


def stream_rows(scope: Scope) -> Iterator[Row]:
    """Our masks against AES-256-CTR into one buffer that stays in the cache."""
    for length in scope.lengths:
        for dtype in (np.uint32, np.uint16):
            yield _stream_row(length, np.dtype(dtype), scope.pairs)


def _stream_row(length: int, dtype: np.dtype[np.unsignedinteger], pairs: int) -> Row:
    masks = [Mask(bytes([number]) * 32, number % 2 == 0) for number in range(55)]
    words = np.zeros(length, dtype)
    size = len(masks) * words.nbytes
    found = interleave(
        lambda: {"stream": cpu_seconds(lambda: add_masks(words, masks))},
        lambda: {"stream": cpu_seconds(lambda: _encrypt(size))},
        pairs,
    )["stream"]
    rates = size / found.ours / 1e9, size / found.theirs / 1e9
    goal = 0.8 if length == 10**6 and dtype == np.uint32 else None
    name = f"mask stream, 55 masks d={short_count(length)} {dtype.name}"
    return Row(name, *rates, kind="rate", goal=goal, unit="GB/s", low=found.low)


def _encrypt(size: int) -> None:
    stream = Cipher(AES256(bytes(32)), CTR(bytes(16))).encryptor()
    zeros, buffer = bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES + 16)
    for start in range(0, size, CHUNK_BYTES):
        stream.update_into(memoryview(zeros)[: min(CHUNK_BYTES, size - start)], buffer)


# --- server --------------------------------------------------------------------------------------


def server_rows(scope: Scope) -> Iterator[Row]:
    """From the first answer to the decoded sum, a tenth of the members gone before their vector."""
    for size in scope.sizes:
        for choose in (semi_honest, active):
            cases = [choose(size, length) for length in scope.lengths]
            if size > WHOLE_UP_TO:
                yield from _large_cohort(cases)
            else:
                for case in cases:
                    yield _whole(case, scope.pairs if size < WHOLE_UP_TO else 1)
                    yield _server_memory(case)
                yield _last_answers(_play(cases[0])[0])


def _whole(case: Case, pairs: int) -> Row:
    flower = FlowerServer(case)
    found = interleave(lambda: {"server": _play(case)[1]}, flower.run, pairs)["server"]
    return paired_row(f"server {case.name}", found, note="both whole rounds")


def _play(case: Case) -> tuple[OurRound, float]:
    """A whole round of ours, and its server's CPU seconds."""
    watch = Stopwatch()
    played = OurRound(Cohort.of(case), watch)
    played.run()
    return played, watch.total


def _last_answers(played: OurRound) -> Row:
    """What a client does after its vector is sent, which does not depend on its length."""
    seconds = played.own.seconds
    spent = seconds[Exchange.CONSISTENCY] + seconds[Exchange.UNMASK]
    note = (
        "survivor set signed, the cohort's signatures checked, shares given; Flower's checks none"
    )
    return Row(f"client, after its vector {played.cohort.case.name}", spent, note=note)


def _large_cohort(cases: Sequence[Case]) -> Iterator[Row]:
    """Ours whole at the least length and at the goal's; Flower's counted."""
    least = cases[0]
    played, whole = _play(least)
    rest = whole - OurTerms(Cohort.of(least)).counted()
    for case in cases:
        goal = is_goal(case, GOAL_SERVER)
        ours, note = whole, "ours a whole round"
        if goal:
            _, ours = _play(case)
        elif case != least:
            ours, note = rest + OurTerms(Cohort.of(case)).counted(), "ours counted from d above"
        theirs = FlowerTerms(case).counted()["server"]
        name = f"server {case.name}, Flower extrapolated"
        note += "; theirs its terms, measured and counted"
        yield Row(name, ours, theirs, goal=40.0 if goal else None, note=note)
    yield _last_answers(played)


def _server_memory(case: Case) -> Row:
    """Ours: its state and the most that one call takes; theirs: its sum, with all answers at hand."""
    meter = PeakMeter()
    tracemalloc.start()
    try:
        ours = OurRound(Cohort.of(case), meter)
        ours.run()
    finally:
        tracemalloc.stop()
    theirs = peak_bytes(FlowerServer(case, distinct=True).collect)
    return Row(f"server peak memory {case.name}", ours.held + meter.peak, theirs, unit="B")


# --- two servers ---------------------------------------------------------------------------------


def two_server_rows(scope: Scope) -> Iterator[Row]:
    """A client of the two-server mode: one message, whatever the size of the cohort."""
    for length in scope.lengths:
        yield _two_server(semi_honest(min(100, max(scope.sizes)), length), scope.pairs)


def _two_server(case: Case, pairs: int) -> Row:
    ours = TwoServerClient(case)
    theirs = FlowerClient(case, ours.update.vector)
    found = interleave(
        lambda: {"all": cpu_seconds(ours.run)}, lambda: _flower_client(theirs), pairs
    )
    note = "trusts one of two servers"
    return paired_row(f"two-server client {case.name}", found["all"], note=note)


# --- bytes ---------------------------------------------------------------------------------------


def byte_rows(scope: Scope) -> Iterator[Row]:
    """Sizes of the real messages: values without names and framing."""
    case = semi_honest(min(100, max(scope.sizes)), min(10**6, max(scope.lengths)))
    for bits, bound in ((32, 4.02), (16, 2.01)):
        yield _per_parameter(case, bits, bound if case.num_params >= 10**5 else None)
    yield from _sizes(case, hybrid=False)
    yield from _sizes(case, hybrid=True)


def _per_parameter(case: Case, bits: int, bound: float | None) -> Row:
    cohort = Cohort.of(case, word_bits=bits)
    layout = VectorLayout.of(cohort.plan)
    masked = MaskedUpdate(0, np.zeros(layout.length, layout.dtype), bytes(SIGNATURE))
    size = payload_bytes(write_reply(masked)) / case.num_params
    name = f"masked vector u{bits} d={short_count(case.num_params)}"
    return Row(name, size, kind="bound", goal=bound, unit="B/param", note="Flower: 8")


def _sizes(case: Case, *, hybrid: bool) -> Iterator[Row]:
    """What member 0 sends and is sent in a round, in the order of the exchanges."""
    ours = OurRound(Cohort.of(case, hybrid=hybrid), Stopwatch())
    ours.run()
    where = f" {case.name}" + (", hybrid" if hybrid else "")
    sizes = [(message, _size(message)) for message in ours.seen]
    dealt = sum(_sealed_size(message) for message in ours.seen)
    bound = (135_000 if hybrid else 5_000) if is_goal(case, GOAL_BYTES) else None
    note = "Flower: 33.9 kB; hashes of shares and signatures: below" if bound else ""
    yield Row(f"advert and own shares{where}", dealt, kind="bound", goal=bound, unit="B", note=note)
    for message, size in sizes:
        way = "up" if isinstance(message, ClientEvent) else "down"
        name = f"- {way} {NAMES[type(message)]}{where}"
        yield Row(name, size, kind="bound", unit="B", note=BESIDE.get(type(message), ""))


def _sealed_size(message: ServerEvent | ClientEvent) -> int:
    """Of an advert, and of the sealed shares (and pair secrets) in a bundle."""
    if isinstance(message, ShareBundle):
        return sum(map(len, (*message.packages.values(), *message.offers.values())))
    return _size(message) if isinstance(message, Advert) else 0


def _size(message: ServerEvent | ClientEvent) -> int:
    match message:
        case RoundOpened():
            content = write_request(Opening(message, b""))
        case SharesDelivered():
            content = write_request(Training(message, np.zeros(0, np.float32)))
        case _ if isinstance(message, ClientEvent):
            content = write_reply(message)
        case _:
            content = write_request(message)
    return payload_bytes(content)


GROUPS: Mapping[str, Callable[[Scope], Iterator[Row]]] = {
    "stream": stream_rows,
    "client": client_rows,
    "server": server_rows,
    "two_server": two_server_rows,
    "bytes": byte_rows,
}


def rows_of(groups: Sequence[str], scope: Scope) -> Iterator[Row]:
    """The rows of some groups, as they are measured."""
    for group in groups:
        yield from GROUPS[group](scope)
