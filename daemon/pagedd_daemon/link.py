"""Length-prefixed msgpack over an inherited socketpair: how front, engine and helpers talk.

A frame is a little-endian uint32 length and that many bytes of msgpack. Both ends are processes of
one installation, started by the front, so the limit guards against a defect and not an attacker.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import msgpack

from pagedd_daemon import messages as m

MAX_FRAME_BYTES = 256 * 2**20
"""A prompt of a million tokens is 4 MiB, a vocabulary's byte pieces 5 MiB."""

_LENGTH = struct.Struct("<I")


class LinkError(Exception):
    """The other end sent something that is no frame of ours."""


def frame(body: bytes) -> bytes:
    """``body`` with its length in front."""
    if len(body) > MAX_FRAME_BYTES:
        raise LinkError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Every body that ``data`` completes, in order."""
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > MAX_FRAME_BYTES:
                raise LinkError(f"a frame of {length} bytes is over the limit")
            end = at + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[at + _LENGTH.size : end])
            at = end
        if at:
            del self._buffer[:at]


def _values(message: object) -> list[Any]:
    """A dataclass as the list of its field values (nested ones go through ``default`` again)."""
    if not is_dataclass(message):
        raise TypeError(f"{type(message).__name__} does not travel over the link")
    return [getattr(message, name) for name in _FIELDS[type(message)]]


_TOP_LEVEL: tuple[type[Any], ...] = (
    m.Configure,
    m.App,
    m.Submit,
    m.Embed,
    m.Cancel,
    m.Finish,
    m.Pause,
    m.Unpause,
    m.Drop,
    m.AskSnapshot,
    m.Shutdown,
    m.Loading,
    m.Ready,
    m.Failed,
    m.StepReport,
    m.Snapshot,
)
_FIELDS = {
    kind: tuple(f.name for f in fields(kind))
    for kind in (*_TOP_LEVEL, m.Output, m.Ended, m.Closed, m.Rejected, m.PromptScores, m.Embedded)
}


def _step_report(values: list[Any]) -> m.StepReport:
    steps, outputs, ended, closed, rejected, started, prompts, embedded = values
    return m.StepReport(
        steps,
        [m.Output(*o) for o in outputs],
        [m.Ended(*e) for e in ended],
        [m.Closed(*c) for c in closed],
        [m.Rejected(*r) for r in rejected],
        [(rid, cached) for rid, cached in started],
        [m.PromptScores(*p) for p in prompts],
        [m.Embedded(*e) for e in embedded],
    )


_KINDS = {kind.__name__: kind for kind in _TOP_LEVEL}


def pack(message: m.ToEngine | m.ToFront) -> bytes:
    """One message as a frame, ready to be written."""
    if isinstance(message, m.StepReport) and not message.rejected:
        return frame(_pack_step(message))
    return frame(msgpack.packb([type(message).__name__, *_values(message)], default=_values))


def _pack_step(report: m.StepReport) -> bytes:
    """The message of every step, without a call for each part of it: half the time."""
    packed: bytes = msgpack.packb(
        [
            "StepReport",
            report.steps,
            [(o.rid, o.index, o.tokens, o.logprobs) for o in report.outputs],
            [(e.rid, e.index, e.reason, e.score) for e in report.ended],
            [_values(c) for c in report.closed],
            [],
            report.started,
            [_values(p) for p in report.prompts],
            [_values(e) for e in report.embedded],
        ]
    )
    return packed


def values(body: bytes) -> list[Any]:
    """What was packed as a list by this process or another of this daemon.

    Raises:
        LinkError: It is no list.
    """
    try:
        read = msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise LinkError(f"not msgpack: {error!r}") from error
    if not isinstance(read, list):
        raise LinkError(f"a {type(read).__name__} where a list belongs")
    return read


def unpack(body: bytes) -> m.ToEngine | m.ToFront:
    """The message in a frame's body.

    Raises:
        LinkError: It is none of ours.
    """
    try:
        name, *fields_ = values(body)
        if name == "StepReport":
            return _step_report(fields_)
        message: m.ToEngine | m.ToFront = _KINDS[name](*fields_)
    except (KeyError, TypeError, ValueError) as error:
        raise LinkError(f"not a message of this version: {error!r}") from error
    return message
