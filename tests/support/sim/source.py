"""Models, their vocabularies and their engines, with what goes wrong in helpers and loads."""

from __future__ import annotations

import asyncio
import os
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagedd_daemon import messages as m
from pagedd_daemon.backends.simulated import BLOCK_TOKENS, BYTES_PER_TOKEN
from pagedd_daemon.engine.tiers.opening import Disk
from pagedd_daemon.front.detokenizer import PieceTable
from pagedd_daemon.front.engine_link import EngineListener
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.model_ports import Conversation, Entry, Rendered, Text
from pagedd_daemon.memory_file import create_memory
from tests.support.front import BYTES, FakeEntry
from tests.support.sim.disk import FailingIo, empty_file, open_disk
from tests.support.sim.engine import Plan, SimEngine
from tests.support.sim.loop import VirtualLoop
from tests.support.simulated import EOG, VOCAB

MODELS = ("a", "b")


@dataclass(slots=True)
class Shape:
    """Of the pools of every engine."""

    kv_blocks: int = 24
    ram_pages: int = 32
    write_through: bool = True
    disk_pages: int = 0
    disk_persists: bool = False
    disk_failing: float = 0.0
    disk_corrupt: float = 0.0
    """As of `FailingIo`."""


@dataclass(slots=True)
class HelperFaults:
    """May be changed at any time."""

    delay_s: float = 0.003
    """Of an answer, at most."""
    failing: float = 0.0
    """Share of questions that end with `E_HELPER`."""


def rendered(said: Sequence[tuple[str, str]]) -> str:
    """A conversation as the models' template writes it."""
    return "".join(f"<{role}>{content}</>" for role, content in said) + "<assistant>"


@dataclass(slots=True)
class SimText:
    """Bytes are tokens. Implements `pagedd_daemon.front.model_ports.Text`."""

    dice: random.Random
    faults: HelperFaults
    pieces: PieceTable | None = BYTES

    async def tokenize(self, text: str, special: bool, bos: bool) -> array[int]:
        """See `Text`."""
        await self._work()
        return array("i", list(text.encode()))

    async def try_grammar(self, kind: str, text: str) -> None:
        """See `Text`."""
        await self._work()

    async def chat(self, conversation: Conversation, known: str | None = None) -> Rendered:
        """See `Text`."""
        await self._work()
        text = rendered([(x["role"], x["content"]) for x in conversation.messages])
        if known is None or not text.startswith(known):
            return Rendered(array("i", list(text.encode())), text, known is not None)
        return Rendered(array("i", list(text[len(known) :].encode())), text)

    async def _work(self) -> None:
        await asyncio.sleep(self.dice.random() * self.faults.delay_s)
        if self.dice.random() < self.faults.failing:
            raise WireError("E_HELPER", "the helper ended with signal 9")


@dataclass(slots=True)
class SimSource:
    """Implements `pagedd_daemon.front.model_ports.Source`."""

    loop: VirtualLoop
    dice: random.Random
    shape: Shape
    plan: Callable[[], Plan]
    """What becomes of the next engine."""
    look: Callable[[SimEngine], None]
    helper: HelperFaults = field(default_factory=HelperFaults)
    engines: list[SimEngine] = field(default_factory=list)
    not_started: float = 0.0
    """Share of engines for which there is no process."""
    _ram: int = -1
    _store: int = -1
    """The file of a disk tier that persists."""

    async def resolve(self, name: str) -> Entry:
        """See `Source`."""
        await asyncio.sleep(self.dice.random() * 0.002)
        if name not in MODELS:
            raise WireError("E_MODEL", f"no model {name}", details={"name": name})
        return FakeEntry(name)

    async def list(self) -> list[Entry]:
        """See `Source`."""
        return [FakeEntry(name) for name in MODELS]

    async def open_text(self, entry: Entry) -> Text:
        """See `Source`."""
        await asyncio.sleep(self.dice.random() * 0.02)
        return SimText(self.dice, self.helper)

    def configure(self, entry: Entry, text: Text) -> m.Configure:
        """See `Source`."""
        self.engines[-1].model = entry.name
        return m.Configure(
            backend="simulated",
            model_path="",
            model_digest=entry.name.encode().ljust(32, b"\0"),
            context_tokens=0,
            kv_tokens=self.shape.kv_blocks * BLOCK_TOKENS,
            ram_bytes=self._ram_bytes,
            ram_fd=self._ram,
            threads=1,
            write_through=self.shape.write_through,
            vocab_size=VOCAB,
            eog_tokens=(EOG,),
        )

    async def spawn(self, listener: EngineListener) -> SimEngine:
        """See `Source`."""
        await asyncio.sleep(self.dice.random() * 0.01)
        if self.dice.random() < self.not_started:
            raise OSError("no more processes")
        if self._ram < 0:
            self._ram = create_memory(self._ram_bytes)
        pid = 100 + len(self.engines)
        plan = self.plan()
        plan.disk = self._open_disk
        engine = SimEngine(self.loop, listener, pid, "", plan, self.dice, self.look)
        self.engines.append(engine)
        return engine

    def fall_back(self) -> bool:
        """See `Source`."""
        return False

    def forget(self) -> None:
        """See `Source`."""
        if self._ram >= 0:
            os.close(self._ram)
            self._ram = -1

    def close(self) -> None:
        """Nobody needs any of it any more."""
        self.forget()
        if self._store >= 0:
            os.close(self._store)
            self._store = -1

    def _open_disk(self, digest: bytes, clock: Callable[[], float]) -> Disk:
        """A store that outlives engines, or swap space that is an engine's own."""
        shape = self.shape
        if not shape.disk_pages:
            return Disk()
        if not shape.disk_persists:
            descriptor = empty_file(shape.disk_pages)
        else:
            if self._store < 0:
                self._store = empty_file(shape.disk_pages)
            descriptor = os.dup(self._store)
        io = FailingIo(self.dice, shape.disk_failing, shape.disk_corrupt)
        try:
            return open_disk(
                descriptor, shape.disk_pages, digest, io, clock, persists=shape.disk_persists
            )
        except OSError:
            return Disk(notice="there is no disk tier")

    @property
    def _ram_bytes(self) -> int:
        return self.shape.ram_pages * BLOCK_TOKENS * BYTES_PER_TOKEN
