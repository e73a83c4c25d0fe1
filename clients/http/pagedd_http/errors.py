"""What goes wrong, as HTTP has it.

Everything is an `ApiError` inside the gateway; how one looks depends on whose interface the request
used (`pagedd_http.interfaces`).
"""

from __future__ import annotations

from pagedd import (
    AccessDenied,
    Busy,
    ConnectionFailed,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    HelperFailed,
    InvalidRequest,
    ModelError,
    PageddError,
    PromptTooLong,
    RequestTimeout,
)

RETRY_AFTER_S = 2
"""What ``Retry-After`` says while the daemon is away, full or restarting its engine: a restart
takes about a second."""


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        code: ``E_…`` of the daemon, or a word of the gateway's own, stable.
        param: The field that is wrong, if it is one.
        retry_after_s: Of the header ``Retry-After``; None: trying again will not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


_BY_CODE = {"E_FORBIDDEN": 403, "E_NO_EMBEDDING": 404}

_STATUS: tuple[tuple[type[PageddError], int], ...] = (
    (PromptTooLong, 400),
    (InvalidRequest, 400),
    (Busy, 429),
    (Draining, 503),
    (DeadlineExceeded, 504),
    (RequestTimeout, 504),
    (EngineFailed, 503),
    (HelperFailed, 503),
    (AccessDenied, 502),
    (ConnectionFailed, 503),
)
"""The first that fits; anything else is 500."""


def of_daemon(error: PageddError) -> ApiError:
    """The daemon's or the client library's error as one of HTTP."""
    if isinstance(error, ModelError):
        status = 503 if error.retryable else 404
    elif error.code in _BY_CODE:
        status = _BY_CODE[error.code]
    else:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    field = error.details.get("field")
    return ApiError(
        status,
        str(error),
        code=error.code,
        param=field if isinstance(field, str) else None,
        retry_after_s=RETRY_AFTER_S if status in (429, 503) else None,
    )


def as_api_error(error: Exception) -> ApiError:
    """Anything raised, as what the client is told: of a defect of ours no more than that."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PageddError):
        return of_daemon(error)
    return ApiError(500, "the gateway failed: its log says more", code="internal")
