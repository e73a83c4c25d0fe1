"""From a step's logits to its tokens on the host.

A step is drawn from right behind its forward pass, but where a grammar has to be told first what
the step before has drawn: then the pass runs meanwhile, and the draws follow by themselves, with
parameters as of then. What grammars let follow is worked out on threads while the host goes on to
plan the next step, before whose launch the draws are launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedd_daemon.backends.base import PENDING, DeviceMemoryError, Draw, Run, StepResult
from pagedd_daemon.backends.paged.prompts import PromptScores, joined
from pagedd_daemon.backends.paged.runner import Runner
from pagedd_daemon.backends.paged.sampling import CountTable, StagedDraw, Wanted, stage
from pagedd_daemon.backends.paged.staging import HostBuffer
from pagedd_daemon.engine.grammar import Matcher, write_words
from pagedd_daemon.engine.sampler import Drawn
from pagedd_kernels import Sampled, sample


@dataclass(frozen=True, slots=True)
class _Scored:
    """Log-probabilities of some draws on their way to the host, and from which draw on they are."""

    first: int
    logprobs: Tensor
    tops: tuple[Tensor, Tensor] | None


class Results:
    """Where a step's tokens arrive, and when the device has done what."""

    def __init__(self, draws: int, *, cuda: bool) -> None:
        """Room for ``draws`` tokens."""
        self.tokens = torch.zeros(draws, dtype=torch.int32, pin_memory=cuda)
        """One per draw."""
        self.marks: tuple[torch.cuda.Event, ...] = ()
        """Begin and end of the forward pass, then of the draws, where these were put off."""
        self.done: torch.cuda.Event | None = None
        if cuda:
            self.marks = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3))
            # Waiting sleeps instead of spinning: the step behind this one keeps the device busy.
            self.done = torch.cuda.Event(enable_timing=True, blocking=True)

    def mark(self, at: int) -> None:
        """The device comes by one of `marks`."""
        if self.marks:
            self.marks[at].record()

    def end(self, drawn: Tensor, count: int) -> None:
        """Fetch the first ``count`` tokens; nothing follows in this step."""
        if count:
            self.tokens[:count].copy_(drawn[:count], non_blocking=True)
        if self.done is not None:
            self.done.record()

    def wait(self, *, put_off: bool) -> float:
        """Until they are there; seconds that the device was busy with the step, 0 on the CPU."""
        if self.done is None:
            return 0.0
        self.done.synchronize()
        begin, computed, resumed = self.marks
        if not put_off:
            return float(begin.elapsed_time(self.done)) * 1e-3
        return float(begin.elapsed_time(computed) + resumed.elapsed_time(self.done)) * 1e-3


@dataclass(frozen=True, slots=True)
class PutOff:
    """Draws that wait: a draw and its row of the logits, each."""

    logits: Tensor
    asked: list[tuple[int, Draw]]


@dataclass(slots=True)
class Flight:
    """A step that was launched."""

    epoch: int
    results: Results
    waits: bool
    """Its draws are put off."""
    draws: list[Draw] = field(default_factory=list)
    put_off: list[PutOff] = field(default_factory=list)
    """Those of ``draws`` that have not happened, piece by piece."""
    scored: list[_Scored] = field(default_factory=list)
    prompts: list[PromptScores] = field(default_factory=list)
    refused: str = ""
    """There was no memory for its draws."""
    seconds: float = 0.0
    """On the CPU, where the work is done."""

    def collected(self) -> StepResult:
        """Wait for it.

        Raises:
            DeviceMemoryError: There was no memory for its draws.
        """
        if self.refused:
            raise DeviceMemoryError(self.refused)
        assert not self.put_off, "its draws were not asked for"
        seconds = self.seconds + self.results.wait(put_off=self.waits)
        tokens = self.results.tokens[: len(self.draws)].tolist()
        drawn = [(draw.seq, Drawn(token)) for draw, token in zip(self.draws, tokens, strict=True)]
        for part in self.scored:
            _add_logprobs(drawn, self.draws, part)
        return StepResult(self.epoch, drawn, seconds, joined(self.prompts))


@dataclass(frozen=True, slots=True)
class _Late:
    """Draws that were put off, and are to be launched next."""

    flight: Flight
    logits: Tensor
    wanted: list[Wanted]
    first: int
    """Of the draws of ``flight``."""
    staged: StagedDraw
    buffer: HostBuffer


def waits_for_grammars(runs: Sequence[Run]) -> bool:
    """Whether a draw of these runs has a grammar that must see a token first that is not known."""
    return any(
        run.draws and run.draws[0].sampler.matcher is not None and run.tokens[0] == PENDING
        for run in runs
    )


class Drawer:
    """Draws from logits on the device, with parameters that come from the host."""

    def __init__(self, runner: Runner, counts: CountTable, buffers: deque[HostBuffer]) -> None:
        """``buffers`` are used in turn: the first one was used last."""
        self._runner = runner
        self._counts = counts
        self._buffers = buffers
        self._pinned = runner.model.device.type == "cuda"
        self._late: _Late | None = None
        self._working: Future[None] | None = None
        """Writes what grammars let follow into the buffer of the above."""
        self._thread = ThreadPoolExecutor(1, "masks")

    def next_buffer(self) -> HostBuffer:
        """A buffer to write to."""
        self._buffers.rotate(-1)
        buffer = self._buffers[0]
        buffer.wait()
        return buffer

    def draw(
        self, flight: Flight, logits: Tensor, wanted: Sequence[Wanted], staged: StagedDraw
    ) -> None:
        """Draw with parameters that the device has, and add what comes of it to ``flight``, in
        whose list the draws are not yet."""
        sampled = sample(self._rows(logits, wanted), staged.params(self._runner.inputs))
        self._took(flight, len(flight.draws), sampled)

    def begin_late(self, flight: Flight) -> None:
        """Begin to draw what ``flight`` has put off; `finish_late` launches the last of it."""
        parts, flight.put_off = flight.put_off, []
        first = 0
        for part in parts:
            self.finish_late()
            wanted = [Wanted(row, draw.sampler, 0) for row, draw in part.asked]
            buffer = self.next_buffer()
            staged = stage(wanted, self._counts, buffer.bytes, 0, self._words)
            self._late = _Late(flight, part.logits, wanted, first, staged, buffer)
            first += len(wanted)

    def finish_late(self) -> None:
        """Launch what was begun, if anything: nothing else may be launched before.

        Raises:
            RuntimeError: There is no memory for it.
        """
        late, self._late = self._late, None
        if late is None:
            return
        words, self._working = self._working, None
        if words is not None:
            words.result()
        flight = late.flight
        if not late.first:
            flight.results.mark(2)
        # What the forward pass was told is needed no more.
        late.buffer.copy_to(self._runner.inputs, late.staged.end)
        params = late.staged.params(self._runner.inputs)
        self._took(flight, late.first, sample(self._rows(late.logits, late.wanted), params))
        if late.first + len(late.wanted) == len(flight.draws):
            flight.results.end(self._runner.drawn, len(flight.draws))

    def late_of(self) -> Flight | None:
        """Whose draws were begun and not finished."""
        return None if self._late is None else self._late.flight

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _words(self, matchers: Sequence[Matcher], words: npt.NDArray[np.int32]) -> None:
        """`write_words`, until `finish_late`."""
        self._working = self._thread.submit(write_words, matchers, words)

    def _rows(self, logits: Tensor, wanted: Sequence[Wanted]) -> Tensor:
        """The logits of each draw."""
        rows = [one.row for one in wanted]
        if len(rows) > rows[-1] + 1:  # several draws from one row
            index = torch.tensor(rows, pin_memory=self._pinned)
            logits = logits[index.to(logits.device, non_blocking=True)]
        return logits[: len(rows)]

    def _took(self, flight: Flight, first: int, sampled: Sampled) -> None:
        self._runner.drawn[first : first + len(sampled.tokens)] = sampled.tokens
        if sampled.logprobs is None:
            return

        def send(values: Tensor) -> Tensor:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._pinned)
            return host.copy_(values, non_blocking=True)

        tops = None
        if sampled.top_tokens is not None and sampled.top_logprobs is not None:
            tops = send(sampled.top_tokens), send(sampled.top_logprobs)
        flight.scored.append(_Scored(first, send(sampled.logprobs), tops))


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
