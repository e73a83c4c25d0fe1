"""Whether a prompt and its token ids fit the model."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from typing import TYPE_CHECKING

from pagedd_daemon.front.errors import WireError

if TYPE_CHECKING:
    from pagedd_daemon.front.models import Model
    from pagedd_daemon.front.requests import Generation


def room_for_reply(request: Generation, prompt: array[int], model: Model) -> int:
    """Tokens the context has left for a reply.

    Raises:
        WireError: The request does not fit the model.
    """
    ready = model.ready
    if not prompt:
        raise WireError("E_FIELD", "the prompt is empty", details={"field": "prompt"})
    check_ids(prompt, ready.vocab_size)
    check_ids(request.logit_bias, ready.vocab_size)
    check_ids(request.stop_token_ids, ready.vocab_size)
    length = len(prompt)
    if length < ready.context_tokens:
        return ready.context_tokens - length
    if ready.pool_tokens <= ready.context_tokens:
        raise WireError(
            "E_NEVER_FITS",
            f"a prompt of {length} tokens and a reply need more than the whole pool of"
            f" {ready.pool_tokens}",
            details={"need_tokens": length + 1, "pool_tokens": ready.pool_tokens},
        )
    raise WireError(
        "E_TOO_LONG",
        f"a prompt of {length} tokens leaves no room in a context of {ready.context_tokens}",
        details={"prompt_tokens": length, "context_tokens": ready.context_tokens},
    )


def check_ids(ids: Collection[int], vocab_size: int) -> None:
    """Check that ids are in the vocabulary; negative ones were refused with the message.

    Raises:
        WireError: ``E_TOKEN_ID``.
    """
    if ids and (highest := max(ids)) >= vocab_size:
        raise WireError(
            "E_TOKEN_ID",
            f"token id {highest} is outside the vocabulary of {vocab_size}",
            details={"token": highest, "vocab_size": vocab_size},
        )
