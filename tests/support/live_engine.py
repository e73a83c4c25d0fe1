"""The real engine over the simulated backend, behind a real front, in one process and one thread.

What would end an engine's process (an exception that nobody handles, a link that breaks) ends a
`LiveEngine` as the front sees a process end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from kvpager.types import Instruction, PageName, Spill, Store
from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Backend, Handle, Step, StepResult, TransferResult
from pagedd_daemon.backends.simulated import BLOCK_TOKENS, BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.front.engine_link import EngineListener, Message
from tests.support.front import FakeEngine, FakeSource


class Chance:
    """Counts what may fail, and has one of it fail: the ``nth``, counted from 0 over all kinds."""

    def __init__(self, nth: int = -1) -> None:
        self._nth = nth
        self.seen: list[str] = []
        """What could have failed, in order."""

    def fails(self, what: str) -> bool:
        """Whether this one does."""
        self.seen.append(what)
        return len(self.seen) - 1 == self._nth


class Unlucky:
    """A backend whose calls may run out of memory; everything else is its own."""

    def __init__(self, backend: Backend, chance: Chance) -> None:
        self._backend = backend
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def _try(self, what: str) -> None:
        if self._chance.fails(what):
            raise MemoryError(f"no memory to {what}")

    def apply(self, instructions: Iterable[Instruction]) -> None:
        """See `Backend`."""
        self._try("apply")
        self._backend.apply(instructions)

    def launch(self, step: Step) -> Handle:
        """See `Backend`."""
        self._try("launch")
        return self._backend.launch(step)

    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`."""
        self._try("collect")
        return self._backend.collect(handle)

    def poll_transfers(self) -> list[TransferResult]:
        """See `Backend`."""
        self._try("poll")
        return self._backend.poll_transfers()

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        self._try("commit")
        self._backend.commit(transfer, names)


class LiveEngine(FakeEngine):
    """An engine that computes; ready at once."""

    def __init__(
        self, listener: EngineListener, pid: int, chance: Chance, *, blocks: int, ram_pages: int
    ) -> None:
        super().__init__(listener, pid)
        self._chance = chance
        configure = m.Configure(
            backend="simulated",
            model_path="",
            model_digest=bytes(32),
            context_tokens=1000,
            kv_tokens=blocks * BLOCK_TOKENS,
            ram_bytes=ram_pages * BLOCK_TOKENS * BYTES_PER_TOKEN,
            threads=1,
            vocab_size=258,
            eog_tokens=(256,),
            pieces=bytes(range(256)),
            piece_lengths=np.array([1] * 256 + [0, 0], "<i4").tobytes(),
        )
        backend = cast(Backend, SimulatedBackend.from_configure(configure, verify=True))
        loop = asyncio.get_running_loop()
        self.engine = Engine(cast(Backend, Unlucky(backend, chance)), loop.time, write_through=True)
        self._messages: list[m.ToEngine] = []
        self._scheduled = False

    def send(self, message: m.ToEngine) -> None:
        """What the front sends; the link may break under it."""
        if self._chance.fails(f"send {type(message).__name__}"):
            self.die()
        else:
            super().send(message)

    def say(self, message: m.ToFront) -> None:
        """What the engine says; the link may break under it."""
        if self._chance.fails(f"say {type(message).__name__}"):
            raise BrokenPipeError("the link is broken")
        super().say(message)

    def _hear(self, message: Message) -> None:
        if isinstance(message, m.ToEngine):
            self._messages.append(message)
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self.stopped:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """What `pagedd_daemon.engine.loop.run` does in one turn."""
        self._scheduled = False
        if self.stopped or self.status:
            return
        messages, self._messages = self._messages, []
        try:
            for message in messages:
                if isinstance(message, m.AskSnapshot):
                    self.say(self.engine.snapshot())
                elif not isinstance(message, (m.Configure, m.Shutdown)):
                    self.engine.handle(message)
            self.engine.step(self.say, lambda: True)
        except (MemoryError, BrokenPipeError):
            self.die(-6)  # as a process that ends with a traceback
            return
        self.engine.validate()
        if self.engine.has_work:
            self._schedule()


class LiveSource(FakeSource):
    """Model ``a``, computed by live engines."""

    def __init__(self, chance: Chance, *, blocks: int, ram_pages: int) -> None:
        super().__init__()
        self._chance = chance
        self._blocks, self._ram_pages = blocks, ram_pages
        self.live: list[LiveEngine] = []

    async def spawn(self, listener: EngineListener) -> FakeEngine:
        """See `pagedd_daemon.front.models.Source`."""
        engine = LiveEngine(
            listener,
            100 + len(self.live),
            self._chance,
            blocks=self._blocks,
            ram_pages=self._ram_pages,
        )
        self.live.append(engine)
        FakeEngine.say(engine, self.ready)  # loading is not what is tested here
        return engine
