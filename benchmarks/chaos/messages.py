"""Messages of every verb, right and wrong, all of them from one seed.

A message begins as a valid one of its verb, made from the fields of its model, and is then changed
in its values (types, bounds, depths, sizes), in its place (a session that is not there, an id used
before, a verb on the other socket), or in its bytes (lengths that lie, keys given twice, extension
types, cut frames, several frames, none). So most reach the code behind the check that would have
stopped noise at once.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from benchmarks.chaos.fields import BY_NAME, TOKEN, WORDS, of_type
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits
from pagedd_daemon.front.wire import CONTROL_VERBS, DATA_VERBS

_UNSENT = frozenset({"shutdown"})
"""Would end the run, rightly."""

_EDGES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 16, 17, 255, 256, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63),
    *(2**64 - 1, -(2**31) - 1, -(2**63), 0.0, -0.0, 1.0, 0.5, 1.5, 1e308, -1e308, 5e-324),
    *(math.nan, math.inf, -math.inf),
)
_ODD: tuple[Any, ...] = (
    *(None, True, False, "", " ", "\0", "0", "nan", "-5m", "1e9", "𝟙", "é" * 40, "x" * 64),
    *(
        "x" * 65,
        "x" * 4097,
        "../../etc/passwd",
        "%s%n{0}{{7*7}}",
        "\u202e",
        b"",
        b"\0",
        b"\xff" * 4,
    ),
    *(b"abc", [], {}, [[]], {"": ""}, [None], {"a": {"b": [1, "c", None]}}, {"role": "user"}),
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One message."""

    connection: int
    """Which of the attacker's connections it is sent over."""
    control: bool
    """Over the control socket."""
    frames: tuple[bytes, ...]
    how: str
    """What was done to it."""


class Messages:
    """An endless sequence of them; the same for the same arguments."""

    def __init__(self, seed: int, connections: int = 8, limits: Limits = DEFAULT_LIMITS) -> None:
        self._dice = random.Random(seed)
        self._connections = connections
        self._limits = limits
        self._count = 0
        self._ids: list[str] = ["r0"]
        self._last = b"\x80"
        verbs = (*DATA_VERBS, *CONTROL_VERBS)
        self._kinds = {**DATA_VERBS, **CONTROL_VERBS}
        self._verbs = [verb for verb in verbs if verb not in _UNSENT]
        # What opens and what generates leads further than the rest; `bye` ends too much.
        heavy = {"generate": 6, "chat": 3, "session.say": 4, "session.open": 3, "bye": 0.2}
        # Each of these writes a file or reads one.
        heavy |= {"hello": 1.5, "apps.set": 0.3, "reload": 0.1}
        # While a model is unloaded or another one loaded, everybody waits.
        heavy |= {"unload": 0.01, "load": 0.3, "session.close": 0.2}
        self._weights = [heavy.get(verb, 1.0) for verb in self._verbs]
        self._in_values: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
            *(
                self._odd,
                self._edge,
                self._edge,
                self._drop,
                self._extra,
                self._nested,
                self._large,
            ),
            *(self._many, self._verb, self._version, self._null, self._stranger, self._again),
        )
        self._in_bytes: tuple[Callable[[bytes], tuple[bytes, ...]], ...] = (
            *(self._cut, self._tail, self._flip, self._flip, self._splice, self._lie, self._ext),
            *(self._twice, self._keys, self._frames, self._noise, self._oversize, self._raw_text),
        )

    def next(self) -> Sent:
        """The next message."""
        dice = self._dice
        self._count += 1
        connection = dice.randrange(self._connections)
        (verb,) = dice.choices(self._verbs, self._weights)
        control = (verb in CONTROL_VERBS) != (dice.random() < 0.02)
        fields = self.valid(verb)
        how = "valid"
        chance = dice.random()
        if chance < 0.5:
            for _ in range(1 if dice.random() < 0.8 else 3):
                change = dice.choice(self._in_values)
                fields, how = change(fields), change.__name__
        packed = _packed(fields)
        frames: tuple[bytes, ...] = (packed,)
        if chance > 0.8:
            alter = dice.choice(self._in_bytes)
            frames, how = alter(packed), alter.__name__
        self._last = packed
        return Sent(connection, control, frames, how.strip("_"))

    # ------------------------------------------------------------------------------ valid messages

    def valid(self, verb: str) -> dict[str, Any]:
        """A message of ``verb`` that passes every check."""
        dice, kind = self._dice, self._kinds[verb]
        message: dict[str, Any] = {"v": 1, "verb": verb, "id": self._id()}
        for name, field in kind.model_fields.items():
            if field.is_required() and name != "id":
                message[name] = self._value(name, field.annotation)
        optional = [n for n, f in kind.model_fields.items() if not f.is_required()]
        for name in dice.sample(optional, min(len(optional), dice.choice((0, 0, 1, 2, 4)))):
            message[name] = self._value(name, kind.model_fields[name].annotation)
        if verb == "generate":
            message.pop("prompt", None)
            if "tokens" not in message or dice.random() < 0.5:
                message.pop("tokens", None)
                message["prompt"] = dice.choice(WORDS)
        elif verb == "embed":
            name = dice.choice(("texts", "tokens"))
            for one in ("texts", "tokens"):
                message.pop(one, None)
            message[name] = [dice.choice(WORDS) if name == "texts" else bytes(8)]
        elif verb == "cancel":
            for name in ("token", "app", "all", "target"):
                message.pop(name, None)
            scope = dice.choice(({"token": TOKEN}, {"app": "a"}))
            message |= {**scope, "target": dice.choice(self._ids)}
        if issubclass(kind, r.Generation):
            self._together(message)
        return message

    def _together(self, message: dict[str, Any]) -> None:
        """Takes away what does not go with the rest, and bounds what it costs to answer."""
        grammars: list[str] = [n for n in ("json_schema", "regex", "grammar") if n in message]
        for grammar in grammars[1:]:
            del message[grammar]
        if "beam_width" in message:
            beams = ("v", "verb", "id", "session", "content", "messages", "prompt", "tokens")
            for name in set(message) - {*beams, "beam_width", "max_tokens"}:
                del message[name]
        else:
            for name in ("length_penalty", "early_stopping"):
                message.pop(name, None)
        if grammars:
            for name in ("ignore_eos", "min_tokens"):
                message.pop(name, None)
        if "best_of" in message:
            message.pop("n", None)
            message.pop("stream", None)
        message.setdefault("max_tokens", self._dice.randrange(1, 24))

    def _id(self) -> str:
        id = f"r{self._count}"
        if self._count % 16 == 0:
            self._ids = [*self._ids[-31:], id]
        return id

    def _value(self, name: str, annotation: Any) -> Any:
        """A valid value of a field."""
        dice = self._dice
        made = BY_NAME.get(name)
        return made(dice) if made is not None else of_type(annotation, dice)

    # --------------------------------------------------------------------------- changes of values

    def _field(self, fields: Mapping[str, Any]) -> str:
        names = list(fields)
        # What every message begins with is checked first: what is wrong with the rest is the point.
        deep = names[3:]
        return self._dice.choice(deep if deep and self._dice.random() < 0.8 else names or ["id"])

    def _odd(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, self._field(fields): self._dice.choice(_ODD)}

    def _edge(self, fields: dict[str, Any]) -> dict[str, Any]:
        names = [n for n, v in fields.items() if isinstance(v, (int, float)) and n != "v"]
        name = self._dice.choice(names) if names else self._field(fields)
        return {**fields, name: self._dice.choice(_EDGES)}

    def _drop(self, fields: dict[str, Any]) -> dict[str, Any]:
        gone = self._field(fields)
        return {name: value for name, value in fields.items() if name != gone}

    def _null(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, self._field(fields): None}

    def _extra(self, fields: dict[str, Any]) -> dict[str, Any]:
        name = self._dice.choice((*BY_NAME, "promt", "", "é", "__class__", "x" * 300, "v.v"))
        made = BY_NAME.get(name)
        return {**fields, name: made(self._dice) if made else 1}

    def _nested(self, fields: dict[str, Any]) -> dict[str, Any]:
        value: Any = self._dice.choice(_ODD)
        for _ in range(self._dice.choice((1, 2, 13, 14, 15, 16, 17, 200))):
            value = [value] if self._dice.random() < 0.5 else {"a": value}
        return {**fields, self._field(fields): value}

    def _large(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A text, binary or list at a limit or beyond it."""
        dice, limits = self._dice, self._limits
        # Now and then megabytes; most of the time what is large for the field alone.
        if dice.random() < 0.02:
            size = limits.string_bytes + dice.choice((-1, 0, 1))
        else:
            size = dice.choice((63, 64, 65, 255, 256, 257, 4096, 4097, 65_536, 65_537))
        kind = dice.randrange(4)
        value: Any = (
            b"\1\0\0\0" * (size // 4) + b"\0" * (size % 4),
            "é" * (size // 2),
            "x" * size,
        )[min(kind, 2)]
        if kind == 3:
            value = [dice.choice(_ODD)] * min(size, dice.choice((17, 65, 257, 4097, 16_385)))
        return {**fields, self._field(fields): value}

    def _many(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A map of many keys, of texts or of numbers."""
        dice = self._dice
        count = dice.choice((1, 64, 65, 1024, 1025, 4097))
        step = dice.choice((1, 2**31, 2**61 - 1))
        keys: list[Any] = [i * step % 2**64 for i in range(count)]
        if dice.random() < 0.5:
            keys = [str(key) for key in keys]
        value: dict[Any, Any] = dict.fromkeys(keys, dice.choice((0.5, 1, "x", None, [])))
        name = "logit_bias" if dice.random() < 0.5 else self._field(fields)
        return {**fields, name: value}

    def _verb(self, fields: dict[str, Any]) -> dict[str, Any]:
        verb = self._dice.choice((*self._verbs, "generat", "", "x" * 10_000, "session", "é"))
        return {**fields, "verb": verb}

    def _version(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "v": self._dice.choice((0, 2, -1, "1", 1.0, True, None, [1], 2**64 - 1))}

    def _stranger(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Names something that is not there, or is another's."""
        changed = {
            "session": self._dice.choice(("0", "999", "x" * 4097, "")),
            "model": self._dice.choice(("no-such", "/dev/zero", "/etc/passwd", "~", "a" * 4096)),
            "target": "not-mine",
            "token": bytes(16),
            "after": self._dice.choice((-1, 0, 5, 2**63 - 1)),
            "app": self._dice.choice(("b", "-", "a" * 64)),
        }
        there = [name for name in changed if name in fields] or ["session"]
        name = self._dice.choice(there)
        return {**fields, name: changed[name]}

    def _again(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Another request's id: a resend if all else is equal, and a twin if not."""
        return {**fields, "id": self._dice.choice(self._ids)}

    # ---------------------------------------------------------------------------- changes of bytes

    def _place(self, data: bytes) -> int:
        return self._dice.randrange(len(data))

    def _cut(self, data: bytes) -> tuple[bytes, ...]:
        return (data[: self._place(data)],)

    def _tail(self, data: bytes) -> tuple[bytes, ...]:
        return (data + self._dice.choice((b"\0", b"\xc1", data, self._last)),)

    def _flip(self, data: bytes) -> tuple[bytes, ...]:
        changed = bytearray(data)
        for _ in range(self._dice.choice((1, 1, 2, 8))):
            changed[self._place(data)] = self._dice.randrange(256)
        return (bytes(changed),)

    def _splice(self, data: bytes) -> tuple[bytes, ...]:
        return (data[: self._place(data)] + self._last[self._dice.randrange(len(self._last)) :],)

    def _lie(self, data: bytes) -> tuple[bytes, ...]:
        """A container or text that claims another size than it has."""
        code, size = self._dice.choice(
            (
                (0xDC, "H"),
                (0xDD, "I"),
                (0xDE, "H"),
                (0xDF, "I"),
                (0xDA, "H"),
                (0xDB, "I"),
                (0xC6, "I"),
            )
        )
        most = 2 ** (8 * struct.calcsize(size)) - 1
        claimed = self._dice.choice((0, 1, 15, 4096, 16_385, most // 2, most))
        head = bytes([code]) + struct.pack(f">{size}", min(claimed, most))
        return (self._with_entry(data, head),)

    def _ext(self, data: bytes) -> tuple[bytes, ...]:
        value = self._dice.choice(
            (
                msgpack.packb(msgpack.ExtType(self._dice.randrange(128), b"x" * 5)),
                msgpack.packb(msgpack.Timestamp(2**33, 1)),
                b"\xd4\xfe\x00",
                b"\xc9\xff\xff\xff\xff\x01",
                b"\xc1",
            )
        )
        return (self._with_entry(data, value),)

    def _twice(self, data: bytes) -> tuple[bytes, ...]:
        """The first key once more."""
        key = self._dice.choice(("v", "verb", "id", "max_tokens"))
        return (self._with_entry(data, msgpack.packb(1), msgpack.packb(key)),)

    def _keys(self, data: bytes) -> tuple[bytes, ...]:
        """A key that is no text."""
        key = self._dice.choice((1, -1, 1.5, None, True, b"id", math.nan, [1], {"a": 1}))
        return (self._with_entry(data, b"\x01", msgpack.packb(key)),)

    def _raw_text(self, data: bytes) -> tuple[bytes, ...]:
        """A text that is not UTF-8: stray bytes, a surrogate, an overlong zero, past the end."""
        raw = self._dice.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"))
        name = self._dice.choice(("prompt", "content", "text", "app", "zz"))
        value = bytes([0xA0 | len(raw)]) + raw
        return (self._with_entry(data, value, msgpack.packb(name)),)

    def _with_entry(self, data: bytes, value: bytes, key: bytes = b"\xa1a") -> bytes:
        """One entry more at the end of the message's map, counted in its head."""
        if 0x80 <= data[0] < 0x8F:
            return bytes([data[0] + 1]) + data[1:] + key + value
        (count,) = struct.unpack_from(">H", data, 1) if data[0] == 0xDE else (0,)
        return b"\xde" + struct.pack(">H", (count + 1) % 2**16) + data[3:] + key + value

    def _frames(self, data: bytes) -> tuple[bytes, ...]:
        count = self._dice.choice((0, 2, 2, 3, 100))
        return (data,) * count if count != 3 else (b"", data, b"")

    def _noise(self, data: bytes) -> tuple[bytes, ...]:
        return (self._dice.randbytes(self._dice.choice((1, 2, 20, len(data), 4096))),)

    def _oversize(self, data: bytes) -> tuple[bytes, ...]:
        """Around the limit of a frame, rarely: each takes megabytes."""
        if self._dice.random() > 0.005:
            return (b"",)
        return (data.ljust(self._limits.frame_bytes + self._dice.choice((-1, 0, 1)), b"\xc0"),)


def _packed(fields: Mapping[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(fields, use_bin_type=True, unicode_errors="surrogatepass")
    return packed
