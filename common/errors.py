"""The errors that a user may meet, each with the exit code of the command that it ends.

    FedoppuError                1  failed
    ├── UsageError              2  an option, key or value that cannot be
    ├── DataError               1  a malformed file, record or field
    ├── BaseModelError          1  a base that cannot be read or adapted
    ├── AdapterError            1  an adapter that does not fit the base or the shared adapter under it
    ├── ClientFailed            1  an exception in a client's part of a round
    ├── ProtocolError           1  a peer broke the protocol; names the member and the rule
    ├── RoundAborted            1  a round that changed no model: no sum was made, or it was discarded
    ├── ConnectionFailed        3  connection or authentication
    ├── DeadlineExceeded        4  time-out
    └── RefusedByPolicy         6  a floor or consent of the client's own policy

Each message names the thing, the bound and the remedy. What is none of these is a bug of ours: exit code 5.
"""


class FedoppuError(Exception):
    """An error that is reported in one line.

    Attributes:
        exit_code: Exit code of the command.
        code: Stable name for `--format json`.
        hint: What to do about it, or an empty string.
    """

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Keep the one-line message and the hint."""
        super().__init__(message)
        self.hint = hint


class UsageError(FedoppuError):
    """An option, key or value that cannot be."""

    exit_code = 2
    code = "usage"


class DataError(FedoppuError):
    """A malformed file, record or field."""

    code = "data"


class BaseModelError(FedoppuError):
    """A base that cannot be read, or has no such target modules."""

    code = "base_model"


class AdapterError(FedoppuError):
    """An adapter that was made for another base or for another shared adapter."""

    code = "adapter"


class ClientFailed(FedoppuError):
    """An exception in a client's part of a round."""

    code = "client_failed"


class ProtocolError(FedoppuError):
    """A peer broke the protocol (a remote fault); its message is not answered, or not used."""

    code = "protocol"


class RoundAborted(FedoppuError):
    """A round, or an attempt at one, that changed no model.

    Most end without a sum: too few members were left, or a secret was lost. Shares may have been
    revealed by then, never of both secrets of one member. A sum whose totals are out of range was
    unmasked, and is discarded.
    """

    code = "round_aborted"


class ConnectionFailed(FedoppuError):
    """The other side could not be reached, or one side did not accept the other."""

    exit_code = 3
    code = "connection"


class DeadlineExceeded(FedoppuError):
    """Something that was waited for did not come in time."""

    exit_code = 4
    code = "timeout"


class RefusedByPolicy(FedoppuError):
    """This client's own policy forbids what was asked; no message of the server can lower it."""

    exit_code = 6
    code = "refused"
