"""Part ``timing`` of ``make chaos``: does the time to a first token tell what others have asked?

Two apps of one daemon, each with a namespace of its own, as all apps have that were given no group
to share; daemons are never shared between users. The attacker guesses that the victim has just
asked a prompt, asks the very same, and compares with a prompt that nobody has asked (the attack of
CVE-2025-46570). Each guess is at a prompt of its own, or the attacker would find what it left
itself. The same with prompts of its own shows what a prefix that is found would look like.

On the simulated backend: front, scheduler and pager are the real ones, and a step takes a known
time that hides less of what they do than a model's would, whose steps vary by more than a lookup
takes.
"""

from __future__ import annotations

import random
import time
from array import array
from dataclasses import dataclass, field

import pagedd
from benchmarks.chaos.served import serve
from benchmarks.report import Report, Row

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


def probe(seed: int, probes: int) -> tuple[Times, Times]:
    """What the attacker measures of the victim's prompts, and of its own, in turns."""
    dice = random.Random(seed)
    foreign, own = Times(), Times()
    step = ("--step-us", "1000", "--token-us", str(TOKEN_US))
    with (
        serve("simulated", "simulated", *step) as daemon,
        pagedd.connect(app="victim", host=daemon.host) as victim,
        pagedd.connect(app="attacker", host=daemon.host) as attacker,
    ):
        for _ in range(probes):
            for who, times in ((victim, foreign), (attacker, own)):
                known = _prompt(dice)
                _ask(who, known)
                turns = [(known, times.guessed), (_prompt(dice), times.fresh)]
                dice.shuffle(turns)
                for prompt, kept in turns:
                    took, cached = _ask(attacker, prompt)
                    kept.append(took)
                    times.told += cached
    return foreign, own


def part(report: Report, seed: int) -> None:
    """Rows of both."""
    probes = 200 if report.quick else PROBES
    foreign, own = probe(seed, probes)
    note = f"{probes} + {probes} probes of {TOKENS} tokens in turns, two apps, seed {seed}; "
    note += "simulated backend"
    either = max(foreign.auc, 1 - foreign.auc)
    bound = 0.55 if not report.quick else 0.6
    what = "timing: a prefix of another app against a random one, AUC"
    report.add(Row(what, either, "", f"<= {bound}", note))
    what = "timing: cached tokens that an app was told of another's prefixes"
    report.add(Row(what, foreign.told, "tokens", "== 0"))
    report.add(Row("timing: an own prefix against a random one, AUC", own.auc, "", ">= 0.95"))
