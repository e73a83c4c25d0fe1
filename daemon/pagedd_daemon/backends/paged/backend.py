"""The paged engine as a backend: launches steps, hands results back, moves pages.

On CUDA everything that computes is on one stream, in the order of `PagedBackend.launch`; the host
runs ahead of it by up to two steps. A second step may name tokens that the first has not drawn yet:
the device puts them in. On the CPU the same code computes while `launch` is called.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from kvpager.types import (
    Adopt,
    CopyBlock,
    Grown,
    Instruction,
    Load,
    PageName,
    Shrunk,
    Spill,
    Store,
    Tier,
)
from pagedd_daemon.backends.base import (
    PENDING,
    Capabilities,
    DeviceMemoryError,
    Elastic,
    Embedder,
    Handle,
    MemoryReport,
    Run,
    Step,
    StepResult,
    TransferResult,
)
from pagedd_daemon.backends.paged.arena import PADDING_BLOCKS, Arena
from pagedd_daemon.backends.paged.caches import CompileCounter
from pagedd_daemon.backends.paged.device_memory import free_bytes, ran_out, total_bytes
from pagedd_daemon.backends.paged.drawing import (
    Drawer,
    Flight,
    PutOff,
    Results,
    waits_for_grammars,
)
from pagedd_daemon.backends.paged.layout import Buckets, Layout, StepShape, layout
from pagedd_daemon.backends.paged.prompts import score_prompts
from pagedd_daemon.backends.paged.runner import Model, Runner
from pagedd_daemon.backends.paged.sampling import CountTable, Wanted, stage
from pagedd_daemon.backends.paged.slabs import RamTier
from pagedd_daemon.backends.paged.staging import HostBuffer, fill
from pagedd_daemon.backends.paged.startup import LoadReport
from pagedd_daemon.backends.paged.transfers import Transfers
from pagedd_daemon.engine.tiers.disk import filled
from pagedd_daemon.engine.tiers.opening import Disk
from pagedd_kernels import copy_blocks

log = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2
LEAST_PIECE_TOKENS = 256
"""A step that runs out of memory is computed in pieces, of no fewer tokens than these where any is
`PENDING`: as many as there may be sequences, so that all of those are in the first piece."""
_LEAST_KNOWN_TOKENS = 16
"""The same where all tokens are known."""
_STEPS_IN_PIECES = 50
"""After so many steps in pieces, pieces twice as large are tried: who took the memory may be gone.
"""


class PagedBackend:
    """See the module. Implements `pagedd_daemon.backends.base.Backend`."""

    def __init__(
        self,
        model: Model,
        arena: Arena,
        ram: RamTier,
        disk: Disk,
        caps: Capabilities,
        runner: Runner,
        buckets: Buckets | None,
        compiled: CompileCounter | None,
        report: LoadReport,
    ) -> None:
        """Use `pagedd_daemon.backends.paged.load`."""
        self._model = model
        self._arena = arena
        self._ram = ram
        self._disk = disk
        self._caps = caps
        self._runner = runner
        self._limits = runner.limits
        self._buckets = buckets
        self._compiled = compiled
        self.load_report = report
        """What loading took, part by part."""
        device = model.device
        self._cuda = device.type == "cuda"
        self._transfers = Transfers(arena.kv, ram, device, disk.tier)
        self._counts = CountTable(caps.vocab_size, device)
        size = runner.limits.buffer_bytes()
        # One more than steps in flight, so that writing the next step never waits.
        self._buffers = deque(
            HostBuffer(size, pinned=self._cuda) for _ in range(STEPS_IN_FLIGHT + 1)
        )
        self._drawer = Drawer(runner, self._counts, self._buffers)
        draws = runner.limits.sequences
        self._results = deque(Results(draws, cuda=self._cuda) for _ in range(STEPS_IN_FLIGHT + 1))
        self._layouts: dict[StepShape, Layout] = {}
        self._pending: dict[int, int] = {}
        self._in_flight = 0
        """Steps that were launched and not collected."""
        self._begun: Results | None = None
        self._weight_bytes = model.weight_bytes
        self._piece_tokens = caps.max_step_tokens
        self._in_pieces = 0
        """Steps since that was changed."""
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """See `Backend`."""
        return self._caps

    # ------------------------------------------------------------------------------------- memory

    @torch.inference_mode()
    def apply(self, instructions: Iterable[Instruction]) -> None:
        """See `Backend`. Block tables come with each step, so only copies are to be made."""
        copies: dict[int, int] = {}
        for instruction in instructions:
            match instruction:
                case CopyBlock(src=src, dst=dst):
                    if src in copies or copies.get(dst, src) != src:
                        self._copy_blocks(copies)
                    copies[dst] = src
                case Store() | Load() | Spill():
                    self._copy_blocks(copies)
                    self._transfers.submit(instruction)
                case Grown(gpu_blocks=blocks):
                    assert self.grow(blocks) >= blocks, "the pager was told of more than there is"
                case Shrunk(gpu_blocks=blocks):
                    self._copy_blocks(copies)
                    self._transfers.wait_fence()
                    self._arena.resize(blocks)
                    if self._arena.elastic:  # there is more room beside it
                        self._piece_tokens = self._caps.max_step_tokens
                case _:
                    pass
        self._copy_blocks(copies)

    def _copy_blocks(self, copies: dict[int, int]) -> None:
        """Carry out copies of blocks, ``dst -> src``, and forget them."""
        if copies:
            pairs = torch.tensor([list(copies.values()), list(copies)], pin_memory=self._cuda)
            pairs = pairs.to(self._model.device, non_blocking=True) + PADDING_BLOCKS
            copy_blocks(self._arena.kv, pairs[0], pairs[1])
            copies.clear()
            self._transfers.fence()

    embedder: Embedder | None = None
    """See `Backend`: it keeps no hidden states."""

    @property
    def elastic(self) -> Elastic | None:
        """See `Backend`."""
        return self if self._arena.elastic else None

    @property
    def total_bytes(self) -> int:
        """See `Elastic`."""
        return total_bytes(self._model.device)

    def free_bytes(self) -> int:
        """See `Elastic`."""
        return free_bytes(self._model.device)

    @property
    def there(self) -> int:
        """See `Elastic`."""
        return min(self._arena.blocks, self._caps.gpu_blocks)

    def grow(self, blocks: int) -> int:
        """See `Elastic`."""
        self._arena.resize(max(blocks, self._arena.blocks))
        self._transfers.fence()
        return self.there

    def poll_transfers(self) -> list[TransferResult]:
        """See `Backend`."""
        return self._transfers.poll(idle=not self._in_flight)

    def commit(self, transfer: Store | Spill, names: Sequence[PageName | None]) -> None:
        """See `Backend`."""
        disk = self._disk.tier
        if isinstance(transfer, Store) and transfer.tier is Tier.RAM:
            for page, name in zip(transfer.pages, names, strict=True):
                if name is not None:
                    self._ram.commit(page.slot, name, page.tokens)
        elif disk is not None:
            for slot, name in zip(filled(transfer), names, strict=True):
                if name is not None:
                    disk.commit(slot, name)

    def adoptable(self) -> list[Adopt]:
        """See `Backend`."""
        found = [Adopt(Tier.RAM, self._ram.found())]
        if self._disk.tier is not None:
            found.append(self._disk.tier.adoptable())
        return found

    def troubles(self) -> list[str]:
        """See `Backend`."""
        return self._disk.troubles()

    def memory(self) -> MemoryReport:
        """See `Backend`."""
        return MemoryReport(self._weight_bytes, self._arena.bytes, self._ram.bytes)

    def counters(self) -> dict[str, int]:
        """See `Backend`; for people who measure.

        ``late_compiles`` are kernels that were compiled while requests waited: a defect each.
        ``start_…`` are the parts of loading the model.
        """
        return {
            "graphs": self._runner.graphs,
            "late_compiles": self._compiled.count if self._compiled is not None else 0,
            "locked_ram_slabs": self._ram.locked_slabs,
            **self.load_report.counters(),
            **self._disk.counters(),
        }

    def compiled_late(self) -> list[str]:
        """Names of the last kernels that `counters` counts as late."""
        return [] if self._compiled is None else list(self._compiled.names)

    def close(self) -> None:
        """See `Backend`."""
        if not self._closed:
            self._closed = True
            if self._cuda:
                torch.cuda.synchronize()
            self._drawer.close()
            self._transfers.close()
            self._disk.close()
            self._ram.close()
            self._runner.close()
            self._arena.close()

    # --------------------------------------------------------------------------------------- step

    @torch.inference_mode()
    def launch(self, step: Step) -> Flight:
        """See `Backend`."""
        begin = time.perf_counter()
        before = self._drawer.late_of()
        if before is not None:
            with self._drawing_late(before):
                self._drawer.finish_late()
            if before.refused:
                raise DeviceMemoryError(before.refused)  # there are no tokens to go on from
        self._results.rotate(-1)
        self._begun = results = self._results[0]
        flight = Flight(step.epoch, results, waits_for_grammars(step.runs))
        self._compute(step.runs, flight)
        if flight.waits:
            results.mark(1)
        else:
            results.end(self._runner.drawn, len(flight.draws))
        self._pending = {draw.seq: at for at, draw in enumerate(flight.draws)}
        self._in_flight += 1
        flight.seconds = 0.0 if self._cuda else time.perf_counter() - begin
        return flight

    @torch.inference_mode()
    def draw(self, handle: Handle) -> None:
        """See `Backend`."""
        assert isinstance(handle, Flight)
        if handle.put_off:
            with self._drawing_late(handle):
                self._drawer.begin_late(handle)

    @torch.inference_mode()
    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`."""
        assert isinstance(handle, Flight)
        self._in_flight -= 1
        if self._drawer.late_of() is handle:
            with self._drawing_late(handle):
                self._drawer.finish_late()
        return handle.collected()

    @contextmanager
    def _drawing_late(self, flight: Flight) -> Iterator[None]:
        """Launch draws that were put off; without memory their step has failed."""
        begin = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            if not ran_out(error):
                raise
            torch.cuda.empty_cache()
            self._counts.forget(draw.sampler for draw in flight.draws)
            flight.refused = f"the device is out of memory: {error}"
        flight.seconds += 0.0 if self._cuda else time.perf_counter() - begin

    def _compute(self, runs: Sequence[Run], flight: Flight) -> None:
        """Compute the runs, in smaller pieces where memory runs out.

        Raises:
            DeviceMemoryError: It runs out with the smallest piece, too.
        """
        rest = runs
        least = 0
        while rest:
            if self._piece_tokens < LEAST_PIECE_TOKENS and not least:
                least = _least_piece(runs)
            piece, left = cut(rest, max(self._piece_tokens, least))
            try:
                self._compute_piece(piece, flight, last=not left)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                self._retreat(error, _least_piece(runs), flight)
            else:
                rest = left
        if self._piece_tokens < self._caps.max_step_tokens:
            self._advance()

    def _advance(self) -> None:
        """One more step has been computed, in pieces if need be."""
        self._in_pieces += 1
        if self._in_pieces == _STEPS_IN_PIECES:
            self._in_pieces = 0
            self._piece_tokens = min(2 * self._piece_tokens, self._caps.max_step_tokens)

    def _retreat(self, error: RuntimeError, least: int, flight: Flight) -> None:
        """Compute smaller pieces from now on; ``flight`` has the draws of the pieces before."""
        torch.cuda.empty_cache()
        if self._piece_tokens <= least:
            if not flight.waits:
                self._counts.forget(draw.sampler for draw in flight.draws)
            raise DeviceMemoryError(f"the device is out of memory: {error}") from error
        self._piece_tokens = max(self._piece_tokens // 2, least)
        self._in_pieces = 0
        log.warning("out of memory: steps in pieces of %d tokens", self._piece_tokens)

    def _compute_piece(self, runs: Sequence[Run], flight: Flight, *, last: bool) -> None:
        """Logits of some runs, and what is drawn from them, added to ``flight``."""
        where, captured = self._layout(runs)
        buffer = self._drawer.next_buffer()
        host = buffer.arrays(where, keep=captured)
        filled = fill(
            host, runs, self._pending, self._limits.block_tokens, decode=where.shape.decode
        )
        end = where.tables + -(-filled.blocks // 4) * 16
        asked = [(row, draw) for row, at in enumerate(filled.drawing) for draw in runs[at].draws]
        wanted: list[Wanted] = []
        staged = None
        if asked and not flight.waits:
            wanted = [Wanted(row, draw.sampler, filled.ahead[row]) for row, draw in asked]
            staged = stage(wanted, self._counts, buffer.bytes, end)
            end = staged.end
        if self._begun is not None:
            self._begun.mark(0)
            self._begun = None
        buffer.copy_to(self._runner.inputs, end)
        try:
            logits = self._runner.run(where, filled.max_query)
            following = [run for run in runs if run.follows is not None]
            if following:
                flight.prompts.append(score_prompts(logits[len(filled.drawing) :], following))
            if staged is not None:
                self._drawer.draw(flight, logits, wanted, staged)
            elif asked:
                # The next piece would overwrite them.
                kept = logits if last else logits[: len(filled.drawing)].clone()
                flight.put_off.append(PutOff(kept, asked))
        except RuntimeError:
            if staged is not None and staged.counts is not None:
                self._counts.undo(wanted)
            raise
        flight.draws += [draw for _, draw in asked]

    def _layout(self, runs: Sequence[Run]) -> tuple[Layout, bool]:
        """Where the arrays of a step lie, and whether there is a graph for it."""
        tokens, count = sum(len(run.tokens) for run in runs), len(runs)
        decode = tokens == count and all(run.draws for run in runs)
        shape = self._buckets.fit(tokens, count, decode) if self._buckets is not None else None
        scored = sum(len(run.follows) for run in runs if run.follows is not None)
        if shape is None or (scored and count + scored > shape.rows):
            rows = scored + sum(1 for run in runs if run.draws)
            return layout(StepShape(tokens, count, rows, False)), False
        known = self._layouts.get(shape)
        if known is None:
            known = self._layouts[shape] = layout(shape)
        return known, True


def _least_piece(runs: Sequence[Run]) -> int:
    """Tokens of the smallest piece of a step."""
    ahead = any(run.tokens[0] == PENDING for run in runs)
    return LEAST_PIECE_TOKENS if ahead else _LEAST_KNOWN_TOKENS


def cut(runs: Sequence[Run], tokens: int) -> tuple[Sequence[Run], Sequence[Run]]:
    """The first ``tokens`` tokens of some runs, and what is left of them."""
    room = tokens
    for at, run in enumerate(runs):
        length = len(run.tokens)
        if length > room:
            if not room:
                return runs[:at], runs[at:]
            first, rest = run.follows, run.follows
            if first is not None and rest is not None:
                first, rest = first[:room], rest[room:] if len(rest) > room else None
            head = replace(run, tokens=run.tokens[:room], draws=(), follows=first)
            tail = replace(run, start=run.start + room, tokens=run.tokens[room:], follows=rest)
            return [*runs[:at], head], [tail, *runs[at + 1 :]]
        room -= length
    return runs, ()
