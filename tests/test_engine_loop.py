"""The engine's loop checks the pager's books when nobody is served."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from kvpager import InvariantError
from pagedd_daemon import messages as m
from pagedd_daemon.backends.simulated import SimulatedBackend
from pagedd_daemon.engine import loop
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.link import pack
from tests.test_engine_core import sampling, stopping
from tests.test_engine_process import CONFIGURE


class Watched(Engine):
    """An engine that tells when it is checked."""

    def __init__(self, verdict: InvariantError | None = None) -> None:
        super().__init__(SimulatedBackend.from_configure(CONFIGURE), clock=lambda: 0.0)
        self.checked = threading.Event()
        self.checks = 0
        self._verdict = verdict

    def validate(self) -> None:
        super().validate()
        self.checks += 1
        self.checked.set()
        if self._verdict is not None:
            raise self._verdict


def request(rid: int) -> m.Submit:
    prompt = np.arange(40, dtype="<i4").tobytes()
    return m.Submit(rid, "app", 1, bytes(32), prompt, 1, sampling(), stopping(max_tokens=3))


def test_the_books_are_checked_once_after_work_and_not_while_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "CHECK_AFTER_S", 0.01)
    ours, theirs = socket.socketpair()
    engine = Watched()
    with ours, theirs:
        thread = threading.Thread(
            target=loop.run, args=(engine, loop.FrontLink(theirs), [request(1)])
        )
        thread.start()
        assert engine.checked.wait(30)
        engine.checked.clear()
        ours.sendall(pack(m.AskSnapshot()))  # looking is no work
        ours.sendall(pack(request(2)))
        assert engine.checked.wait(30)
        ours.sendall(pack(m.Shutdown()))
        thread.join(30)
    assert engine.checks == 2


def test_an_engine_whose_books_are_wrong_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECK_AFTER_S", 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(InvariantError, match="block 3"):
        loop.run(
            Watched(InvariantError("block 3 is held by nobody")),
            loop.FrontLink(theirs),
            [request(1)],
        )
