"""Part ``timing`` of ``make chaos``: does the time to a first token tell what others have asked?

Two apps of one daemon, each with a namespace of its own, as all apps have that were given no group
to share; and, where root runs this, the same app of two users of a daemon that is shared. The
attacker guesses that the victim has just
asked a prompt, asks the very same, and compares with a prompt that nobody has asked (the attack of
CVE-2025-46570). Each guess is at a prompt of its own, or the attacker would find what it left
itself. The same with prompts of its own shows what a prefix that is found would look like.

On the simulated backend: front, scheduler and pager are the real ones, and a step takes a known
time that hides less of what they do than a model's would, whose steps vary by more than a lookup
takes.
"""

from __future__ import annotations

import os
import random
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pagedd
from benchmarks.chaos.served import serve
from benchmarks.report import Report, Row
from tests.support.as_user import User

VICTIM = 64_001
"""A user who is in no file of users."""
PROBES = 2000
TOKENS = 256
"""Of a prompt: 16 blocks."""
TOKEN_US = 20
"""To compute one of them; a step takes 1 ms beside that."""


@dataclass
class Times:
    """Seconds to the first token of prompts that may be known, and of some that cannot be."""

    guessed: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    told: int = 0
    """Cached tokens that the answers to guesses spoke of."""

    @property
    def auc(self) -> float:
        """How often a guess is faster than a fresh prompt, ties by half: the area under the curve
        of a test that tells them apart by time (Mann and Whitney's U, over all pairs)."""
        both = [(t, True) for t in self.guessed] + [(t, False) for t in self.fresh]
        both.sort(key=lambda pair: pair[0])
        wins, at, slower = 0.0, 0, len(self.fresh)
        while at < len(both):
            end = at
            while end < len(both) and both[end][0] == both[at][0]:
                end += 1
            guesses = sum(guess for _, guess in both[at:end])
            fresh = end - at - guesses
            slower -= fresh
            wins += guesses * (slower + fresh / 2)
            at = end
        return wins / (len(self.guessed) * len(self.fresh))


def _prompt(dice: random.Random) -> array[int]:
    return array("i", [dice.randrange(1, 250) for _ in range(TOKENS)])


def _ask(client: pagedd.Client, prompt: array[int]) -> tuple[float, int]:
    """Seconds until its one token was there, and the cached tokens that it was told of."""
    begin = time.perf_counter()
    result = client.generate(prompt, max_tokens=1, temperature=0.0, ignore_eos=True).wait()
    return time.perf_counter() - begin, result.usage.cached_tokens


@contextmanager
def _victim(host: str, users: bool) -> Iterator[Callable[[array[int]], object]]:
    """Has the victim ask: another app, or the attacker's app of another user."""
    if users:
        with User(VICTIM, host) as user:
            user.does("connect", app="attacker")
            options = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
            yield lambda prompt: user.does("generate", prompt=list(prompt), **options)
    else:
        with pagedd.connect(app="victim", host=host) as client:
            yield lambda prompt: _ask(client, prompt)


def probe(seed: int, probes: int, *, users: bool = False) -> tuple[Times, Times]:
    """What the attacker measures of the victim's prompts, and of its own, in turns.

    ``users``: the victim is another user, which takes root.
    """
    dice = random.Random(seed)
    foreign, own = Times(), Times()
    step = ["--step-us", "1000", "--token-us", str(TOKEN_US), *(["--shared"] if users else [])]
    with (
        serve("simulated", "simulated", *step) as daemon,
        _victim(daemon.host, users) as victim,
        pagedd.connect(app="attacker", host=daemon.host) as attacker,
    ):
        asks: tuple[tuple[Callable[[array[int]], object], Times], ...] = (
            (victim, foreign),
            (lambda prompt: _ask(attacker, prompt), own),
        )
        for _ in range(probes):
            for have_asked, times in asks:
                known = _prompt(dice)
                have_asked(known)
                turns = [(known, times.guessed), (_prompt(dice), times.fresh)]
                dice.shuffle(turns)
                for prompt, kept in turns:
                    took, cached = _ask(attacker, prompt)
                    kept.append(took)
                    times.told += cached
    return foreign, own


def part(report: Report, seed: int) -> None:
    """Rows of apps, and, as root, of users."""
    _rows(report, seed, "app", probe(seed, probes := 200 if report.quick else PROBES))
    if os.geteuid():
        print("timing of users: left out, only root can have processes of several users")
    else:
        _rows(report, seed + 1, "user", probe(seed + 1, probes, users=True))


def _rows(report: Report, seed: int, who: str, found: tuple[Times, Times]) -> None:
    foreign, own = found
    probes = len(own.fresh)
    note = f"{probes} + {probes} probes of {TOKENS} tokens in turns, two {who}s, seed {seed}; "
    note += "simulated backend"
    either = max(foreign.auc, 1 - foreign.auc)
    bound = 0.55 if not report.quick else 0.6
    what = f"timing: a prefix of another {who} against a random one, AUC"
    report.add(Row(what, either, "", f"<= {bound}", note))
    what = f"timing: cached tokens that {'an' if who == 'app' else 'a'} {who} was told of another's"
    report.add(Row(f"{what} prefixes", foreign.told, "tokens", "== 0"))
    what = f"timing: an own prefix against a random one, AUC, beside another {who}"
    report.add(Row(what, own.auc, "", ">= 0.95"))
