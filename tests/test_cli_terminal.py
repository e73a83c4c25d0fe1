"""The interactive conversation on a real (pseudo) terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.daemon import RunningDaemon, running_daemon

PATIENCE_S = 30


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    # Slow enough that a person could interrupt a reply.
    with running_daemon(model="simulated", simulated_step_us=5000, context=2048) as running:
        yield running


class Terminal:
    """A command on a terminal of its own, which also controls it, so that Ctrl-C works."""

    def __init__(self, daemon: RunningDaemon, *arguments: str) -> None:
        self.seen = ""
        self._ours, theirs = pty.openpty()
        # `setsid --ctty` is what a terminal emulator does for its shell. SIGINT may be ignored
        # here, where the tests run in the background.
        self.process = subprocess.Popen(
            [
                *("setsid", "--ctty", "--wait", "env", "--default-signal=INT"),
                *(sys.executable, "-m", "pagedd", *arguments),
            ],
            env=daemon.env | {"TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def expect(self, pattern: str) -> str:
        """Read until the pattern has come; what came before it. A hang ends with pytest's own."""
        while (found := re.search(pattern, self.seen)) is None:
            self.seen += os.read(self._ours, 4096).decode(errors="replace")
        before, self.seen = self.seen[: found.start()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        """What a person types; ``\\x03`` is Ctrl-C, ``\\x04`` Ctrl-D."""
        os.write(self._ours, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._ours)


@pytest.mark.timeout(60)
def test_ctrl_c_stops_the_reply_and_ctrl_d_the_conversation(daemon: RunningDaemon) -> None:
    terminal = Terminal(daemon, "chat", "--max-tokens", "5000", "--ignore-eos", "--seed", "1")
    terminal.expect(">>> ")
    terminal.type("hello\r")
    terminal.expect("hello\r\n")
    terminal.expect(r"\S{3}")
    terminal.type("\x03")
    terminal.expect(">>> ")
    terminal.type("\x04")
    assert terminal.close() == 0
    with daemon.control() as control:
        assert control.status()["requests"]["running"] == 0


@pytest.mark.timeout(60)
def test_ctrl_c_while_it_runs_exits_130_and_cancels(daemon: RunningDaemon) -> None:
    terminal = Terminal(daemon, "run", "hello", "--max-tokens", "5000", "--ignore-eos")
    terminal.expect(r"\S{3}")
    terminal.type("\x03")
    assert terminal.close() == 130
    with daemon.control() as control:
        assert control.status()["requests"]["running"] == 0


@pytest.mark.timeout(60)
def test_an_error_in_a_conversation_does_not_end_it(daemon: RunningDaemon) -> None:
    terminal = Terminal(daemon, "chat", "--max-tokens", "3")
    terminal.expect(">>> ")
    terminal.type("x" * 3000 + "\r")
    assert "pagedd: " in terminal.expect(">>> ")
    terminal.type("hello\r")
    assert "pagedd: " not in terminal.expect(">>> ")
    terminal.type("\x04")
    assert terminal.close() == 0
