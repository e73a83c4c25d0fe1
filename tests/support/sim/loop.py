"""An event loop whose time passes only when nobody has anything to do."""

from __future__ import annotations

import asyncio
import selectors
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn


class StandstillError(Exception):
    """Nobody is ready, no timer runs, and yet somebody waits: that would be for ever."""


class _Waiting(selectors.BaseSelector):
    """Waits by moving the loop's clock. The loop's own pipe is registered, and never readable."""

    def __init__(self) -> None:
        self.now = 0.0
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[number] = selectors.SelectorKey(fileobj, number, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StandstillError("nobody can go on")
        self.now += max(0.0, timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs tasks and timers in an order that depends on nothing but the program.

    Raises:
        StandstillError: From ``run_until_complete``, where nothing can ever happen again.
    """

    def __init__(self) -> None:
        self._waiting = _Waiting()
        super().__init__(self._waiting)
        # Two timers a rounding error apart are due at the same time.
        self._clock_resolution = 1e-9
        self.failures: list[str] = []
        """What nobody caught; the first one stops the loop."""
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        """Simulated seconds."""
        return self._waiting.now

    def run_in_executor(self, *_: Any) -> NoReturn:  # type: ignore[override]
        """There are no threads here: their order would not be the seed's."""
        raise AssertionError("the simulation has no threads")

    def _failed(self, _: object, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        self.failures.append(f"{context['message']}: {error!r}")
        if error is not None and error.__traceback__ is not None:
            self.failures += traceback.format_tb(error.__traceback__)[-2:]
        self.stop()
