"""A look at bytes before anything is built from them.

msgpack's own limits are per container, so 16 MiB of empty maps become 1.2 GB, and 500 nested array
headers of 3 bytes each reserve 250 MB before the first value is read. So the bytes are walked once:
60 ns a value, 250 ns a container, and the walk stops at the budget of `total_nodes`, so the worst
message costs about 10 ms. Prompts and token ids are one value each.
"""

from __future__ import annotations

from typing import Any

from pagedd_daemon.front.errors import WireError, limit_error
from pagedd_daemon.front.limits import Limits

_WIDTH = bytearray(256)
"""First byte of a value -> its width where that byte alone tells it, else 0."""
_WIDTH[0x00:0x80] = b"\x01" * 0x80
_WIDTH[0xE0:0x100] = b"\x01" * 0x20
_WIDTH[0xA0:0xC0] = bytes(range(1, 33))
_WIDTH[0x80] = _WIDTH[0x90] = 1
for _code, _width in (
    *((code, 1) for code in (0xC0, 0xC2, 0xC3)),
    *((0xCA, 5), (0xCB, 9)),
    *((0xCC, 2), (0xCD, 3), (0xCE, 5), (0xCF, 9), (0xD0, 2), (0xD1, 3), (0xD2, 5), (0xD3, 9)),
):
    _WIDTH[_code] = _width

_LENGTH_BYTES = {
    code: 1 << (index % 3 if code < 0xDC else 1 + index % 2)
    for codes in ((0xC4, 0xC5, 0xC6), (0xD9, 0xDA, 0xDB), (0xDC, 0xDD), (0xDE, 0xDF))
    for index, code in enumerate(codes)
}
"""First byte of a binary, string, list or map -> how many bytes its length takes."""


def malformed(message: str, **details: Any) -> WireError:
    """The error of bytes that are no message."""
    return WireError("E_MALFORMED", message, details=details)


def container(data: bytes, pos: int, code: int, limits: Limits) -> tuple[int, int]:
    """The string, binary, list or map at ``pos``: where its content starts, and the values in it.

    A string or binary is skipped whole and has no values.
    """
    if code < 0xA0:
        size, pos = code & 0x0F, pos + 1
    else:
        width = _LENGTH_BYTES.get(code)
        if width is None:
            raise malformed("extension types and reserved bytes are not part of the protocol")
        size = int.from_bytes(data[pos + 1 : pos + 1 + width], "big")
        pos += 1 + width
    if 0xC4 <= code <= 0xC6:
        name, end, values = "binary_bytes", pos + size, 0
    elif 0xD9 <= code <= 0xDB:
        name, end, values = "string_bytes", pos + size, 0
    elif code in (0xDC, 0xDD) or 0x90 <= code <= 0x9F:
        name, end, values = "list_entries", pos, size
    else:
        name, end, values = "map_entries", pos, 2 * size
    at_most = getattr(limits, name)
    if size > at_most:
        raise limit_error(name, size, at_most)
    return end, values


def is_map(code: int) -> bool:
    """Whether the value that begins with this byte is a map."""
    return 0x80 <= code <= 0x8F or code in (0xDE, 0xDF)


def walk(data: bytes, pos: int, count: int, limits: Limits, depth: int = 0) -> int:
    """Steps over ``count`` values from ``pos`` without building any; where the next one starts.

    Raises:
        WireError: A limit is passed, or this is not msgpack of this protocol.
        IndexError: The bytes end before the values do.
    """
    width_of = _WIDTH
    open_containers: list[int] = []
    budget = limits.total_nodes - count
    left = count
    while True:
        while left:
            left -= 1
            code = data[pos]
            width = width_of[code]
            if width:
                pos += width
                continue
            start, values = container(data, pos, code, limits)
            is_container = 0x80 <= code <= 0x9F or code >= 0xDC
            if is_container and depth + len(open_containers) >= limits.depth:
                raise malformed(
                    "maps and lists are nested too deep", limit="depth", max=limits.depth
                )
            pos = start
            if is_container:
                # Declared values count at once: a header cannot promise more than the budget.
                budget -= values
                if budget < 0:
                    raise limit_error(
                        "total_nodes", limits.total_nodes - budget, limits.total_nodes
                    )
                open_containers.append(left)
                left = values
        if not open_containers:
            return pos
        left = open_containers.pop()


def survey(data: bytes, limits: Limits) -> None:
    """Refuses what would grow beyond the limits, and what is not one whole map.

    Raises:
        WireError: ``E_MALFORMED`` or ``E_LIMIT``.
    """
    if not data:
        raise malformed("the frame is empty")
    if not is_map(data[0]):
        raise malformed("a message is one map")
    try:
        end = walk(data, 0, 1, limits)
    except IndexError:
        end = len(data) + 1
    if end > len(data):
        raise malformed("the message is truncated")
    if end < len(data):
        raise malformed(f"{len(data) - end} bytes follow the message")
