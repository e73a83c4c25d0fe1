"""Who comes in: waiting requests, and sequences that were paged out."""

from __future__ import annotations

from kvpager.types import Admit, DeferReason, Deferred, Denied, Resume, Tokens
from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.engine.relief import Relief
from pagedd_daemon.engine.residents import Residents
from pagedd_daemon.engine.room import Room
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.engine.turns import Candidate, Turns
from pagedd_daemon.engine.work import Request, Sequence, TokenBuffer, WaitingQueue

_TOO_LARGE = (DeferReason.POOL, DeferReason.QUOTA)
"""What keeps a sequence out for itself, whatever room others leave."""
_OTHERS_HELP = (DeferReason.BLOCKS, DeferReason.SEQUENCES)
"""What keeps a sequence out until others leave."""
_ROOM_TOKENS = 256
"""Generated tokens a buffer has room for from the start; it doubles when they are used up."""


class Entrance:
    """Lets requests in and brings sequences back, by turn, while their whole texts fit."""

    def __init__(
        self,
        waiting: WaitingQueue,
        residents: Residents,
        room: Room,
        turns: Turns,
        capabilities: Capabilities,
        relief: Relief,
    ) -> None:
        self._waiting = waiting
        self._residents = residents
        self._room = room
        self._turns = turns
        self._caps = capabilities
        self._relief = relief
        self.changed = True
        """Whether something has happened since the queue was last asked."""
        self.started: list[Request] = []
        """Requests whose prompt began to be computed since the caller last cleared this."""
        self.denied: list[tuple[Request, Denied]] = []
        """Requests that can never fit, until the caller clears this."""

    def let_in(self, now: float, *, pressed: bool) -> bool:
        """Bring back paged-out sequences and let waiting requests in, by turn, while their whole
        texts fit.

        Asking costs a hash of the prompt, so after a refusal no request is asked again before
        something has changed: an end, a transfer, a computed chunk, a newcomer, a quantum of work.

        Returns:
            Whether anybody was asked.
        """
        ask = (
            self.changed or self._residents.heard or (len(self._waiting) > 0 and self._turns.due())
        )
        if not (self._residents.preempted or (ask and len(self._waiting))):
            return False
        if not pressed:
            self.changed = self._residents.heard = False
        walk = self._turns.walk(self._waiting, self._residents.preempted, ask=ask, pressed=pressed)
        while (candidate := walk.next()) is not None:
            refusal = self._try(candidate, now)
            if refusal is not None:
                refusal = self._page_out_for(candidate, refusal, now)
            walk.answer(refusal)
        return True

    def _try(self, candidate: Candidate, now: float) -> Deferred | None:
        request = candidate if isinstance(candidate, Request) else candidate.request
        if self._relief.full(request, now):
            self.changed = True  # nothing says when there is memory for more
            return Deferred(0, DeferReason.SEQUENCES, 1, 0)
        if isinstance(candidate, Request):
            return self._try_admit(candidate, now)
        return self._try_resume(candidate)

    def _page_out_for(self, candidate: Candidate, refusal: Deferred, now: float) -> Deferred | None:
        """Make room for somebody who must not wait for it, and say what is in its way still.

        First those whose clients do not read. Then, while that helps, who yields to it.
        """
        if refusal.reason is DeferReason.PREFIX_IN_FLIGHT:
            self._page_out_paused(computing=True)
        if refusal.reason not in _OTHERS_HELP:
            return refusal
        request = candidate if isinstance(candidate, Request) else candidate.request
        self._page_out_paused()
        running = [s for s in self._residents.sequences.values() if s.removable]
        groups = self._turns.yielding(request, running, refusal)
        while True:
            self._residents.hear()
            if self._residents.pool.room_coming or self._room.somebody_leaves():
                return refusal  # room may be on its way already
            victim = self._room.choose(groups)
            if victim is None:
                return refusal
            self._turns.paged_out(victim.request, request)
            self._room.page_out(victim)
            self._residents.hear()
            self.changed = True
            after = self._try(candidate, now)
            if after is None or after.reason not in _OTHERS_HELP:
                return after
            refusal = after

    def _try_resume(self, sequence: Sequence) -> Deferred | None:
        """Bring a sequence back, or say what is in its way.

        The samples of one request come back together, or wait until the first of them has computed
        the prompt they share again; nobody younger overtakes them meanwhile for want of room.
        """
        verdicts = self._residents.pool.handle(Resume(sequence.seq))
        self._residents.settle(verdicts)
        refusals = (v for v in verdicts if isinstance(v, Deferred) and v.seq == sequence.seq)
        refusal = next(refusals, None)
        request = sequence.request
        request.outgrown = refusal is not None and refusal.reason in _TOO_LARGE
        if request.outgrown and request.beams is not None and not self._room.shrunk:
            # They have grown until the pool cannot hold them together.
            self._room.stranded.append(sequence)
        return refusal

    def _page_out_paused(self, *, computing: bool = False) -> None:
        """Somebody waits for room: take it from sequences whose clients do not read.

        With ``computing`` only from those amid their prompts: somebody may wait for the prefix.
        """
        for sequence in list(self._residents.sequences.values()):
            if computing and sequence.pending <= 1:
                continue
            if sequence.request.paused and sequence.removable:
                self._room.page_out(sequence)
                self.changed = True

    def _try_admit(self, request: Request, now: float) -> Deferred | None:
        """Admit one request, or say what is in its way."""
        seq, known = self._residents.take_id(), request.known
        verdicts = self._residents.pool.handle(
            Admit(
                seq,
                known,
                request.root,
                klass=request.klass,
                width=request.width,
                group=request.rid,
                whole=request.beams is not None,
                owner=request.owner,
                fresh=request.prompt_logprobs >= 0,
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
            index=request.first_index,
            prompt=request.prompt,
            vocab_size=self._caps.vocab_size,
            eog_tokens=self._caps.eog_tokens,
            matcher=request.matcher,
            resumed=request.resumed,
        )
        buffer = token_buffer(request, known)
        sequence = Sequence(seq, request, request.first_index, sampler, buffer)
        self._residents.sequences[seq] = sequence
        self._residents.settle(verdicts)
        request.started_s = now
        request.cached_tokens = min(sequence.computed, request.prompt_tokens)
        # What an engine before this one has computed was paid for.
        sequence.charged = len(known) if len(request.resumed) else sequence.computed
        request.sequences[sequence.index] = sequence
        self.started.append(request)
        return None


def token_buffer(request: Request, known: Tokens) -> TokenBuffer:
    """A buffer that begins with ``known``, for a sample of ``request``."""
    return TokenBuffer(known, min(request.stop.max_tokens, _ROOM_TOKENS))
