"""An engine process in simulated time: the real engine behind the real codec.

Front and engine run at the same time, as two processes do: the engine has a clock of its own, which
is ahead of the loop's by the step it computes. What it says arrives later; what it is told while it
computes, it reads when it has computed.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pagedd_daemon import messages as m
from pagedd_daemon.backends.simulated import SimulatedBackend
from pagedd_daemon.backends.simulated_faults import Faults
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.tiers.opening import Disk
from pagedd_daemon.front.engine_link import EngineListener
from pagedd_daemon.link import FrameReader, pack, unpack
from tests.support.sim.grammar import SimGrammars
from tests.support.sim.loop import VirtualLoop

_NAP_S = 0.002
"""Until the engine looks again at a transfer, or at a request that cannot run."""
_REAPED_S = 0.002
"""Until the front knows how a process has ended."""
_MOST_NAPS = 20_000
"""Naps in which nothing happens, after which nothing ever will."""


@dataclass(slots=True)
class Plan:
    """What becomes of an engine."""

    load_s: float = 0.05
    step_s: float = 0.004
    token_s: float = 0.0001
    delay_s: float = 0.001
    """Of a message between front and engine, at most."""
    asynchronous: bool = True
    """Two steps in flight."""
    keep_cached_on_gpu: bool = True
    faults: Faults = field(default_factory=Faults)
    dies_loading: bool = False
    refuses: bool = False
    """Says `Failed` instead of `Ready`."""
    disk: Callable[[bytes, Callable[[], float]], Disk] = lambda digest, clock: Disk()
    """Opens the disk tier, for a model and by a clock."""


class SimEngine:
    """Implements `pagedd_daemon.front.engine_link.Engine`."""

    def __init__(
        self,
        loop: VirtualLoop,
        listener: EngineListener,
        pid: int,
        model: str,
        plan: Plan,
        dice: random.Random,
        look: Callable[[SimEngine], None],
    ) -> None:
        """``look`` is called after each turn."""
        self.model = model
        self.plan = plan
        self.engine: Engine | None = None
        self.backend: SimulatedBackend | None = None
        self.status: int | None = None
        """Its exit status, once it has ended."""
        self.apps: dict[str, m.App] = {}
        """What it was told of each."""
        self._loop = loop
        self._listener = listener
        self._pid = pid
        self._dice = dice
        self._look = look
        self._now = loop.time()
        self._inbox: list[m.ToEngine] = []
        self._to_engine: deque[bytes] = deque()
        self._to_front: deque[tuple[float, bytes | None]] = deque()
        """With the time at which each was said; None: the end of the link."""
        self._last = [0.0, 0.0]
        """When the last message in each direction arrives."""
        self._frames = FrameReader()
        self._next: asyncio.TimerHandle | None = None
        self._naps = 0
        self._size: int | None = None
        """Blocks that its pool shall have."""
        self._idle = True
        self._stopping = self._hung = False
        self._exited = asyncio.Event()

    # ------------------------------------------------------------------------- the front's side

    @property
    def pid(self) -> int:
        """See `Engine`."""
        return self._pid

    def send(self, message: m.ToEngine) -> None:
        """See `Engine`."""
        if self.status is not None:
            return
        self._to_engine.append(pack(message))
        self._loop.call_at(self._arrival(0, self._loop.time()), self._arrived)

    def kill(self) -> None:
        """See `Engine`."""
        self.die(-9)

    async def stop(self, grace_s: float) -> int:
        """See `Engine`."""
        self._stopping = True
        self.send(m.Shutdown())
        try:
            await asyncio.wait_for(self._exited.wait(), grace_s)
        except asyncio.TimeoutError:
            self.die(-9)
        assert self.status is not None
        return self.status

    @property
    def at_rest(self) -> bool:
        """Nothing is on its way to it, and it waits for a message."""
        return self._idle and not self._to_engine and not self._inbox

    def counters(self) -> dict[str, int]:
        """What its pager did."""
        if self.engine is None:
            return {}
        stats = self.engine._pool.pager.stats()
        return {
            "preempted": stats.preemptions_swap + stats.preemptions_recompute,
            "loaded": stats.loaded_pages,
            "found": stats.hit_tokens,
        }

    # ------------------------------------------------------------------------------- its faults

    def die(self, status: int) -> None:
        """End it now. What it has said by now still arrives."""
        if self.status is not None:
            return
        now = self._loop.time()
        self.status = status
        self._to_front = deque(
            (said, None if said > now else data) for said, data in self._to_front
        )
        self._wake(None)
        self._exited.set()
        self._say(None, max(now, self._last[1]) + _REAPED_S)
        if self.backend is not None:
            self.backend.close()

    def resize(self, blocks: int) -> None:
        """Other programs want its memory, or give it back."""
        self._size = blocks
        if self.engine is not None and self.status is None and not self._hung:
            self._wake(max(self._loop.time(), self._now))

    def hang(self) -> None:
        """From now on it neither reads nor computes."""
        self._hung = True
        self._wake(None)

    # --------------------------------------------------------------------------------- the link

    def _arrival(self, direction: int, said: float) -> float:
        at = max(self._last[direction], said + self._dice.random() * self.plan.delay_s)
        self._last[direction] = at
        return at

    def _say(self, message: m.ToFront | None, said: float | None = None) -> None:
        said = self._now if said is None else said
        self._to_front.append((said, None if message is None else pack(message)))
        self._loop.call_at(self._arrival(1, said), self._heard_by_front)

    def _heard_by_front(self) -> None:
        _, data = self._to_front.popleft()
        if data is not None:
            for body in self._frames.feed(data):
                message = unpack(body)
                assert isinstance(message, m.ToFront)
                self._listener.engine_said(self, message)
        elif not self._to_front and self.status is not None and not self._stopping:
            self._listener.engine_gone(self, self.status)

    def _arrived(self) -> None:
        data = self._to_engine.popleft()
        if self.status is not None or self._hung:
            return
        message = unpack(data[4:])
        assert isinstance(message, m.ToEngine)
        if isinstance(message, m.App):
            self.apps[message.key] = message
        self._inbox.append(message)
        if self._idle or self._next is None:
            self._wake(max(self._loop.time(), self._now))

    def _wake(self, at: float | None) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next = None if at is None else self._loop.call_at(at, self._turn)

    # ---------------------------------------------------------------------------------- its loop

    def _turn(self) -> None:
        """One turn of `pagedd_daemon.engine.loop.run`."""
        self._next = None
        self._now = max(self._now, self._loop.time())
        messages, self._inbox = self._inbox, []
        for message in messages:
            if isinstance(message, m.Shutdown):
                self.die(0)
                return
            if isinstance(message, m.Configure):
                self._load(message)
            elif self.engine is None:
                self._inbox.append(message)
            elif isinstance(message, m.AskSnapshot):
                self._say(self.engine.snapshot(blocks=message.blocks))
            else:
                self.engine.handle(message)
        engine = self.engine
        if engine is None:
            return
        size, self._size = self._size, None
        if size is not None:
            engine.resize(size)
        stepped = engine.step(self._say, lambda: self._dice.random() < 0.3)
        idle = not engine.has_work
        if idle and not self._idle:
            self._say(engine.snapshot())
        self._idle = idle
        self._look(self)
        if idle:
            return
        self._naps = 0 if stepped else self._naps + 1
        assert self._naps < _MOST_NAPS, "requests live and nobody can run"
        self._wake(self._now if stepped else self._now + _NAP_S)

    def _load(self, configure: m.Configure) -> None:
        plan = self.plan
        self._now += plan.load_s
        self._loop.call_at(self._now, self._loaded, configure)

    def _loaded(self, configure: m.Configure) -> None:
        plan = self.plan
        if self.status is not None or self._hung:
            return
        self._now = max(self._now, self._loop.time())
        if plan.dies_loading:
            self.die(-11)
            return
        if plan.refuses:
            self._say(m.Failed("E_MODEL", "the model is damaged", {}))
            self._loop.call_later(0.01, self.die, 66)
            return
        made = SimulatedBackend.from_configure(
            configure, keep_cached_on_gpu=plan.keep_cached_on_gpu
        )
        disk = plan.disk(configure.model_digest, lambda: self._now)
        caps = replace(
            made.capabilities,
            asynchronous=plan.asynchronous,
            disk_blocks=disk.slots,
            disk_persists=disk.persists,
        )
        self.backend = SimulatedBackend(
            caps,
            step_s=plan.step_s,
            token_s=plan.token_s,
            ram_fd=configure.ram_fd,
            disk=disk,
            faults=plan.faults,
            verify=True,
            clock=lambda: self._now,
            wait=self._wait,
        )
        self.engine = Engine(
            self.backend,
            lambda: self._now,
            SimGrammars(configure, caps),
            write_through=configure.write_through,
        )
        self._say(
            m.Ready(
                backend=caps.name,
                device=caps.device,
                vocab_size=caps.vocab_size,
                context_tokens=caps.context_tokens,
                pool_tokens=caps.gpu_blocks * caps.block_tokens,
                block_tokens=caps.block_tokens,
                eog_tokens=tuple(sorted(caps.eog_tokens)),
                kv_dtype=caps.kv_dtype,
                ram_tokens=caps.ram_blocks * caps.block_tokens,
            )
        )
        self._wake(self._now)

    def _wait(self, moment: float) -> None:
        self._now = max(self._now, moment)
