"""The exceptions of pagedd.

::

    PageddError                     code, retryable, details
    ├── ConnectionFailed            no daemon, refused, or gone
    │   ├── DaemonNotRunning        nothing listens on the socket
    │   ├── SessionLost             the daemon ended: what it knew of this client is gone
    │   └── AccessDenied            the daemon refused this user
    ├── RequestTimeout              a call's own deadline passed
    ├── ProtocolViolation           the daemon said what the protocol does not allow
    └── RequestError                the daemon answered with an error
        ├── InvalidRequest          the request itself is wrong; sending it again will not help
        │   ├── PromptTooLong       longer than the context or the pool
        │   ├── NothingToCommit
        │   └── UnknownSession
        │       └── SessionExpired  not used for as long as its time to live
        ├── ModelError              unknown, missing or broken model
        ├── Busy                    too much at once; try again
        ├── Draining                the daemon is shutting down
        ├── DeadlineExceeded        the daemon's deadline for the request passed
        ├── EngineFailed            a step failed, or no engine can take the place of one that died
        ├── Poison                  engines died while they had this request
        ├── HelperFailed            tokenising or rendering took too much time or memory
        └── InternalError           a defect of the daemon
"""

# ruff: noqa: N818 (a name says what happened, as in httpx; the tree says that it is an error)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PageddError(Exception):
    """Base of everything pagedd raises.

    Attributes:
        code: Stable and machine-readable, ``E_…``; docs/protocol.md lists them.
        retryable: Whether the same call may succeed later.
        details: The figures that explain it.
    """

    code = "E_CLIENT"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retryable: bool | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable
        self.details: dict[str, Any] = dict(details or {})


class ConnectionFailed(PageddError):
    """The daemon cannot be reached."""

    code = "E_CONNECTION"
    retryable = True


class DaemonNotRunning(ConnectionFailed):
    """Nothing listens on the socket."""

    code = "E_NOT_RUNNING"


class SessionLost(ConnectionFailed):
    """The connection that was open is gone, and with it its sessions and live requests.

    The same call may be made again on a new connection: nobody else has what this one began.
    """

    code = "E_SESSION_LOST"


class AccessDenied(ConnectionFailed):
    """The daemon refused this user."""

    code = "E_ACCESS"
    retryable = False


class RequestTimeout(PageddError):
    """The deadline of the call passed before the daemon answered."""

    code = "E_TIMEOUT"
    retryable = True


class ProtocolViolation(PageddError):
    """The daemon sent what the protocol does not allow."""

    code = "E_PROTOCOL"


class RequestError(PageddError):
    """The daemon answered the request with an error."""


class InvalidRequest(RequestError):
    """The request itself is wrong."""


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the context or the pool; ``details`` has the figures."""


class UnknownSession(InvalidRequest):
    """The session does not exist, or not any more."""


class SessionExpired(UnknownSession):
    """The session was not used for as long as its time to live; ``details`` has ``ttl_s``."""


class NothingToCommit(InvalidRequest):
    """The session has no reply that does not count already."""


class ModelError(RequestError):
    """The model is unknown, missing or broken."""


class Busy(RequestError):
    """Too much at once."""


class Draining(RequestError):
    """The daemon is shutting down."""


class DeadlineExceeded(RequestError):
    """The request's own deadline passed in the daemon."""


class EngineFailed(RequestError):
    """The engine died or a step failed."""


class Poison(RequestError):
    """Several engines died while they had this request; do not send it again."""


class HelperFailed(RequestError):
    """Tokenising or rendering took too much time or memory."""


class InternalError(RequestError):
    """A defect of the daemon."""


_BY_CODE: dict[str, type[RequestError]] = {
    "E_TOO_LONG": PromptTooLong,
    "E_NEVER_FITS": PromptTooLong,
    "E_SESSION": UnknownSession,
    "E_EXPIRED": SessionExpired,
    "E_COMMIT": NothingToCommit,
    "E_MODEL": ModelError,
    "E_NO_MODEL": ModelError,
    "E_BUSY": Busy,
    "E_SLOW": Busy,
    "E_DRAINING": Draining,
    "E_DEADLINE": DeadlineExceeded,
    "E_ENGINE": EngineFailed,
    "E_POISON": Poison,
    "E_HELPER": HelperFailed,
    "E_INTERNAL": InternalError,
}


def from_wire(event: Mapping[str, Any]) -> RequestError:
    """The exception for an ``error`` event of the daemon."""
    code = str(event.get("code", "E_INTERNAL"))
    kind = _BY_CODE.get(code, InvalidRequest)
    details = event.get("details")
    return kind(
        str(event.get("message", code)),
        code=code,
        retryable=bool(event.get("retryable", False)),
        details=details if isinstance(details, dict) else {},
    )
