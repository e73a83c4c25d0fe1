"""Where the time goes between a model's files and the first request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Part:
    """One part of loading a model."""

    name: str
    """A word: ``weights``, ``compile``, ``run``, ``graphs``, ``pool``."""
    seconds: float = 0.0
    count: int = 0
    """Of what it deals with: kernels, shapes, graphs, blocks; 0 where there is nothing to count."""


@dataclass(slots=True)
class LoadReport:
    """The parts in their order. Time between them is nobody's, and little."""

    clock: Callable[[], float] = time.monotonic
    parts: list[Part] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Time what happens within, and log it."""
        part = Part(name)
        begin = self.clock()
        yield part
        part.seconds = self.clock() - begin
        self.parts.append(part)
        log.info("%s: %.2f s (%d)", part.name, part.seconds, part.count)

    def counters(self) -> dict[str, int]:
        """For `Backend.counters`: ``start_NAME_ms``, and ``start_NAME`` where there is a count."""
        found: dict[str, int] = {}
        for part in self.parts:
            found[f"start_{part.name}_ms"] = round(1e3 * part.seconds)
            if part.count:
                found[f"start_{part.name}"] = part.count
        return found
