"""Types of what a client may write into a field, each with its check.

They are strict, and know every limit of docs/protocol.md, section 7: the `Limits` to apply come as
validation context.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, ValidationInfo

from pagedd_daemon.front.refusals import at_most, wrong

MAX_TOKEN_ID = 2**31 - 1
MAX_COUNT = 2**31 - 1
"""Counts of tokens beyond this mean "as many as the context holds" anyway."""


_PRINTABLE = re.compile(r"[ -~]+")
_APP = re.compile(r"[A-Za-z0-9._-]+")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _id(value: str, info: ValidationInfo) -> str:
    if _PRINTABLE.fullmatch(value) is None:
        raise wrong("must be printable ASCII, at least one character")
    at_most("id_chars", len(value), info)
    return value


def _app(value: str, info: ValidationInfo) -> str:
    if _APP.fullmatch(value) is None:
        raise wrong("must be made of A-Z a-z 0-9 . _ -, at least one character")
    at_most("app_chars", len(value), info)
    return value


def _token_bytes(value: bytes) -> bytes:
    if len(value) % 4:
        raise wrong(f"must be packed int32: {len(value)} bytes are no multiple of 4")
    # The top byte of each little-endian id: `isascii` tells in C whether a sign bit is set.
    if not value[3::4].isascii():
        raise wrong("holds a negative token id")
    return value


def _some_tokens(value: bytes) -> bytes:
    if not value:
        raise wrong("holds no token id")
    return value


def _some_text(value: str) -> str:
    if not value:
        raise wrong("is empty")
    return value


def _samples(value: int, info: ValidationInfo) -> int:
    at_most("samples", value, info)
    return value


def _stop(value: list[str], info: ValidationInfo) -> list[str]:
    at_most("stop_strings", len(value), info)
    for text in value:
        if not text:
            raise wrong("holds an empty string")
        at_most("stop_string_bytes", len(text.encode()), info)
    return value


def _stop_token_ids(value: list[int], info: ValidationInfo) -> list[int]:
    at_most("stop_token_ids", len(value), info)
    return value


def _logit_bias(value: dict[int, float], info: ValidationInfo) -> dict[int, float]:
    at_most("logit_bias", len(value), info)
    return value


def _grammar(value: str, info: ValidationInfo) -> str:
    if not value:
        raise wrong("is empty")
    at_most("grammar_bytes", len(value.encode()), info)
    return value


def seconds(value: object) -> float:
    """A ``keep_alive`` in seconds: a number of seconds or a duration like ``"1h30m"``.

    Returns:
        0 and more; ``inf`` for a negative one, which means for ever.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong("must be a number of seconds or a duration like 5m")
    if isinstance(value, str):
        text = value.strip()
        negative = text.startswith("-")
        text = text[1:] if negative else text
        # The longest of any use has about a dozen characters; a bound keeps `float` cheap.
        if len(text) > 64 or not text.isascii():
            raise wrong("is no duration like 5m or 1h30m")
        parts = _DURATION.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            value = sum(float(number) * _UNIT_S[unit] for number, unit in parts)
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            value = float(text)
        else:
            raise wrong("is no duration like 5m or 1h30m")
        value = -1.0 if negative and value else value
    if not math.isfinite(value):
        raise wrong("must be finite; a negative one means for ever")
    return math.inf if value < 0 else float(value)


def _plain(value: Any) -> Any:
    """Refuses, at any depth, what has no JSON form: templates are written for JSON values."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
        elif isinstance(item, bytes):
            raise wrong("holds a binary, which has no place in a template")
        elif isinstance(item, float) and not math.isfinite(item):
            raise wrong("holds a number that is not finite")
    return value


def _messages(value: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
    at_most("messages", len(value), info)
    for message in value:
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise wrong("holds a message without a role")
        content = message.get("content")
        # A turn that only calls tools has no text of its own.
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise wrong("holds a message without content")
    _plain(value)
    return value


def _some_messages(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not value:
        raise wrong("holds no message")
    return value


def _tools(value: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
    at_most("tools", len(value), info)
    _plain(value)
    return value


RequestId = Annotated[str, AfterValidator(_id)]
AppName = Annotated[str, AfterValidator(_app)]
Text = Annotated[str, AfterValidator(_some_text)]
Tokens = Annotated[bytes, AfterValidator(_token_bytes)]
SomeTokens = Annotated[Tokens, AfterValidator(_some_tokens)]
GrammarText = Annotated[str, AfterValidator(_grammar)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Name = Annotated[str, Field(min_length=1, max_length=4096)]
KeepAlive = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(seconds)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_logit_bias)
]
Stops = Annotated[list[str], FailFast(), AfterValidator(_stop)]
StopTokenIds = Annotated[list[TokenId], FailFast(), AfterValidator(_stop_token_ids)]
Samples = Annotated[int, Field(ge=1), AfterValidator(_samples)]
# `FailFast`: 16,384 wrong elements cost 15 ms to be collected, of which the first one is told.
Messages = Annotated[list[dict[str, Any]], FailFast(), AfterValidator(_messages)]
SomeMessages = Annotated[Messages, AfterValidator(_some_messages)]
Tools = Annotated[list[dict[str, Any]], FailFast(), AfterValidator(_tools)]
TemplateArgs = Annotated[dict[str, Any], AfterValidator(_plain)]
