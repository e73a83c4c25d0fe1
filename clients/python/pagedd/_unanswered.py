"""Errors of calls that nothing came for."""

from __future__ import annotations

from pagedd._core import Call
from pagedd._errors import ConnectionFailed, RequestTimeout


def unanswered(call: Call, seconds: float) -> RequestTimeout:
    """The error of a request without a result."""
    return RequestTimeout(
        f"{call.verb} had no answer within {seconds:g} s",
        details={"verb": call.verb, "timeout_s": seconds},
    )


def stalled(call: Call, seconds: float) -> RequestTimeout:
    """The error of a stream that stands still."""
    return RequestTimeout(
        f"{call.verb} made no progress for {seconds:g} s",
        details={"verb": call.verb, "request": call.id, "timeout_s": seconds},
    )


def was_closed() -> ConnectionFailed:
    """The error of calls on a client that was closed."""
    return ConnectionFailed("the client was closed", retryable=False)
