"""The one place where bytes of a client become a request, and events become bytes.

`decode` turns frames into a map of plain values, once `pagedd_daemon.front.survey` has found them
to be within the limits; `parse_data` and `parse_control` turn the map into a model of
`pagedd_daemon.front.requests`. Whatever is wrong is a `WireError` that carries the request's id
wherever one could be read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import msgpack
from pydantic import ValidationError

from pagedd_daemon.front import requests as r
from pagedd_daemon.front.errors import WireError, limit_error
from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits
from pagedd_daemon.front.survey import container, is_map, malformed, survey, walk

VERSION = 1

DATA_VERBS: Mapping[str, type[r.Request]] = {
    kind.verb: kind
    for kind in (
        r.Hello,
        r.Generate,
        r.Chat,
        r.SessionOpen,
        r.SessionSay,
        r.SessionFork,
        r.SessionCommit,
        r.SessionPin,
        r.SessionClose,
        r.Embed,
        r.Tokenize,
        r.Detokenize,
        r.Render,
        r.Models,
        r.Load,
        r.Unload,
        r.Bye,
    )
}
CONTROL_VERBS: Mapping[str, type[r.Request]] = {
    kind.verb: kind
    for kind in (
        *(r.Cancel, r.Status, r.Stats, r.Ping, r.Metrics),
        *(r.AppsList, r.AppsShow, r.AppsSet),
        *(r.CacheShow, r.CacheClear),
        r.Reload,
        r.Shutdown,
    )
}


def salvaged_id(data: bytes, limits: Limits) -> str:
    """The id in a message that is not decoded; ``""`` unless it stands before what is wrong."""
    try:
        first = data[0]
        if not is_map(first):
            return ""
        pos, values = container(data, 0, first, limits)
        for _ in range(values // 2):
            if data[pos : pos + 3] == b"\xa2id":
                end = walk(data, pos + 3, 1, limits, depth=1)
                return valid_id(_unpacked(data[pos + 3 : end], _Builder(limits)), limits)
            pos = walk(data, pos, 2, limits, depth=1)
    except (IndexError, WireError):
        pass
    return ""


# ------------------------------------------------------------------------------------------ decode


class _IntKeys(dict[int, Any]):
    """A map with integer keys: only ``logit_bias`` may be one."""


class _Builder:
    """msgpack's hook for maps: refuses duplicate keys, and keys that are not strings."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.int_maps = 0

    def map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        if all(type(key) is str for key, _ in pairs):
            made: dict[Any, Any] = dict(pairs)
        elif all(type(key) is int for key, _ in pairs):
            # Integers hash to themselves, so keys can be made to collide: few keep that harmless.
            if len(pairs) > self.limits.logit_bias:
                raise limit_error("logit_bias", len(pairs), self.limits.logit_bias)
            made = _IntKeys(pairs)
            self.int_maps += 1
        else:
            raise malformed("a map has keys that are not strings")
        if len(made) != len(pairs):
            raise malformed("a map has the same key twice")
        return made


def decode(frames: Sequence[bytes], limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """One message as a map with string keys.

    Args:
        frames: The message without its routing frame.
        limits: What it may take at most.

    Raises:
        WireError: ``E_MALFORMED`` or ``E_LIMIT``, with the request's id if that could be read.
    """
    if not 1 <= len(frames) <= limits.frames:
        raise malformed(
            f"a message is {limits.frames} frame, this one has {len(frames)}",
            limit="frames",
            value=len(frames),
            max=limits.frames,
        )
    data = frames[0]
    if len(data) > limits.frame_bytes:
        raise limit_error("frame_bytes", len(data), limits.frame_bytes)
    try:
        return _decode(data, limits)
    except WireError as error:
        error.id = salvaged_id(data, limits)
        raise


def _decode(data: bytes, limits: Limits) -> dict[str, Any]:
    survey(data, limits)
    build = _Builder(limits)
    message = _unpacked(data, build)
    if build.int_maps != isinstance(message.get("logit_bias"), _IntKeys) or isinstance(
        message, _IntKeys
    ):
        raise malformed("a map has keys that are not strings")
    return dict(message)


def _unpacked(data: bytes, build: _Builder) -> Any:
    """The value in bytes that were surveyed."""
    limits = build.limits
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            # Integer keys are checked by `_Builder.map`.
            strict_map_key=False,
            object_pairs_hook=build.map,
            ext_hook=_no_extension,
            max_str_len=limits.string_bytes,
            max_bin_len=limits.binary_bytes,
            max_array_len=limits.list_entries,
            max_map_len=limits.map_entries,
            max_ext_len=0,
        )
    except UnicodeDecodeError as error:
        raise malformed("a string is not UTF-8") from error
    # What msgpack raises has no common base: ValueError (ExtraData, FormatError, StackError,
    # lengths), UnpackException (OutOfData, BufferFull), TypeError, OverflowError, RecursionError.
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        msgpack.UnpackException,
    ) as error:
        raise malformed(f"not msgpack of this protocol ({type(error).__name__})") from error


def _no_extension(code: int, data: bytes) -> NoReturn:
    raise malformed("extension types are not part of the protocol")


# ------------------------------------------------------------------------------------------- parse

_PRINTABLE_ID = re.compile(r"[ -~]+")


def valid_id(value: object, limits: Limits = DEFAULT_LIMITS) -> str:
    """``value`` if it is a request id, else ``""``."""
    if isinstance(value, str) and len(value) <= limits.id_chars and _PRINTABLE_ID.fullmatch(value):
        return value
    return ""


def parse_data(
    message: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS
) -> r.Hello | r.Bye | r.DataRequest:
    """A decoded message of the data socket as a request.

    Raises:
        WireError: ``E_VERSION``, ``E_VERB``, ``E_FIELD`` or ``E_LIMIT``, with the request's id.
    """
    made: Any = _parse(message, DATA_VERBS, CONTROL_VERBS, "control.sock", limits)
    return made  # type: ignore[no-any-return]


def parse_control(message: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS) -> r.ControlRequest:
    """A decoded message of the control socket as a request.

    Raises:
        WireError: As `parse_data`.
    """
    made: Any = _parse(message, CONTROL_VERBS, DATA_VERBS, "pagedd.sock", limits)
    return made  # type: ignore[no-any-return]


def _parse(
    message: Mapping[str, Any],
    verbs: Mapping[str, type[r.Request]],
    elsewhere: Mapping[str, type[r.Request]],
    other_socket: str,
    limits: Limits,
) -> r.Request:
    try:
        version = message.get("v")
        if type(version) is not int or version != VERSION:
            raise WireError(
                "E_VERSION",
                f"this daemon speaks version {VERSION} of the protocol",
                details={"supported": [VERSION]},
            )
        kind = _kind(message.get("verb"), verbs, elsewhere, other_socket)
        # A field that is null counts as left out.
        values = {
            name: value
            for name, value in message.items()
            if value is not None and name != "v" and name != "verb"
        }
        try:
            return kind.model_validate(values, context={"limits": limits})
        except ValidationError as error:
            raise _translated(error, kind) from None
    except WireError as error:
        error.id = valid_id(message.get("id"), limits)
        raise


def _kind(
    verb: object,
    verbs: Mapping[str, type[r.Request]],
    elsewhere: Mapping[str, type[r.Request]],
    other_socket: str,
) -> type[r.Request]:
    if not isinstance(verb, str):
        raise WireError(
            "E_FIELD", "verb: must be a string", details={"field": "verb", "reason": "string_type"}
        )
    kind = verbs.get(verb)
    if kind is not None:
        return kind
    if verb in elsewhere:
        raise WireError(
            "E_VERB",
            f"{verb} belongs on {other_socket}",
            details={"nearest": verb, "socket": other_socket},
        )
    # Bounded, so that a megabyte sent as a verb is neither compared nor sent back.
    shown = verb[:32]
    nearest = next(iter(difflib.get_close_matches(shown, list(verbs), n=1)), None)
    hint = f"; did you mean {nearest}?" if nearest else ""
    raise WireError("E_VERB", f"unknown verb {shown!r}{hint}", details={"nearest": nearest})


def _translated(error: ValidationError, kind: type[r.Request]) -> WireError:
    """The first complaint of pydantic as ours: never with the text that was refused."""
    first = error.errors(include_url=False, include_input=False)[0]
    context = first.get("ctx", {})
    path = ".".join(str(part)[:64] for part in first["loc"]) or str(context.get("field", ""))
    path = path[:200]
    if first["type"] == "limit":
        made = limit_error(context["limit"], context["value"], context["max"], field=path)
        made.message = f"{path}: {made.message}"
        return made
    reason = first["msg"][:200]
    details: dict[str, Any] = {"field": path, "reason": first["type"], **context.get("figures", {})}
    if first["type"] == "extra_forbidden":
        nearest = next(iter(difflib.get_close_matches(path, list(kind.model_fields), n=1)), None)
        reason = f"{kind.verb} has no such field"
        if nearest:
            reason += f"; did you mean {nearest}?"
            details["nearest"] = nearest
    return WireError("E_FIELD", f"{path}: {reason}", details=details)


# ------------------------------------------------------------------------------------------ encode

_packer = msgpack.Packer(use_bin_type=True)
_HEAD = msgpack.packb({"v": VERSION})[1:] + msgpack.packb("ev")


def pack_event(event: Mapping[str, Any]) -> bytes:
    """One event, to be joined with others into a message."""
    packed: bytes = _packer.pack(event)
    return packed


def join_events(packed: Sequence[bytes]) -> bytes:
    """The message ``{"v": 1, "ev": [...]}`` of events that are packed already."""
    header: bytes = _packer.pack_array_header(len(packed))
    return b"".join((b"\x82", _HEAD, header, *packed))


def encode(events: Iterable[Mapping[str, Any]]) -> bytes:
    """The message ``{"v": 1, "ev": [...]}``."""
    return join_events([pack_event(event) for event in events])
