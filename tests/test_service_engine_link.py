"""The link to an engine process: nothing blocks, nothing is lost, and nobody outlives the front."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from pagedd_daemon import messages as m
from pagedd_daemon.front.engine_link import Channel, Engine, EngineProcess, Message
from tests.support.front import run

ECHO = """
import socket, sys
from pagedd_daemon.link import FrameReader, pack, unpack
from pagedd_daemon.messages import Shutdown, Snapshot
link = socket.socket(fileno=int(sys.argv[-1]))
frames = FrameReader()
while data := link.recv(65536):
    for body in frames.feed(data):
        message = unpack(body)
        if isinstance(message, Shutdown):
            sys.exit(0)
        link.sendall(pack(Snapshot({"heard": type(message).__name__})))
"""
DEAF = "import time; time.sleep(600)"
FAULTY = """
import socket, sys
socket.socket(fileno=int(sys.argv[-1])).sendall(b"\\x01\\x00\\x00\\x00\\xc1")
import time; time.sleep(600)
"""


class Listener:
    def __init__(self) -> None:
        self.said: asyncio.Queue[Message] = asyncio.Queue()
        self.gone: asyncio.Queue[int] = asyncio.Queue()

    def engine_said(self, engine: Engine, message: Message) -> None:
        self.said.put_nowait(message)

    def engine_gone(self, engine: Engine, status: int) -> None:
        self.gone.put_nowait(status)


def with_engine(script: str, scenario: Callable[[EngineProcess, Listener], object]) -> None:
    async def body() -> None:
        listener = Listener()
        engine = await EngineProcess.spawn(listener, ("-c", script))
        try:
            await scenario(engine, listener)  # type: ignore[misc]
        finally:
            await engine.stop(0.1)

    run(body())


def test_messages_go_to_the_process_and_come_back() -> None:
    async def scenario(engine: EngineProcess, listener: Listener) -> None:
        engine.send(m.AskSnapshot())
        assert await listener.said.get() == m.Snapshot({"heard": "AskSnapshot"})
        assert await engine.stop(20) == 0
        assert listener.gone.empty()

    with_engine(ECHO, scenario)


def test_a_process_that_dies_is_reported_once_with_its_status() -> None:
    async def scenario(engine: EngineProcess, listener: Listener) -> None:
        assert await listener.gone.get() == 3
        engine.send(m.AskSnapshot())  # to nobody

    with_engine("import sys; sys.exit(3)", scenario)


def test_a_process_that_does_not_stop_is_killed() -> None:
    async def scenario(engine: EngineProcess, listener: Listener) -> None:
        assert await engine.stop(0.05) == -9

    with_engine(DEAF, scenario)


def test_a_process_that_talks_nonsense_is_ended() -> None:
    async def scenario(engine: EngineProcess, listener: Listener) -> None:
        assert await listener.gone.get() == -9

    with_engine(FAULTY, scenario)


def test_what_a_full_pipe_does_not_take_is_sent_in_order_when_it_does() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        heard: asyncio.Queue[Message] = asyncio.Queue()
        ended = asyncio.Event()
        front = Channel(ours, lambda _: None, lambda: None)
        submits = [
            m.Submit(rid, "app", 1, bytes(32), bytes(4) * 300_000, 1, {}, {}) for rid in range(4)
        ]
        for submit in submits:
            front.send(submit)  # nobody reads yet: returns all the same
        engine = Channel(theirs, heard.put_nowait, ended.set)
        for submit in submits:
            assert await heard.get() == submit
        front.close()
        await ended.wait()
        engine.close()

    run(scenario())
