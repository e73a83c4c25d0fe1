"""One request that generates: its samples, and what is said of it and its prompt."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from pagedd_daemon.front.calls import Call
from pagedd_daemon.front.detokenizer import Detokenizer, PieceTable
from pagedd_daemon.front.echo import Echo
from pagedd_daemon.front.held import Held
from pagedd_daemon.front.requests import Generate, Generation

if TYPE_CHECKING:
    from pagedd_daemon.front.accounts import Account
    from pagedd_daemon.front.apps import Standing
    from pagedd_daemon.front.model_ports import Timer
    from pagedd_daemon.front.ports import Connection, Transport
    from pagedd_daemon.front.sessions import Turn
    from pagedd_daemon.messages import Closed, Submit


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


def tell_of_prompt(stream: Stream, pieces: PieceTable | None) -> int:
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


def say_best(stream: Stream, held: Held) -> None:
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


def usage(closed: Closed | None) -> dict[str, int]:
    """Tokens of a request, as ``done`` has them."""
    return {
        "prompt_tokens": closed.prompt_tokens if closed else 0,
        "cached_tokens": closed.cached_tokens if closed else 0,
        "generated_tokens": closed.generated_tokens if closed else 0,
    }


def timings(closed: Closed | None, stream: Stream) -> dict[str, float]:
    """What the engine measured, with the time before the engine had the request."""
    waited = stream.waited_ms
    return {
        "queue_ms": round(waited + (closed.queue_ms if closed else 0.0), 3),
        "prompt_ms": round(closed.prompt_ms, 3) if closed else 0.0,
        "generation_ms": round(closed.generation_ms, 3) if closed else 0.0,
        "ttft_ms": round(waited + closed.ttft_ms, 3) if closed else 0.0,
    }
