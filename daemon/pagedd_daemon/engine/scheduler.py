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
from collections.abc import Container, Iterable

import numpy as np

from kvpager.types import (
    Fork,
    Free,
    Pressure,
    PriorityClass,
    StepFailed,
    StepLaunched,
    StepRetired,
    Tokens,
    Truncate,
)
from pagedd_daemon.backends.base import (
    PENDING,
    SCORED_ROWS,
    Capabilities,
    Draw,
    Elastic,
    Run,
    Step,
)
from pagedd_daemon.engine.branches import Branches
from pagedd_daemon.engine.entrance import Entrance, token_buffer
from pagedd_daemon.engine.pace import Pace
from pagedd_daemon.engine.pool import Pool
from pagedd_daemon.engine.relief import Relief
from pagedd_daemon.engine.residents import Residents
from pagedd_daemon.engine.room import Room
from pagedd_daemon.engine.scoring import follows
from pagedd_daemon.engine.stepcost import LEAST_ASIDE, LEAST_DECODES, StepCost
from pagedd_daemon.engine.stretch import Stretch, steps_ahead
from pagedd_daemon.engine.turns import Turns
from pagedd_daemon.engine.work import (
    Request,
    Sequence,
    SequenceState,
    WaitingQueue,
)

_LEAST_CHUNK = 32
"""Prompt tokens of a step at least: llama.cpp computes chunks of 64 at full speed, 32 at 85 %."""
_LEAST_ATTENTIVE = 16
"""The same while a person may ask at any moment: 32 take 100 ms on two cores, which is most of what
another app may add to the time that person waits. Chunks of 16 run at 80 %."""
_NOT_DRAWN = np.array([PENDING], np.int32)
_NOT_DRAWN.flags.writeable = False


class Scheduler:
    """Queues, running sequences and the plan of each step. Owns nothing of the model's maths."""

    def __init__(
        self, pool: Pool, capabilities: Capabilities, elastic: Elastic | None = None
    ) -> None:
        self._pool = pool
        self._caps = capabilities
        self._waiting = WaitingQueue()
        self.turns = Turns(pool.pager)
        """Whose turn it is, wherever more ask than there is room for."""
        self._residents = Residents(pool)
        self._room = Room(self._residents, self.turns)
        self._relief = Relief(self._residents, self._room, self.turns, capabilities, elastic)
        self._entrance = Entrance(
            self._waiting, self._residents, self._room, self.turns, capabilities, self._relief
        )
        self.blocks = capabilities.gpu_blocks
        """Blocks that the first tier may use now."""
        self.branches = Branches(self, self._room)
        """The beams."""
        self._epoch = 0
        self._flights: deque[list[tuple[Sequence, int]]] = deque()
        """Who takes part in each step in flight, with how many tokens; the oldest step first."""
        self._stretch: Stretch | None = None
        self.cost = StepCost()
        self.started = self._entrance.started
        self.denied = self._entrance.denied
        self.stranded = self._room.stranded

    # -------------------------------------------------------------------------- what may happen

    def add(self, request: Request) -> None:
        """Queue a request behind those of its app and class."""
        self._waiting.add(request)
        self.wake()

    def wake(self) -> None:
        """Something outside changed (a paused request goes on): look at the queue again."""
        self._end_stretch()
        self._entrance.changed = True

    def resize(self, gpu_blocks: int) -> None:
        """The first tier may use ``gpu_blocks`` blocks from now on.

        The backend hears `Grown` at once, `Shrunk` when nothing uses what is taken away any more.

        Raises:
            kvpager.ImpossibleEventError: It was made with fewer.
        """
        self.wake()
        self._residents.tell(Pressure(gpu_blocks))
        self._room.shrunk = gpu_blocks < self._caps.gpu_blocks
        self.blocks = gpu_blocks

    def relieve(self, failed: list[Sequence], now: float) -> bool:
        """The device had no memory for a step of ``failed``, which stand where they stood before:
        have more memory or fewer sequences when they are tried again.

        Returns:
            Whether there was anything to give up.
        """
        fewer = self._relief.smaller(self.blocks, now)
        if fewer < self.blocks:
            self.resize(fewer)
            return True
        return self._relief.thin_out(failed, now)

    def withdraw(self, request: Request) -> bool:
        """Take a request off the queue; False if it is not waiting."""
        return self._waiting.remove(request)

    def fork(self, parent: Sequence, indices: Iterable[int]) -> list[Sequence]:
        """Further sequences of a request, numbered ``indices``, that go on from where ``parent`` is
        and share all its blocks. Nothing of ``parent`` may be in flight."""
        request = parent.request
        known = parent.tokens.view(0, len(parent.tokens))
        children = [
            Sequence(
                self._residents.take_id(),
                request,
                i,
                parent.sampler.fork(i),
                token_buffer(request, known),
            )
            for i in indices
        ]
        self._pool.handle(Fork(parent.seq, tuple(child.seq for child in children)))
        for child in children:
            child.computed = parent.computed
            child.charged = parent.charged
            self._residents.sequences[child.seq] = child
            request.sequences[child.index] = child
        return children

    def end(
        self,
        sequence: Sequence,
        *,
        keep_tokens: int | None = None,
        cache: bool = True,
        hold: bool = False,
    ) -> None:
        """A sequence is over; what it computed (its first ``keep_tokens``) stays in the cache, but
        for what cannot be trusted (not ``cache``), or is held in a lower tier (``hold``)."""
        self._end_stretch()
        known = len(sequence.tokens)
        keep = known if keep_tokens is None else min(keep_tokens, known)
        self.turns.overrun(sequence.request, known - keep)
        if keep < sequence.computed:
            if sequence.state in (SequenceState.RUNNING, SequenceState.LEAVING):
                self._residents.tell(Truncate(sequence.seq, keep))
            sequence.computed = keep
        self._residents.sequences.pop(sequence.seq)
        if sequence in self._residents.preempted:
            self._residents.preempted.remove(sequence)
        if hold:
            self._residents.hold(sequence)
        else:
            self._residents.tell(Free(sequence.seq, cache))
        sequence.state = SequenceState.ENDED
        self._entrance.changed = True

    def drop(self, rid: int) -> None:
        """What an ended request left behind is held no longer."""
        self._end_stretch()
        self._residents.drop(rid)
        self._entrance.changed = True

    # ------------------------------------------------------------------------------ what it holds

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether no request lives."""
        return not self._residents.sequences and self.waiting == 0

    def sequences(self) -> Iterable[Sequence]:
        """The live sequences, oldest first."""
        return self._residents.sequences.values()

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
        decodes = self.turns.survey(self._waiting, self._residents.sequences.values(), now)
        if self._room.shrunk:
            self._room.give_way()
            if self._pool.pager.vacating and self._pool.transfers_in_flight and not self._flights:
                return None  # the next step may need the memory that they give back
            decodes = self.turns.look(self._residents.sequences.values())
        pace = self.turns.pace()
        decodes = self.turns.decoding(decodes, pace, self._decodes_within(pace))
        ready, pressed = self._room.make(decodes, in_flight=bool(self._flights))
        short = {s.seq for s in decodes} - {s.seq for s in ready}
        self._residents.evicted.clear()
        if self._entrance.let_in(now, pressed=pressed) or pressed:
            # Where a copy is done at once, whoever was found in RAM takes part in this very step.
            self.settle()
            # Whoever was paged out, and perhaps came back at once, has lost the room it had; and
            # newcomers may be in a hurry.
            ready = [s for s in ready if s.runs and s.seq not in self._residents.evicted]
            self.turns.look(self._residents.sequences.values())
            pace = self.turns.pace()
            ready = self.turns.decoding(ready, pace, self._decodes_within(pace))
        chunks, blocked = self._chunks(ready, pace)
        if not ready and not chunks:
            if self._flights or self._pool.transfers_in_flight or self._room.somebody_leaves():
                return None
            ready = self._withheld(short, pace)
            if not ready:
                if not self.branches.untangle() and blocked is not None:
                    self._room.make_way(blocked)
                return None
        if ready and not chunks and (ahead := self._room_ahead(ready)) > 1:
            return self._begin_stretch(ready, ahead)
        return self._launch([*((s, 1) for s in ready), *chunks])

    def settle(self) -> None:
        """Hear of transfers that have ended."""
        if self._pool.transfers_in_flight:
            # Who asked before a block was merely written through would hear the same again.
            changed = self._pool.room_coming
            self._residents.hear()
            self._entrance.changed |= changed

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
        self._freed(parts)
        if self._stretch is not None:
            if self._stretch.step_done(seconds):
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
        self._residents.tell(StepRetired(step.epoch, tokens))
        decodes = sum(1 for run in step.runs if len(run.tokens) == 1)
        prefill = sum(len(run.tokens) for run in step.runs if len(run.tokens) > 1)
        self.cost.observe(decodes, prefill, seconds)
        if prefill:
            self._entrance.changed = True
            if rate := self.cost.prefill_tokens_per_s:
                self._pool.pager.observe(prefill_tokens_per_s=rate)

    def _freed(self, parts: list[tuple[Sequence, int]]) -> None:
        """Blocks of who has ended meanwhile are free only now, when no step touches them."""
        if any(sequence.state is SequenceState.ENDED for sequence, _ in parts):
            self._entrance.changed = True

    def fail(self, step: Step) -> list[Sequence]:
        """The oldest step in flight was refused: its sequences stand where they stood before it.

        So does, for them, a later step that was launched upon it. Returns them.
        """
        parts = self._flights.popleft()
        self._freed(parts)
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
            self._residents.tell(StepFailed(step.epoch))
        return [sequence for sequence, _ in parts]

    # ---------------------------------------------------------------------------------- stretches

    def _room_ahead(self, ready: list[Sequence]) -> int:
        """Steps that these sequences alone can take before anything needs to be decided."""
        if self._caps.asynchronous or self._residents.preempted or self.waiting:
            return 1
        if self._pool.room_coming:
            return 1
        ahead = steps_ahead(ready, self._caps.context_tokens)
        if ahead > 1 and self._room.reserve(ready, [ahead] * len(ready)):
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

    def advance(self, seconds: float) -> Step:
        """The step in flight of a stretch is done and took ``seconds``; its next one, in flight."""
        assert self._stretch is not None
        self._stretch.step_done(seconds)
        return self._stretch.next_step()

    def _end_stretch(self) -> None:
        """Tell the pager what the stretch has computed, all of it or not."""
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            return
        if stretch.done:
            for seconds in stretch.seconds:
                self.cost.observe(len(stretch.parts), 0, seconds)
            self.turns.decoded((s for s, _ in stretch.parts), stretch.epoch, stretch.done)
            self._residents.tell(StepRetired(stretch.epoch, stretch.tokens()))
        else:
            self._residents.tell(StepFailed(stretch.epoch))

    # ------------------------------------------------------------------------------- parts of plan

    def _decodes_within(self, pace: Pace) -> int:
        """Streams that decode beside whatever else this step computes."""
        person = pace.spared is PriorityClass.INTERACTIVE
        return self.cost.decodes_within(pace.decode_s, LEAST_ASIDE if person else LEAST_DECODES)

    def _withheld(self, short: set[int], pace: Pace) -> list[Sequence]:
        """Decodes for a step that would be empty: of apps that are ahead, and not ``short`` of
        room. Whom they were to wait for cannot go on for want of room, until they have ended.
        """
        decodes = self.turns.look(self._residents.sequences.values())
        able = [sequence for sequence in decodes if sequence.seq not in short]
        able = self.turns.decoding(able, pace, self._decodes_within(pace), ahead=True)
        return self._room.make(able, in_flight=False)[0] if able else []

    def _chunks(
        self, ready: list[Sequence], pace: Pace
    ) -> tuple[list[tuple[Sequence, int]], Sequence | None]:
        """Chunks of prompts for this step, which have room; and of those without, whom to help.

        Where nobody whose turn it is has room, it is the next one's: else all would stand still
        while who could go on, and then give room, waits behind who cannot.
        """
        lacking: set[int] = set()
        blocked: Sequence | None = None
        at_ceiling: frozenset[int] = frozenset()
        while wanted := self._wanted(ready, pace, lacking):
            short = self._room.reserve([s for s, _ in wanted], [n for _, n in wanted])
            chunks = [(s, n) for s, n in wanted if s.seq not in short]
            for s, n in wanted:
                # What came back with all that its namespace may have decodes one token further on,
                # and is refused there.
                if (
                    s.seq in self._room.at_ceiling
                    and n > 1
                    and not self._room.reserve([s], [n - 1])
                ):
                    return [*chunks, (s, n - 1)], None
            if chunks or ready:
                return chunks, None
            if blocked is None or blocked.seq in at_ceiling:
                blocked, at_ceiling = wanted[0][0], self._room.at_ceiling
            lacking |= short
        return [], blocked

    def _wanted(
        self, ready: list[Sequence], pace: Pace, lacking: Container[int]
    ) -> list[tuple[Sequence, int]]:
        """Chunks by turn, whole blocks where a prompt goes on, of who is not ``lacking`` room."""
        block = self._caps.block_tokens
        most = self._caps.max_step_tokens - len(ready)
        least = min(_LEAST_ATTENTIVE if pace.attentive else _LEAST_CHUNK, most)
        budget = self.cost.prefill_budget(len(ready), most, least, pace.step_s)
        whole = self.cost.prefill_budget(len(ready), most, least, pace.whole_s)
        wanted: list[tuple[Sequence, int]] = []
        # Where the step brings an interactive app its first token, nobody else's prompt delays it.
        answered = PriorityClass.BACKGROUND
        rows = SCORED_ROWS
        for sequence, at_most in self.turns.prefilling():
            klass = sequence.request.klass
            if budget <= 0 or klass > answered:
                break
            if sequence.seq in lacking:
                continue
            if not wanted and _asked(sequence) <= 2 * whole:
                # A short question comes whole, or in halves. The end of a long prompt does not:
                # others have waited long enough.
                rest = sequence.computable
                budget = max(budget, rest if rest <= whole else min(whole, -(-rest // 2)))
            count = min(sequence.computable, budget, at_most)
            if sequence.request.prompt_logprobs >= 0:
                if not rows:
                    continue
                count = min(count, rows)
                rows -= count
            if count < sequence.pending and count > block:
                count -= (sequence.computed + count) % block
            wanted.append((sequence, count))
            budget -= count
            if count == sequence.pending and klass is PriorityClass.INTERACTIVE:
                answered = klass
        return wanted

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
            follows(sequence, start, count),
            sequence.request.prompt_logprobs,
        )


def _asked(sequence: Sequence) -> int:
    """Tokens of its prompt that were not found."""
    request = sequence.request
    return request.prompt_tokens - request.cached_tokens


def _inputs(run: Run, sequence: Sequence) -> Tokens:
    """What a run's input was, now that it is known. Of a sequence that has ended, the pager keeps
    only what is known."""
    end = run.start + len(run.tokens)
    return sequence.tokens.view(run.start, end) if end <= len(sequence.tokens) else run.tokens
