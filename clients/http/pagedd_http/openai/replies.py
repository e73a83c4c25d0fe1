"""Replies as OpenAI's clients read them."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from pagedd import Completion, Usage
from pagedd_http.answers import sse
from pagedd_http.errors import ApiError

FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}
"""OpenAI's word for the daemon's reason."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one reply begins with."""

    kind: str
    """``object`` of the reply."""
    model: str
    prefix: str
    """Of the id."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object: a whole reply or a piece of a stream."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def usage_of(usages: list[Usage]) -> dict[str, Any]:
    """``usage`` of a reply, over its prompts."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    generated = sum(usage.generated_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    status = error.status
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    codes = {"E_MODEL": "model_not_found", "E_TOO_LONG": "context_length_exceeded"}
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": codes.get(error.code, error.code),
        }
    }


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that fails."""
    return sse(error_body(error))


def timings_of(completion: Completion) -> dict[str, Any]:
    """llama.cpp's ``timings``, which local front ends show."""
    usage, timings = completion.usage, completion.timings
    return {
        "prompt_n": usage.prompt_tokens - usage.cached_tokens,
        "cache_n": usage.cached_tokens,
        "prompt_ms": timings.prompt_ms,
        "predicted_n": usage.generated_tokens,
        "predicted_ms": timings.generation_ms,
        "queue_ms": timings.queue_ms,
    }
