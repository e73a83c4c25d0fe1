"""A backend without a model: deterministic tokens, real paged content, a known step time.

What it keeps in its pool is a hash per token instead of keys and values. The hash of a token is
chained to the one before it, which is read *through the block table*, and the logits come from the
last hash and from one hash of every full page. So a wrong block table, a missed copy-on-write, a
lost or exchanged page give other tokens than a plain run, as they would with a model, and with
``verify`` they raise `ContentError` at the step that meets them.

Its memory is `pagedd_daemon.backends.simulated_pages`, what it says
`pagedd_daemon.backends.simulated_logits`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvpager.types import (
    Adopt,
    Instruction,
    PageName,
    Spill,
    Store,
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
from pagedd_daemon.backends.chain import POISON, Oracle, chain, mix
from pagedd_daemon.backends.simulated_embedder import SimulatedEmbedder
from pagedd_daemon.backends.simulated_faults import Faults
from pagedd_daemon.backends.simulated_logits import Logits
from pagedd_daemon.backends.simulated_pages import SimulatedPages
from pagedd_daemon.engine.sampler import Drawn, Sampler, draw
from pagedd_daemon.engine.scoring import score
from pagedd_daemon.engine.tiers.diskfile import READERS
from pagedd_daemon.engine.tiers.opening import Disk, DiskWishes, open_disk
from pagedd_daemon.engine.tiers.ranges import UNIT
from pagedd_daemon.engine.tiers.records import bind
from pagedd_daemon.messages import Configure

BLOCK_TOKENS = 16
BYTES_PER_TOKEN = 8192
"""What a token's KV is said to take, so that a byte budget means something here too."""
DEFAULT_VOCAB = 512
DEFAULT_CONTEXT = 8192
DEFAULT_KV_TOKENS = 32768
_SPIN_S = 100e-6
"""`time.sleep` wakes up to this much late; the rest of a wait is spun."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Draws of a step: logits, whose they are, and row and sampler of each."""

    logits: npt.NDArray[np.float32]
    sequences: list[int]
    rows: list[tuple[int, Sampler]]


@dataclass(slots=True)
class _Handle:
    epoch: int
    drawn: list[tuple[int, Drawn]] | None
    """None: the step fails."""
    put_off: _Wanted | None
    """Draws that wait for what grammars say to the step before."""
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


def _waits(run: Run) -> bool:
    """Whether a grammar of the run must see a token before anything can be drawn for it."""
    if run.tokens.item(0) != PENDING:
        return False
    return any(one.sampler.matcher is not None for one in run.draws)


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
        self._step_s, self._token_s = step_s, token_s
        self.faults = faults or Faults()
        self.elastic = elastic
        self.embedder: Embedder | None = SimulatedEmbedder(step_s, token_s, clock, wait)
        """See `Backend`."""
        self._clock, self._wait = clock, wait
        self._pages = SimulatedPages(
            capabilities, page_s=page_s, ram_fd=ram_fd, disk=disk, faults=self.faults
        )
        self._cells = self._pages.cells
        self._oracle = Oracle(capabilities.block_tokens) if verify else None
        self._spoilt: set[int] = set()
        """Sequences of a failed step that nobody was told of yet: a step launched upon it reads
        rubbish, and nothing of it is used."""
        self._steps = 0
        self._busy_until = 0.0
        """When the device has done all that was launched."""
        self._tokens: dict[int, int] = {}
        """What the last step drew for each of its sequences that has one draw."""
        self._logits = Logits(capabilities.vocab_size, capabilities.eog_tokens)
        self._rows = np.zeros((16, capabilities.vocab_size), np.float32)

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
        self._pages.apply(instructions)

    def poll_transfers(self) -> list[TransferResult]:
        """See `Backend`."""
        return self._pages.poll_transfers()

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        self._pages.commit(transfer, names)

    def adoptable(self) -> list[Adopt]:
        """See `Backend`."""
        return self._pages.adoptable()

    def troubles(self) -> list[str]:
        """See `Backend`."""
        return self._pages.troubles()

    def memory(self) -> MemoryReport:
        """See `Backend`; what a model with `BYTES_PER_TOKEN` would take."""
        size = self._caps.block_bytes
        return MemoryReport(0, self._caps.gpu_blocks * size, len(self._pages.stored) * size)

    def counters(self) -> dict[str, int]:
        """See `Backend`."""
        return self._pages.counters()

    def close(self) -> None:
        """See `Backend`."""
        self._pages.close()

    # ----------------------------------------------------------------------------------------- step

    def launch(self, step: Step) -> _Handle:
        """See `Backend`."""
        if 0 < self.faults.most_runs < len(step.runs):
            raise DeviceMemoryError(f"no memory for a step of {len(step.runs)} runs")
        begin = max(self._clock(), self._busy_until)
        number, self._steps = self._steps, self._steps + 1
        seconds = self._step_s + self._token_s * sum(len(run.tokens) for run in step.runs)
        hangs = number == self.faults.hang_at_step
        self._busy_until = begin + seconds
        handle = _Handle(step.epoch, None, None, [], begin + seconds, seconds, hangs)
        if number in self.faults.steps:
            self._tokens = {one.seq: 0 for run in step.runs for one in run.draws}
            self._spoilt.update(run.seq for run in step.runs)
            for run in step.runs:
                self._write(run, np.full(len(run.tokens), POISON, np.uint64))
            return handle
        put_off = any(_waits(run) for run in step.runs)
        wanted = self._compute([self._known(run, ahead=not put_off) for run in step.runs])
        handle.scored = [
            (r.seq, self._score(r, r.follows)) for r in step.runs if r.follows is not None
        ]
        if put_off:
            handle.drawn, handle.put_off = [], replace(wanted, logits=wanted.logits.copy())
        else:
            handle.drawn = self._drawn(wanted)
        return handle

    def draw(self, handle: Handle) -> None:
        """See `Backend`."""
        assert isinstance(handle, _Handle)
        if handle.put_off is not None:
            handle.drawn, handle.put_off = self._drawn(handle.put_off), None

    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`."""
        assert isinstance(handle, _Handle)
        if handle.hangs:
            threading.Event().wait()
        self._wait(handle.ends)
        if handle.drawn is None:
            self._spoilt.clear()
            raise StepFaultError("the simulated device refused the step")
        assert handle.put_off is None, "its draws were not asked for"
        return StepResult(handle.epoch, handle.drawn, handle.seconds, handle.scored)

    def _compute(self, runs: list[Run]) -> _Wanted:
        """Cells and logits of runs whose input is known; the logits are valid until the next."""
        sequences: list[int] = []
        wanted: list[tuple[int, Sampler]] = []
        rows = 0
        for run in runs:
            last = self._advance(run)
            if not run.draws:
                continue
            if rows == len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._fill(self._rows[rows], run, last)
            for one in run.draws:
                sequences.append(one.seq)
                wanted.append((rows, one.sampler))
            rows += 1
        return _Wanted(self._rows[:rows], sequences, wanted)

    def _drawn(self, wanted: _Wanted) -> list[tuple[int, Drawn]]:
        drawn = draw(wanted.logits, wanted.rows) if wanted.rows else []
        found = list(zip(wanted.sequences, drawn, strict=True))
        self._tokens = {seq: one.token for seq, one in found}
        return found

    def _score(self, run: Run, following: Tokens) -> list[Drawn]:
        """How likely what follows each token of a run that has been computed was."""
        size = self._caps.block_tokens
        rows = np.zeros((len(following), self._caps.vocab_size), np.float32)
        for at, row in enumerate(rows):
            end = run.start + at
            last = int(self._cells[run.block_table[end // size], end % size])
            self._fill(row, replace(run, tokens=run.tokens[: at + 1]), last)
        return score(rows, following, run.top)

    def _known(self, run: Run, *, ahead: bool) -> Run:
        """A run whose input the step before has drawn, with that token, and where it draws
        ``ahead``, as of after it."""
        if run.tokens.item(0) != PENDING:
            return run
        token = max(0, self._tokens[run.seq])  # what follows a NaN is of no use to anybody
        draws = run.draws
        if ahead:
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
        """The logits after a run."""
        if run.seq in self.faults.nan_sequences:
            row.fill(np.nan)
            return
        length = run.start + len(run.tokens)
        full = run.block_table[: length // self._caps.block_tokens]
        pages = int(self._cells[full, -1].sum()) if full.size else 0
        self._logits.fill(row, mix(last ^ pages), run.tokens.item(-1))
