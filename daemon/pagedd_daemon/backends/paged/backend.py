"""The paged engine as a backend: launches steps, hands results back, moves pages.

On CUDA everything that computes is on one stream, in the order of `PagedBackend.launch`; the host
runs ahead of it by up to two steps. A second step may name tokens that the first has not drawn yet:
the device puts them in. On the CPU the same code computes while `launch` is called.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
    Draw,
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
from pagedd_daemon.backends.paged.layout import Buckets, Layout, StepShape, layout
from pagedd_daemon.backends.paged.prompts import PromptScores, joined, score_prompts
from pagedd_daemon.backends.paged.runner import Model, Runner
from pagedd_daemon.backends.paged.sampling import CountTable, StagedDraw, Wanted, stage
from pagedd_daemon.backends.paged.slabs import RamTier
from pagedd_daemon.backends.paged.staging import HostBuffer, fill
from pagedd_daemon.backends.paged.startup import LoadReport
from pagedd_daemon.backends.paged.transfers import Transfers
from pagedd_daemon.engine.sampler import Drawn
from pagedd_daemon.engine.tiers.disk import filled
from pagedd_daemon.engine.tiers.opening import Disk
from pagedd_kernels import Sampled, copy_blocks, sample

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


@dataclass(frozen=True, slots=True)
class _Scored:
    """Log-probabilities of some draws on their way to the host, and from which draw on they are."""

    first: int
    logprobs: Tensor
    tops: tuple[Tensor, Tensor] | None


@dataclass(slots=True)
class _Results:
    """Where a step's results arrive."""

    tokens: Tensor
    """int32, one per draw."""
    begun: torch.cuda.Event | None
    done: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class _Handle:
    epoch: int
    draws: list[Draw]
    results: _Results
    scored: list[_Scored]
    prompts: list[PromptScores]
    seconds: float
    """On the CPU, where the work is done."""


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
        self._results = deque(self._make_results() for _ in range(STEPS_IN_FLIGHT + 1))
        self._layouts: dict[StepShape, Layout] = {}
        self._pending: dict[int, int] = {}
        self._begun: torch.cuda.Event | None = None
        self._weight_bytes = model.weight_bytes
        self._piece_tokens = caps.max_step_tokens
        self._in_pieces = 0
        """Steps since that was changed."""
        self._closed = False

    def _make_results(self) -> _Results:
        tokens = torch.zeros(self._limits.sequences, dtype=torch.int32, pin_memory=self._cuda)
        if not self._cuda:
            return _Results(tokens, None, None)
        # Waiting sleeps instead of spinning: the step behind this one keeps the device busy.
        done = torch.cuda.Event(enable_timing=True, blocking=True)
        return _Results(tokens, torch.cuda.Event(enable_timing=True), done)

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
        return self._transfers.poll()

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
            self._transfers.close()
            self._disk.close()
            self._ram.close()
            self._runner.close()
            self._arena.close()

    # --------------------------------------------------------------------------------------- step

    @torch.inference_mode()
    def launch(self, step: Step) -> _Handle:
        """See `Backend`."""
        begin = time.perf_counter()
        self._results.rotate(-1)
        results = self._results[0]
        self._begun = results.begun
        draws: list[Draw] = []
        scored: list[_Scored] = []
        prompts: list[PromptScores] = []
        self._compute(step.runs, draws, scored, prompts)
        count = len(draws)
        if count:
            results.tokens[:count].copy_(self._runner.drawn[:count], non_blocking=True)
        if results.done is not None:
            results.done.record()
        self._pending = {draw.seq: at for at, draw in enumerate(draws)}
        seconds = time.perf_counter() - begin
        return _Handle(step.epoch, draws, results, scored, prompts, seconds)

    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`."""
        assert isinstance(handle, _Handle)
        results, seconds = handle.results, handle.seconds
        if results.done is not None and results.begun is not None:
            results.done.synchronize()
            seconds = results.begun.elapsed_time(results.done) * 1e-3
        tokens = results.tokens[: len(handle.draws)].tolist()
        drawn = [(draw.seq, Drawn(token)) for draw, token in zip(handle.draws, tokens, strict=True)]
        for part in handle.scored:
            _add_logprobs(drawn, handle.draws, part)
        told = joined(handle.prompts)
        return StepResult(handle.epoch, drawn, seconds, told)

    def _compute(
        self,
        runs: Sequence[Run],
        draws: list[Draw],
        scored: list[_Scored],
        prompts: list[PromptScores],
    ) -> None:
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
                self._compute_piece(piece, draws, scored, prompts)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                self._retreat(error, _least_piece(runs), draws)
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

    def _retreat(self, error: RuntimeError, least: int, draws: Sequence[Draw]) -> None:
        """Compute smaller pieces from now on; ``draws`` are those of the pieces before."""
        torch.cuda.empty_cache()
        if self._piece_tokens <= least:
            self._counts.forget(draw.sampler for draw in draws)
            raise DeviceMemoryError(f"the device is out of memory: {error}") from error
        self._piece_tokens = max(self._piece_tokens // 2, least)
        self._in_pieces = 0
        log.warning("out of memory: steps in pieces of %d tokens", self._piece_tokens)

    def _compute_piece(
        self,
        runs: Sequence[Run],
        draws: list[Draw],
        scored: list[_Scored],
        prompts: list[PromptScores],
    ) -> None:
        """Logits of some runs, and what is drawn from them, added to ``draws``."""
        where, captured = self._layout(runs)
        self._buffers.rotate(-1)
        buffer = self._buffers[0]
        buffer.wait()
        host = buffer.arrays(where, keep=captured)
        filled = fill(
            host, runs, self._pending, self._limits.block_tokens, decode=where.shape.decode
        )
        end = where.tables + -(-filled.blocks // 4) * 16
        asked = [(row, draw) for row, at in enumerate(filled.drawing) for draw in runs[at].draws]
        wanted = [Wanted(row, draw.sampler, filled.ahead[row]) for row, draw in asked]
        staged = stage(wanted, self._counts, buffer.bytes, end)
        if self._begun is not None:
            self._begun.record()
            self._begun = None
        buffer.copy_to(self._runner.inputs, staged.end)
        try:
            logits = self._runner.run(where, filled.max_query)
            following = [run for run in runs if run.follows is not None]
            if following:
                prompts.append(score_prompts(logits[len(filled.drawing) :], following))
            if not wanted:
                return
            sampled = self._draw(logits, wanted, staged)
        except RuntimeError:
            if staged.counts is not None:
                self._counts.undo(wanted)
            raise
        first, count = len(draws), len(wanted)
        self._runner.drawn[first : first + count] = sampled.tokens
        if sampled.logprobs is not None:
            scored.append(self._send_logprobs(first, sampled))
        draws += [draw for _, draw in asked]

    def _draw(self, logits: Tensor, wanted: Sequence[Wanted], staged: StagedDraw) -> Sampled:
        rows = [one.row for one in wanted]
        if len(rows) > rows[-1] + 1:  # several draws from one row
            index = torch.tensor(rows, pin_memory=self._cuda)
            logits = logits[index.to(logits.device, non_blocking=True)]
        return sample(logits[: len(rows)], staged.params(self._runner.inputs))

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

    def _send_logprobs(self, first: int, sampled: Sampled) -> _Scored:
        def send(values: Tensor) -> Tensor:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._cuda)
            return host.copy_(values, non_blocking=True)

        assert sampled.logprobs is not None
        tops = None
        if sampled.top_tokens is not None and sampled.top_logprobs is not None:
            tops = send(sampled.top_tokens), send(sampled.top_logprobs)
        return _Scored(first, send(sampled.logprobs), tops)


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


def _add_logprobs(drawn: list[tuple[int, Drawn]], draws: Sequence[Draw], part: _Scored) -> None:
    """Complete what was drawn where log-probabilities were asked for."""
    values = part.logprobs.tolist()
    tops = [t.tolist() for t in part.tops] if part.tops is not None else None
    for at, value in enumerate(values, start=part.first):
        seq, one = drawn[at]
        asked = draws[at].sampler.params.logprobs
        if asked < 0 or one.token < 0:
            continue
        best: tuple[tuple[int, float], ...] = ()
        if tops is not None:
            row = at - part.first
            best = tuple(zip(tops[0][row][:asked], tops[1][row][:asked], strict=True))
        drawn[at] = seq, Drawn(one.token, value, best)
