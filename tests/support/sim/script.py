"""What clients do: every one draws its next act from the world's dice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from pagedd_daemon.front.detokenizer import pack_ids
from tests.support.sim.asked import Asked, promise
from tests.support.sim.client import Client, Talk
from tests.support.sim.source import rendered

_STEMS = [tuple(random.Random(number).choices(range(97, 123), k=260)) for number in range(1, 6)]
"""Few, so that requests share prefixes and worlds share plain runs."""
_LENGTHS = (1, 5, 16, 17, 33, 60, 100, 150)
_REPLIES = (1, 2, 4, 8, 16, 30)
_WORDS = ("Hello", "And then?", "Name a river, and another one.", "no")
_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
)
_BROKEN: tuple[dict[str, Any], ...] = (
    {"temperatur": 0.5},
    {"max_tokens": 0},
    {"n": 99},
    {"stop": [""]},
    {"tokens": b"abc"},
    {"logit_bias": {300: 1.0}},
    {"model": "c"},
)
_AT_THE_DOOR = ("E_BUSY", "E_SLOW", "E_DRAINING")

Act: TypeAlias = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Habits:
    """Of the clients of a world."""

    acts: int = 6
    pause_s: float = 0.05
    """Between two acts, in the mean."""
    impatient: float = 0.2
    """Share of requests that are taken back."""
    rude: float = 0.3
    """Share of clients that hang up while they are being served."""
    names_models: float = 0.0
    """Share of requests that name a model."""
    unloads: bool = False


class Script:
    """The life of one client."""

    def __init__(self, client: Client, dice: random.Random, habits: Habits) -> None:
        self.client = client
        self._dice = dice
        self._habits = habits
        self._talks: list[Talk] = []
        self._turns: set[asyncio.Task[None]] = set()
        self._acts: list[tuple[Act, int]] = [
            (self._generate, 10),
            (self._choose, 2),
            (self._search, 1),
            (self._embed, 1),
            (self._chat, 3),
            (self._open, 4),
            (self._say, 6),
            (self._fork, 2),
            (self._commit, 1),
            (self._close, 1),
            (self._pin, 4),
            (self._look_away, 3),
            (self._again, 2),
            (self._other, 1),
            (self._break, 1),
            (self._look, 2),
            (self._text, 1),
            (self._load, 1),
        ]
        if habits.unloads:
            self._acts.append((self._unload, 1))

    async def live(self) -> None:
        """From hello to the end of the last request, or to a sudden end."""
        client, habits, dice = self.client, self._habits, self._dice
        hello = client.hello()
        if dice.random() < 0.2:
            self._generate_now()  # does not wait for the answer
        await client.end(hello)
        client.line.lost = client.lost
        acts, weights = zip(*self._acts, strict=True)
        for act in dice.choices(acts, weights, k=dice.randint(1, habits.acts)):
            await act()
            await asyncio.sleep(dice.expovariate(1 / habits.pause_s))
        if dice.random() < habits.rude:
            client.hang_up()
        client.read(True)
        await asyncio.gather(*self._turns)
        await client.all_over()

    # ------------------------------------------------------------------------------- one request

    def _settings(self) -> dict[str, Any]:
        dice = self._dice
        fields: dict[str, Any] = dict(dice.choice(_SAMPLINGS))
        fields["max_tokens"] = dice.choice(_REPLIES)
        if dice.random() < 0.2:
            fields["stop"] = dice.choice((["e", "x"], ["th", "q", "!"], ["é", "#", "%%"]))
        if dice.random() < 0.1:
            fields["stop_token_ids"] = list(range(65, 75))
        if dice.random() < 0.1:
            fields["min_tokens"] = dice.randint(1, 8)
        if dice.random() < 0.1:
            fields["ignore_eos"] = True
        if dice.random() < 0.1:
            fields["logprobs"] = dice.randint(0, 2)
        if dice.random() < 0.05:
            fields["deadline_ms"] = dice.choice((5, 50, 300))
        if dice.random() < 0.05:
            fields["stream"] = False
        if dice.random() < self._habits.names_models:
            fields["model"] = dice.choice(("a", "b"))
        if dice.random() < 0.05:
            fields["keep_alive"] = dice.choice((0, 0.05, "5m"))
        return fields

    def _generate_now(self) -> Asked:
        dice = self._dice
        prompt = dice.choice(_STEMS)[: dice.choice(_LENGTHS)]
        fields = self._settings()
        if dice.random() < 0.2:
            fields["n"] = dice.randint(2, 3)
        if dice.random() < 0.1 and not fields.keys() & {"min_tokens", "ignore_eos"}:
            fields["regex"] = dice.choice(("(yes|no)", "[a-f]{2,9}", "[^é]{1,20}!"))
        if dice.random() < 0.1:
            fields["echo"] = True
        if dice.random() < 0.1:
            fields["prompt_logprobs"] = dice.randint(0, 2)
        if dice.random() < 0.2:
            text = bytes(prompt).decode()
            asked = self.client.ask("generate", prompt, prompt=text, **fields)
        else:
            asked = self.client.generate(prompt, **fields)
        self._maybe_cancel(asked)
        return asked

    def _maybe_cancel(self, asked: Asked) -> None:
        dice = self._dice
        if dice.random() < self._habits.impatient:
            late = dice.choice((0.0, 0.002, 0.02, 0.2)) * dice.random()
            asyncio.get_running_loop().call_later(late, self._cancel, asked)

    def _cancel(self, asked: Asked) -> None:
        if asked.end is None and not self.client.gone:
            self.client.cancel(asked)

    async def _generate(self) -> None:
        for _ in range(self._dice.choice((1, 1, 1, 2, 5))):
            self._generate_now()

    async def _choose(self) -> None:
        """Ask for the best of several samples."""
        dice = self._dice
        n = dice.randint(1, 2)
        fields: dict[str, Any] = {"n": n, "best_of": n + dice.randint(1, 2), "temperature": 0.8}
        prompt = dice.choice(_STEMS)[: dice.choice(_LENGTHS)]
        asked = self.client.generate(
            prompt, seed=dice.randint(0, 2), max_tokens=dice.choice(_REPLIES[:4]), **fields
        )
        self._maybe_cancel(asked)

    async def _search(self) -> None:
        """Ask for a beam search."""
        dice = self._dice
        width = dice.randint(2, 3)
        prompt = dice.choice(_STEMS[:2])[: dice.choice((5, 16, 33))]
        asked = self.client.generate(
            prompt, beam_width=width, n=dice.randint(1, width), max_tokens=dice.choice((2, 4, 6))
        )
        self._maybe_cancel(asked)

    async def _embed(self) -> None:
        """Ask for a vector, and for the same one again."""
        prompt = self._dice.choice(_STEMS)[: self._dice.choice((1, 5, 16))]
        vectors = set()
        for _ in range(2):
            asked = self.client.ask("embed", tokens=[pack_ids(prompt)])
            await self.client.end(asked)
            if asked.end is not None and asked.code is None:
                vectors.add(asked.end["embeddings"])
                promise(asked.end["prompt_tokens"] == len(prompt), "embedded", asked.end)
        promise(len(vectors) < 2, "a text has two vectors")

    async def _chat(self) -> None:
        said = [("user", self._dice.choice(_WORDS))]
        if self._dice.random() < 0.5:
            said = [("system", "Be brief."), *said]
        messages = [{"role": role, "content": content} for role, content in said]
        prompt = tuple(rendered(said).encode())
        asked = self.client.ask("chat", prompt, messages=messages, **self._settings())
        self._maybe_cancel(asked)

    # ------------------------------------------------------------------------------ conversations

    async def _open(self) -> None:
        fields: dict[str, Any] = {}
        said: list[tuple[str, str]] = []
        if self._dice.random() < 0.5:
            fields["system"] = "Be brief."
            said = [("system", "Be brief.")]
        if self._dice.random() < 0.2:
            fields["ttl"] = self._dice.choice((0.05, 1))
        await self._opened(Talk(said), self.client.ask("session.open", **fields))

    async def _opened(self, talk: Talk, asked: Asked) -> None:
        await self.client.end(asked)
        if asked.end is not None and asked.code is None:
            talk.id = asked.end["session"]
            self._talks.append(talk)

    def _talk(self) -> Talk | None:
        return self._dice.choice(self._talks) if self._talks else None

    async def _say(self) -> None:
        talk = self._talk()
        if talk is None:
            return
        self._talks.remove(talk)
        task = asyncio.ensure_future(self._turn(talk))
        self._turns.add(task)
        if self._dice.random() < 0.5:
            await asyncio.wait([task])

    async def _turn(self, talk: Talk) -> None:
        """A turn; nobody else uses the conversation meanwhile, so what it holds is known."""
        client, dice = self.client, self._dice
        content = dice.choice(_WORDS)
        commit = dice.random() < 0.8
        fields = self._settings()
        if talk.model is not None:
            fields["model"] = talk.model
        # A conversation whose history has outgrown the pool is refused; this one starts small.
        prompt = talk.prompt(content, talk.model)
        asked = client.ask(
            "session.say", prompt, session=talk.id, content=content, commit=commit, **fields
        )
        self._maybe_cancel(asked)
        await client.end(asked)
        if asked.end is None:
            return
        talk.take(content, asked, commit=commit)
        if asked.code not in ("E_SESSION", "E_EXPIRED"):
            self._talks.append(talk)

    async def _fork(self) -> None:
        talk = self._talk()
        if talk is not None:
            branch = Talk(talk.said, ids=talk.ids, model=talk.model)
            await self._opened(branch, self.client.ask("session.fork", session=talk.id))

    async def _commit(self) -> None:
        talk = self._talk()
        if talk is None:
            return
        asked = await self.client.end(self.client.ask("session.commit", session=talk.id))
        if asked.end is not None and asked.code is None:
            promise(talk.kept is not None, "a reply counts that there was not")
            talk.commit()

    async def _close(self) -> None:
        talk = self._talk()
        if talk is not None:
            self._talks.remove(talk)
            await self.client.end(self.client.ask("session.close", session=talk.id))

    async def _pin(self) -> None:
        talk = self._talk()
        if talk is not None:
            pinned = self._dice.choice((True, True, False, None))
            fields: dict[str, Any] = {} if pinned is None else {"pinned": pinned}
            await self.client.end(self.client.ask("session.pin", session=talk.id, **fields))

    # ------------------------------------------------------------------------------- other things

    async def _look_away(self) -> None:
        self.client.read(False)
        late = self._dice.choice((0.01, 0.3, 0.3, 700.0))
        asyncio.get_running_loop().call_later(late, self.client.read, True)

    async def _again(self) -> None:
        """Send something again that needs not be."""
        asked = self._any()
        if asked is not None:
            self.client.send(asked)

    async def _other(self) -> None:
        asked = self._any()
        if asked is not None:
            self.client.ask_other(asked)

    def _any(self) -> Asked | None:
        # One that was turned away at the door is not remembered: sent again, it would begin.
        known = [
            asked
            for asked in self.client.asked.values()
            if asked.prompt is not None and asked.last >= 0 and asked.code not in _AT_THE_DOOR
        ]
        return self._dice.choice(known) if known else None

    async def _break(self) -> None:
        """Ask for what must be refused."""
        fields = {"tokens": b"aaaa", **self._dice.choice(_BROKEN)}
        asked = await self.client.end(self.client.ask("generate", None, **fields))
        promise(asked.end is None or asked.code is not None, fields, "was not refused")

    async def _look(self) -> None:
        verb = self._dice.choice(("status", "ping"))
        self.client.control({"verb": verb})

    async def _text(self) -> None:
        said = self._dice.choice(_WORDS)
        asked = await self.client.end(self.client.ask("tokenize", text=said))
        if asked.end is not None and asked.code is None:
            promise(asked.end["tokens"][::4] == said.encode(), said, "became", asked.end)

    async def _load(self) -> None:
        model = self._dice.choice((None, "a", "b")) if self._habits.names_models else None
        fields: dict[str, Any] = {} if model is None else {"model": model}
        self.client.ask("load", **fields)

    async def _unload(self) -> None:
        self.client.ask("unload")
