"""Grammars without their thread: compiled at once, and once for all worlds."""

from __future__ import annotations

from concurrent.futures import Future

from pagedd_daemon.engine.grammar import Grammars, Matcher
from pagedd_daemon.engine.work import Request
from tests.support.simulated import grammars_for, simulated

_ALL = grammars_for(simulated(blocks=2, ram_pages=0, verify=False))


def matcher(regex: str) -> Matcher:
    """Where a text stands that has not begun."""
    return _ALL._compile("regex", regex)


class SimGrammars(Grammars):
    """Those of one engine."""

    def add(self, request: Request, kind: str, text: str) -> None:
        """See `Grammars`."""
        made: Future[Matcher] = Future()
        made.set_result(_ALL._compile(kind, text))
        self._waiting.append((request, made))
