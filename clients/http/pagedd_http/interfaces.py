"""Whose interface a path belongs to: its routes, and the look of its errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.routing import Route

from pagedd_http.errors import ApiError


@dataclass(frozen=True, slots=True)
class Interface:
    """One of the interfaces that a gateway offers."""

    prefixes: tuple[str, ...]
    """Paths that begin so are its own, whether there is a route for them or not."""
    routes: Sequence[Route]
    error_body: Callable[[ApiError], Mapping[str, Any]]
    """The JSON document of an error, as clients of this interface read it."""


def owner(interfaces: Sequence[Interface], path: str) -> Interface:
    """Whose path it is: the longest prefix decides; the first has what nobody claims."""

    def claim(interface: Interface) -> int:
        return max((len(p) for p in interface.prefixes if path.startswith(p)), default=0)

    return max(interfaces, key=claim)
