"""What five apps of a desktop ask, and when: data, made from a seed, the same for every server.

* ``chat``: a person who reads, thinks and answers.
* ``autocomplete``: an editor that asks at every pause in typing, and drops its last question.
* ``agent-a``, ``agent-b``: long contexts that grow by what a tool printed, with pauses between.
* ``summariser``: articles, 16 of them in flight at any time.

Replies have a fixed length (no end token is obeyed), so every server has the same to compute.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SEED = 20
OVERCOMMIT = 4.0
"""Times the pool that all apps together want at the same time."""
_BLOCK = 16
_TURN_TOKENS = 12
"""What a chat template adds to a message and its reply (SmolLM2's: 11)."""
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea body information back parent face level office door health "
    "person art war history party result change morning reason research girl guy moment air teacher"
)
_WORDS = _TEXT.split()
"""One token each, with the space before them, in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    text: str
    tokens: int
    """Length of the reply."""
    wait_s: float = 0.0
    """After the reply before it has ended; where the app types, after the last question was
    sent."""


@dataclass(frozen=True, slots=True)
class App:
    """One app and all that it asks."""

    name: str
    klass: str
    """``interactive``, ``normal`` or ``background``."""
    kind: str
    """``talk``: one conversation. ``type``: texts to be continued, each of which cancels the one
    before it. ``batch``: texts to be continued, ``in_flight`` at a time."""
    asks: tuple[Ask, ...]
    begin_s: float = 0.0
    in_flight: int = 1

    def most_tokens(self) -> int:
        """Tokens of its requests in flight at their longest."""
        sizes = [len(ask.text.split()) + ask.tokens for ask in self.asks]
        if self.kind == "talk":
            return sum(sizes) + _TURN_TOKENS * len(sizes)
        return self.in_flight * max(sizes)


def pool_tokens(apps: Sequence[App]) -> int:
    """The pool that these apps want `OVERCOMMIT` times."""
    wanted = sum(app.most_tokens() for app in apps)
    return int(wanted / OVERCOMMIT) // _BLOCK * _BLOCK


def desktop(*, quick: bool = False, seed: int = SEED) -> list[App]:
    """The five apps: some four minutes on two cores; about one if ``quick``."""
    dice = random.Random(seed)
    part = 4 if quick else 1
    return [
        _chat(dice, 28 // part),
        _autocomplete(dice, 224 // part),
        *(_agent(dice, name, 9 // part + (part > 1)) for name in ("agent-a", "agent-b")),
        _summariser(dice, 96 // part),
    ]


def text(dice: random.Random, words: int) -> str:
    """So many words, a sentence in shape only."""
    return " ".join(dice.choice(_WORDS) for _ in range(words))


def _chat(dice: random.Random, turns: int) -> App:
    asks = tuple(
        Ask(text(dice, dice.randint(12, 40)), dice.randint(32, 56), dice.uniform(3.0, 8.0))
        for _ in range(turns)
    )
    return App("chat", "interactive", "talk", asks, begin_s=4.0)


def _autocomplete(dice: random.Random, requests: int) -> App:
    asks = []
    typed = ""
    for number in range(requests):
        if number % 28 == 0:  # another file is opened
            typed = text(dice, dice.randint(120, 220))
        typed += " " + text(dice, dice.randint(1, 4))
        # Bursts of typing, and pauses between them.
        pause = dice.uniform(0.25, 0.7) if dice.random() < 0.6 else dice.uniform(0.9, 3.5)
        asks.append(Ask(typed, 12, pause))
    return App("autocomplete", "interactive", "type", tuple(asks), begin_s=4.0)


def _agent(dice: random.Random, name: str, turns: int) -> App:
    first = Ask(text(dice, 400), dice.randint(64, 112))
    others = (
        Ask(text(dice, dice.randint(160, 320)), dice.randint(64, 112), dice.uniform(4.0, 14.0))
        for _ in range(turns - 1)
    )
    return App(name, "normal", "talk", (first, *others), begin_s=dice.uniform(1.0, 3.0))


def _summariser(dice: random.Random, articles: int) -> App:
    asks = tuple(
        Ask(text(dice, dice.randint(350, 650)), dice.randint(64, 96)) for _ in range(articles)
    )
    return App("summariser", "background", "batch", asks, in_flight=16)
