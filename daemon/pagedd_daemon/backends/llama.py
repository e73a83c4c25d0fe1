"""llama.cpp on the CPU, behind the pager.

One context with many sequences and one pool of cells. llama.cpp shares cells by token and knows no
blocks, so the pager's blocks are virtual: they decide who may run, who shares and who is swapped,
and `Holders` translates them. The cells in use are never more than the pager counts, since two
sequences that share a partial block share its cells too.

Pages go to RAM through a temporary sequence id: copy the membership of a range to it (no cell is
copied), save it, drop it. They come back the same way. Transfers are over when `apply` returns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from kvpager.types import (
    Adopt,
    Attach,
    CopyBlock,
    Instruction,
    Load,
    Page,
    PageName,
    Release,
    Spill,
    Store,
    Trim,
)
from pagedd_daemon.backends import llama_api as api
from pagedd_daemon.backends.base import (
    Capabilities,
    Elastic,
    Handle,
    MemoryReport,
    ModelLoadError,
    Run,
    Step,
    StepFaultError,
    StepResult,
    TransferResult,
)
from pagedd_daemon.backends.holders import Holders
from pagedd_daemon.backends.llama_embedder import LlamaEmbedder
from pagedd_daemon.backends.llama_pages import LlamaPages
from pagedd_daemon.engine.sampler import Drawn, Sampler, draw
from pagedd_daemon.engine.scoring import score
from pagedd_daemon.engine.tiers.extents import EXTENT_PAGES, Extents
from pagedd_daemon.engine.tiers.opening import Disk, DiskWishes, open_disk
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.records import bind
from pagedd_daemon.messages import Configure

BLOCK_TOKENS = 16
STEP_TOKENS = 512
"""More would only make steps longer: a prompt runs at 195 tok/s in chunks of 16, at 236 in chunks
of 64, at 222 in chunks of 512 (SmolLM2-135M Q4_1, one thread of a shared 2-core machine)."""
TEMPORARY_IDS = 4
"""Sequence ids kept back for saving, restoring and packing."""
_CONTEXTS = 4
"""Sequences of full length that the first tier has room for, unless memory is short."""
_MEMORY_SHARE = 0.25
"""Of the memory that is available, what the first tier may take by itself."""


@dataclass(slots=True)
class _Handle:
    step: Step
    rows: int
    status: int
    seconds: float


@dataclass(slots=True)
class _Repeated:
    """A decode step that may be launched again, a token further for each of its runs.

    Then most of the batch is filled, and `Holders` hears of its tokens once for all repetitions: at
    16 streams both took 150 µs a step, at one stream 25, with the cold caches that a step leaves.
    """

    step: Step
    tables: list[npt.NDArray[np.int32]]
    """Copies of the block tables: the views end with the pager's next event."""
    times: int = 0


class LlamaBackend:
    """See the module. Implements `pagedd_daemon.backends.base.Backend`."""

    elastic: Elastic | None = None
    """See `Backend`."""

    def __init__(
        self,
        model: api.Model,
        context: api.Context,
        embedder: LlamaEmbedder,
        caps: Capabilities,
        ram: RamStore,
        ram_bytes: int,
        disk: Disk,
    ) -> None:
        """Use `load`."""
        self._model = model
        self._context = context
        self._caps = caps
        self._free_ids = list(range(api.SEQUENCE_IDS - TEMPORARY_IDS - 1, -1, -1))
        self._ids: dict[int, int] = {}
        self._holders = Holders(caps.block_tokens)
        self._repeated: _Repeated | None = None
        window = model.window_tokens
        self._pages = LlamaPages(
            context,
            ram,
            ram_bytes,
            disk,
            block_tokens=BLOCK_TOKENS,
            block_bytes=caps.block_bytes,
            # Saving leaves out cells that the saved id's own window masks: extents must fit in it.
            extent_pages=max(1, min(EXTENT_PAGES, window // BLOCK_TOKENS or EXTENT_PAGES)),
            source=self._ids.get,
            landed=self._landed,
            target=self._id,
        )
        self.embedder = embedder
        self._closed = False

    @classmethod
    def load(
        cls, configure: Configure, progress: Callable[[float], None], notice: str = ""
    ) -> LlamaBackend:
        """Load the model and allocate the pool.

        Args:
            configure: ``kv_tokens`` 0 lets the memory of the machine decide.
            progress: Called with the fraction of the weights that is read.
            notice: Why the model is computed here and not on a GPU.

        Raises:
            ModelLoadError: The file is no model llama.cpp can serve in pages, or memory is short.
        """
        path = configure.model_path
        if Path(path).is_dir():
            raise ModelLoadError(
                f"{path} is a folder, and llama.cpp runs GGUF files: take one of the model, or "
                "--backend torch",
                {"path": path, "notice": notice},
            )
        if configure.kv_dtype not in api.KV_TYPES:
            raise ModelLoadError(
                f"KV type {configure.kv_dtype!r} is not served",
                {"kv_dtype": configure.kv_dtype, "served": sorted(api.KV_TYPES)},
            )
        try:
            model = api.Model(path, progress)
        except OSError as error:
            details = {"path": path, "messages": list(api.messages().recent)}
            raise ModelLoadError(str(error), details) from error
        reason = model.unsupported()
        if reason is not None:
            model.close()
            raise ModelLoadError(f"{path} cannot be served: {reason}", {"path": path})
        try:
            return cls._with_pool(model, configure, notice)
        except ModelLoadError:
            model.close()
            raise

    @classmethod
    def _with_pool(cls, model: api.Model, configure: Configure, notice: str) -> LlamaBackend:
        token_bytes = model.kv_values_per_token() * api.KV_TYPES[configure.kv_dtype][1]
        wanted = configure.context_tokens or model.context_tokens
        blocks = _choose_blocks(configure.kv_tokens, wanted, token_bytes)
        pool_bytes = blocks * BLOCK_TOKENS * token_bytes
        available = psutil.virtual_memory().available
        figures = {"kv_tokens": blocks * BLOCK_TOKENS, "kv_bytes": pool_bytes}
        if blocks < 2 or pool_bytes > available:
            raise ModelLoadError(
                f"a pool of {blocks * BLOCK_TOKENS} tokens takes {pool_bytes} bytes, "
                f"{available} are available",
                {**figures, "available_bytes": available},
            )
        threads = configure.threads or _physical_cores()
        # While an extent is being restored it takes cells beside those of the blocks.
        options = api.ContextOptions(
            cells=(blocks + EXTENT_PAGES) * BLOCK_TOKENS,
            step_tokens=STEP_TOKENS,
            threads=threads,
            kv_type=configure.kv_dtype,
            flash_attention=configure.flash_attention,
        )
        try:
            context = api.Context(model, options)
        except MemoryError as error:
            details = {**figures, "messages": list(api.messages().recent)}
            raise ModelLoadError(str(error), details) from error
        block_bytes = BLOCK_TOKENS * token_bytes
        binding = _binding(configure, block_bytes)
        disk = open_disk(DiskWishes.of(configure), binding, block_bytes, pieces=True)
        caps = Capabilities(
            name="llama.cpp",
            device=f"CPU ({threads} thread{'s' if threads > 1 else ''})",
            model_digest=configure.model_digest,
            kv_dtype=configure.kv_dtype,
            vocab_size=model.vocab_size,
            context_tokens=min(wanted, (blocks - 1) * BLOCK_TOKENS),
            eog_tokens=model.eog_tokens(),
            gpu_blocks=blocks,
            ram_blocks=Extents.slots_for(configure.ram_bytes, block_bytes),
            disk_blocks=disk.slots,
            disk_persists=disk.persists,
            block_tokens=BLOCK_TOKENS,
            block_bytes=block_bytes,
            max_sequences=api.SEQUENCE_IDS - TEMPORARY_IDS,
            max_step_tokens=STEP_TOKENS,
            asynchronous=False,
            keep_cached_on_gpu=False,
            constrains=True,
            notice=notice,
        )
        ram = RamStore(configure.ram_fd, configure.ram_bytes, binding, caps.ram_blocks)
        embedder = LlamaEmbedder(model, options)
        return cls(model, context, embedder, caps, ram, configure.ram_bytes, disk)

    @property
    def capabilities(self) -> Capabilities:
        """See `Backend`."""
        return self._caps

    # ------------------------------------------------------------------------------------- memory

    def apply(self, instructions: Iterable[Instruction]) -> None:
        """See `Backend`."""
        self._end_repeated()
        for instruction in instructions:
            match instruction:
                case Attach():
                    self._attach(instruction)
                case CopyBlock(seq=seq, index=index, dst=dst):
                    self._holders.put(seq, index, (dst,), self._holders.length(seq))
                case Store() | Load() | Spill():
                    self._pages.begin(instruction)
                case Trim(seq=seq, length=length):
                    self._pages.trimmed(seq, length)
                    if seq in self._ids:
                        self._context.remove(self._ids[seq], length)
                        self._holders.trim(seq, length)
                case Release(seq=seq):
                    self._pages.trimmed(seq, 0)
                    if seq in self._ids:
                        identity = self._ids.pop(seq)
                        self._context.remove(identity)
                        self._free_ids.append(identity)
                        self._holders.release(seq)
                case _:
                    pass

    def _id(self, seq: int) -> int:
        """The sequence's id in llama.cpp, given to it when it first holds something."""
        identity = self._ids.get(seq)
        if identity is None:
            assert self._free_ids, "the pager let in more sequences than there are ids"
            identity = self._ids[seq] = self._free_ids.pop()
        return identity

    def _attach(self, a: Attach) -> None:
        end = a.first * BLOCK_TOKENS + a.tokens
        mine = self._id(a.seq)
        for holder, start, stop in self._holders.find(a.seq, a.first, a.blocks, end):
            self._context.share(self._ids[holder], mine, start, stop)
        self._holders.put(a.seq, a.first, a.blocks, end)

    def _landed(self, seq: int, pages: Sequence[Page]) -> None:
        for page in pages:
            end = page.index * BLOCK_TOKENS + page.tokens
            self._holders.put(seq, page.index, (page.block,), end)

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        self._pages.commit(transfer, names)

    def adoptable(self) -> list[Adopt]:
        """See `Backend`."""
        return self._pages.adoptable()

    def poll_transfers(self) -> list[TransferResult]:
        """See `Backend`."""
        return self._pages.poll()

    def troubles(self) -> list[str]:
        """See `Backend`."""
        return self._pages.troubles()

    def memory(self) -> MemoryReport:
        """See `Backend`."""
        caps = self._caps
        pool = self._context.cells * caps.block_bytes // caps.block_tokens
        return MemoryReport(self._model.size_bytes, pool, self._pages.ram_bytes)

    def counters(self) -> dict[str, int]:
        """See `Backend`."""
        return self._pages.counters()

    def close(self) -> None:
        """See `Backend`."""
        if not self._closed:
            self._closed = True
            self._pages.close()
            self.embedder.rest()
            self._context.close()
            self._model.close()

    # --------------------------------------------------------------------------------------- step

    def launch(self, step: Step) -> _Handle:
        """See `Backend`. On the CPU the work is done when this returns."""
        begin = time.perf_counter()
        repeated = self._repeated
        if repeated is not None and repeated.step is step:
            tokens = rows = self._fill_again(step.runs)
            repeated.times += 1
            status = self._context.decode(tokens)
            if status != 0:
                self._undo(step)
        else:
            self._end_repeated()
            tokens, rows = self._fill(step.runs)
            status = self._context.decode(tokens)
            if status != 0:
                self._undo(step)
            else:
                for run in step.runs:
                    self._holders.grow(run.seq, run.block_table, run.start + len(run.tokens))
                if _decodes_only(step):
                    tables = [run.block_table.copy() for run in step.runs]
                    self._repeated = _Repeated(step, tables)
        return _Handle(step, rows, status, time.perf_counter() - begin)

    def _undo(self, step: Step) -> None:
        """The step failed: llama.cpp has removed some of its cells, or all or none."""
        self._end_repeated()
        for run in step.runs:
            self._context.remove(self._ids[run.seq], run.start)
            self._holders.trim(run.seq, run.start)

    def _end_repeated(self) -> None:
        """Tell `Holders` of what was computed by repeating a step."""
        repeated, self._repeated = self._repeated, None
        if repeated is not None and repeated.times:
            for run, table in zip(repeated.step.runs, repeated.tables, strict=True):
                self._holders.grow(run.seq, table, run.start + 1)

    def _fill_again(self, runs: list[Run]) -> int:
        """Write what differs where a decode step is repeated; returns its tokens."""
        tokens, positions = self._context.tokens_view, self._context.positions_view
        at = 0
        for run in runs:
            tokens[at] = run.tokens.item()
            positions[at] = run.start
            at += 1
        return at

    def _fill(self, runs: list[Run]) -> tuple[int, int]:
        """Write the batch; returns its tokens and the rows of logits it will give."""
        context = self._context
        total = rows = 0
        for run in runs:
            start, n = run.start, len(run.tokens)
            end = total + n
            context.tokens[total:end] = run.tokens
            context.positions[total:end] = start if n == 1 else np.arange(start, start + n)
            context.sequences[total:end] = self._id(run.seq)
            context.wanted[total:end] = 0
            if run.follows is not None:
                context.wanted[total : total + len(run.follows)] = 1
                rows += len(run.follows)
            if run.draws:
                context.wanted[end - 1] = 1
                rows += 1
            total = end
        assert total <= self._caps.max_step_tokens
        return total, rows

    def draw(self, handle: Handle) -> None:
        """See `Backend`: nothing is put off."""

    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`."""
        assert isinstance(handle, _Handle)
        step = handle.step
        if handle.status != 0:
            raise StepFaultError(f"llama_decode returned {handle.status}")
        begin = time.perf_counter()
        drawn: list[tuple[int, Drawn]] = []
        scored: list[tuple[int, list[Drawn]]] = []
        if handle.rows:
            logits = self._context.logits(handle.rows)
            seqs: list[int] = []
            wanted: list[tuple[int, Sampler]] = []
            row = 0
            for run in step.runs:
                if run.follows is not None:
                    n = len(run.follows)
                    scored.append((run.seq, score(logits[row : row + n], run.follows, run.top)))
                    row += n
                if run.draws:
                    for one in run.draws:
                        seqs.append(one.seq)
                        wanted.append((row, one.sampler))
                    row += 1
            drawn = list(zip(seqs, draw(logits, wanted), strict=True))
        seconds = handle.seconds + time.perf_counter() - begin
        return StepResult(step.epoch, drawn, seconds, scored)


def _decodes_only(step: Step) -> bool:
    """Whether each run is one token with a draw after it, and nothing else is asked."""
    return all(len(run.tokens) == 1 and run.draws and run.follows is None for run in step.runs)


def _binding(configure: Configure, block_bytes: int) -> bytes:
    """What the bytes of an extent depend on. Flash attention wants values not transposed."""
    return bind(
        "llama.cpp",
        api.VERSION,
        configure.model_digest,
        configure.kv_dtype,
        BLOCK_TOKENS,
        block_bytes,
        configure.flash_attention,
    )


def _physical_cores() -> int:
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return max(1, min(cores, len(os.sched_getaffinity(0))))


def _choose_blocks(kv_tokens: int, context_tokens: int, token_bytes: int) -> int:
    """Blocks of the first tier: as configured, or by the memory of the machine."""
    if kv_tokens:
        return kv_tokens // BLOCK_TOKENS
    affordable = int(psutil.virtual_memory().available * _MEMORY_SHARE) // token_bytes
    return min(_CONTEXTS * context_tokens, affordable) // BLOCK_TOKENS
