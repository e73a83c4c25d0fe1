"""Turns arguments of the client's methods into fields of the wire protocol."""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

from pagedd._errors import InvalidRequest
from pagedd._types import Embeddings, RenderedChat

DEFAULT_TIMEOUT_S = 30.0


class GenerateOptions(TypedDict, total=False):
    """Options of a generation; what is left out has the daemon's default.

    docs/protocol.md, section 4, has ranges and defaults; the daemon checks them.
    """

    model: str
    """A name from `Client.models`; it is loaded when it is not the loaded one."""
    n: int
    """Samples to draw, 1 to 16; the prompt is computed once. Not for `Session.say`."""
    best_of: int
    """Draw so many samples and get the ``n`` with the highest log-probability per token, best
    first, 1 to 16; nothing is streamed if more than ``n``."""
    beam_width: int
    """Search with so many beams instead of drawing, 1 to 16: the ``n`` best texts, best first, when
    the search is over."""
    length_penalty: float
    """Of a search: scores are divided by the number of tokens to the power of this (1)."""
    early_stopping: bool | Literal["never"]
    """Of a search: when it is over, as in Hugging Face transformers (false)."""
    stream: bool
    """False: nothing comes before the end."""
    echo: bool
    """`Completion.prompt` has the prompt's text and tokens, and what ``logprobs`` asks for of them.
    Not for conversations."""
    prompt_logprobs: int
    """`Completion.prompt` has the log-probabilities of the prompt's tokens, and at each of them the
    most likely k, 0 to 20. Not for conversations."""
    max_tokens: int
    """Tokens per sample at most (256)."""
    min_tokens: int
    """No stop before this many (0)."""
    ignore_eos: bool
    """Go on after the model's end tokens."""
    temperature: float
    """0 is greedy (0.8)."""
    top_k: int
    """0 is off (40)."""
    top_p: float
    """1 is off (0.95)."""
    min_p: float
    """0 is off (0)."""
    typical_p: float
    """1 is off (1)."""
    repetition_penalty: float
    """1 is off (1)."""
    presence_penalty: float
    frequency_penalty: float
    seed: int
    """The same seed, prompt and options draw the same tokens (random)."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these ids."""
    stop: str | Sequence[str]
    """The text ends before the first of these that occurs."""
    stop_token_ids: Sequence[int]
    logprobs: int
    """Log-probabilities of each token and of the most likely k, 0 to 20."""
    json_schema: Mapping[str, Any] | str
    """The text is JSON that matches this schema, whole unless ``stop`` or ``max_tokens`` ends
    it. At most one of this, ``regex`` and ``grammar``."""
    regex: str
    """The whole text matches this regular expression (Rust's syntax)."""
    grammar: str
    """The whole text is a sentence of this grammar (llguidance's variant of Lark)."""
    keep_alive: float | str
    """How long the model stays loaded: seconds, ``"5m"``, negative for ever, 0 not at all."""
    deadline_ms: int
    """The daemon ends the request with `DeadlineExceeded` after this long."""


WHOLE_TIMEOUT_S = 600.0
"""Of requests that bring nothing before their end, where the caller has given no timeout."""


def patience_s(fields: Mapping[str, Any], timeout: float | None, usual: float) -> float:
    """The longest wait for the next event of a stream, in seconds.

    Args:
        fields: What it asks for.
        timeout: The caller's, if given.
        usual: The client's.
    """
    if timeout is not None:
        return timeout
    chooses = (fields.get("best_of") or 1) > (fields.get("n") or 1)
    whole = fields.get("beam_width") is not None or fields.get("stream") is False or chooses
    return max(usual, WHOLE_TIMEOUT_S) if whole else usual


_OPTIONS = frozenset(GenerateOptions.__annotations__)


def generate(prompt: str | Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``generate``."""
    fields = _options(options)
    if isinstance(prompt, str):
        fields["prompt"] = prompt
    else:
        fields["tokens"] = pack_tokens(prompt)
    return fields


def chat(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_args: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Fields of ``chat``."""
    return _options(options) | {
        "messages": [dict(message) for message in messages],
        "tools": _plain(tools),
        "template_args": None if template_args is None else dict(template_args),
    }


def session_open(
    system: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    template_args: Mapping[str, Any] | None,
    messages: Sequence[Mapping[str, Any]] | None,
    ttl: float | str | None,
) -> dict[str, Any]:
    """Fields of ``session.open``."""
    return {
        "system": system,
        "tools": _plain(tools),
        "template_args": None if template_args is None else dict(template_args),
        "messages": _plain(messages),
        "ttl": ttl,
    }


def session_say(
    session: str, content: str, role: str, options: Mapping[str, Any], *, commit: bool
) -> dict[str, Any]:
    """Fields of ``session.say``."""
    fields = {"session": session, "content": content, "role": role}
    return _options(options) | fields | {"commit": None if commit else False}


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as the wire has them: little-endian int32.

    Raises:
        InvalidRequest: One of them is no 32-bit integer.
    """
    try:
        return struct.pack(f"<{len(tokens)}i", *tokens)
    except (struct.error, TypeError) as error:
        raise InvalidRequest(
            f"token ids must be 32-bit integers: {error}",
            code="E_FIELD",
            details={"field": "tokens"},
        ) from error


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """Token ids of a ``bin`` of the wire.

    Raises:
        ValueError: Its length is no multiple of 4.
    """
    if len(data) % 4:
        raise ValueError(f"{len(data)} bytes are no packed int32")
    return struct.unpack(f"<{len(data) // 4}i", data)


def embed(
    inputs: str | Sequence[str] | Sequence[Sequence[int]],
    model: str | None,
    normalize: bool,
    keep_alive: float | str | None,
) -> dict[str, Any]:
    """Fields of ``embed``."""
    listed = [inputs] if isinstance(inputs, str) else list(inputs)
    fields: dict[str, Any] = {"model": model, "keep_alive": keep_alive, "normalize": normalize}
    if all(isinstance(one, str) for one in listed):
        return {**fields, "texts": listed}
    return {**fields, "tokens": [pack_tokens(cast(Sequence[int], one)) for one in listed]}


def embeddings(result: Mapping[str, Any]) -> Embeddings:
    """The result of ``embed``."""
    width = int(result["dimensions"])
    numbers = struct.unpack(f"<{len(result['embeddings']) // 4}f", result["embeddings"])
    vectors = [list(numbers[at : at + width]) for at in range(0, len(numbers), width)]
    return Embeddings(vectors, int(result["prompt_tokens"]), str(result["model"]))


def rendered(result: Mapping[str, Any]) -> RenderedChat:
    """The result of ``render``."""
    return RenderedChat(str(result["model"]), str(result["text"]), unpack_tokens(result["tokens"]))


def _plain(items: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    return None if items is None else [dict(item) for item in items]


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, with sequences as lists.

    Raises:
        TypeError: An option that does not exist, as Python does for a keyword argument.
    """
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown option {name!r}{hint}")
    fields = dict(options)
    stop = fields.get("stop")
    if stop is not None:
        fields["stop"] = [stop] if isinstance(stop, str) else list(stop)
    if fields.get("json_schema") is not None and not isinstance(fields["json_schema"], str):
        fields["json_schema"] = json.dumps(fields["json_schema"])
    if fields.get("stop_token_ids") is not None:
        fields["stop_token_ids"] = list(fields["stop_token_ids"])
    if fields.get("logit_bias") is not None:
        fields["logit_bias"] = dict(fields["logit_bias"])
    return fields
