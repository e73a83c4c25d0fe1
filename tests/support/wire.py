"""Messages as they are packed, and what is made of them."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from pagedd_daemon.front import wire
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits

GENERATE: dict[str, Any] = {"v": 1, "verb": "generate", "id": "a", "prompt": "p"}


def parse(message: dict[Any, Any], limits: Limits = DEFAULT_LIMITS) -> Any:
    """The request in a message of the data socket."""
    return wire.parse_data(wire.decode([msgpack.packb(message)], limits), limits)


def refused(message: dict[Any, Any] | bytes, limits: Limits = DEFAULT_LIMITS) -> WireError:
    """Why a message is refused."""
    data = message if isinstance(message, bytes) else msgpack.packb(message)
    with pytest.raises(WireError) as caught:
        wire.parse_data(wire.decode([data], limits), limits)
    return caught.value
