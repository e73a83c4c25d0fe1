"""The protocol without I/O: what both clients share.

`Core` makes requests, sorts events to their calls, notices lost ones and asks for them again.
`Assembly` turns the events of one stream into chunks and the finished `Completion`. Neither knows
sockets, threads or clocks, so a test can feed them any history of frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from pagedd._errors import (
    InvalidRequest,
    PageddError,
    ProtocolViolation,
    SessionLost,
    from_wire,
)
from pagedd._types import (
    Chunk,
    Completion,
    Prompt,
    Sample,
    ServerInfo,
    Timings,
    TokenLogprob,
    Usage,
)
from pagedd._verbs import unpack_tokens

PROTOCOL = 1

MAX_FRAME_BYTES = 64 * 2**20
"""Of what the daemon sends: a resend of a long stream is one message."""

MAX_RESENDS = 8
"""Resends of one call without any progress before the daemon is taken to be broken."""

STREAMING = frozenset({"generate", "chat", "session.say"})
_FINAL = frozenset({"done", "result", "error"})

Event = dict[str, Any]


@dataclass(slots=True, eq=False)
class Call:
    """One request and the events of it that nobody has read yet."""

    id: str
    verb: str
    control: bool
    """It travels over the control socket."""
    request: dict[str, Any]
    events: deque[Event] = field(default_factory=deque)
    over: bool = False
    """No further event comes."""
    failure: PageddError | None = None
    """Why it is over, if the daemon did not say so itself."""
    abandoned: bool = False
    """Nobody reads it: its events are dropped."""
    waker: Callable[[], None] | None = None
    """Called when an event arrived or the call is over."""
    next_seq: int = 0
    asked_again_at: int = -1
    """The gap a resend was asked for, or -1."""
    highest_seen: int = -1
    resends: int = 0

    @property
    def ready(self) -> bool:
        """Whether there is something to read."""
        return bool(self.events) or self.over

    @property
    def wanted(self) -> bool:
        """Whether it goes on and somebody reads it."""
        return not (self.over or self.abandoned)

    def take(self) -> Event:
        """The next event.

        Raises:
            PageddError: There is none left, and why.
        """
        if self.events:
            return self.events.popleft()
        assert self.over, f"{self.verb} {self.id} was read before it was ready"
        raise self.failure or ProtocolViolation(f"{self.verb} was read past its end")

    def wake(self) -> None:
        """Tell whoever waits."""
        if self.waker is not None:
            self.waker()


class Core:
    """The calls of one client.

    Not thread-safe: the caller serialises.
    """

    def __init__(self) -> None:
        self.token = b""
        self.frame_bytes = 0
        """Longest frame the daemon takes; 0 until it said so."""
        self._calls: dict[str, Call] = {}
        self._made = 0

    @property
    def busy(self) -> bool:
        """Whether a call is not over."""
        return bool(self._calls)

    def open(
        self, verb: str, fields: Mapping[str, Any], *, control: bool = False
    ) -> tuple[Call, bytes]:
        """A new call and the frame that starts it.

        Raises:
            InvalidRequest: A field cannot be expressed in msgpack, or the request is too long.
        """
        self._made += 1
        request: dict[str, Any] = {"v": PROTOCOL, "verb": verb, "id": f"r{self._made}"}
        request.update((name, value) for name, value in fields.items() if value is not None)
        frame = self._pack(request)
        call = Call(request["id"], verb, control, request)
        self._calls[call.id] = call
        return call, frame

    def opened(self, result: Event) -> ServerInfo:
        """Takes in the result of ``hello``."""
        try:
            info = ServerInfo(
                version=str(result["server"]),
                pid=int(result["pid"]),
                limits=dict(result["limits"]),
                model=result.get("model"),
                notice=result.get("notice"),
            )
            self.token = bytes(result["token"])
        except (KeyError, TypeError, ValueError) as error:
            raise _violation({"type": "hello", **result}, error) from error
        self.frame_bytes = info.limits.get("frame_bytes", 0)
        return info

    def cancel(self, target: str) -> bytes:
        """The control frame that cancels a request; nobody waits for its answer."""
        call, frame = self.open("cancel", {"token": self.token, "target": target}, control=True)
        call.abandoned = True
        return frame

    def again(self, call: Call) -> bytes:
        """The frame that asks for everything of a call that has not arrived.

        The protocol makes this idempotent (section 6).
        """
        request = call.request
        if call.verb in STREAMING:
            request = request | {"after": call.next_seq - 1}
        return self._pack(request)

    def abandon(self, call: Call) -> None:
        """Nobody reads this call any more."""
        call.abandoned = True
        call.events.clear()

    def feed(self, frame: bytes) -> list[tuple[bool, bytes]]:
        """Takes in one frame of the daemon.

        Returns:
            Frames to send, each with whether it goes to the control socket.

        Raises:
            ProtocolViolation: It is none the protocol allows. The connection is of no more use.
        """
        try:
            message = decoded(frame)
            if message["v"] != PROTOCOL:
                raise ProtocolViolation(
                    f"the daemon speaks protocol {message['v']!r}, this client {PROTOCOL}: "
                    "upgrade the older of the two"
                )
            again: list[tuple[bool, bytes]] = []
            for event in message["ev"]:
                call = self._sort(event)
                if call is not None:
                    again.append((call.control, self.again(call)))
        except (ValueError, TypeError, KeyError) as error:
            raise _no_message(frame, error) from error
        return again

    def fail(self, error: PageddError, *, control: bool | None = None) -> None:
        """Every call of a socket (None: of both) is over with this error."""
        for call in list(self._calls.values()):
            if control is None or call.control == control:
                self._end(call, error)

    def _sort(self, event: Event) -> Call | None:
        """Gives an event to its call; returns the call if it must be asked for again."""
        call = self._calls.get(event["id"])
        if call is None:
            if event["id"] == "" and event["type"] == "error":
                self._unreadable(event)
            return None
        seq, final = event["seq"], event["type"] in _FINAL
        if seq != call.next_seq and not (call.abandoned and final):
            return None if call.abandoned else self._gap(call, seq)
        call.next_seq = seq + 1
        if call.asked_again_at >= 0:
            call.asked_again_at, call.resends = -1, 0
        if final:
            call.over = True
            del self._calls[call.id]
        if not call.abandoned:
            call.events.append(event)
            call.wake()
        return None

    def _gap(self, call: Call, seq: int) -> Call | None:
        """An event out of order arrived. Returns the call if it must be asked for again.

        The daemon answers a resend with everything after the last event we have, in order, so
        what arrives early is dropped and comes again. Until then live events go on with rising
        numbers; one that does not rise belongs to the answer, whose beginning was then lost too.
        """
        if seq < call.next_seq:
            return None
        if call.asked_again_at == call.next_seq and seq > call.highest_seen:
            call.highest_seen = seq
            return None
        call.resends += 1
        if call.resends > MAX_RESENDS:
            details = {"request": call.id, "missing_seq": call.next_seq, "got_seq": seq}
            self._end(call, ProtocolViolation("events of the request are lost", details=details))
            return None
        call.asked_again_at, call.highest_seen = call.next_seq, seq
        return call

    def _unreadable(self, event: Event) -> None:
        """The daemon could not read some message, nor tell whose: no unanswered call is safe."""
        for call in list(self._calls.values()):
            if call.next_seq == 0:
                self._end(call, from_wire(event))

    def _end(self, call: Call, error: PageddError) -> None:
        self._calls.pop(call.id, None)
        call.over, call.failure = True, error
        call.wake()

    def _pack(self, request: dict[str, Any]) -> bytes:
        try:
            frame: bytes = msgpack.packb(request)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(
                f"{request['verb']} has a value that cannot be sent: {error}", code="E_FIELD"
            ) from error
        if 0 < self.frame_bytes < len(frame):
            # The daemon closes the connection on such a frame, and with it every other stream.
            raise InvalidRequest(
                f"the request has {len(frame)} bytes, the daemon takes {self.frame_bytes}",
                code="E_LIMIT",
                details={"limit": "frame_bytes", "value": self.frame_bytes, "bytes": len(frame)},
            )
        return frame


def decoded(frame: bytes) -> Any:
    """The value that a frame of the daemon's holds.

    Raises:
        ProtocolViolation: It holds none.
    """
    try:
        return msgpack.unpackb(frame)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise _no_message(frame, error) from error


def _no_message(frame: bytes, error: Exception) -> ProtocolViolation:
    return ProtocolViolation(f"the daemon sent {len(frame)} bytes that are no message: {error!r}")


def result_of(event: Event) -> Event:
    """The fields of a ``result``.

    Raises:
        RequestError: It is an ``error``.
    """
    kind = event.get("type")
    if kind == "error":
        raise error_of(event)
    if kind != "result":
        raise ProtocolViolation(f"the daemon answered with {kind!r} instead of a result")
    return {key: value for key, value in event.items() if key not in ("id", "seq", "type")}


def error_of(event: Event) -> PageddError:
    """The exception for an ``error`` event."""
    if event.get("code") == "E_HELLO":
        # We said hello first; so this is another daemon than the one that heard it.
        return SessionLost("the daemon does not know this connection: connect again")
    return from_wire(event)


class Assembly:
    """Puts the samples of one stream together."""

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.seed: int | None = None
        self.model: str | None = None
        self.completion: Completion | None = None
        self._texts: dict[int, list[str]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = {}
        self._prompt = _PromptParts()

    @property
    def prompt(self) -> Prompt | None:
        """The prompt as far as it came; None if nothing of it did."""
        return self._prompt.whole()

    def finished(self, error: PageddError | None) -> Completion:
        """The completion.

        Raises:
            PageddError: There is none; ``error``, if that is why.
        """
        if self.completion is None:
            raise error or PageddError("the stream is not over: read it to its end first")
        return self.completion

    def take(self, event: Event) -> list[Chunk]:
        """The chunks an event carries: none, one, or at the end one per sample.

        Raises:
            RequestError: The event is an error.
            ProtocolViolation: The event is none of a stream.
        """
        kind = event.get("type")
        try:
            if kind == "chunk":
                return [self._chunk(event)]
            if kind == "prompt":
                self._prompt.add(event)
                return []
            if kind == "accepted":
                self.prompt_tokens = int(event["prompt_tokens"])
                self.seed = int(event["seed"])
                self.model = str(event["model"])
                return []
            if kind == "done":
                return self._done(event)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _violation(event, error) from error
        if kind == "error":
            raise error_of(event)
        raise ProtocolViolation(f"the daemon sent {kind!r} in a stream")

    def _chunk(self, event: Event) -> Chunk:
        index, text = event["index"], event["text"]
        tokens = unpack_tokens(event["tokens"])
        logprobs = _logprobs(tokens, event.get("logprobs"))
        self._texts.setdefault(index, []).append(text)
        self._tokens.setdefault(index, []).extend(tokens)
        if logprobs is not None:
            self._logprobs.setdefault(index, []).extend(logprobs)
        return Chunk(index, text, tokens, logprobs)

    def _done(self, event: Event) -> list[Chunk]:
        samples, chunks = [], []
        for finish in sorted(event["finish"], key=lambda finish: int(finish["index"])):
            index, held_back = finish["index"], finish["text"]
            if held_back:
                chunks.append(Chunk(index, held_back, ()))
            logprobs = self._logprobs.get(index)
            samples.append(
                Sample(
                    index=index,
                    text="".join([*self._texts.get(index, ()), held_back]),
                    tokens=tuple(self._tokens.get(index, ())),
                    reason=str(finish["reason"]),
                    logprobs=None if logprobs is None else tuple(logprobs),
                    score=finish.get("score"),
                    stop=finish.get("stop"),
                )
            )
        usage, timings = event["usage"], event["timings"]
        self.completion = Completion(
            text=samples[0].text,
            samples=tuple(samples),
            usage=Usage(usage["prompt_tokens"], usage["cached_tokens"], usage["generated_tokens"]),
            timings=Timings(
                timings["queue_ms"],
                timings["prompt_ms"],
                timings["generation_ms"],
                timings["ttft_ms"],
            ),
            model=self.model or "",
            seed=self.seed or 0,
            prompt=self.prompt,
        )
        return chunks


class _PromptParts:
    """The prompt, as its parts come."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob | None] | None = None

    def add(self, event: Event) -> None:
        """One ``prompt`` event."""
        tokens, entries = unpack_tokens(event["tokens"]), event.get("logprobs")
        self._text.append(event["text"])
        self._tokens += tokens
        if entries is None:
            return
        known = self._logprobs = self._logprobs or []
        for token, entry in zip(tokens, entries, strict=True):
            known += (None,) if entry is None else _logprobs((token,), [entry]) or ()

    def whole(self) -> Prompt | None:
        """All of it; None if nothing came."""
        if not self._tokens:
            return None
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        return Prompt("".join(self._text), tuple(self._tokens), logprobs)


def _logprobs(tokens: tuple[int, ...], entries: Any) -> tuple[TokenLogprob, ...] | None:
    if entries is None:
        return None
    return tuple(
        TokenLogprob(token, logprob, tuple((other, value) for other, value in top))
        for token, (logprob, top) in zip(tokens, entries, strict=True)
    )


def _violation(event: Event, error: Exception) -> ProtocolViolation:
    return ProtocolViolation(
        f"the daemon sent a {event.get('type')!r} the protocol does not allow: {error!r}",
        details={"request": event.get("id")},
    )
