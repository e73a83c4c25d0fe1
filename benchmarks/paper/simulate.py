"""One run: a trace of requests through the real scheduler and pager, in simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from benchmarks.paper.backend import TimingBackend
from benchmarks.paper.model import POOL_SLOTS, TOKEN_BYTES, LatencyModel
from benchmarks.paper.policies import AnyPager, baseline, paged
from benchmarks.paper.workload import VOCABULARY, Arrival
from kvpager import Pager
from kvpager.baselines import StaticBatchPager
from kvpager.types import Admit, PriorityClass, Tokens
from pagedd_daemon.engine.pool import Pool
from pagedd_daemon.engine.scheduler import Scheduler
from pagedd_daemon.engine.work import Request, Sequence, SequenceState
from pagedd_daemon.params import SamplingParams, StopParams

if TYPE_CHECKING:
    from pagedd_daemon.backends.base import Step

_ROOT = bytes(32)
_SAMPLING = SamplingParams()
_LOOK_EVERY = 8
"""Steps between two looks at the pool."""
_NOISE = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is made with, beside its trace."""

    policy: str = "paged"
    """One of `benchmarks.paper.policies.POLICIES`."""
    model: LatencyModel = field(default_factory=LatencyModel)
    block_tokens: int = 16
    samples: int = 1
    swap: bool = True
    """Whether paging may swap to RAM; else it recomputes."""
    prefix_tokens: int = 0
    """Leading tokens that all prompts share, counted in their length."""


@dataclass(slots=True)
class Mean:
    """A mean over time."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float) -> None:
        """Take in a value that held for ``weight`` seconds."""
        self.total += value * weight
        self.weight += weight

    @property
    def value(self) -> float:
        """0 if nothing was added."""
        return self.total / self.weight if self.weight else 0.0


@dataclass(slots=True)
class Outcome:
    """What a run showed. Shares are of the whole pool, means over time."""

    normalized_s: float = 0.0
    """Mean over requests of end-to-end seconds per output token (paper, section 6.1)."""
    throughput: float = 0.0
    """Requests that ended per second, while the means were taken."""
    finished: int = 0
    seconds: float = 0.0
    """Simulated, from the first arrival to the last end."""
    steps: int = 0
    in_flight: float = 0.0
    """Requests in the running batch."""
    token_state: float = 0.0
    reserved: float = 0.0
    internal: float = 0.0
    external: float = 0.0
    """With what is free, as in figure 2's "external fragmentation and others"."""
    sharing_saved: float = 0.0
    """Blocks saved by sharing over blocks without it."""
    swapped: int = 0
    """Preemptions by swapping."""
    recomputed: int = 0
    """Preemptions that gave the memory up."""
    computed_again: int = 0
    """Tokens that had been computed before and were lost."""
    transfer_share: float = 0.0
    """Of the time, held up by swapping."""
    hit_tokens: int = 0


def saving(tables: Seq[npt.NDArray[np.int32]]) -> float:
    """Share of blocks that sharing saves: 1 - distinct blocks / entries of the block tables.

    The paper's definition (figure 15): blocks saved by sharing over blocks without it.
    """
    entries = np.concatenate(tables)
    return 1.0 - len(np.unique(entries)) / len(entries) if len(entries) else 0.0


class Simulation:
    """Runs one trace."""

    def __init__(self, setting: Setting, arrivals: Seq[Arrival], *, saturated: bool) -> None:
        """Ready to `run`.

        Args:
            setting: Policy and machine.
            arrivals: In order of time.
            saturated: Take the means only while the queue is not empty and a tenth of the
                requests have ended, so that neither filling nor draining counts; else over all.
        """
        self._setting = setting
        self._arrivals = deque(enumerate(arrivals))
        self._saturated = saturated
        self._warm = len(arrivals) // 10
        self._outputs = [arrival.output_tokens for arrival in arrivals]
        self._pager: AnyPager = self._make_pager()
        self._backend = TimingBackend(
            setting.model, POOL_SLOTS // setting.block_tokens, setting.block_tokens
        )
        # The baselines answer the pager's events with the pager's instructions.
        self._pool = Pool(self._backend, cast("Pager", self._pager))
        self._scheduler = Scheduler(self._pool, self._backend.capabilities)
        self._noise = np.random.default_rng(11).integers(0, VOCABULARY, _NOISE, dtype=np.int32)
        self._normalized: list[float] = []
        self._held_back: list[tuple[Request, int]] = []
        self._means = {name: Mean() for name in _MEANS}
        self._steps = 0
        self._computed = 0
        self._wanted = 0
        self._window: list[tuple[float, int]] = []
        """Time and requests ended, at the first and the last look."""

    def run(self) -> Outcome:
        """From the first arrival until everything has ended."""
        backend, scheduler = self._backend, self._scheduler
        while True:
            self._arrive()
            step = scheduler.plan(backend.now_s)
            assert not scheduler.denied
            for sequence in scheduler.stranded:
                self._end(sequence)
            scheduler.stranded.clear()
            if step is None:
                if not self._idle():
                    break
                continue
            self._steps += 1
            self._run_step(step)
        return self._outcome()

    def _run_step(self, step: Step) -> None:
        backend, pager = self._backend, self._pager
        if isinstance(pager, StaticBatchPager):
            backend.padding = pager.batch_width - len(step.runs)
        before = backend.now_s
        result = backend.collect(backend.launch(step))
        sequences = self._scheduler.launched
        self._scheduler.retire(step, result.seconds)
        if self._steps % _LOOK_EVERY == 0:
            self._look(backend.now_s - before)
        for run, sequence in zip(step.runs, sequences, strict=True):
            self._computed += len(run.tokens)
            if run.draws:
                if len(run.draws) > 1:
                    others = range(1, sequence.request.samples)
                    for child in self._scheduler.fork(sequence, others):
                        self._accept(child)
                self._accept(sequence)
        if isinstance(pager, StaticBatchPager) and pager.batch_width == 0:
            self._answer_batch()

    def _idle(self) -> bool:
        """Nobody can run: wait for what comes next. False if nothing will."""
        times = [self._backend.next_transfer_s()] if not self._scheduler.idle else []
        times += [self._arrivals[0][1].at_s] if self._arrivals else []
        known = [at for at in times if at is not None]
        if not known:
            assert self._scheduler.idle, "a request can neither run nor end"
            return False
        self._backend.wait(min(known))
        return True

    # ------------------------------------------------------------------------------------ requests

    def _make_pager(self) -> AnyPager:
        setting = self._setting
        if setting.policy != "paged":
            return baseline(setting.policy, self._known_output)
        pager = paged(setting.block_tokens, swap=setting.swap)
        rate = setting.model.pcie_bytes_per_s / TOKEN_BYTES
        pager.observe(load_tokens_per_s=rate, store_tokens_per_s=rate)
        return pager

    def _known_output(self, event: Admit) -> int:
        return self._outputs[event.group]

    def _arrive(self) -> None:
        now = self._backend.now_s
        while self._arrivals and self._arrivals[0][1].at_s <= now:
            number, arrival = self._arrivals.popleft()
            self._scheduler.add(
                Request(
                    rid=number,
                    app="paper",
                    klass=PriorityClass.NORMAL,
                    root=_ROOT,
                    prompt=self._prompt(number, arrival.prompt_tokens),
                    samples=self._setting.samples,
                    sampling=_SAMPLING,
                    stop=StopParams(max_tokens=arrival.output_tokens),
                    submitted_s=arrival.at_s,
                    open_samples=set(range(self._setting.samples)),
                )
            )

    def _prompt(self, number: int, tokens: int) -> Tokens:
        """Ids that no other request begins with, after what all of them share."""
        own = tokens - self._setting.prefix_tokens
        at = number * 769 % (_NOISE - 4096)
        mine = self._noise[at : at + own]
        if own == tokens:
            return mine
        return np.concatenate([self._noise[-self._setting.prefix_tokens :], mine])

    def _accept(self, sequence: Sequence) -> None:
        """One more token of a sequence; which one does not matter, but siblings' differ."""
        sequence.tokens.append((sequence.seq * 40_503 + len(sequence.tokens) * 31) % VOCABULARY)
        if sequence.generated >= sequence.request.stop.max_tokens:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        request = sequence.request
        self._wanted += sequence.computed
        if sequence.index:
            self._wanted -= len(request.prompt)
        else:
            self._wanted -= request.cached_tokens
        request.sequences.pop(sequence.index, None)
        request.open_samples.discard(sequence.index)
        self._scheduler.end(sequence)
        if not request.open_samples:
            if isinstance(self._pager, StaticBatchPager):
                self._held_back.append((request, request.stop.max_tokens))
            else:
                self._answer(request, request.stop.max_tokens)

    def _answer(self, request: Request, tokens: int) -> None:
        self._normalized.append((self._backend.now_s - request.submitted_s) / tokens)

    def _answer_batch(self) -> None:
        """A static batch is answered when all of it has ended."""
        for request, tokens in self._held_back:
            self._answer(request, tokens)
        self._held_back.clear()

    # --------------------------------------------------------------------------------------- means

    def _look(self, seconds: float) -> None:
        if self._saturated and not (
            len(self._normalized) >= self._warm and self._scheduler.waiting
        ):
            return
        now = (self._backend.now_s, len(self._normalized))
        self._window = [*self._window[:1], now]
        stats = self._pager.stats()
        size = self._setting.block_tokens
        running = [s for s in self._scheduler.sequences() if s.state is SequenceState.RUNNING]
        split = stats.split
        total = stats.gpu.total * (size if isinstance(self._pager, Pager) else 1)
        counted = split.token_state + split.reserved + split.internal
        values = {
            "in_flight": len({s.request.rid for s in running}),
            "token_state": split.token_state / total,
            "reserved": split.reserved / total,
            "internal": split.internal / total,
            "external": 1.0 - counted / total,
        }
        if self._setting.samples > 1 and running:
            tables = [self._pager.block_table(s.seq)[: -(-s.computed // size)] for s in running]
            values["sharing_saved"] = saving(tables)
        for name, value in values.items():
            self._means[name].add(value, seconds)

    def _outcome(self) -> Outcome:
        stats = self._pager.stats()
        assert self._window, "too few requests to fill the pool"
        means = {name: mean.value for name, mean in self._means.items()}
        (began_s, before), (ended_s, after) = self._window[0], self._window[-1]
        return Outcome(
            throughput=(after - before) / max(ended_s - began_s, 1e-9),
            normalized_s=float(np.mean(self._normalized)),
            finished=len(self._normalized),
            seconds=self._backend.now_s,
            steps=self._steps,
            swapped=stats.preemptions_swap,
            recomputed=stats.preemptions_recompute,
            computed_again=self._computed - self._wanted,
            transfer_share=self._backend.transfer_s / self._backend.now_s,
            hit_tokens=stats.hit_tokens,
            **means,
        )


_MEANS = (
    "in_flight",
    "token_state",
    "reserved",
    "internal",
    "external",
    "sharing_saved",
)
