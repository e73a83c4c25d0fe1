"""Who takes part in the next step: iteration-level scheduling over the paged pool.

There are no prefill and decode phases. A step holds, in this order: the next token of everybody who
decodes, sequences that come back from a lower tier, and chunks of prompts, cut so that the step
stays within its time. Decodes get their room first, by preempting the least important sequence if
need be: a full pool pages somebody out and never fails a request.

Where the backend computes by itself a step is planned while the one before it runs. Then a sequence
has its place in a step before its token is known, and when that token ends it, the place was in
vain: what was computed there is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from kvpager.types import (
    Admit,
    Admitted,
    DeferReason,
    Deferred,
    Denied,
    Fork,
    Free,
    Instruction,
    Preempt,
    Preempted,
    Pressure,
    PriorityClass,
    Reserve,
    Reserved,
    Resume,
    Runnable,
    StepFailed,
    StepLaunched,
    StepRetired,
    Tokens,
    Truncate,
)
from pagedd_daemon.backends.base import PENDING, Capabilities, Draw, Run, Step
from pagedd_daemon.engine.pace import Pace
from pagedd_daemon.engine.pool import Pool
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.engine.stepcost import StepCost
from pagedd_daemon.engine.stretch import Stretch, steps_ahead
from pagedd_daemon.engine.turns import Candidate, Turns
from pagedd_daemon.engine.work import (
    Request,
    Sequence,
    SequenceState,
    TokenBuffer,
    WaitingQueue,
)

_TOO_LARGE = (DeferReason.POOL, DeferReason.QUOTA)
"""What keeps a sequence out for itself, whatever room others leave."""
_LEAST_CHUNK = 32
"""Prompt tokens of a step at least: llama.cpp computes chunks of 64 at full speed, 32 at 85 %."""
_ROOM_TOKENS = 256
"""Generated tokens a buffer has room for from the start; it doubles when they are used up."""
_NOT_DRAWN = np.array([PENDING], np.int32)
_NOT_DRAWN.flags.writeable = False


class Scheduler:
    """Queues, running sequences and the plan of each step. Owns nothing of the model's maths."""

    def __init__(self, pool: Pool, capabilities: Capabilities) -> None:
        self._pool = pool
        self._caps = capabilities
        self._waiting = WaitingQueue()
        self.turns = Turns(pool.pager)
        """Whose turn it is, wherever more ask than there is room for."""
        self._sequences: dict[int, Sequence] = {}
        self._preempted: list[Sequence] = []
        self._evicted: set[int] = set()
        """Paged out since the decodes of this plan got their room."""
        self._next_seq = 0
        self._epoch = 0
        self._flights: deque[list[tuple[Sequence, int]]] = deque()
        """Who takes part in each step in flight, with how many tokens; the oldest step first."""
        self._stretch: Stretch | None = None
        self._changed = True
        self._shrunk = False
        self._at_ceiling: frozenset[int] = frozenset()
        """Sequences that were refused room last, since their namespace has all it may have."""
        self.cost = StepCost()
        self.started: list[Request] = []
        """Requests whose prompt began to be computed since the caller last cleared this."""
        self.denied: list[tuple[Request, Denied]] = []
        """Requests that can never fit, until the caller clears this."""
        self.stranded: list[Sequence] = []
        """Sequences alone in a full pool, which cannot grow; until the caller clears this."""

    # -------------------------------------------------------------------------- what may happen

    def add(self, request: Request) -> None:
        """Queue a request behind those of its app and class."""
        self._waiting.add(request)
        self.wake()

    def wake(self) -> None:
        """Something outside changed (a paused request goes on): look at the queue again."""
        self._end_stretch()
        self._changed = True

    def resize(self, gpu_blocks: int) -> None:
        """The first tier may use ``gpu_blocks`` blocks from now on.

        The backend hears `Grown` at once, `Shrunk` when nothing uses what is taken away any more.

        Raises:
            kvpager.ImpossibleEventError: It was made with fewer.
        """
        self.wake()
        self._settle(self._pool.handle(Pressure(gpu_blocks)))
        self._shrunk = gpu_blocks < self._caps.gpu_blocks

    def withdraw(self, request: Request) -> bool:
        """Take a request off the queue; False if it is not waiting."""
        return self._waiting.remove(request)

    def fork(self, parent: Sequence) -> list[Sequence]:
        """The other samples of a request whose prompt was just computed, sharing all its blocks."""
        request = parent.request
        known = parent.tokens.view(0, len(parent.tokens))
        children = [
            Sequence(self._take_id(), request, i, parent.sampler.fork(i), _buffer(request, known))
            for i in range(1, request.samples)
        ]
        self._pool.handle(Fork(parent.seq, tuple(child.seq for child in children)))
        for child in children:
            child.computed = parent.computed
            child.charged = parent.charged
            self._sequences[child.seq] = child
            request.sequences[child.index] = child
        return children

    def end(
        self, sequence: Sequence, *, keep_tokens: int | None = None, cache: bool = True
    ) -> None:
        """A sequence is over; what it computed (its first ``keep_tokens``) stays in the cache, but
        for what cannot be trusted (not ``cache``)."""
        self._end_stretch()
        known = len(sequence.tokens)
        keep = known if keep_tokens is None else min(keep_tokens, known)
        self.turns.overrun(sequence.request, known - keep)
        if keep < sequence.computed:
            if sequence.state in (SequenceState.RUNNING, SequenceState.LEAVING):
                self._settle(self._pool.handle(Truncate(sequence.seq, keep)))
            sequence.computed = keep
        self._sequences.pop(sequence.seq)
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        sequence.state = SequenceState.ENDED
        self._settle(self._pool.handle(Free(sequence.seq, cache)))
        self._changed = True

    # ------------------------------------------------------------------------------ what it holds

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no request lives."""
        return not self._sequences and self.waiting == 0

    def sequences(self) -> Iterable[Sequence]:
        """The live sequences, oldest first."""
        return self._sequences.values()

    def queued(self) -> Iterable[Request]:
        """The waiting requests, by class."""
        return iter(self._waiting)

    # ------------------------------------------------------------------------------------- a step

    def plan(self, now: float) -> Step | None:
        """The next step, its room reserved, or None if nobody can run now.

        It is in flight from now on, until `retire` or `fail`.
        """
        if self._stretch is not None:
            return self._stretch_step(self._stretch)
        self.settle()
        decodes = self.turns.survey(self._waiting, self._sequences.values(), now)
        if self._shrunk:
            self._give_way()
            decodes = [s for s in decodes if s.runs]
        pace = self.turns.pace()
        decodes = self.turns.decoding(decodes, pace, self.cost.decodes_within(pace.decode_s))
        ready, pressed = self._make_room(decodes)
        self._evicted.clear()
        if self._let_in(now, pressed=pressed) or pressed:
            # Whoever was paged out, and perhaps came back at once, has lost the room it had; and
            # newcomers may be in a hurry.
            ready = [s for s in ready if s.runs and s.seq not in self._evicted]
            self.turns.look(self._sequences.values())
            pace = self.turns.pace()
            ready = self.turns.decoding(ready, pace, self.cost.decodes_within(pace.decode_s))
        chunks = self._chunks(ready, pace)
        if not ready and not chunks:
            return None
        if ready and not chunks and (ahead := self._room_ahead(ready)) > 1:
            return self._begin_stretch(ready, ahead)
        return self._launch([*((s, 1) for s in ready), *chunks])

    def settle(self) -> None:
        """Hear of transfers that have ended."""
        if self._pool.transfers_in_flight:
            self._settle(self._pool.settle())
            self._changed = True

    @property
    def in_stretch(self) -> bool:
        """Whether the step just planned is one of a stretch, so that nothing needs to be decided
        before the next."""
        return self._stretch is not None

    @property
    def stretch_left(self) -> int:
        """Steps of the stretch that have not retired."""
        return 0 if self._stretch is None else self._stretch.left

    @property
    def in_flight(self) -> int:
        """Steps that were planned and are not over."""
        return len(self._flights)

    @property
    def launched(self) -> list[Sequence]:
        """The sequences of the oldest step in flight, in the order of its runs."""
        return [sequence for sequence, _ in self._flights[0]]

    def retire(self, step: Step, seconds: float) -> None:
        """The oldest step in flight is done: its tokens are in the pool."""
        parts = self._flights.popleft()
        if self._stretch is not None:
            self.cost.observe(len(step.runs), 0, seconds)
            if self._stretch.step_done():
                self._end_stretch()
            return
        self.turns.retired()
        for run, (sequence, _) in zip(step.runs, parts, strict=True):
            if run.draws and sequence.drawing:
                sequence.drawing -= 1  # a later step in flight may be drawing, too
            if run.draws and sequence.state is SequenceState.ENDED:
                self.turns.overrun(sequence.request, len(run.draws))
        tokens = tuple(
            _inputs(run, sequence) for run, (sequence, _) in zip(step.runs, parts, strict=True)
        )
        self._settle(self._pool.handle(StepRetired(step.epoch, tokens)))
        decodes = sum(1 for run in step.runs if len(run.tokens) == 1)
        prefill = sum(len(run.tokens) for run in step.runs if len(run.tokens) > 1)
        self.cost.observe(decodes, prefill, seconds)
        if prefill:
            self._changed = True
            if rate := self.cost.prefill_tokens_per_s:
                self._pool.pager.observe(prefill_tokens_per_s=rate)

    def fail(self, step: Step) -> list[Sequence]:
        """The oldest step in flight was refused: its sequences stand where they stood before it.

        So does, for them, a later step that was launched upon it. Returns them.
        """
        parts = self._flights.popleft()
        if self._stretch is None:
            self.turns.failed()
        for run, (sequence, _) in zip(step.runs, parts, strict=True):
            sequence.computed = min(sequence.computed, run.start)
            sequence.drawing = 0
        stretch = self._stretch
        if stretch is not None and stretch.done:
            self._end_stretch()
        else:
            self._stretch = None
            self._settle(self._pool.handle(StepFailed(step.epoch)))
        return [sequence for sequence, _ in parts]

    # ---------------------------------------------------------------------------------- stretches

    def _room_ahead(self, ready: list[Sequence]) -> int:
        """Steps that these sequences alone can take before anything needs to be decided."""
        if self._caps.asynchronous or self._preempted or self.waiting:
            return 1
        if self._pool.transfers_in_flight:
            return 1
        ahead = steps_ahead(ready, self._caps.context_tokens)
        if ahead > 1 and self._reserve(ready, [ahead] * len(ready)):
            return 1
        return ahead

    def _begin_stretch(self, ready: list[Sequence], steps: int) -> Step:
        self._announce_step([(s, steps) for s in ready])
        first = Step(self._epoch, [self._run(sequence, 1) for sequence in ready])
        self._stretch = Stretch(first, ready, steps)
        return self._stretch_step(self._stretch)

    def _stretch_step(self, stretch: Stretch) -> Step:
        self._flights.append(stretch.parts)
        return stretch.next_step()

    def _end_stretch(self) -> None:
        """Tell the pager what the stretch has computed, all of it or not."""
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            return
        if stretch.done:
            self.turns.decoded((s for s, _ in stretch.parts), stretch.epoch, stretch.done)
            self._settle(self._pool.handle(StepRetired(stretch.epoch, stretch.tokens())))
        else:
            self._settle(self._pool.handle(StepFailed(stretch.epoch)))

    # ------------------------------------------------------------------------------- parts of plan

    def _make_room(self, decodes: list[Sequence]) -> tuple[list[Sequence], bool]:
        """Room for one more token of each; whom it could not be made for sits this step out."""
        pressed = False
        ready: list[Sequence] = []
        asking = decodes
        while asking:
            short = self._reserve(asking, [1] * len(asking))
            ready += [s for s in asking if s.seq not in short]
            asking = [s for s in asking if s.seq in short]
            if not asking:
                break
            pressed = True
            if self._pool.transfers_in_flight or self._somebody_leaves():
                break  # room may be on its way already, from a victim of the last step
            victim = self._victim(asking[0], must=not ready and not self._flights)
            if victim is None:
                break
            self._page_out(victim)
            self._settle(self._pool.settle())
            ready = [s for s in ready if s.state is SequenceState.RUNNING]
            asking = [s for s in asking if s.state is SequenceState.RUNNING]
        return ready, pressed

    def _give_way(self) -> None:
        """The pool has shrunk below what runs: page out the least important until the rest fits."""
        while self._shrunk and self._pool.pager.excess() and not self._somebody_leaves():
            running = [s for s in self._sequences.values() if s.removable]
            if not running:
                return
            self._page_out(self._choose(self.turns.victims(running)) or running[-1])
            self._settle(self._pool.settle())

    def _page_out(self, victim: Sequence) -> None:
        """Have it give its blocks back, as soon as no step in flight needs them."""
        for member in victim.request.sequences.values():
            if member.state is SequenceState.RUNNING:
                member.state = SequenceState.LEAVING
        self._settle(self._pool.handle(Preempt(victim.seq)))

    def _somebody_leaves(self) -> bool:
        return any(s.state is SequenceState.LEAVING for s in self._sequences.values())

    def _victim(self, asking: Sequence, *, must: bool) -> Sequence | None:
        """Whom to page out: a paused one (its client does not read), else by turn and by the
        pager's choice.

        The pager spares whoever was just resumed. With ``must`` nobody else could go on either, so
        then the newest other one is taken; if there is none, ``asking`` is stranded.
        """
        running = [s for s in self._sequences.values() if s.removable]
        if asking.seq in self._at_ceiling:
            # Only its own namespace can give it room.
            running = [s for s in running if s.request.root == asking.request.root]
            must = must or (running == [asking] and not self._flights)
        paused = [s for s in running if s.request.paused]
        others = [s for s in running if s is not asking]
        if others and (chosen := self._choose(self.turns.victims(paused or running))):
            return chosen
        if others and must:
            return others[-1]
        if must and self._shrunk and asking.seq not in self._at_ceiling:
            return asking  # until the pool grows again
        if must:
            self.stranded.append(asking)
        return None

    def _choose(self, groups: Iterable[list[int]]) -> Sequence | None:
        """The pager's choice in the first group in which it has one."""
        for group in groups:
            removable = [seq for seq in group if self._sequences[seq].removable]
            chosen = self._pool.pager.choose_victim(removable)
            if chosen is not None:
                return self._sequences[chosen]
        return None

    def _let_in(self, now: float, *, pressed: bool) -> bool:
        """Bring back paged-out sequences and let waiting requests in, by turn, while their whole
        texts fit.

        Asking costs a hash of the prompt, so after a refusal no request is asked again before
        something has changed: an end, a transfer, a computed chunk, a newcomer, a quantum of work.

        Returns:
            Whether anybody was asked.
        """
        ask = self._changed or (self.waiting > 0 and self.turns.due())
        if not (self._preempted or (ask and self.waiting)):
            return False
        if not pressed:
            self._changed = False
        walk = self.turns.walk(self._waiting, self._preempted, ask=ask, pressed=pressed)
        while (candidate := walk.next()) is not None:
            refusal = self._try(candidate, now)
            if refusal is not None and self._page_out_for(candidate, refusal, now):
                refusal = None
            walk.answer(refusal)
        return True

    def _try(self, candidate: Candidate, now: float) -> Deferred | None:
        if isinstance(candidate, Request):
            return self._try_admit(candidate, now)
        return self._try_resume(candidate)

    def _page_out_for(self, candidate: Candidate, refusal: Deferred, now: float) -> bool:
        """Make room for somebody who must not wait for it; whether that let it in.

        First those whose clients do not read. Then, while that helps, who yields to it.
        """
        if refusal.reason is DeferReason.PREFIX_IN_FLIGHT:
            self._page_out_paused(computing=True)
        if refusal.reason not in (DeferReason.BLOCKS, DeferReason.SEQUENCES):
            return False
        request = candidate if isinstance(candidate, Request) else candidate.request
        self._page_out_paused()
        running = [s for s in self._sequences.values() if s.removable]
        groups = self.turns.yielding(request, running, refusal)
        while True:
            if self._pool.transfers_in_flight or self._somebody_leaves():
                return False  # room may be on its way already
            victim = self._choose(groups)
            if victim is None:
                return False
            self.turns.paged_out(victim.request, request)
            self._page_out(victim)
            self._settle(self._pool.settle())
            self._changed = True
            if self._try(candidate, now) is None:
                return True

    def _try_resume(self, sequence: Sequence) -> Deferred | None:
        """Bring a sequence back, or say what is in its way.

        The samples of one request come back together, or wait until the first of them has computed
        the prompt they share again; nobody younger overtakes them meanwhile for want of room.
        """
        verdicts = self._pool.handle(Resume(sequence.seq))
        self._settle(verdicts)
        refusals = (v for v in verdicts if isinstance(v, Deferred) and v.seq == sequence.seq)
        refusal = next(refusals, None)
        sequence.request.outgrown = refusal is not None and refusal.reason in _TOO_LARGE
        return refusal

    def _page_out_paused(self, *, computing: bool = False) -> None:
        """Somebody waits for room: take it from sequences whose clients do not read.

        With ``computing`` only from those amid their prompts: somebody may wait for the prefix.
        """
        for sequence in list(self._sequences.values()):
            if computing and sequence.pending <= 1:
                continue
            if sequence.request.paused and sequence.removable:
                self._page_out(sequence)
                self._changed = True

    def _try_admit(self, request: Request, now: float) -> Deferred | None:
        """Admit one request, or say what is in its way."""
        seq = self._take_id()
        verdicts = self._pool.handle(
            Admit(
                seq,
                request.prompt,
                request.root,
                klass=request.klass,
                width=request.samples,
                group=request.rid,
            )
        )
        for verdict in verdicts:
            if isinstance(verdict, Deferred):
                return verdict
            if isinstance(verdict, Denied):
                self._waiting.remove(request)
                self.denied.append((request, verdict))
                return None
        self._waiting.remove(request)
        sampler = Sampler(
            request.sampling,
            request.stop,
            index=0,
            prompt=request.prompt,
            vocab_size=self._caps.vocab_size,
            eog_tokens=self._caps.eog_tokens,
            matcher=request.matcher,
        )
        sequence = Sequence(seq, request, 0, sampler, _buffer(request, request.prompt))
        self._sequences[seq] = sequence
        self._settle(verdicts)
        request.started_s = now
        request.cached_tokens = sequence.charged = sequence.computed
        request.sequences[0] = sequence
        self.started.append(request)
        return None

    def _take_id(self) -> int:
        self._next_seq += 1
        return self._next_seq

    def _chunks(self, ready: list[Sequence], pace: Pace) -> list[tuple[Sequence, int]]:
        """Chunks of prompts for this step, by turn, whole blocks where a prompt goes on."""
        block = self._caps.block_tokens
        most = self._caps.max_step_tokens - len(ready)
        least = min(_LEAST_CHUNK, most)
        budget = self.cost.prefill_budget(len(ready), most, least, pace.step_s)
        whole = self.cost.prefill_budget(len(ready), most, least, pace.whole_s)
        wanted: list[tuple[Sequence, int]] = []
        # Where the step brings an interactive app its first token, nobody else's prompt delays it.
        answered = PriorityClass.BACKGROUND
        for sequence, at_most in self.turns.prefilling():
            klass = sequence.request.klass
            if budget <= 0 or klass > answered:
                break
            if not wanted and sequence.computable <= whole:
                budget = max(budget, sequence.computable)
            count = min(sequence.computable, budget, at_most)
            if count < sequence.pending and count > block:
                count -= (sequence.computed + count) % block
            wanted.append((sequence, count))
            budget -= count
            if count == sequence.pending and klass is PriorityClass.INTERACTIVE:
                answered = klass
        if not wanted:
            return []
        short = self._reserve([s for s, _ in wanted], [n for _, n in wanted])
        chunks = [(s, n) for s, n in wanted if s.seq not in short]
        for s, n in wanted:
            # What came back with all that its namespace may have decodes one token further on,
            # and is refused there.
            if s.seq in self._at_ceiling and n > 1 and not self._reserve([s], [n - 1]):
                return [*chunks, (s, n - 1)]
        return chunks

    def _reserve(self, sequences: list[Sequence], counts: list[int]) -> set[int]:
        """Ask the pager for room; returns the sequences it had none for."""
        verdicts = self._pool.handle(Reserve(tuple(s.seq for s in sequences), tuple(counts)))
        for verdict in verdicts:
            if isinstance(verdict, Reserved):
                at_ceiling = (s.seq for s in verdict.short if s.reason is DeferReason.QUOTA)
                self._at_ceiling = frozenset(at_ceiling)
                return {shortage.seq for shortage in verdict.short}
        raise AssertionError("Reserve was not answered")

    def _launch(self, parts: list[tuple[Sequence, int]]) -> Step:
        """The step over ``parts``, announced to the pager."""
        self._announce_step(parts)
        step = Step(self._epoch, [self._run(sequence, count) for sequence, count in parts])
        self._flights.append(parts)
        for run, (sequence, count) in zip(step.runs, parts, strict=True):
            sequence.computed += count
            sequence.drawing += bool(run.draws)
        self.turns.charge(step, [sequence for sequence, _ in parts])
        return step

    def _announce_step(self, parts: list[tuple[Sequence, int]]) -> None:
        self._epoch += 1
        self._pool.handle(
            StepLaunched(self._epoch, tuple(s.seq for s, _ in parts), tuple(n for _, n in parts))
        )

    def _run(self, sequence: Sequence, count: int) -> Run:
        start = sequence.computed
        draws: tuple[Draw, ...] = ()
        if count == sequence.pending:
            draws = (Draw(sequence.seq, sequence.sampler),)
            if sequence.generated == 0 and sequence.request.samples > 1:
                others = range(1, sequence.request.samples)
                draws += tuple(Draw(sequence.seq, sequence.sampler.fork(i)) for i in others)
        known = start < len(sequence.tokens)
        return Run(
            sequence.seq,
            start,
            sequence.tokens.view(start, start + count) if known else _NOT_DRAWN,
            self._pool.pager.block_table(sequence.seq),
            draws,
        )

    # ------------------------------------------------------------------------------ what came back

    def _settle(self, instructions: list[Instruction]) -> None:
        """Take over what the pager decided about sequences."""
        for verdict in instructions:
            match verdict:
                case Admitted(seq=seq, computed=computed, loading=loading, until=until):
                    sequence = self._sequences[seq]
                    sequence.computed, sequence.until = computed, until
                    if sequence.state is SequenceState.PREEMPTED:
                        self._preempted.remove(sequence)
                    sequence.state = SequenceState.LOADING if loading else SequenceState.RUNNING
                case Runnable(seq=seq, computed=computed, until=until) if seq in self._sequences:
                    sequence = self._sequences[seq]
                    sequence.computed, sequence.until = computed, until
                    sequence.state = SequenceState.RUNNING
                case Preempted(seq=seq) if seq in self._sequences:
                    sequence = self._sequences[seq]
                    sequence.state, sequence.until = SequenceState.PREEMPTED, -1
                    self._preempted.append(sequence)
                    self._evicted.add(seq)
                case _:
                    pass


def _inputs(run: Run, sequence: Sequence) -> Tokens:
    """What a run's input was, now that it is known. Of a sequence that has ended, the pager keeps
    only what is known."""
    end = run.start + len(run.tokens)
    return sequence.tokens.view(run.start, end) if end <= len(sequence.tokens) else run.tokens


def _buffer(request: Request, known: Tokens) -> TokenBuffer:
    return TokenBuffer(known, min(request.stop.max_tokens, _ROOM_TOKENS))
