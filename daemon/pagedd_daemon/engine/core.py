"""The engine: takes messages, runs steps, reports what came out.

``handle`` takes what the front says, ``step`` runs at most one step and says what came of it. How a
request begins and ends is in `pagedd_daemon.engine.books`. There is no I/O and no waiting beside
the backend's own; `pagedd_daemon.engine.loop` adds the socket.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import TypeAlias

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import (
    Backend,
    DeviceMemoryError,
    Handle,
    Run,
    Step,
    StepFaultError,
    StepResult,
)
from pagedd_daemon.engine.books import Books
from pagedd_daemon.engine.embedding import Embeddings
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.engine.outbox import AT_ONCE, HOLD_S, Outbox
from pagedd_daemon.engine.pool import Pool
from pagedd_daemon.engine.sampler import Drawn
from pagedd_daemon.engine.scheduler import Scheduler
from pagedd_daemon.engine.scoring import told
from pagedd_daemon.engine.snapshot import block_map, snapshot
from pagedd_daemon.engine.work import Request, Sequence, SequenceState

_STEPS_REMEMBERED = 64
"""Steps that their median time is taken over."""
_NAN = "the model's output is not a number (NaN)"

Say: TypeAlias = Callable[[m.StepReport], None]


class Engine:
    """Composes backend, pool, scheduler and books, and runs the steps."""

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float],
        grammars: Grammars | None = None,
        *,
        write_through: bool = False,
    ) -> None:
        """``grammars`` is None where no request may be constrained; ``write_through``: see
        `kvpager.types.PagerConfig`."""
        self._backend = backend
        self._clock = clock
        self._caps = backend.capabilities
        self._pool = Pool(backend, write_through=write_through)
        self._scheduler = Scheduler(self._pool, self._caps, backend.elastic)
        self._depth = 2 if self._caps.asynchronous else 1
        """Steps in flight at most."""
        self._flights: deque[tuple[Step, Handle]] = deque()
        self._steps = 0
        self._outbox = Outbox()
        self._hold_s = dict.fromkeys(HOLD_S, 0.0) if self._caps.asynchronous else HOLD_S
        self._books = Books(self._caps, self._pool, self._scheduler, self._outbox, clock, grammars)
        self._step_s = 0.0
        """Of the last step."""
        self._seconds: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        """Of the last steps."""
        self._blocked = 0
        """Turns in which nothing was under way: what is waited for is outside."""
        self._embeddings = Embeddings(
            backend.embedder,
            self._caps,
            self._scheduler.turns,
            clock,
            self._outbox.embedded,
            self._books.left,
        )

    # ------------------------------------------------------------------------------------ messages

    def handle(self, message: m.ToEngine) -> None:
        """Take one message of the front. What it leads to is in the next report."""
        match message:
            case m.Submit():
                self._books.submit(message)
            case m.App():
                self._books.tell_app(message)
            case m.Embed():
                self._books.came(message.app)
                self._embeddings.add(message)
            case m.Cancel(rid=rid) if rid < 0:
                self._embeddings.cancel(rid)
            case m.Cancel(rid=rid):
                if request := self._books.requests.get(rid):
                    for index in sorted(request.open_samples):
                        self._books.end_sample(request, index, "cancelled")
            case m.Finish(rid=rid, index=index, tokens=tokens):
                request = self._books.requests.get(rid)
                if request is not None and index in request.open_samples:
                    self._books.end_sample(request, index, "stop", keep=tokens)
            case m.Pause(rid=rid) | m.Unpause(rid=rid):
                if request := self._books.requests.get(rid):
                    request.paused = isinstance(message, m.Pause)
                    self._scheduler.wake()
            case m.Drop(rid=rid):
                if request := self._books.requests.get(rid):
                    request.hold = False  # it has not ended: a pin was taken back at once
                self._scheduler.drop(rid)
            case _:
                raise AssertionError(f"{type(message).__name__} is not for a running engine")

    @property
    def has_work(self) -> bool:
        """Whether to call `step` without a new message: a request is alive and not paused, or a
        step or a transfer has not ended."""
        if self._flights or self._pool.transfers_in_flight > 0 or self._embeddings.busy:
            return True
        return any(not request.paused for request in self._books.requests.values())

    @property
    def steps(self) -> int:
        """Steps planned since start."""
        return self._steps

    @property
    def blocks(self) -> int:
        """Blocks that the first tier may use now; may be asked from any thread."""
        return self._scheduler.blocks

    def resize(self, blocks: int) -> None:
        """Give the first tier so many blocks, or as many more as its device has memory for."""
        elastic = self._backend.elastic
        if elastic is not None and blocks > self.blocks:
            blocks = max(self.blocks, min(blocks, elastic.grow(blocks)))
        self._scheduler.resize(blocks)

    @property
    def transfers_in_flight(self) -> int:
        """Stores and loads that have not ended."""
        return self._pool.transfers_in_flight

    @property
    def saving(self) -> bool:
        """Whether pages are on their way to a disk that outlives the engine."""
        return self._caps.disk_persists and self.transfers_in_flight > 0

    def settle(self) -> None:
        """Hear of transfers that have ended, and begin those that follow."""
        self._scheduler.settle()

    def validate(self) -> None:
        """Check the pager's invariants.

        Raises:
            kvpager.InvariantError: One does not hold; it carries the story of the sequence.
        """
        self._pool.pager.validate()

    @property
    def progress(self) -> int:
        """Rises unless something is under way that does not end."""
        return self._steps + self._pool.ended + self._blocked + self._embeddings.pieces

    def snapshot(self, *, blocks: bool = False) -> m.Snapshot:
        """The engine's figures now, and the block map if it is wanted."""
        return m.Snapshot(
            snapshot(
                self._pool.pager,
                self._scheduler,
                self._backend,
                self._books.totals,
                self._steps,
                self._clock(),
            )
            | {
                "progress": self.progress,
                "median_step_s": statistics.median(self._seconds) if self._seconds else 0.0,
            }
            | ({"blocks": block_map(self._pool.pager)} if blocks else {})
        )

    # ---------------------------------------------------------------------------------------- step

    def step(self, say: Say, waiting: Callable[[], bool] = lambda: False) -> bool:
        """Launch the next step, if anybody can run, and collect the one before it.

        Where the backend computes by itself, the step that was just launched runs meanwhile; else
        it is the one that is collected. What a step drew is said before the books are brought up to
        date, so that the front works while the engine does; what ends follows in a second report.
        Where both need the same cores it may be held back a little (`HOLD_S`), not to be said too
        often.

        Args:
            say: Takes reports.
            waiting: Whether a message waits to be handled. Where nothing else would be decided
                between this step and the next, the next is run at once unless one does.

        Returns:
            Whether a step was launched or collected.
        """
        self._books.take_grammars()
        embedded = self._embed()
        self._advance_searches()
        step = self._scheduler.plan(self._clock())
        self._announce()
        if step is not None and self._scheduler.in_stretch:
            self._follow(step, say, waiting)
            self._say(say)
            return True
        if step is not None:
            self._steps += 1
            try:
                self._flights.append((step, self._backend.launch(step)))
            except StepFaultError as fault:
                self._drain(say)
                self._fail(step, fault)
        if self._flights and (step is None or len(self._flights) == self._depth):
            self._collect(say)
            self._scheduler.settle()
        self._say(say, everything=step is None)
        if step is None and not self._flights and not self._pool.transfers_in_flight:
            self._blocked += 1
        return step is not None or bool(self._flights) or embedded

    def _embed(self) -> bool:
        """Compute a piece of a text that becomes a vector, if it is time for one."""
        if not self._embeddings.busy:
            return False
        classes = [request.klass for request in self._books.requests.values() if not request.paused]
        return self._embeddings.advance(min(classes, default=None))

    def _follow(self, step: Step, say: Say, waiting: Callable[[], bool]) -> None:
        """The steps of a stretch, one after the other, for as long as tokens may be held back.

        What is done between two of them is what the next one needs and no more: everything else
        begins with cold caches, since a step reads all of the weights (300 us a step of 6 ms, when
        the books were brought up to date after each).
        """
        sequences = self._scheduler.launched
        hold_s = min(self._hold_s[sequence.request.klass] for sequence in sequences)
        until = 0.0
        done: list[list[Drawn]] = []
        while True:
            self._steps += 1
            try:
                result = self._backend.collect(self._backend.launch(step))
            except StepFaultError as fault:
                self._keep(sequences, done, until)
                self._fail(step, fault)
                return
            row = [one for _, one in result.drawn]
            over = self._note(sequences, row)
            now = self._clock()
            if not done:  # of those held back, this one waits longest
                until = min(self._outbox.until, now + hold_s)
            done.append(row)
            self._seconds.append(result.seconds)
            over = over or self._scheduler.stretch_left == 1 or self._embeddings.busy or waiting()
            if over:
                break
            if now + result.seconds > until:
                self._keep(sequences, done, until)
                self._outbox.say(say, self._steps)
                done.clear()
            step = self._scheduler.advance(result.seconds)
        self._step_s = result.seconds
        self._keep(sequences, done, until)
        self._say(say)
        self._scheduler.retire(step, result.seconds)
        for sequence, one in zip(sequences, row, strict=True):
            self._end_if_over(sequence, one)

    def _note(self, sequences: list[Sequence], row: list[Drawn]) -> bool:
        """Take over what one step drew for ``sequences``; whether that ends one of them."""
        over = False
        eog = self._caps.eog_tokens
        for sequence, one in zip(sequences, row, strict=True):
            request, token = sequence.request, one.token
            if token < 0 or token in eog or token in request.stop.stop_token_ids:
                over = True
                continue
            sequence.tokens.append(token)
            sequence.sampler.accept(token)
            if request.constrained and sequence.sampler.complete:
                over = True
        return over

    def _keep(self, sequences: list[Sequence], done: list[list[Drawn]], until: float) -> None:
        """Say ``until`` then what some steps drew for ``sequences``, a list each."""
        now = self._clock()
        for row in done:
            for sequence, one in zip(sequences, row, strict=True):
                self._output(sequence, [one], now, until)

    def _output(self, sequence: Sequence, drawn: list[Drawn], now: float, until: float) -> None:
        """Report what was drawn for a sequence and the samples after it; it may wait ``until``
        then, unless somebody waits for a first token."""
        request = sequence.request
        first = request.first_token_s == 0.0
        if first:
            request.first_token_s = now
        request.last_token_s = now
        if request.beams is not None:
            return  # what is a token of the reply is known at the end
        for index, one in enumerate(drawn, sequence.index):
            if not self._ends(request, one.token):
                self._outbox.output(request.rid, index, one, AT_ONCE if first else until)

    def _drain(self, say: Say) -> None:
        while self._flights:
            self._collect(say)

    def _collect(self, say: Say) -> None:
        """Wait for the oldest step in flight."""
        step, handle = self._flights.popleft()
        try:
            result = self._backend.collect(handle)
        except StepFaultError as fault:
            self._fail(step, fault)
        else:
            self._retire(step, result, say)
        if self._flights:  # what its step has put off until these tokens were accepted
            self._backend.draw(self._flights[0][1])

    def _advance_searches(self) -> None:
        """Searches take their steps before a plan is made: an end may change it."""
        if self._scheduler.in_stretch:
            return
        self._scheduler.settle()
        self._scheduler.branches.advance()
        for request in self._scheduler.branches.over:
            self._books.end_search(request)
        self._scheduler.branches.over.clear()

    def _announce(self) -> None:
        """Report what planning found: who started, who can never fit, who cannot grow."""
        for request in self._scheduler.started:
            self._outbox.started(request.rid, request.cached_tokens)
            self._books.totals.start(request)
            if request.beams is not None:
                self._scheduler.branches.begin(request.beams)
        self._scheduler.started.clear()
        for request, denial in self._scheduler.denied:
            block = self._caps.block_tokens
            need, pool = denial.need_blocks * block, denial.total_blocks * block
            self._books.reject(
                request,
                "E_NEVER_FITS",
                f"the request needs {need} tokens of a pool of {pool}",
                {"need_tokens": need, "pool_tokens": pool},
            )
        self._scheduler.denied.clear()
        for sequence in self._scheduler.stranded:
            if sequence.request.beams is not None:
                self._books.end_search(sequence.request)
            else:
                self._books.end_sample(sequence.request, sequence.index, "context")
        self._scheduler.stranded.clear()

    def _retire(self, step: Step, result: StepResult, say: Say) -> None:
        drawn, scored = iter(result.drawn), iter(result.scored)
        now = self._clock()
        kept: list[tuple[Sequence, list[Drawn]]] = []
        unreadable: list[Request] = []
        for run, sequence in zip(step.runs, self._scheduler.launched, strict=True):
            if run.follows is not None and not self._tell_prompt(sequence, run, next(scored)[1]):
                unreadable.append(sequence.request)
            if not run.draws:
                continue
            tokens = [next(drawn)[1] for _ in run.draws]
            if sequence.state is SequenceState.ENDED:
                continue  # by the token before, after this step was launched
            kept.append((sequence, tokens))
            self._output(sequence, tokens, now, now + self._hold_s[sequence.request.klass])
        self._step_s = result.seconds
        self._seconds.append(result.seconds)
        self._say(say)
        self._scheduler.retire(step, result.seconds)
        for sequence, tokens in kept:
            if len(tokens) > 1:
                others = range(1, sequence.request.samples)
                children = self._scheduler.fork(sequence, others)
                for child, one in zip(children, tokens[1:], strict=True):
                    self._accept(child, one)
            self._accept(sequence, tokens[0])
        for request in unreadable:
            if request.rid in self._books.requests:
                self._books.reject(request, "E_ENGINE", _NAN, {}, cache=False)

    def _tell_prompt(self, sequence: Sequence, run: Run, scored: Items[Drawn]) -> bool:
        """Report log-probabilities of a prompt; False if they are not numbers."""
        if any(one.token < 0 for one in scored):
            return False
        part = told(sequence, run.start, scored)
        if part is not None and sequence.state is not SequenceState.ENDED:
            self._outbox.prompt(part)
        return True

    def _ends(self, request: Request, token: int) -> bool:
        """Whether a drawn token ends its sample and is no part of it."""
        return token < 0 or token in self._caps.eog_tokens or token in request.stop.stop_token_ids

    def _accept(self, sequence: Sequence, drawn: Drawn) -> None:
        """Keep a token that was drawn for a sequence, or end it."""
        request, token = sequence.request, drawn.token
        if request.rid not in self._books.requests:
            return  # another sample of it was rejected in this step
        if request.beams is not None and token >= 0:
            request.beams.report(sequence, drawn)
            return
        if not self._ends(request, token):
            sequence.tokens.append(token)
            sequence.sampler.accept(token)
        self._end_if_over(sequence, drawn)

    def _end_if_over(self, sequence: Sequence, drawn: Drawn) -> None:
        """End a sequence whose last token, or whose last room, this was."""
        request, token = sequence.request, drawn.token
        if request.rid not in self._books.requests:
            return  # another sample of it was rejected in this step
        matcher = sequence.sampler.matcher
        if token < 0 and matcher is not None and matcher.error:
            self._books.reject(request, "E_GRAMMAR", matcher.error, {})
        elif token < 0:
            self._books.reject(request, "E_ENGINE", _NAN, {}, cache=False)
        elif self._ends(request, token) or sequence.sampler.complete:
            self._books.end_sample(request, sequence.index, "stop")
        elif sequence.generated >= request.stop.max_tokens:
            self._books.end_sample(request, sequence.index, "length")
        elif len(sequence.tokens) >= self._caps.context_tokens:
            self._books.end_sample(request, sequence.index, "context")

    def _fail(self, step: Step, fault: StepFaultError) -> None:
        """A step was refused. For want of memory, somebody gives way and it is tried again; else
        its requests end, and everybody else goes on."""
        failed = self._scheduler.fail(step)
        if isinstance(fault, DeviceMemoryError) and self._scheduler.relieve(failed, self._clock()):
            return
        for sequence in failed:
            if sequence.request.rid in self._books.requests:
                self._books.reject(sequence.request, "E_ENGINE", f"a step failed: {fault}", {})

    def _say(self, say: Say, *, everything: bool = False) -> None:
        """Say what there is to say, ``everything`` or what is due."""
        if everything or self._outbox.due(self._clock(), self._step_s):
            self._outbox.say(say, self._steps)
