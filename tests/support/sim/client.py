"""A client: its connection, its requests, and the conversations that the daemon keeps for it."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.front.identity import Program
from tests.support.sim.asked import Asked, promise
from tests.support.sim.oracle import Oracle
from tests.support.sim.source import rendered
from tests.support.sim.transport import Line, SimTransport

PATIENCE_S = 20.0
"""Until a client that hears nothing sends its request again."""
_MOST_PATIENCE_S = 4000.0
"""Until it is a broken promise that a request has not ended."""


@dataclass(slots=True, eq=False)
class Talk:
    """A conversation, as its client believes that the daemon has it."""

    said: list[tuple[str, str]]
    """Role and text of what counts."""
    id: str = ""
    ids: tuple[int, ...] = ()
    """What the model has read and said in it."""
    model: str | None = None
    kept: tuple[list[tuple[str, str]], tuple[int, ...], str | None] | None = None
    """The same with a reply that does not count yet."""

    def prompt(self, content: str, model: str | None) -> tuple[int, ...]:
        """What the model reads if the user says this."""
        text = rendered([*self.said, ("user", content)])
        if not self.ids or self.model != model:
            return tuple(text.encode())
        known = rendered(self.said[:-1]) + self.said[-1][1]
        assert text.startswith(known)
        return self.ids + tuple(text[len(known) :].encode())

    def take(self, content: str, asked: Asked, *, commit: bool) -> None:
        """A turn is over."""
        (sample,) = asked.samples
        well = bool(asked.reasons) and "cancelled" not in asked.reasons
        if asked.model is None or not (well or sample.tokens):
            self.kept = None
            return
        assert asked.prompt is not None
        said = [*self.said, ("user", content), ("assistant", "".join(sample.text))]
        # Tokens of a stop string are no part of the reply, even where they went out.
        usage = {} if asked.end is None else asked.end.get("usage", {})
        tokens = sample.tokens[: usage.get("generated_tokens")]
        self.kept = said, asked.prompt + tuple(tokens), asked.model
        if well and commit:
            self.commit()

    def commit(self) -> None:
        """The last reply counts."""
        assert self.kept is not None
        self.said, self.ids, self.model = self.kept
        self.kept = None


class Client:
    """One connection and what was asked on it."""

    def __init__(
        self,
        transport: SimTransport,
        dice: random.Random,
        oracle: Oracle,
        *,
        app: str,
        priority: str,
        uid: int,
        program: Program,
        delay_s: float,
        lost: float,
        note: Callable[[str], None],
    ) -> None:
        self.app = app
        self.dice = dice
        self.line = Line(self._heard, uid, program, delay_s)
        self.lost = lost
        """Share of messages that do not arrive, once it has been greeted."""
        self.asked: dict[str, Asked] = {}
        self.gone = False
        """It has hung up."""
        self.answers = 0
        """Of control requests."""
        self._transport = transport
        self._note = note
        self._oracle = oracle
        self._numbers = itertools.count()
        self._priority = priority

    # ----------------------------------------------------------------------------------- requests

    def ask(self, verb: str, reads: tuple[int, ...] | None = None, **fields: Any) -> Asked:
        """Send a request; ``reads``: what the model must read, if it generates."""
        asked = Asked({"verb": verb, "id": f"r{next(self._numbers)}", **fields}, reads)
        self.asked[asked.id] = asked
        self.send(asked)
        return asked

    def generate(self, tokens: tuple[int, ...], **fields: Any) -> Asked:
        """Ask for a continuation of token ids."""
        return self.ask("generate", tokens, tokens=pack_ids(tokens), **fields)

    def send(self, asked: Asked) -> None:
        """Send it, or send it again from the event that is missing on."""
        fields = asked.fields
        again = {"after": asked.last} if asked.sent and asked.prompt is not None else {}
        asked.sent += 1
        self._note(f"{self.app} sends {asked}")
        self._transport.ask(self.line, {**fields, **again})

    def ask_other(self, asked: Asked) -> None:
        """Send a different request under the same id."""
        asked.other += 1
        self._transport.ask(self.line, {"verb": "tokenize", "id": asked.id, "text": "other"})

    def cancel(self, asked: Asked) -> None:
        """Take a request back, be it there already or not."""
        asked.cancelled = True
        self._note(f"{self.app} cancels {asked.id}")
        self.control({"verb": "cancel", "token": self.token, "target": asked.id})

    def control(self, request: dict[str, Any]) -> None:
        """Ask something on the control socket."""
        id = f"c{next(self._numbers)}"
        self._transport.control(self.line, {"id": id, **request}, self._controlled)

    def read(self, reading: bool) -> None:
        """Stop reading, or go on."""
        if not self.gone:
            self._note(f"{self.app} {'reads' if reading else 'does not read'}")
            self._transport.read(self.line, reading)

    def hang_up(self) -> None:
        """Go without a word."""
        self.gone = True
        self._note(f"{self.app} hangs up")
        self._transport.hang_up(self.line)

    @property
    def token(self) -> bytes:
        """Of the connection; before hello is answered, of none."""
        return self.line.connection.token if self.line.connection else bytes(16)

    def hello(self) -> Asked:
        """Say who it is, before anything else."""
        return self.ask("hello", app=self.app, priority=self._priority)

    async def end(self, asked: Asked) -> Asked:
        """Wait until a request is over, and ask again for what got lost."""
        waited = 0.0
        while asked.end is None and not self.gone:
            try:
                await asyncio.wait_for(asked.over.wait(), PATIENCE_S)
            except asyncio.TimeoutError:
                waited += PATIENCE_S
                promise(waited < _MOST_PATIENCE_S, self.app, asked, "never ended")
                if self.line.lost and self.line.reading and not self.gone:
                    self.send(asked)
        return asked

    async def all_over(self) -> None:
        """Wait until every request is."""
        for asked in list(self.asked.values()):
            await self.end(asked)

    # -------------------------------------------------------------------------------------- events

    def _heard(self, events: list[dict[str, Any]]) -> None:
        if self.gone:
            return
        for event in events:
            asked = self.asked[event["id"]]
            self._note(f"{self.app} hears {asked.id} {event['seq']} {event['type']}")
            if not asked.hear(event) and self.line.lost:
                self.send(asked)

    def _controlled(self, event: dict[str, Any]) -> None:
        promise(event["type"] == "result", self.app, "asked and got", event)
        self.answers += 1

    def endings(self) -> Iterator[str]:
        """Why its requests and samples have ended."""
        for asked in self.asked.values():
            if asked.code is not None:
                yield asked.code
            yield from asked.reasons

    def check(self, allowed: Callable[[str, Asked], bool]) -> None:
        """Whether every request ended as it had to."""
        for asked in self.asked.values():
            promise(self.gone or asked.end is not None, self.app, asked, "has no end")
            if asked.code is not None:
                promise(allowed(asked.code, asked), self.app, asked, "ended:", asked.end)
            asked.check(self._oracle)
