"""Turns between apps, in the scheduler's terms: requests, sequences, steps.

`pagedd_daemon.engine.fairness` keeps the counters; this module says what they mean for who comes
in next, whose decode and whose prompt a step computes, and who is paged out. It moves nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from kvpager import Pager
from kvpager.types import DeferReason, Deferred, PriorityClass
from pagedd_daemon.backends.base import Step
from pagedd_daemon.engine.fairness import W_OUT, AppId, Fairness, Flow
from pagedd_daemon.engine.pace import PERSON_S, Pace, pace
from pagedd_daemon.engine.work import Request, Sequence, SequenceState, WaitingQueue

MOST_BYPASSES = 16
"""Requests of its class that may come in past one that lacks room; then the room is kept for it."""
_MOST_SHARERS = 16
"""Requests asked per step that turn out to wait for a prefix or a page in flight."""

_OTHERS_MAY_PASS = (DeferReason.PREFIX_IN_FLIGHT, DeferReason.TRANSFER, DeferReason.POOL)
"""What keeps a request waiting and no room from those behind it."""
_MOST_DEPARTED = 256
_MOST_PERSONS = 64

Candidate: TypeAlias = Sequence | Request
"""A sequence to bring back or a request to let in."""


@dataclass(frozen=True, slots=True)
class AppPolicy:
    """What the engine knows of an app."""

    id: AppId
    weight: float = 1.0
    max_running: int = 0
    """Requests that run at the same time; 0 for any number."""
    floor_blocks: int = 0
    """Its running sequences are no victims with so many blocks or fewer, while others are."""


class Turns:
    """Decides between apps."""

    def __init__(self, pager: Pager) -> None:
        self.fair = Fairness()
        self._pager = pager
        self._policies: dict[str, AppPolicy] = {}
        self._departed: dict[str, None] = {}
        """Apps without a request, the one that left first first."""
        self._limited: set[str] = set()
        """Apps of which only so many requests may run."""
        self._running: dict[str, set[int]] = {}
        """Requests that have begun, by app; kept while any app is limited."""
        self._decoding: dict[Flow, list[Sequence]] = {}
        self._prompts: dict[Flow, list[Sequence]] = {}
        """Who may decode, and whose prompts may be computed, as of the last look."""
        self._charges: deque[list[tuple[Flow, float]]] = deque()
        """Of the steps in flight, oldest first."""
        self._unmet: set[Flow] = set()
        """Who has demand that is not met, as of the last survey."""
        self._served: set[Flow] = set()
        """Of these, who computes something nevertheless."""
        self._at_ceiling: set[Flow] = set()
        """Apps whose requests wait for room within their own namespace, as of the last walk."""
        self._asked_at = 0.0
        self._now = 0.0
        self._persons: dict[Flow, float] = {}
        """When each interactive app last got something computed."""

    # -------------------------------------------------------------------------------- who is who

    def tell(self, key: str, policy: AppPolicy) -> None:
        """What holds for the app from now on."""
        self._policies[key] = policy
        (self._limited.add if policy.max_running else self._limited.discard)(key)
        self._departed.pop(key, None)
        self.fair.set_weight(policy.id, policy.weight)

    def forget(self, key: str) -> None:
        """The app has no request any more. The last ones stay known: their shares are shown."""
        self._departed[key] = None
        while len(self._departed) > _MOST_DEPARTED:
            oldest = next(iter(self._departed))
            del self._departed[oldest]
            policy = self._policies.pop(oldest, None)
            self._limited.discard(oldest)
            if policy is not None:
                self.fair.forget(policy.id)

    def policy(self, key: str) -> AppPolicy:
        """An app nobody told of is one by its name."""
        known = self._policies.get(key)
        return known if known is not None else AppPolicy(AppId(0, key, key))

    def flow(self, request: Request) -> Flow:
        """The request's app and class."""
        if request.flow is None:
            request.flow = Flow(request.klass, self.policy(request.app).id)
        return request.flow

    def share(self, key: str, now: float) -> float:
        """Of all that was charged lately, the part charged to the app."""
        return self.fair.share(self.policy(key).id, now)

    # ------------------------------------------------------------------------------------ a step

    def survey(
        self, waiting: WaitingQueue, sequences: Iterable[Sequence], now: float
    ) -> list[Sequence]:
        """Look whose demand is not being met, before anything else of a plan.

        Returns:
            Those whose next step is to compute the token that was drawn last.
        """
        self._now = now
        unmet: dict[Flow, int] = {}
        self._served.clear()
        decodes = self.look(sequences, unmet)
        for request in waiting.heads():
            flow = self.flow(request)
            if flow not in self._at_ceiling and not self.at_limit(request.app):
                unmet.setdefault(flow, 0)
        if unmet or self._unmet:
            self._unmet = set(unmet)
            self.fair.survey(unmet, now)
        self._served &= self._unmet
        if len(self._persons) > _MOST_PERSONS:
            self._persons = {f: at for f, at in self._persons.items() if now - at < PERSON_S}
        return decodes

    def look(
        self, sequences: Iterable[Sequence], unmet: dict[Flow, int] | None = None
    ) -> list[Sequence]:
        """One pass over all sequences, for whatever is asked until the next one.

        Args:
            sequences: The live ones, oldest first.
            unmet: Gets whose demand is not met, with prompt tokens that are let in and not
                computed.

        Returns:
            Those whose next step is to compute the token that was drawn last.
        """
        decodes: list[Sequence] = []
        self._decoding, self._prompts = {}, {}
        self._running.clear()
        demand = {} if unmet is None else unmet
        for sequence in sequences:
            request = sequence.request
            flow = request.flow or self.flow(request)
            if self._limited:
                self._running.setdefault(request.app, set()).add(request.rid)
            if sequence.state is SequenceState.PREEMPTED:
                if not (request.paused or request.outgrown):
                    demand.setdefault(flow, 0)
                continue
            pending = sequence.pending
            if pending > 1 and not request.paused:
                demand[flow] = demand.get(flow, 0) + pending - 1
            if not sequence.runs:
                continue
            self._served.add(flow)
            if pending == 1 and sequence.until < 0:
                decodes.append(sequence)
                self._decoding.setdefault(flow, []).append(sequence)
            elif sequence.computable > 0:
                self._prompts.setdefault(flow, []).append(sequence)
        if unmet is None:
            self._served &= self._unmet
        return decodes

    def at_limit(self, app: str) -> bool:
        """Whether as many of its requests run as may."""
        most = self.policy(app).max_running
        return bool(most) and len(self._running.get(app, ())) >= most

    def charge(self, step: Step, sequences: Iterable[Sequence]) -> None:
        """A step is launched: 1 for each prompt token computed for the first time, `W_OUT` for each
        token drawn. What is computed again after a preemption was paid for."""
        sums: dict[Flow, int] = {}
        epoch = step.epoch
        for run, sequence in zip(step.runs, sequences, strict=True):
            sequence.stepped = epoch
            request = sequence.request
            units = W_OUT * len(run.draws)
            if sequence.charged < len(request.prompt):
                prompt_end = min(run.start + len(run.tokens), len(request.prompt))
                if prompt_end > sequence.charged:
                    units += prompt_end - max(run.start, sequence.charged)
                    sequence.charged = prompt_end
            if units:
                flow = request.flow or self.flow(request)
                sums[flow] = sums.get(flow, 0) + units
        for flow, units in sums.items():
            self.fair.charge(flow, units, self._now)
            if flow.klass is PriorityClass.INTERACTIVE:
                self._persons[flow] = self._now
        self._charges.append(list(sums.items()))

    def decoded(self, sequences: Iterable[Sequence], epoch: int, steps: int) -> None:
        """Each of ``sequences`` has decoded ``steps`` tokens in a stretch, which is charged when it
        has ended."""
        sums: dict[Flow, int] = {}
        for sequence in sequences:
            sequence.stepped = epoch
            flow = self.flow(sequence.request)
            sums[flow] = sums.get(flow, 0) + W_OUT * steps
        for flow, units in sums.items():
            self.fair.charge(flow, units, self._now)
            if flow.klass is PriorityClass.INTERACTIVE:
                self._persons[flow] = self._now

    def retired(self) -> None:
        """The oldest step in flight is done: its charge stands."""
        self._charges.popleft()

    def failed(self) -> None:
        """The oldest step in flight led to nothing: everybody gets the charge back."""
        for flow, units in self._charges.popleft():
            self.fair.refund(flow, units, self._now)

    def overrun(self, request: Request, tokens: int) -> None:
        """Tokens that were drawn past the request's end are not charged."""
        if tokens:
            self.fair.refund(self.flow(request), W_OUT * tokens, self._now)

    # ---------------------------------------------------------------------------- whose step it is

    def pace(self) -> Pace:
        """How long the next step may take, by what there is to compute."""
        flows = self._decoding.keys() | self._prompts.keys()
        persons = {flow for flow, at in self._persons.items() if self._now - at < PERSON_S}
        asking = {flow for flow in self._prompts if flow.klass is PriorityClass.INTERACTIVE}
        first = set(self.fair.work_order(asking)[:1])
        return pace(
            min((flow.klass for flow in self._prompts), default=None),
            min((flow.klass for flow in self._decoding), default=None),
            person=bool((persons | asking) - first),
            alone=len(flows) == 1 and persons <= flows,
        )

    def decoding(
        self, decodes: list[Sequence], pace: Pace, most: int, *, ahead: bool = False
    ) -> list[Sequence]:
        """Who of ``decodes`` takes part, where ``most`` fit in a step's time: by turn, and in turn
        within an app.

        Unless ``ahead``, neither takes part, for as long as it lasts, who is ahead of an app whose
        prompts or decodes are under way by one and a half quanta, in spite of all that keeps apps
        together otherwise.
        """
        if not self._served and len(decodes) <= most:
            return decodes
        by_flow = self._by_flow(decodes)
        for flow in () if ahead else list(by_flow):
            if any(self.fair.too_far_ahead(flow, other, quanta=1.5) for other in self._served):
                del by_flow[flow]
        if pace.spared is not None:
            spared = sum(len(by_flow[flow]) for flow in by_flow if flow.klass <= pace.spared)
            most = max(most, spared)
        kept = sum(map(len, by_flow.values()))
        if kept <= most:
            return [s for line in by_flow.values() for s in line]
        chosen: list[Sequence] = []
        for flow in self.fair.work_order(by_flow):
            line = sorted(by_flow[flow], key=lambda s: s.stepped)
            chosen += line[: max(0, most - len(chosen))]
        return chosen

    def prefilling(self) -> Iterator[tuple[Sequence, int]]:
        """Whose prompts are to be computed, by turn, the oldest of an app first; with each, the
        most tokens it may get in this step.

        An owed class gets no more than it is owed before the classes above it. An app that is ahead
        of another that decodes, and has more to do than it gets, gets nothing: a decoding sequence
        takes one token a step, so its app can only catch up by steps that are short.
        """
        if not self._prompts:
            return
        top = min(flow.klass for flow in self._prompts)
        decoding = self._decoding.keys() & self._unmet
        for flow in self.fair.work_order(self._prompts):
            if any(self.fair.too_far_ahead(flow, other) for other in decoding):
                continue
            owed = self.fair.owed(flow.klass) if flow.klass != top else 0
            for sequence in self._prompts[flow]:
                yield sequence, owed or sequence.computable

    def _by_flow(self, sequences: Iterable[Sequence]) -> dict[Flow, list[Sequence]]:
        by_flow: dict[Flow, list[Sequence]] = {}
        for sequence in sequences:
            request = sequence.request
            by_flow.setdefault(request.flow or self.flow(request), []).append(sequence)
        return by_flow

    # ----------------------------------------------------------------------------- who is paged out

    def victims(self, sequences: Iterable[Sequence]) -> Iterator[list[int]]:
        """Groups of sequences, those to be paged out first: apps above their floor, then the lowest
        class (an owed one last), then the app most ahead. Within a group the pager chooses."""
        by_flow = self._by_flow(sequences)
        order = self.fair.order(by_flow)[::-1]
        spared: list[Flow] = []
        for flow in order:
            if all(self._below_floor(s.request) for s in by_flow[flow]):
                spared.append(flow)
            else:
                yield [s.seq for s in by_flow[flow] if not self._below_floor(s.request)]
        for flow in spared:
            yield [s.seq for s in by_flow[flow]]

    def yielding(
        self, asking: Request, sequences: Iterable[Sequence], refusal: Deferred
    ) -> list[list[int]]:
        """Like `victims`, but only those that may be paged out to let ``asking`` in; empty where
        all of them together would not make enough room."""
        flow = self.flow(asking)
        # Asked once for each app: for each of 256 sequences it took a tenth of a step.
        by_flow = self._by_flow(sequences)
        yielding = [line for other, line in by_flow.items() if self.fair.yields(other, flow)]
        may = [s for line in yielding for s in line if not self._below_floor(s.request)]
        held = len(may)
        if refusal.reason is DeferReason.BLOCKS:
            held = sum(len(self._pager.block_table(s.seq)) for s in may)
        return list(self.victims(may)) if held >= refusal.need - refusal.free else []

    def paged_out(self, victim: Request, asking: Request) -> None:
        """``victim`` was paged out to let ``asking`` in."""
        if victim.klass <= asking.klass:
            self.fair.preempted()

    def _below_floor(self, request: Request) -> bool:
        floor = self.policy(request.app).floor_blocks
        return bool(floor) and self._pager.namespace_blocks(request.root) <= floor

    # ------------------------------------------------------------------------------- who comes in

    def due(self) -> bool:
        """Whether so much was computed since the last walk over those who wait that the answers may
        differ. The walk asks the pager, and each question costs a hash of the prompt."""
        return self.fair.charged - self._asked_at >= self.fair.quantum

    def walk(
        self, waiting: WaitingQueue, preempted: list[Sequence], *, ask: bool, pressed: bool
    ) -> Walk:
        """Those who may come in now, one after the other.

        Args:
            waiting: New requests.
            preempted: Sequences to bring back.
            ask: New requests are asked too.
            pressed: Those who run lack room: nobody comes in but those for whom others make way.
        """
        if ask and not pressed:
            self._asked_at = self.fair.charged
            self._at_ceiling.clear()
        return Walk(self, waiting if ask else None, preempted, pressed)


class Walk:
    """Candidates by turn; after each, `answer` says how it went.

    An app's preempted sequences come before its new requests, and its requests in their order.
    Where one lacks room, nobody of a lower class comes in behind it (unless owed), and no more than
    `MOST_BYPASSES` of its class, over all the walks it takes.
    """

    def __init__(
        self,
        turns: Turns,
        waiting: WaitingQueue | None,
        preempted: list[Sequence],
        pressed: bool,
    ) -> None:
        self._turns = turns
        self._lines: dict[Flow, deque[Candidate]] = {}
        self._sharers = 0
        self._flow: Flow | None = None
        self._short: dict[int, Request] = {}
        """By class, the first request of this walk that lacks room."""
        back = [s for s in preempted if not s.request.paused]
        for sequence in sorted(back, key=lambda s: (s.request.rid, s.seq)):
            self._lines.setdefault(turns.flow(sequence.request), deque()).append(sequence)
        for line in waiting.lines() if waiting is not None else ():
            for request in line:
                if not request.paused:
                    self._lines.setdefault(turns.flow(request), deque()).append(request)
        if pressed:
            kept = [flow for flow in self._lines if flow.klass is PriorityClass.INTERACTIVE]
            self._lines = {flow: self._lines[flow] for flow in kept}

    def next(self) -> Candidate | None:
        """Whose turn it is; None if nobody may come in any more."""
        while self._lines and self._sharers <= _MOST_SHARERS:
            flow = min(self._lines, key=self._turns.fair.turn)
            line = self._lines[flow]
            while line and self._passed_over(line[0]):
                line.popleft()
            if line and not self._barred(flow):
                self._flow = flow
                return line[0]
            del self._lines[flow]
        return None

    def answer(self, refusal: Deferred | None) -> None:
        """How it went with the last candidate: None if it came in, or never will."""
        assert self._flow is not None
        reason = None if refusal is None else refusal.reason
        line = self._lines[self._flow]
        candidate = line.popleft()
        request = candidate if isinstance(candidate, Request) else candidate.request
        if reason is None and not request.sequences:
            return  # refused for good: it takes nobody's place
        if reason is None:
            self._turns._running.setdefault(request.app, set()).add(request.rid)
            for sequence in request.sequences.values():
                self._turns.fair.promise(self._flow, max(0, sequence.pending - 1))
            short = self._short.get(self._flow.klass)
            if short is not None:
                short.bypassed += 1
        elif reason in _OTHERS_MAY_PASS:
            self._sharers += 1
        else:
            # With QUOTA only its own namespace helps, and no other app waits behind it.
            if reason is DeferReason.QUOTA:
                self._turns._at_ceiling.add(self._flow)
            else:
                self._short.setdefault(self._flow.klass, request)
            line.clear()

    def _passed_over(self, candidate: Candidate) -> bool:
        if isinstance(candidate, Sequence):  # a sibling may have brought it back
            return candidate.state is not SequenceState.PREEMPTED
        return self._turns.at_limit(candidate.app)

    def _barred(self, flow: Flow) -> bool:
        """Whether somebody who lacks room must not be overtaken."""
        owed = self._turns.fair.owed(flow.klass)
        if any(klass < flow.klass for klass in self._short) and not owed:
            return True
        short = self._short.get(flow.klass)
        return short is not None and short.bypassed >= MOST_BYPASSES
