"""Replies as Anthropic's clients read them."""

from __future__ import annotations

import secrets
from typing import Any

from pagedd import Completion
from pagedd_http.answers import sse
from pagedd_http.errors import ApiError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of an error."""
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    told = {"type": _KINDS.get(error.status, kind), "message": error.message}
    return {"type": "error", "error": told, "request_id": None}


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that fails."""
    return sse(error_body(error), "error")


def message(model: str, content: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A message of the assistant."""
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **more,
    }


def ended(done: Completion, *, called: bool) -> dict[str, Any]:
    """Why it ended: ``stop_reason`` and ``stop_sequence``."""
    sample = done.samples[0]
    if sample.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": sample.stop}
    if called and sample.reason == "stop":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    reasons = {"length": "max_tokens", "context": "model_context_window_exceeded"}
    return {"stop_reason": reasons.get(sample.reason, "end_turn"), "stop_sequence": None}


def usage_of(done: Completion) -> dict[str, int]:
    """``usage``: what was found in the pool is not among ``input_tokens``."""
    usage = done.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.generated_tokens,
    }
