"""How a field of a request is refused: what pydantic raises, for `wire` to translate."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError

from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits


def over_limit(name: str, value: int, at_most: int) -> PydanticCustomError:
    """Becomes ``E_LIMIT`` where the error is translated."""
    return PydanticCustomError(
        "limit",
        "is over the limit {limit} of {max}",
        {"limit": name, "value": value, "max": at_most},
    )


def wrong(reason: str, field: str = "", **figures: Any) -> PydanticCustomError:
    """Becomes ``E_FIELD``. ``reason`` must not hold a text that the client sent.

    ``field`` is named by those who check a whole model; pydantic knows the others. ``figures`` are
    added to the error's details.
    """
    context = {"reason": reason, "field": field, "figures": figures}
    return PydanticCustomError("field", "{reason}", context)


def limits_of(info: ValidationInfo) -> Limits:
    """The limits that hold for a message."""
    limits = (info.context or {}).get("limits", DEFAULT_LIMITS)
    assert isinstance(limits, Limits)
    return limits


def at_most(name: str, value: int, info: ValidationInfo) -> None:
    """Refuse a value over the limit called ``name``."""
    most: int = getattr(limits_of(info), name)
    if value > most:
        raise over_limit(name, value, most)
