"""Live requests: what each was asked, and how the engine's reports become its events.

A request has two ends. For its client it is *over* with its last event. For the engine it is over
with `Closed` or `Rejected`, which may come later (after a deadline, or when the client has gone);
only then is its lease on the model given back.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.apps import CLASSES, Apps
from pagedd_daemon.front.detokenizer import pack_ids, unpack_ids
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.failover import POISON, accounted, resumed
from pagedd_daemon.front.fitting import room_for_reply
from pagedd_daemon.front.held import Held
from pagedd_daemon.front.measures import Measures
from pagedd_daemon.front.model_ports import Clock, wire_error
from pagedd_daemon.front.models import Model, Models
from pagedd_daemon.front.pins import Pins
from pagedd_daemon.front.stream import Sample, Stream, say_best, tell_of_prompt, timings, usage
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
        room = room_for_reply(request, prompt, model)
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
        prompt_logprobs = tell_of_prompt(stream, pieces)
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
            owner=standing.app.owner,
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
                owner=app.owner,
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
            say_best(stream, stream.held)
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
        event = {"finish": finish, "usage": usage(closed), "timings": timings(closed, stream)}
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
