"""Live requests: what each was asked, and how the engine's reports become its events.

A request has two ends. For its client it is *over* with its last event. For the engine it is over
with `Closed` or `Rejected`, which may come later (after a deadline, or when the client has gone);
only then is its lease on the model given back.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from typing import Any

from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.apps import CLASSES, Apps, Standing
from pagedd_daemon.front.calls import Call
from pagedd_daemon.front.detokenizer import Detokenizer, PieceTable, pack_ids, unpack_ids
from pagedd_daemon.front.echo import Echo
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.failover import POISON, accounted, resumed
from pagedd_daemon.front.held import Held
from pagedd_daemon.front.measures import Measures
from pagedd_daemon.front.model_ports import Clock, Timer, wire_error
from pagedd_daemon.front.models import Model, Models
from pagedd_daemon.front.pins import Pins
from pagedd_daemon.front.ports import Connection, Transport
from pagedd_daemon.front.requests import Generate, Generation
from pagedd_daemon.front.sessions import Turn
from pagedd_daemon.messages import (
    Cancel,
    Closed,
    Ended,
    Finish,
    Output,
    Pause,
    Rejected,
    StepReport,
    Submit,
    ToEngine,
    Unpause,
)
from pagedd_daemon.params import SamplingParams, StopParams


class Sample:
    """One of the ``n`` continuations of a request."""

    __slots__ = ("_detokenizer", "at", "ids", "reason", "score", "stop", "tail")

    def __init__(self, table: PieceTable | None, stop: tuple[str, ...], min_tokens: int) -> None:
        """``table`` is None for a model without a tokeniser, whose samples have no text."""
        self.ids = array("i")
        """Generated and kept; with the prompt, all that is needed to go on elsewhere."""
        self.reason: str | None = None
        self.stop: str | None = None
        """The stop string that ended it."""
        self.at = 0.0
        """When its last tokens came; 0 before the first."""
        self.score: float | None = None
        """By which it was chosen among others, if it was."""
        self.tail = ""
        """Text that was held back until the end."""
        self._detokenizer = None if table is None else Detokenizer(table, stop, min_tokens)

    def take(self, ids: array[int]) -> tuple[str, bool]:
        """Take new tokens: the text to show, and whether a stop string ended the sample.

        When one did, `ids` ends with the last token that has a byte before it.
        """
        self.ids += ids
        detokenizer = self._detokenizer
        if detokenizer is None:
            return "", False
        text = detokenizer.push(ids)
        if detokenizer.stopped:
            del self.ids[detokenizer.kept_tokens :]
            self.reason, self.stop = "stop", detokenizer.stop
        return text, detokenizer.stopped

    def end(self, reason: str) -> None:
        """No token follows."""
        if self.reason is None:
            self.reason = reason
            if self._detokenizer is not None:
                self.tail = self._detokenizer.finish()


class Stream(Call):
    """A request that generates."""

    request: Generation

    def __init__(
        self,
        transport: Transport,
        connection: Connection,
        request: Generation,
        account: Account,
        arrived: float,
    ) -> None:
        super().__init__(transport, connection, request)
        self.account = account
        self.arrived = arrived
        """Time of the clock."""
        self.timer: Timer | None = None
        """Of the request's deadline."""
        self.rids: set[int] = set()
        """The engine's names for it: none while no engine has it, and one for each sample that goes
        on after another engine has died."""
        self.submitted: Submit | None = None
        """What the engine was told first."""
        self.deaths = 0
        """Engines that died while they had it."""
        self.cached_tokens = 0
        """Of its prompt, those that the first engine found."""
        self.times = [0.0, 0.0, 0.0]
        """When it was submitted, begun, and had its first token."""
        self.prompt = array("i")
        self.samples: list[Sample] = []
        self.texts: list[str] = []
        """Text of the only sample, where ``turn`` wants it."""
        self.clipped = False
        """``max_tokens`` was cut to the context: reaching it is reason ``context``."""
        self.cancelled = False
        self.waited_ms = 0.0
        """From its arrival until the engine got it: loading, tokenising."""
        self.counted = 0
        """Generated tokens that its account was charged with."""
        self.n = request.wanted
        """Samples of the reply."""
        self.echo: Echo | None = None
        """Its prompt, where the client wants to hear of it."""
        self.held: Held | None = None
        """What they have said, where they are not streamed."""
        self.standing: Standing | None = None
        """What it was submitted with."""
        self.begun = float("-inf")
        """When it was its turn at the gate."""
        self.started = False
        """The engine has begun with it."""
        self.turn: Turn | None = None
        """Of the session it speaks in."""
        self.left_behind = -1
        """The engine's name for the KV it leaves behind; -1: its session is not pinned."""


class Streams:
    """All requests that generate, from acceptance to the engine's last word."""

    pins: Pins
    """Set before the first request; the two need each other."""

    def __init__(
        self,
        models: Models,
        clock: Clock,
        apps: Apps,
        over: Callable[[Stream], None],
        working: Callable[[], None] = lambda: None,
    ) -> None:
        """``over`` hears of every stream that ends, ``working`` when the engine gets one."""
        self._models = models
        self._clock = clock
        self._apps = apps
        self._over = over
        self._working = working
        self._by_rid: dict[int, Stream] = {}
        self._waiting: dict[Stream, None] = {}
        """Those that wait for an engine in place of one that died."""
        self._last_rid = 0
        self.steps = 0
        """Of the engine, since it started."""
        self.measures = [Measures() for _ in CLASSES]
        """By class."""

    @property
    def running(self) -> int:
        """Requests the engine has, or the one after it will have."""
        return len(self._by_rid) + len(self._waiting)

    @property
    def working(self) -> bool:
        """Whether the engine has a request whose client reads."""
        return any(not stream.connection.lagging for stream in self._by_rid.values())

    # ------------------------------------------------------------ from the client

    def submit(self, stream: Stream, model: Model, prompt: array[int]) -> None:
        """Check the prompt against the model, accept the request and hand it to the engine.

        Raises:
            WireError: The prompt or a token id does not fit the model.
        """
        request = stream.request
        room = _check(request, prompt, model)
        sampling, stopping = request.sampling(), request.stopping()
        kind, grammar = request.constraint()
        stream.clipped = room < request.max_tokens
        stopping["max_tokens"] = min(room, request.max_tokens)
        stop = tuple(request.stop)
        pieces = model.text.pieces
        drawn = request.drawn
        stream.samples = [Sample(pieces, stop, request.min_tokens) for _ in range(drawn)]
        if request.holds:
            logprobs = request.logprobs is not None
            stream.held = Held(drawn, ranked=request.chooses, logprobs=logprobs)
        stream.prompt = prompt
        stream.times[0] = self._clock.time()
        stream.waited_ms = (stream.times[0] - stream.arrived) * 1000
        stream.emit(
            "accepted",
            {
                "prompt_tokens": len(prompt),
                "seed": sampling["seed"],
                "model": model.entry.name,
            },
        )
        prompt_logprobs = _tell_of_prompt(stream, pieces)
        at_once = request.sequences
        standing = self._apps.stand(stream.account, stream.connection.priority, at_once)
        stream.standing = standing
        hold = stream.turn is not None and stream.turn.session in self.pins
        stream.submitted = Submit(
            rid=0,
            app=standing.app.key,
            klass=standing.klass,
            root=standing.app.root,
            prompt=pack_ids(prompt),
            n=drawn,
            sampling=sampling,
            stop=stopping,
            grammar_kind=kind,
            grammar=grammar,
            beams=request.searching(),
            prompt_logprobs=prompt_logprobs,
            hold=hold,
        )
        self._send(stream, model)

    def _send(self, stream: Stream, model: Model) -> None:
        """Have the model's engine work on it, from where it stands."""
        if model.down:
            self._waiting[stream] = None
            return
        assert stream.submitted is not None
        assert stream.standing is not None
        self._working()
        model.engine.send(stream.standing.app)
        for submit in resumed(stream.submitted, stream.samples):
            self._last_rid += 1
            stream.rids.add(self._last_rid)
            self._by_rid[self._last_rid] = stream
            model.engine.send(replace(submit, rid=self._last_rid))
            if submit.hold:
                stream.left_behind = self._last_rid
        if stream.connection.lagging:
            self._tell(stream, Pause)

    def hold(self, account: Account, model: Model, tokens: array[int]) -> int:
        """Have the engine hold the KV of ``tokens``, and compute what it has not of it; its name
        for that. Nobody is told of the one token that this draws."""
        self._last_rid += 1
        app = self._apps.message(account)
        model.engine.send(app)
        model.engine.send(
            Submit(
                rid=self._last_rid,
                app=app.key,
                klass=max(CLASSES["normal"], CLASSES[self._apps.klass(account)]),
                root=app.root,
                prompt=pack_ids(tokens),
                n=1,
                sampling=asdict(SamplingParams(temperature=0.0)),
                stop=asdict(StopParams(max_tokens=1, ignore_eos=True)),
                hold=True,
            )
        )
        return self._last_rid

    def cancel(self, stream: Stream) -> None:
        """End it with ``done`` and reason ``cancelled``: at once, or when the engine has let go."""
        if stream.over or stream.cancelled:
            return
        stream.cancelled = True
        if not stream.rids:
            self._done(stream, self._own_account(stream))
        else:
            self._tell(stream, Cancel)

    def fail(self, stream: Stream, error: WireError) -> None:
        """End it with an error."""
        if not stream.over:
            stream.emit_error(error)
            stream.account.failed += 1
            self._let_go(stream)

    def drop(self, stream: Stream) -> None:
        """Its client has gone: end it without a word."""
        if not stream.over:
            stream.account.cancelled += 1
            self._let_go(stream)

    def _let_go(self, stream: Stream) -> None:
        if not stream.cancelled:
            self._tell(stream, Cancel)
        self._end(stream, False)

    def pause(self, streams: Iterable[Stream], paused: bool) -> None:
        """Keep these out of steps, or let them go on."""
        for stream in streams:
            if not stream.over:
                self._tell(stream, Pause if paused else Unpause)
        self._working()

    def lost(self, model: Model, how: str) -> None:
        """The engine of ``model`` died: its requests wait for the next one, but for those that had
        nothing more to wait for, and those that may be what engines die of."""
        streams = dict.fromkeys(
            s for s in self._by_rid.values() if s.lease is not None and s.lease.model is model
        )
        for stream in streams:
            for rid in stream.rids:
                del self._by_rid[rid]
            stream.rids.clear()
            stream.deaths += 1
            if stream.over:
                self._release(stream)
            elif stream.cancelled or all(sample.reason for sample in stream.samples):
                closed = self._own_account(stream)
                if closed is not None:
                    stream.account.closed(closed, stream.counted, stream.waited_ms)
                self._done(stream, closed)
            elif stream.deaths >= POISON:
                self.fail(stream, _poison(stream, how))
            else:
                self._waiting[stream] = None

    def revive(self, model: Model) -> None:
        """Another engine serves ``model``: those that waited for it go on."""
        waiting, self._waiting = self._waiting, {}
        for stream in waiting:
            self._send(stream, model)

    def give_up(self, error: WireError) -> None:
        """No engine will take the place of the one that died."""
        for stream in list(self._waiting):
            self.fail(stream, error)

    def _own_account(self, stream: Stream) -> Closed | None:
        """What the front knows itself of a request that no engine can close."""
        if stream.submitted is None:
            return None
        submitted, begun, first = stream.times
        times = (submitted, begun, first, self._clock.time())
        prompt, cached = len(stream.prompt), stream.cached_tokens
        return accounted(prompt, cached, stream.samples, times)

    # ------------------------------------------------------------ from the engine

    def report(self, report: StepReport) -> None:
        """Everything of one step. This is the front's hot path: microseconds per token count."""
        self.steps = report.steps
        by_rid = self._by_rid
        now = self._clock.time()
        for rid, cached in report.started:
            stream = by_rid.get(rid)
            if stream is not None and not stream.over and not stream.started:
                stream.started = True
                stream.cached_tokens, stream.times[1] = cached, now
                stream.account.running += 1
        for scores in report.prompts:
            stream = by_rid.get(scores.rid)
            if stream is not None and not stream.over and stream.echo is not None:
                part = stream.echo.part(scores.start, scores.logprobs)
                if part is not None:
                    stream.emit("prompt", part)
        for output in report.outputs:
            stream = by_rid.get(output.rid)
            if stream is not None and not stream.over:
                self._output(stream, output, now)
        for ended in report.ended:
            stream = by_rid.get(ended.rid)
            if stream is not None and not stream.over:
                self._ended(stream, ended)
        for closed in report.closed:
            stream = by_rid.pop(closed.rid, None)
            if stream is not None:
                self._closed(stream, closed)
        for rejected in report.rejected:
            stream = by_rid.pop(rejected.rid, None)
            if stream is not None:
                self._rejected(stream, rejected)

    def _output(self, stream: Stream, output: Output, now: float) -> None:
        sample = stream.samples[output.index]
        if sample.reason is not None:
            return  # computed before the engine heard that a stop string had ended the sample
        tokens, logprobs = output.tokens, output.logprobs
        before = len(sample.ids)
        text, stopped = sample.take(unpack_ids(tokens))
        count = len(tokens) // 4
        if stopped:
            self._say(stream, Finish(output.rid, output.index, len(sample.ids)))
            count = max(0, len(sample.ids) - before)
            tokens = tokens[: 4 * count]
            logprobs = logprobs[:count] if logprobs is not None else None
        if count:
            self._measure(stream, sample, count, now)
        stream.account.generated(count, now)
        stream.counted += count
        if not text and not count:
            return
        if stream.held is not None:
            stream.held.take(output.index, text, tokens, logprobs)
            return
        if stream.turn is not None:
            stream.texts.append(text)
        event: dict[str, Any] = {"index": output.index, "text": text, "tokens": tokens}
        if logprobs is not None:
            event["logprobs"] = logprobs
        stream.emit("chunk", event)

    def _measure(self, stream: Stream, sample: Sample, count: int, now: float) -> None:
        assert stream.standing is not None
        measures = self.measures[stream.standing.klass]
        if sample.at:
            measures.between_tokens.add((now - sample.at) / count, count)
        elif not stream.counted:
            measures.first_token.add(now - stream.arrived)
            stream.times[2] = now
        sample.at = now

    def _ended(self, stream: Stream, ended: Ended) -> None:
        reason = ended.reason
        if reason == "length" and stream.clipped:
            reason = "context"
        sample = stream.samples[ended.index]
        sample.end(reason)
        sample.score = ended.score

    def _closed(self, stream: Stream, closed: Closed) -> None:
        stream.rids.discard(closed.rid)
        if stream.rids:
            return  # other samples of it, requests of their own since an engine died, go on
        if stream.deaths:
            closed = self._own_account(stream) or closed
        elif any(sample.stop is not None for sample in stream.samples):
            # The engine may have ended them before it heard where the text does.
            kept = sum(len(sample.ids) for sample in stream.samples)
            closed = replace(closed, generated_tokens=kept)
        stream.account.closed(closed, stream.counted, stream.waited_ms)
        if stream.standing is not None:
            waited_ms = stream.waited_ms + closed.queue_ms
            self.measures[stream.standing.klass].queue.add(waited_ms / 1e3)
        if stream.over:
            self._release(stream)
        else:
            self._done(stream, closed)

    def _rejected(self, stream: Stream, rejected: Rejected) -> None:
        stream.rids.discard(rejected.rid)
        if not stream.over:
            self.fail(stream, wire_error(rejected.code, rejected.message, rejected.details))
        elif not stream.rids:
            self._release(stream)

    # ------------------------------------------------------------ its end

    def _done(self, stream: Stream, closed: Closed | None) -> None:
        """Its last event; without ``closed`` it was cancelled and the engine has no say."""
        if not stream.samples:
            stream.samples = [Sample(None, (), 0) for _ in range(stream.n)]
        for sample in stream.samples:
            sample.end("cancelled")
        if stream.held is not None:
            _say_best(stream, stream.held)
        stream.texts.append(stream.samples[0].tail)
        finish = [
            {
                "index": i,
                "reason": sample.reason,
                "text": sample.tail,
                **({} if sample.score is None else {"score": sample.score}),
                **({} if sample.stop is None else {"stop": sample.stop}),
            }
            for i, sample in enumerate(stream.samples)
        ]
        event = {"finish": finish, "usage": _usage(closed), "timings": _timings(closed, stream)}
        stream.emit("done", event)
        well = all(sample.reason != "cancelled" for sample in stream.samples)
        stream.account.finished += well
        stream.account.cancelled += not well
        self._end(stream, well)

    def _end(self, stream: Stream, well: bool) -> None:
        """The one way in which a stream is over for its client."""
        stream.over = True
        self._waiting.pop(stream, None)
        if stream.started:
            stream.account.running -= 1
        if stream.standing is not None:
            self._apps.leave(stream.account, stream.standing)
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
        if stream.turn is not None:
            reply = stream.samples[0].ids if stream.samples else array("i")
            stream.turn.over(well, "".join(stream.texts), reply)
            if (
                stream.left_behind >= 0
                and stream.lease is not None
                and stream.lease.model is not None
            ):
                session, model = stream.turn.session, stream.lease.model
                self.pins.turn_over(session, model, stream.left_behind, well=well)
        self._over(stream)
        if not stream.rids:
            self._release(stream)

    def _release(self, stream: Stream) -> None:
        if stream.lease is not None:
            self._models.release(stream.lease)

    def _tell(self, stream: Stream, kind: type[Cancel] | type[Pause] | type[Unpause]) -> None:
        """Tell the engine, under each name that it has for the stream."""
        for rid in stream.rids:
            self._say(stream, kind(rid))

    def _say(self, stream: Stream, message: ToEngine) -> None:
        if stream.lease is not None and stream.lease.model is not None:
            stream.lease.model.engine.send(message)


def _poison(stream: Stream, how: str) -> WireError:
    return WireError(
        "E_POISON",
        f"{stream.deaths} engines died while they had this request, the last with {how}",
        details={"deaths": stream.deaths},
    )


def _tell_of_prompt(stream: Stream, pieces: PieceTable | None) -> int:
    """Say what is known of the prompt already, if the client wants to hear of it.

    Returns:
        The log-probabilities that the engine is asked for, as `Submit.prompt_logprobs`.
    """
    request = stream.request
    if not isinstance(request, Generate):
        return -1
    logprobs = request.told_of_prompt()
    if not request.echo and logprobs < 0:
        return -1
    stream.echo = Echo(stream.prompt, pieces, text=request.echo)
    part = stream.echo.whole() if logprobs < 0 else stream.echo.first()
    if part is not None:
        stream.emit("prompt", part)
    return logprobs


def _say_best(stream: Stream, held: Held) -> None:
    """Say what was held of the texts that are the reply; the others are forgotten."""
    best = held.best(stream.n)
    for place, index in enumerate(best):
        for chunk in held.chunks(index):
            if not place:
                stream.texts.append(chunk["text"])
            stream.emit("chunk", {"index": place, **chunk})
        score = held.score(index)
        if score is not None:
            stream.samples[index].score = score
    stream.samples = [stream.samples[index] for index in best]
    stream.held = None


def _check(request: Generation, prompt: array[int], model: Model) -> int:
    """Tokens the context has left for a reply.

    Raises:
        WireError: The request does not fit the model.
    """
    ready = model.ready
    if not prompt:
        raise WireError("E_FIELD", "the prompt is empty", details={"field": "prompt"})
    check_ids(prompt, ready.vocab_size)
    check_ids(request.logit_bias, ready.vocab_size)
    check_ids(request.stop_token_ids, ready.vocab_size)
    length = len(prompt)
    if length < ready.context_tokens:
        return ready.context_tokens - length
    if ready.pool_tokens <= ready.context_tokens:
        raise WireError(
            "E_NEVER_FITS",
            f"a prompt of {length} tokens and a reply need more than the whole pool of"
            f" {ready.pool_tokens}",
            details={"need_tokens": length + 1, "pool_tokens": ready.pool_tokens},
        )
    raise WireError(
        "E_TOO_LONG",
        f"a prompt of {length} tokens leaves no room in a context of {ready.context_tokens}",
        details={"prompt_tokens": length, "context_tokens": ready.context_tokens},
    )


def check_ids(ids: Collection[int], vocab_size: int) -> None:
    """Check that ids are in the vocabulary; negative ones were refused with the message.

    Raises:
        WireError: ``E_TOKEN_ID``.
    """
    if ids and (highest := max(ids)) >= vocab_size:
        raise WireError(
            "E_TOKEN_ID",
            f"token id {highest} is outside the vocabulary of {vocab_size}",
            details={"token": highest, "vocab_size": vocab_size},
        )


def _usage(closed: Closed | None) -> dict[str, int]:
    return {
        "prompt_tokens": closed.prompt_tokens if closed else 0,
        "cached_tokens": closed.cached_tokens if closed else 0,
        "generated_tokens": closed.generated_tokens if closed else 0,
    }


def _timings(closed: Closed | None, stream: Stream) -> dict[str, float]:
    """What the engine measured, with the time before the engine had the request."""
    waited = stream.waited_ms
    return {
        "queue_ms": round(waited + (closed.queue_ms if closed else 0.0), 3),
        "prompt_ms": round(closed.prompt_ms, 3) if closed else 0.0,
        "generation_ms": round(closed.generation_ms, 3) if closed else 0.0,
        "ttft_ms": round(waited + closed.ttft_ms, 3) if closed else 0.0,
    }
