"""Typed access to maps that somebody else wrote: ``config.json``, metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pagedd_daemon.models.errors import ModelFileError

LARGEST = 2**31 - 1
"""No size in a model's description is larger."""

SMALLEST = 1e-30
"""No factor is smaller, or larger than its inverse, so that no power of one is out of range."""

MOST_LAYERS = 4096
"""The deepest models in use have 126."""


class Fields:
    """A map whose every value is checked when it is read; `null` and absent are the same."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        """Fields of a file.

        Args:
            path: The file, for complaints.
            values: The map.
            prefix: Where in the file the map is, for complaints; with a dot at its end.
        """
        self.path = path
        self.values = values
        self.prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """The same, with values for what is absent; an explicit `null` stays one."""
        return Fields(self.path, {**defaults, **self.values}, self.prefix)

    def integer(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST
    ) -> int:
        """A whole number from ``least`` to ``most``; required without a default."""
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(f"has {self.prefix}{name} = {_shown(value)}", name)
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0, within `SMALLEST` and its inverse; required without a default."""
        value = self._value(name, default)
        if not _is_positive(value):
            self.refuse(f"has {self.prefix}{name} = {_shown(value)}", name)
        return float(value)

    def optional_positive(self, name: str) -> float | None:
        """See `positive`; None if it is not there."""
        return self.positive(name) if name in self else None

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.refuse(f"has {self.prefix}{name} = {_shown(value)}", name)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A text; required without a default."""
        value = self._value(name, default)
        if not isinstance(value, str):
            self.refuse(f"has {self.prefix}{name} = {_shown(value)}", name)
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """So many numbers as `positive` takes them."""
        value = self._value(name, None)
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or not all(map(_is_positive, value))
        ):
            self.refuse(f"has no {count} positive numbers as {self.prefix}{name}", name)
        return tuple(float(v) for v in value)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """Texts, if they are there."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.refuse(f"has no list of texts as {self.prefix}{name}", name)
        return tuple(value)

    def ids(self, name: str) -> frozenset[int]:
        """Token ids: none, one, or a list of them."""
        value = self.values.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int and 0 <= v <= LARGEST for v in listed):
            self.refuse(f"has {self.prefix}{name} = {_shown(value)}", name)
        return frozenset(listed)

    def map(self, name: str) -> Fields:
        """A map within; empty if it is not there."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            self.refuse(f"has {self.prefix}{name} = {_shown(value)}", name)
        return Fields(self.path, value, f"{self.prefix}{name}.")

    def refuse(self, reason: str, name: str | None = None) -> NoReturn:
        """Complain of the file, and of a field of it."""
        details = {} if name is None else {"field": f"{self.prefix}{name}"}
        raise ModelFileError(self.path, reason, details)

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                self.refuse(f"does not say {self.prefix}{name}", name)
            return default
        return value


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and SMALLEST <= value <= 1 / SMALLEST


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
