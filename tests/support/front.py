"""The front's service between a scripted engine and a transport that only remembers.

Messages to and from the engine go through a real socketpair; time is the test's.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import socket
from array import array
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pagedd_daemon import messages as m
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.detokenizer import PieceTable, pack_ids
from pagedd_daemon.front.engine_link import Channel, EngineListener, Message
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.identity import UNKNOWN, Program
from pagedd_daemon.front.limits import DEFAULT_LIMITS, Limits
from pagedd_daemon.front.model_ports import Conversation, Entry, Rendered, Text
from pagedd_daemon.front.ports import Connection, Event
from pagedd_daemon.front.service import FrontService

T = TypeVar("T")
PATIENCE_S = 20.0
BYTES = PieceTable([1] * 256 + [0] * 2, bytes(range(256)))
"""A vocabulary in which a text's ids are its bytes."""


def run(scenario: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(scenario, PATIENCE_S))


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._count = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], object]) -> FakeTimer:
        timer = FakeTimer(callback)
        heapq.heappush(self._timers, (self.now + delay, next(self._count), timer))
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                timer.callback()
        self.now = end

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._timers)


@dataclass(eq=False)
class FakeTimer:
    callback: Callable[[], object]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class Transport:
    """Keeps every event; a test waits for the one it wants."""

    def __init__(self) -> None:
        self.events: dict[Connection, list[Event]] = {}
        self.backlog = 0
        self._changed = asyncio.Event()

    def send(self, connection: Connection, event: Event) -> None:
        self.events.setdefault(connection, []).append(event)
        self._changed.set()

    def flush(self) -> None:
        pass

    def backlog_bytes(self, connection: Connection) -> int:
        return self.backlog

    def of(self, connection: Connection, request_id: str) -> list[Event]:
        return [e for e in self.events.get(connection, []) if e["id"] == request_id]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


class FakeEngine:
    """Both ends of an engine's link: the one the service holds, and the script's."""

    def __init__(self, listener: EngineListener, pid: int) -> None:
        ours, theirs = socket.socketpair()
        self.pid = pid
        self.status = 0
        self._stopped = asyncio.Event()
        self.heard: list[Message] = []
        self.figures: dict[str, Any] | None = {}
        """What it answers `AskSnapshot` with; None: nothing."""
        self._taken = 0
        self._changed = asyncio.Event()
        self._listener = listener
        self._front = Channel(ours, lambda said: listener.engine_said(self, said), self._eof)
        self._script = Channel(theirs, self._hear, lambda: None)

    def send(self, message: m.ToEngine) -> None:
        self._front.send(message)

    async def stop(self, grace_s: float) -> int:
        self._stopped.set()
        self._front.close()
        self._script.close()
        return 0

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    async def ended(self) -> None:
        await self._stopped.wait()

    def kill(self) -> None:
        self.die(-9)

    def die(self, status: int = -9) -> None:
        self.status = status
        self._script.close()

    def say(self, message: m.ToFront) -> None:
        self._script.send(message)

    async def hears(self, kind: type[T], where: Callable[[T], bool] = lambda _: True) -> T:
        """The next message of that kind that was not taken yet; others before it are skipped."""
        while True:
            for at in range(self._taken, len(self.heard)):
                message = self.heard[at]
                if isinstance(message, kind) and where(message):
                    self._taken = at + 1
                    return message
            self._changed.clear()
            await self._changed.wait()

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.heard)

    def write(self, rid: int, text: str | bytes, index: int = 0, **more: Any) -> None:
        """One step that gives sample ``index`` the bytes of ``text`` as tokens."""
        data = text.encode() if isinstance(text, str) else text
        output = m.Output(rid, index, pack_ids(list(data)), more.pop("logprobs", None))
        self.say(m.StepReport(steps=more.pop("steps", 1), outputs=[output], **more))

    def close_request(
        self, rid: int, reason: str = "length", n: int = 1, generated: int = 1, prompt: int = 3
    ) -> None:
        self.say(
            m.StepReport(
                steps=2,
                ended=[m.Ended(rid, index, reason) for index in range(n)],
                closed=[m.Closed(rid, prompt, 1, generated, 1.0, 2.0, 3.0, 4.0)],
            )
        )

    def _hear(self, message: Message) -> None:
        self.heard.append(message)
        self._changed.set()
        if isinstance(message, m.AskSnapshot) and self.figures is not None:
            self.say(m.Snapshot(self.figures))

    def _eof(self) -> None:
        self._listener.engine_gone(self, self.status)


@dataclass(frozen=True)
class FakeEntry:
    name: str
    aliases: tuple[str, ...] = ()

    def as_map(self) -> dict[str, Any]:
        return {"name": self.name, "size_bytes": 1}


class FakeText:
    """Bytes are tokens. A template writes ``<role>content</>`` and begins ``<assistant>``."""

    def __init__(self, pieces: PieceTable | None = BYTES) -> None:
        self.pieces = pieces
        self._gate: asyncio.Event | None = None
        self._called = asyncio.Event()
        self.error: WireError | None = None
        self.strips = False
        """The template strips blanks of what was said, as many do."""

    async def tokenize(self, text: str, special: bool, bos: bool) -> array[int]:
        await self._wait()
        return array("i", list(text.encode()))

    async def try_grammar(self, kind: str, text: str) -> None:
        await self._wait()

    async def chat(self, conversation: Conversation, known: str | None = None) -> Rendered:
        await self._wait()
        said = [(x["role"], x["content"]) for x in conversation.messages]
        if self.strips:
            said = [(role, content.strip()) for role, content in said]
        text = "".join(f"<{role}>{content}</>" for role, content in said) + "<assistant>"
        if known is None or not text.startswith(known):
            return Rendered(array("i", list(text.encode())), text, known is not None)
        return Rendered(array("i", list(text[len(known) :].encode())), text)

    def hold(self) -> asyncio.Event:
        """Answer nothing before the event is set."""
        self._gate = asyncio.Event()
        return self._gate

    async def called(self) -> None:
        await self._called.wait()

    async def _wait(self) -> None:
        self._called.set()
        if self._gate is not None:
            await self._gate.wait()
        if self.error is not None:
            raise self.error


class FakeSource:
    """Models ``a``, ``b`` and ``c``; their engines are ready when the script says so."""

    def __init__(self) -> None:
        self.texts = {name: FakeText() for name in ("a", "b", "c")}
        self.engines: list[FakeEngine] = []
        self.loads: list[str] = []
        self.forgotten = 0
        self.can_fall = self.fallen = False
        self.ready = m.Ready("simulated", "CPU", 258, 1000, 2000, 16, (256,), "f16", 1600)
        self.automatic = True
        self._spawned = asyncio.Event()

    async def resolve(self, name: str) -> Entry:
        if name not in ("a", "b", "c"):
            raise WireError("E_MODEL", f"no model {name}", details={"name": name})
        return FakeEntry(name)

    async def resolved(self) -> None:
        """Let a request that named another model get into the queue."""
        for _ in range(5):
            await asyncio.sleep(0)

    async def list(self) -> list[Entry]:
        return [FakeEntry(name) for name in ("a", "b", "c")]

    async def open_text(self, entry: Entry) -> Text:
        return self.texts[entry.name]

    def configure(self, entry: Entry, text: Text) -> m.Configure:
        self.loads.append(entry.name)
        return m.Configure("simulated", "", bytes(32), 0, 0, 0, 0)

    async def spawn(self, listener: EngineListener) -> FakeEngine:
        engine = FakeEngine(listener, 100 + len(self.engines))
        self.engines.append(engine)
        if self.automatic:
            engine.say(self.ready)
        self._spawned.set()
        return engine

    def fall_back(self) -> bool:
        self.fallen = self.can_fall
        return self.can_fall

    def forget(self) -> None:
        self.forgotten += 1

    async def engine(self, number: int) -> FakeEngine:
        """The ``number``-th engine, when it has been started."""
        while len(self.engines) <= number:
            self._spawned.clear()
            await self._spawned.wait()
        return self.engines[number]


class Front:
    """A service with all that surrounds it."""

    def __init__(
        self,
        default: str | None = "a",
        limits: Limits = DEFAULT_LIMITS,
        apps: Apps | None = None,
        source: FakeSource | None = None,
        access: Access | None = None,
    ) -> None:
        self.clock = Clock()
        self.source = source or FakeSource()
        self.transport = Transport()
        self.shutdowns: list[bool] = []
        self.defeats = 0
        self.service = FrontService(
            self.source,
            self.clock,
            limits,
            version="1.2.3",
            default=FakeEntry(default) if default else None,
            keep_alive_s=300.0,
            apps=apps,
            access=access,
            on_shutdown=self.shutdowns.append,
            on_defeat=self._defeat,
        )
        self.service.transport = self.transport
        self._numbers = itertools.count(1)
        self._replied = asyncio.Event()

    def _defeat(self) -> None:
        self.defeats += 1

    async def __aenter__(self) -> Front:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop(0)

    def connect(
        self,
        app: str = "app",
        priority: str = "normal",
        uid: int = 1000,
        program: Program = UNKNOWN,
    ) -> Client:
        number = next(self._numbers)
        token = bytes([number % 256]) * 16
        connection = Connection(number, token, uid, 1, app, priority, program=program)
        hello = self.service.opened(connection)
        return Client(self, connection, hello)

    def control(
        self, request: r.ControlRequest, client: Client | None = None, uid: int = 1000
    ) -> list[Event]:
        """What the request is answered with, in a list that may fill later."""
        replies: list[Event] = []
        connection = client.connection if client else None

        def reply(event: Event) -> None:
            replies.append(event)
            self._replied.set()

        self.service.control(uid, request, connection, reply)
        return replies

    async def answer(self, request: r.ControlRequest, uid: int = 1000) -> Event:
        """The reply to a control request, when it comes."""
        replies = self.control(request, uid=uid)
        await self.settled(lambda: bool(replies))
        return replies[0]

    async def status(self) -> Event:
        return await self.answer(r.Status(id="s"))

    async def settled(self, condition: Callable[[], bool]) -> None:
        """Wait for replies of `control` that make the condition true."""
        while not condition():
            self._replied.clear()
            await self._replied.wait()


@dataclass
class Client:
    """One connection."""

    front: Front
    connection: Connection
    hello: Mapping[str, Any]
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def ask(self, kind: type[r.Request], **fields: Any) -> str:
        """Send a request; its id."""
        fields.setdefault("id", f"r{next(self._ids)}")
        self.front.service.request(self.connection, kind(**fields))  # type: ignore[arg-type]
        return str(fields["id"])

    def generate(self, tokens: bytes | str = "abc", **fields: Any) -> str:
        data = tokens.encode() if isinstance(tokens, str) else tokens
        return self.ask(r.Generate, tokens=pack_ids(list(data)), **fields)

    def events(self, request_id: str) -> list[Event]:
        return self.front.transport.of(self.connection, request_id)

    async def until(self, request_id: str, kind: str, count: int = 1) -> Event:
        """The ``count``-th event of that type."""

        def there() -> list[Event]:
            return [e for e in self.events(request_id) if e["type"] == kind]

        await self.front.transport.until(lambda: len(there()) >= count)
        return there()[count - 1]

    async def end(self, request_id: str) -> Event:
        """The event that ends the request."""

        def last() -> list[Event]:
            ends = ("done", "error", "result")
            return [e for e in self.events(request_id) if e["type"] in ends]

        await self.front.transport.until(lambda: bool(last()))
        return last()[0]

    def text(self, request_id: str, index: int = 0) -> str:
        """All text of a sample so far."""
        events = self.events(request_id)
        chunks = [e["text"] for e in events if e["type"] == "chunk" and e["index"] == index]
        tails = [
            finish["text"]
            for e in events
            if e["type"] == "done"
            for finish in e["finish"]
            if finish["index"] == index
        ]
        return "".join(chunks + tails)


async def ready(front: Front) -> tuple[Client, FakeEngine]:
    """A connection, and the engine with the default model loaded."""
    client = front.connect()
    load = client.ask(r.Load)
    engine = await front.source.engine(0)
    await client.end(load)
    return client, engine


async def begun(client: Client, engine: FakeEngine, **fields: object) -> tuple[str, int]:
    """A request the engine has: its id, and the engine's."""
    request = client.generate(**fields)  # type: ignore[arg-type]
    submit = await engine.hears(m.Submit)
    return request, submit.rid
