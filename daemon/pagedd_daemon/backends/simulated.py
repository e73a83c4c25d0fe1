"""A backend without a model: deterministic tokens, real paged content, a known step time.

What it keeps in its pool is a hash per token instead of keys and values. The hash of a token is
chained to the one before it, which is read *through the block table*, and the logits come from the
last hash and from one hash of every full page. So a wrong block table, a missed copy-on-write, a
lost or exchanged page give other tokens than a plain run, as they would with a model, and with
``verify`` they raise `ContentError` at the step that meets them.

Copies between the tiers happen when they are polled and not when they are asked for, which is the
latest a real device might read or write: a block that is reused too early shows.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kvpager.types import (
    Adopt,
    CopyBlock,
    Instruction,
    Load,
    PageName,
    Shrunk,
    Spill,
    Store,
    Tier,
    Tokens,
)
from pagedd_daemon.backends.base import (
    PENDING,
    Capabilities,
    DeviceMemoryError,
    Draw,
    Elastic,
    Embedder,
    Handle,
    MemoryReport,
    ModelLoadError,
    Run,
    Step,
    StepFaultError,
    StepResult,
    TransferResult,
)
from pagedd_daemon.backends.chain import POISON, Oracle, chain, mix, noise
from pagedd_daemon.engine.sampler import Drawn, Sampler, draw
from pagedd_daemon.engine.scoring import score
from pagedd_daemon.engine.tiers.disk import Blob, DiskTier, Moved, filled
from pagedd_daemon.engine.tiers.diskfile import READERS
from pagedd_daemon.engine.tiers.opening import Disk, DiskWishes, open_disk
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.ranges import UNIT
from pagedd_daemon.engine.tiers.records import Record, bind
from pagedd_daemon.messages import Configure

BLOCK_TOKENS = 16
BYTES_PER_TOKEN = 8192
"""What a token's KV is said to take, so that a byte budget means something here too."""
DEFAULT_VOCAB = 512
DEFAULT_CONTEXT = 8192
DEFAULT_KV_TOKENS = 32768
_EOG_EVERY = 256
"""One in so many positions wants to end the text."""
_MULTIBYTE_EVERY = 24
"""One in so many characters is not ASCII."""
_SPIN_S = 100e-6
"""`time.sleep` wakes up to this much late; the rest of a wait is spun."""

# What must follow a byte, so that most text is valid UTF-8: é, €, 😀.
_FOLLOWS = {0xC3: 0xA9, 0xE2: 0x82, 0x82: 0xAC, 0xF0: 0x9F, 0x9F: 0x98, 0x98: 0x80}
_LEADS = (0xC3, 0xE2, 0xF0)


@dataclass(slots=True)
class Faults:
    """What shall go wrong. Steps and transfers are counted from 0; may be changed at any time."""

    steps: set[int] = field(default_factory=set)
    """Steps that fail, leaving rubbish in every cell they were to write."""
    transfers: set[int] = field(default_factory=set)
    """Transfers that fail, leaving rubbish where they were to write."""
    nan_sequences: set[int] = field(default_factory=set)
    """Sequences whose logits are NaN."""
    hang_at_step: int = -1
    """The step that never ends."""
    most_runs: int = 0
    """Runs of a step that there is memory for; 0: any number."""
    delay_polls: int = 0
    """Calls of ``poll_transfers`` that a transfer outlasts."""


@dataclass(frozen=True, slots=True)
class _Handle:
    epoch: int
    drawn: list[tuple[int, Drawn]] | None
    """None: the step fails."""
    scored: list[tuple[int, list[Drawn]]]
    ends: float
    seconds: float
    hangs: bool


def wait_until(moment: float) -> None:
    """Wait for ``time.perf_counter()`` to pass ``moment``, to some microseconds."""
    nap = moment - time.perf_counter() - _SPIN_S
    if nap > 0:
        time.sleep(nap)
    while time.perf_counter() < moment:
        pass


def _of_disk(transfer: Store | Load | Spill) -> bool:
    return isinstance(transfer, Spill) or transfer.tier is Tier.DISK


class _Embedder:
    """Vectors that depend on every token and its position, and on nothing else."""

    dimensions = 64

    def __init__(
        self,
        step_s: float,
        token_s: float,
        clock: Callable[[], float],
        wait: Callable[[float], None],
    ) -> None:
        self._step_s = step_s
        self._token_s = token_s
        self._clock = clock
        self._wait = wait

    def begin(self, tokens: int) -> None:
        """See `Embedder`."""

    def add(self, start: int, tokens: Tokens) -> npt.NDArray[np.float64]:
        """See `Embedder`."""
        self._wait(self._clock() + self._step_s + self._token_s * len(tokens))
        total = np.zeros(self.dimensions)
        for at, token in enumerate(tokens.tolist(), start):
            total += np.random.Generator(np.random.Philox((at << 32) + token)).random(64) - 0.5
        return total

    def rest(self) -> None:
        """See `Embedder`."""


class SimulatedBackend:
    """See the module. Implements `pagedd_daemon.backends.base.Backend`."""

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        step_s: float = 0.0,
        token_s: float = 0.0,
        page_s: float = 0.0,
        ram_fd: int = -1,
        disk: Disk | None = None,
        faults: Faults | None = None,
        elastic: Elastic | None = None,
        verify: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[float], None] = wait_until,
    ) -> None:
        """A backend with an empty pool.

        Args:
            capabilities: Taken as they are; ``gpu_blocks``, ``ram_blocks`` and ``block_tokens``
                size the pools.
            step_s: Seconds of a step beside its tokens.
            token_s: Seconds for each input token of a step.
            page_s: Seconds that each page of a transfer is said to take; nobody waits for it.
            ram_fd: The memory file of the RAM tier; -1: one of its own.
            disk: The disk tier; its ``slots`` are those of ``capabilities``.
            faults: What goes wrong.
            elastic: The device whose memory the pool is in.
            verify: Check every cell of every block table at every step (slow).
            clock: Seconds, monotonic.
            wait: Returns when ``clock()`` has reached its argument.
        """
        self._caps = capabilities
        self._step_s, self._token_s, self._page_s = step_s, token_s, page_s
        self.faults = faults or Faults()
        self.elastic = elastic
        self.embedder: Embedder | None = _Embedder(step_s, token_s, clock, wait)
        """See `Backend`."""
        self._clock, self._wait = clock, wait
        shape = (capabilities.gpu_blocks, capabilities.block_tokens)
        self._cells = np.full(shape, POISON, np.uint64)
        binding = bind(capabilities.name, capabilities.model_digest, shape[1])
        slots = capabilities.ram_blocks
        budget = slots * capabilities.block_bytes
        self._store = RamStore(ram_fd, budget, binding, slots)
        self._page_bytes = 8 * shape[1]
        pages = self._store.data[: slots * self._page_bytes].view(np.uint64)
        self._ram = pages.reshape(slots, shape[1])
        self._found = tuple((record.slot, record.name) for record in self._store.found)
        self._stored: set[int] = {slot for slot, _ in self._found}
        self._oracle = Oracle(shape[1]) if verify else None
        self._spoilt: set[int] = set()
        """Sequences of a failed step that nobody was told of yet: a step launched upon it reads
        rubbish, and nothing of it is used."""
        self._steps = 0
        self._transfers = 0
        self._pending: deque[tuple[Store | Load | Spill, int, int]] = deque()
        self._disk = disk or Disk()
        self._on_disk: dict[int, Store | Load | Spill] = {}
        self._polls = 0
        self._busy_until = 0.0
        """When the device has done all that was launched."""
        self._tokens: dict[int, int] = {}
        """What the last step drew for each of its sequences that has one draw."""
        self._noise = noise(1 << 16, capabilities.vocab_size)
        self._logits = np.zeros((16, capabilities.vocab_size), np.float32)

    @classmethod
    def from_configure(
        cls,
        configure: Configure,
        *,
        faults: Faults | None = None,
        verify: bool = False,
        keep_cached_on_gpu: bool = True,
        readers: int = READERS,
    ) -> SimulatedBackend:
        """The backend that ``configure`` asks for.

        Raises:
            ModelLoadError: Its pool would hold less than two blocks.
        """
        blocks = (configure.kv_tokens or DEFAULT_KV_TOKENS) // BLOCK_TOKENS
        if blocks < 2:
            raise ModelLoadError(
                f"kv_tokens is {configure.kv_tokens}, at least {2 * BLOCK_TOKENS} are needed",
                {"kv_tokens": configure.kv_tokens, "least": 2 * BLOCK_TOKENS},
            )
        context = configure.context_tokens or DEFAULT_CONTEXT
        digest = configure.model_digest or hashlib.sha256(b"simulated").digest()
        binding = bind("simulated", digest, BLOCK_TOKENS)
        disk = open_disk(DiskWishes.of(configure), binding, UNIT, pieces=False, readers=readers)
        capabilities = Capabilities(
            name="simulated",
            device="simulated",
            model_digest=digest,
            kv_dtype="u64",
            vocab_size=configure.vocab_size or DEFAULT_VOCAB,
            context_tokens=min(context, (blocks - 1) * BLOCK_TOKENS),
            eog_tokens=frozenset(configure.eog_tokens),
            gpu_blocks=blocks,
            ram_blocks=configure.ram_bytes // (BLOCK_TOKENS * BYTES_PER_TOKEN),
            disk_blocks=disk.slots,
            disk_persists=disk.persists,
            block_tokens=BLOCK_TOKENS,
            block_bytes=BLOCK_TOKENS * BYTES_PER_TOKEN,
            max_sequences=0,
            max_step_tokens=2048,
            asynchronous=True,
            keep_cached_on_gpu=keep_cached_on_gpu,
            constrains=True,
        )
        return cls(
            capabilities,
            step_s=configure.simulated_step_us * 1e-6,
            token_s=configure.simulated_token_us * 1e-6,
            ram_fd=configure.ram_fd,
            disk=disk,
            faults=faults,
            verify=verify,
        )

    @property
    def capabilities(self) -> Capabilities:
        """See `Backend`."""
        return self._caps

    # --------------------------------------------------------------------------------------- memory

    def apply(self, instructions: Iterable[Instruction]) -> None:
        """See `Backend`."""
        for instruction in instructions:
            match instruction:
                case CopyBlock(src=src, dst=dst, tokens=tokens):
                    self._cells[dst] = POISON
                    self._cells[dst, :tokens] = self._cells[src, :tokens]
                case Store() | Load() | Spill():
                    ready = self._polls + self.faults.delay_polls
                    self._pending.append((instruction, self._transfers, ready))
                    self._transfers += 1
                case Shrunk(gpu_blocks=end):
                    # As if the memory were given back: whatever still reads it will show.
                    self._cells[end:] = POISON
                case _:
                    pass

    def poll_transfers(self) -> list[TransferResult]:
        """See `Backend`. Here is where the copies happen."""
        ended: list[TransferResult] = []
        while self._pending and self._pending[0][2] <= self._polls:
            transfer, number, _ = self._pending.popleft()
            ok = number not in self.faults.transfers
            if self._disk.tier is not None and ok and _of_disk(transfer):
                self._ask_disk(self._disk.tier, transfer)
                continue
            self._copy(transfer, ok)
            seconds = self._page_s * len(transfer.pages)
            ended.append(TransferResult(transfer.transfer, ok, seconds))
        if self._disk.tier is not None:
            ended += [self._moved(moved) for moved in self._disk.tier.poll()]
        self._polls += 1
        return ended

    def _ask_disk(self, tier: DiskTier, transfer: Store | Load | Spill) -> None:
        self._on_disk[transfer.transfer] = transfer
        if isinstance(transfer, Load):
            tier.get(transfer.transfer, (page.slot for page in transfer.pages))
            return
        if isinstance(transfer, Store):
            pages = [(self._cells[page.block], page.slot, page.tokens) for page in transfer.pages]
        else:
            pages = [(self._ram[move.source], move.target, move.tokens) for move in transfer.pages]
        blobs = [Blob(cells.view(np.uint8).copy(), {slot: (0, n)}, n) for cells, slot, n in pages]
        tier.put(transfer.transfer, blobs)

    def _moved(self, moved: Moved) -> TransferResult:
        """The disk has done its part."""
        transfer = self._on_disk.pop(moved.transfer)
        if isinstance(transfer, Load):
            assert self._disk.tier is not None
            data = {id(extent): data for extent, data in moved.read}
            for page in transfer.pages:
                self._cells[page.block] = POISON
                if moved.ok:
                    n, cells = page.tokens, data[id(self._disk.tier.at(page.slot))]
                    self._cells[page.block, :n] = cells.view(np.uint64)[:n]
        return TransferResult(moved.transfer, moved.ok, self._page_s * len(transfer.pages))

    def _copy(self, transfer: Store | Load | Spill, ok: bool) -> None:
        if isinstance(transfer, Spill) or transfer.tier is Tier.DISK:
            ok = False  # there is none
        for page in () if isinstance(transfer, Spill) else transfer.pages:
            n = page.tokens
            if isinstance(transfer, Store) and transfer.tier is Tier.DISK:
                continue
            if isinstance(transfer, Store):
                self._store.clear((page.slot,))
                self._ram[page.slot] = POISON
                if ok:
                    self._ram[page.slot, :n] = self._cells[page.block, :n]
                    self._stored.add(page.slot)
            else:
                self._cells[page.block] = POISON
                if ok:
                    self._cells[page.block, :n] = self._ram[page.slot, :n]

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        if _of_disk(transfer):
            for slot, name in zip(filled(transfer), names, strict=True):
                if name is not None and self._disk.tier is not None:
                    self._disk.tier.commit(slot, name)
        elif isinstance(transfer, Store):
            for page, name in zip(transfer.pages, names, strict=True):
                if name is not None:
                    size = self._page_bytes
                    at = page.slot * size
                    self._store.commit(Record(page.slot, name, page.tokens, at, size))

    def adoptable(self) -> list[Adopt]:
        """See `Backend`."""
        found = [Adopt(Tier.RAM, self._found)]
        if self._disk.tier is not None:
            found.append(self._disk.tier.adoptable())
        return found

    def troubles(self) -> list[str]:
        """See `Backend`."""
        return self._disk.troubles()

    def memory(self) -> MemoryReport:
        """See `Backend`; what a model with `BYTES_PER_TOKEN` would take."""
        size = self._caps.block_bytes
        return MemoryReport(0, self._caps.gpu_blocks * size, len(self._stored) * size)

    def counters(self) -> dict[str, int]:
        """See `Backend`."""
        return self._disk.counters()

    def close(self) -> None:
        """See `Backend`."""
        self._pending.clear()
        self._stored.clear()
        self._ram = np.empty((0, self._caps.block_tokens), np.uint64)
        self._store.close()
        self._disk.close()

    # ----------------------------------------------------------------------------------------- step

    def launch(self, step: Step) -> _Handle:
        """See `Backend`."""
        if 0 < self.faults.most_runs < len(step.runs):
            raise DeviceMemoryError(f"no memory for a step of {len(step.runs)} runs")
        begin = max(self._clock(), self._busy_until)
        number, self._steps = self._steps, self._steps + 1
        seconds = self._step_s + self._token_s * sum(len(run.tokens) for run in step.runs)
        drawn: list[tuple[int, Drawn]] | None = None
        scored: list[tuple[int, list[Drawn]]] = []
        if number in self.faults.steps:
            self._tokens = {one.seq: 0 for run in step.runs for one in run.draws}
            self._spoilt.update(run.seq for run in step.runs)
            for run in step.runs:
                self._write(run, np.full(len(run.tokens), POISON, np.uint64))
        else:
            drawn = self._compute(step.runs)
            scored = [
                (r.seq, self._score(r, r.follows)) for r in step.runs if r.follows is not None
            ]
        hangs = number == self.faults.hang_at_step
        self._busy_until = begin + seconds
        return _Handle(step.epoch, drawn, scored, begin + seconds, seconds, hangs)

    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`."""
        assert isinstance(handle, _Handle)
        if handle.hangs:
            threading.Event().wait()
        self._wait(handle.ends)
        if handle.drawn is None:
            self._spoilt.clear()
            raise StepFaultError("the simulated device refused the step")
        return StepResult(handle.epoch, handle.drawn, handle.seconds, handle.scored)

    def _compute(self, runs: list[Run]) -> list[tuple[int, Drawn]]:
        runs = [self._known(run) for run in runs]
        sequences: list[int] = []
        wanted: list[tuple[int, Sampler]] = []
        rows = 0
        for run in runs:
            last = self._advance(run)
            if not run.draws:
                continue
            if rows == len(self._logits):
                self._logits = np.concatenate([self._logits, np.zeros_like(self._logits)])
            self._fill(self._logits[rows], run, last)
            for one in run.draws:
                sequences.append(one.seq)
                wanted.append((rows, one.sampler))
            rows += 1
        drawn = draw(self._logits[:rows], wanted) if rows else []
        self._tokens = {seq: one.token for seq, one in zip(sequences, drawn, strict=True)}
        return list(zip(sequences, drawn, strict=True))

    def _score(self, run: Run, following: Tokens) -> list[Drawn]:
        """How likely what follows each token of a run that has been computed was."""
        size = self._caps.block_tokens
        rows = np.zeros((len(following), self._caps.vocab_size), np.float32)
        for at, row in enumerate(rows):
            end = run.start + at
            last = int(self._cells[run.block_table[end // size], end % size])
            self._fill(row, replace(run, tokens=run.tokens[: at + 1]), last)
        return score(rows, following, run.top)

    def _known(self, run: Run) -> Run:
        """A run whose input the step before has drawn, with that token and as of after it."""
        if run.tokens.item(0) != PENDING:
            return run
        token = max(0, self._tokens[run.seq])  # what follows a NaN is of no use to anybody
        draws = [Draw(one.seq, one.sampler.after(token)) for one in run.draws]
        return replace(run, tokens=np.array([token], np.int32), draws=draws)

    def _advance(self, run: Run) -> int:
        """Compute the run's cells; returns the last one."""
        size = self._caps.block_tokens
        start = run.start
        before = 0
        if start:
            block = run.block_table.item((start - 1) // size)
            before = self._cells.item(block, (start - 1) % size)
        if self._oracle is not None and run.seq not in self._spoilt:
            self._oracle.check(run, self._cells)
        if len(run.tokens) == 1:
            last = (before + mix(run.tokens.item(0) << 32 ^ start)) & 0xFFFF_FFFF_FFFF_FFFF
            self._cells[run.block_table.item(start // size), start % size] = last
            return last
        cells = chain(before, run.tokens, start)
        self._write(run, cells)
        return int(cells[-1])

    def _write(self, run: Run, cells: npt.NDArray[np.uint64]) -> None:
        size = self._caps.block_tokens
        at = np.arange(run.start, run.start + len(cells))
        self._cells[run.block_table[at // size], at % size] = cells

    def _fill(self, row: npt.NDArray[np.float32], run: Run, last: int) -> None:
        """The logits after a run: noise and three favourites, all by hash of the content."""
        if run.seq in self.faults.nan_sequences:
            row.fill(np.nan)
            return
        length = run.start + len(run.tokens)
        full = run.block_table[: length // self._caps.block_tokens]
        pages = int(self._cells[full, -1].sum()) if full.size else 0
        h = mix(last ^ pages)
        offset = h & 0xFFFF
        row[:] = self._noise[offset : offset + row.size]
        follower = _FOLLOWS.get(run.tokens.item(-1))
        if follower is not None and row.size >= 256:
            row[follower] = 25.0
        else:
            for height in (11.0, 9.5, 9.0):
                h = mix(h)
                row[self._favourite(h)] = height
        eog = self._caps.eog_tokens
        for token in eog:
            row[token] = -20.0
        if eog and follower is None and (h >> 32) % _EOG_EVERY == 0:
            row[min(eog)] = 30.0

    def _favourite(self, h: int) -> int:
        """An id that text of this vocabulary might have here."""
        if self._caps.vocab_size < 256:
            return h % self._caps.vocab_size
        if h % _MULTIBYTE_EVERY == 0:
            return _LEADS[(h >> 8) % len(_LEADS)]
        return 32 + (h >> 8) % 95
