"""A valid value of each field that a message may have."""

from __future__ import annotations

import random
import struct
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TOKEN = b"\0fuzz-the-token\0"
"""Stands for the token of the connection that a message is sent over."""

WORDS = (
    "river",
    "a b",
    "def f(x):",
    "{{ x }}",
    "<|im_start|>",
    "日本",
    "🙂",
    "\n",
    "\\u0000",
    "a" * 200,
)
_SCHEMAS = ('{"type": "object"}', '{"type": "integer"}', "{", "[]", "null", '{"$ref": "#"}')
_PATTERNS = ("[a-z]{1,5}", "(a|b)*c", "(", "[", "(a*)*b", "\\", "x{0,1000}")
_GRAMMARS = ('root ::= "yes" | "no"', 'start: "a"', "root ::= root", "%%")


def _conversation(dice: random.Random) -> list[dict[str, Any]]:
    roles = ("system", "user", "assistant", "tool")
    return [
        {"role": dice.choice(roles), "content": dice.choice(WORDS)}
        for _ in range(dice.choice((1, 1, 2, 5)))
    ]


def _tokens(dice: random.Random) -> bytes:
    count = dice.choice((1, 2, 17, 64, 200))
    return struct.pack(f"<{count}i", *(dice.randrange(256) for _ in range(count)))


def _settings(dice: random.Random) -> dict[str, Any]:
    name = dice.choice(("weight", "max_running", "kv_ceiling", "ceiling", "nonsense"))
    return {name: dice.choice((1, 2, 0.5, -1, "background", None, True))}


def _durations(dice: random.Random) -> Any:
    return dice.choice((300, -1, "5m", "1h30m", "-1") * 10 + (0, "0", 1, 0.5, "250ms"))


BY_NAME: Mapping[str, Callable[[random.Random], Any]] = {
    "app": lambda dice: dice.choice(("a", "b", "editor", "x" * 64)),
    "priority": lambda dice: dice.choice(("interactive", "normal", "background")),
    "model": lambda dice: dice.choice(("simulated",) * 400 + ("simulated-ids", "broken")),
    "max_tokens": lambda dice: dice.choice((1, 2, 8, 30) * 12 + (2**31 - 1,)),
    "min_tokens": lambda dice: dice.choice((0, 1, 5)),
    "temperature": lambda dice: dice.choice((0, 0.0, 0.7, 1, 100)),
    "top_p": lambda dice: dice.choice((0.1, 0.95, 1)),
    "typical_p": lambda dice: dice.choice((0.1, 1)),
    "min_p": lambda dice: dice.choice((0, 0.1, 1)),
    "repetition_penalty": lambda dice: dice.choice((0.5, 1.1, 10)),
    "seed": lambda dice: dice.choice((0, 1, 2**63 - 1)),
    "logit_bias": lambda dice: {dice.randrange(250): dice.choice((-100, 0.5, 100))},
    "stop": lambda dice: dice.choice(([], ["\n"], ["ab", "é"])),
    "stop_token_ids": lambda dice: dice.choice(([], [3], [1, 2])),
    "logprobs": lambda dice: dice.choice((0, 1, 20)),
    "prompt_logprobs": lambda dice: dice.choice((0, 1, 20)),
    "json_schema": lambda dice: dice.choice(_SCHEMAS),
    "regex": lambda dice: dice.choice(_PATTERNS),
    "grammar": lambda dice: dice.choice(_GRAMMARS),
    "keep_alive": _durations,
    "ttl": lambda dice: dice.choice((1, 0.5, -1, "5m", 1e300)),
    "deadline_ms": lambda dice: dice.choice((1, 50, 10_000, 2**53)),
    "after": lambda dice: dice.choice((-1, 0, 3)),
    "n": lambda dice: dice.choice((1, 1, 2, 16)),
    "best_of": lambda dice: dice.choice((1, 2, 16)),
    "beam_width": lambda dice: dice.choice((1, 2, 4)),
    "prompt": lambda dice: dice.choice(WORDS),
    "text": lambda dice: dice.choice(WORDS),
    "content": lambda dice: dice.choice(WORDS),
    "tokens": _tokens,
    "messages": _conversation,
    "tools": lambda dice: dice.choice(([], [{"type": "function", "function": {"name": "f"}}])),
    "template_args": lambda dice: dice.choice(({}, {"enable_thinking": False, "x": [1, None]})),
    "session": lambda dice: str(dice.randrange(1, 20)),
    "role": lambda dice: dice.choice(("user", "tool", "system")),
    "token": lambda dice: TOKEN,
    "target": lambda dice: "r1",
    "settings": _settings,
}
"""Field -> a valid value. A field that is not here gets the simplest value of its type."""


def of_type(annotation: Any, dice: random.Random) -> Any:
    """The simplest value of a type, for fields that a later protocol adds."""
    origin = typing.get_origin(annotation)
    arguments: Sequence[Any] = typing.get_args(annotation)
    if origin is typing.Annotated:
        return of_type(arguments[0], dice)
    if origin in (typing.Union, types.UnionType):
        chosen = [kind for kind in arguments if kind is not types.NoneType]
        return of_type(dice.choice(chosen), dice)
    if origin is typing.Literal:
        return dice.choice(arguments)
    if origin is list:
        return [of_type(arguments[0], dice)]
    if origin is dict:
        return {of_type(arguments[0], dice): of_type(arguments[1], dice)}
    simplest: Mapping[Any, Any] = {bool: True, int: 1, float: 0.5, str: "a", bytes: b"\1\0\0\0"}
    return simplest[annotation]
