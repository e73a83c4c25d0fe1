"""``make chaos``: engines are killed and the daemon is attacked, and clients look at the outcome.

``simulated`` compares whole texts with those of a daemon whose engine nobody kills. ``killed``
measures pauses on the CPU with the packaged model, whose texts are compared by what a plain run
would have thought of each token, since in quantised weights another batch gives other texts.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.chaos import flood, fuzz, mutants, timing
from benchmarks.chaos.served import serve
from benchmarks.chaos.share import share
from benchmarks.chaos.streams import Record, Round, play, prompts
from benchmarks.report import Report, Row
from benchmarks.service import packaged_model
from benchmarks.stages import run
from pagedd_daemon.backends.llama_api import Context, ContextOptions, Model

KILLS = 200
FIRST_TOKENS = 400
"""Kills are spread evenly over so many tokens of a stream."""
KILLS_A_ROUND = 2
"""One more, and the streams would be suspected to be what engines die of."""
LONG_ROUND = 8
"""One round in so many is long."""
WATCHED_S = 5.5


def _points(dice: random.Random) -> list[int]:
    return sorted(dice.randrange(1, FIRST_TOKENS) for _ in range(KILLS_A_ROUND))


def _wrong(rounds: list[Round]) -> int:
    """Streams that lost or repeated a token by their count, or ended with an error."""
    return sum(
        bool(record.failure) or record.counted != len(record.reply)
        for round_ in rounds
        for record in round_.records
    )


def _first_failure(rounds: list[Round]) -> str:
    """What a stream ended with that should not have, as the end of a note."""
    failures = (record.failure for round_ in rounds for record in round_.records if record.failure)
    return "".join(f"; {failure}" for failure in [next(failures, "")] if failure)


# ------------------------------------------------------------------------------------ exactly


def simulated(report: Report, kills: int) -> None:
    """The same texts, token by token, as if nobody had died."""
    dice = random.Random(1)
    texts = prompts(1, 127)
    rounds: list[Round] = []
    with serve("simulated", "simulated", "--step-us", "1000") as daemon:
        plain = asyncio.run(play(daemon, texts, [], max_tokens=FIRST_TOKENS + 60))
        while sum(len(round_.killed) for round_ in rounds) < kills:
            points = _points(dice)
            rounds.append(asyncio.run(play(daemon, texts, points, max_tokens=FIRST_TOKENS + 60)))
    changed = sum(
        record.reply != wanted.reply
        for round_ in rounds
        for record, wanted in zip(round_.records, plain.records, strict=True)
    )
    killed = sum(len(round_.killed) for round_ in rounds)
    streams = sum(len(round_.records) for round_ in rounds)
    note = f"{killed} kills of the simulated engine, {streams} streams of {FIRST_TOKENS + 60}"
    note += _first_failure(rounds)
    report.add(Row("killed: texts that differ from an undisturbed run", changed, "", "== 0", note))


# ------------------------------------------------------------------------------------ measured


class Plain:
    """llama.cpp alone, quantised as the daemon computes."""

    def __init__(self, path: Path) -> None:
        self._model = Model(str(path), lambda _: None)
        options = ContextOptions(2048, 512, os.cpu_count() or 1, "f16", True)
        self._context = Context(self._model, options)
        self._ends = sorted(self._model.eog_tokens())

    def logits(self, text: list[int], chunk: int) -> npt.NDArray[np.float32]:
        """Logits after each token, float32, ``(tokens, vocab)``, computed in such pieces; of what
        would end the text, -inf, for the streams that are judged may not draw it (``ignore_eos``).
        """
        context, rows = self._context, []
        context.remove(0)
        for start in range(0, len(text), chunk):
            part = text[start : start + chunk]
            n = len(part)
            context.tokens[:n] = part
            context.positions[:n] = np.arange(start, start + n)
            context.sequences[:n] = 0
            context.wanted[:n] = 1
            if context.decode(n):
                raise RuntimeError("llama.cpp refused a plain run")
            rows.append(context.logits(n).copy())
        result = np.concatenate(rows)
        result[:, self._ends] = -np.inf
        return result

    def close(self) -> None:
        """Free it."""
        self._context.close()
        self._model.close()


def _compare(records: list[Record], path: Path) -> tuple[float, float]:
    """The most that a token lies behind the best logit of a plain run at its place; and how much
    it may: 1.5 times the largest change of the gap of the two best between two plain runs that
    differ in their chunks alone."""
    worst = change = 0.0
    with closing(Plain(path)) as plain:
        for at, record in enumerate(records):
            text = [*record.prompt, *record.reply[:-1]]
            rows = plain.logits(text, 512)[len(record.prompt) - 1 :]
            behind = rows.max(axis=1) - rows[np.arange(len(rows)), record.reply]
            worst = max(worst, float(behind.max()))
            if at < 4:
                other = plain.logits(text, 48)[len(record.prompt) - 1 :]
                gaps = [np.diff(np.sort(r, axis=1)[:, -2:], axis=1) for r in (rows, other)]
                change = max(change, float(np.abs(gaps[0] - gaps[1]).max()))
    return worst, 1.5 * change


def killed(report: Report, kills: int) -> None:
    """Pauses, and what comes after them."""
    dice = random.Random(2)
    rounds: list[Round] = []
    with serve(str(packaged_model()), "llama.cpp") as daemon:
        done = 0
        while done < kills:
            points = _points(dice)
            # Some go on until the speed of afterwards can be told.
            long = len(rounds) % LONG_ROUND == 0
            size = 10**4 if not long else FIRST_TOKENS + 400
            texts = prompts(len(rounds), 40_000)
            after = 300 if long else 24
            rounds.append(asyncio.run(play(daemon, texts, points, max_tokens=size, after=after)))
            done += len(rounds[-1].killed)
    _tell(report, rounds)


def _tell(report: Report, rounds: list[Round]) -> None:
    kills = sum(len(round_.killed) for round_ in rounds)
    streams = [record for round_ in rounds for record in round_.records]
    note = f"{kills} kills, {len(streams)} streams, 2 kills in each"
    report.add(
        Row("killed: streams with lost or repeated tokens", _wrong(rounds), "", "== 0", note)
    )
    sample = random.Random(3).sample(streams, min(len(streams), 16 if report.quick else 48))
    worst, delta = _compare(sample, packaged_model())
    note = f"{sum(len(r.reply) for r in sample)} tokens of {len(sample)} streams, 1.5 times what"
    note += " chunking alone changes"
    what = "killed: most that a token lies behind the best of a plain run"
    report.add(Row(what, worst, "logits", f"<= {delta:.3f}", note))
    pauses = [r.pause(at) for round_ in rounds for at in round_.killed for r in round_.records]
    pauses = sorted(p for p in pauses if not math.isnan(p))
    tail = pauses[int(0.95 * len(pauses))]
    note = f"{len(pauses)} pauses, p95 {tail:.2f} s, longest {pauses[-1]:.2f} s"
    what = "killed: pause of a stream, last event before to first after, p50"
    report.add(Row(what, statistics.median(pauses), "s", "<= 2", note))
    back = [
        seconds
        for round_ in rounds
        for at in round_.killed
        if not math.isnan(seconds := round_.recovered(at, 0.95, 1.0, WATCHED_S))
    ]
    middle = statistics.median(back) if back else float("nan")
    share = sum(seconds <= 5.0 for seconds in back) / len(back) if back else float("nan")
    note = f"{len(back)} kills that were watched for {WATCHED_S} s; {100 * share:.0f} % within 5 s"
    what = "killed: until 95 % of the tokens a second of before, p50"
    report.add(Row(what, middle, "s", "<= 5", note))


def stopped(report: Report, kills: int) -> None:
    """An engine that is stopped in the middle of a step."""
    del kills  # one is enough
    with serve(str(packaged_model()), "llama.cpp") as daemon:
        # A second or two of steps, so that the daemon knows how long they take.
        round_ = asyncio.run(
            play(daemon, prompts(9, 40_000), [150], max_tokens=260, how=signal.SIGSTOP)
        )
    (at,) = round_.killed
    pauses = [record.pause(at) for record in round_.records]
    report.add(Row("stopped: streams with lost or repeated tokens", _wrong([round_]), "", "== 0"))
    note = "bound: 40 median steps, at least 10 s, told in ticks of 1 s"
    report.add(Row("stopped: pause of a stream, longest", max(pauses), "s", "<= 14", note))


def cost(report: Report, kills: int) -> None:
    """Tokens a second with writing through, and without."""
    del kills  # nobody dies
    turns = 2 if report.quick else 4
    texts = prompts(4, 40_000)
    rates: dict[bool, list[float]] = {True: [], False: []}
    model = str(packaged_model())
    with (
        serve(model, "llama.cpp") as through,
        serve(model, "llama.cpp", "--no-write-through") as without,
    ):
        for turn in range(turns):
            for on in ((True, False), (False, True))[turn % 2]:
                daemon = through if on else without
                round_ = asyncio.run(play(daemon, texts, [], max_tokens=260))
                begin = max(r.arrivals[0][0] for r in round_.records)
                end = min(r.arrivals[-1][0] for r in round_.records)
                rates[on].append(round_.rate(begin, end))
    with_, plain = statistics.median(rates[True]), statistics.median(rates[False])
    note = f"{with_:.1f} against {plain:.1f} tok/s of 8 streams, medians of {turns} in turns"
    what = "cost of writing through, two daemons in turns"
    report.add(Row(what, 100 * (1 - with_ / plain), "%", "<= 2", note))
    part, took, pages = share(packaged_model())
    note = f"{pages} pages while 8 streams decode {took:.1f} s, by a clock around it"
    report.add(Row("writing through: of the engine's time", 100 * part, "%", "<= 2", note))


class Stage(Protocol):
    """Measures some rows."""

    def __call__(self, report: Report, kills: int) -> None:
        """Fill the report; ``kills``: of each kind of engine."""


KILLED: dict[str, Stage] = {
    "simulated": simulated,
    "killed": killed,
    "stopped": stopped,
    "cost": cost,
}
"""Parts that kill engines: stages of one result file."""
HOSTILE: dict[str, Callable[[Report, int], None]] = {
    "fuzz": fuzz.part,
    "mutants": mutants.part,
    "flood": flood.part,
    "timing": timing.part,
}
"""Parts that attack the daemon: a result file each. Each is given a seed."""


def main() -> int:
    """Run the parts; exit status 1 if a row misses what it must reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join((*KILLED, *HOSTILE))
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{names}; default: all of them")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each kind of engine")
    parser.add_argument("--seed", type=int, help="of the hostile parts; default: another each time")
    arguments = parser.parse_args()
    chosen = arguments.parts or [*KILLED, *HOSTILE]
    if unknown := set(chosen) - {*KILLED, *HOSTILE}:
        parser.error(f"no such part: {', '.join(unknown)}; there are {names}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    quick = bool(os.environ.get("PAGEDD_QUICK"))
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    begin, status = time.monotonic(), 0
    if kill := [name for name in chosen if name in KILLED]:
        kills = 10 if quick else arguments.kills
        stages = {name: partial(stage, kills=kills) for name, stage in KILLED.items()}
        status |= run("chaos", stages, kill)
    for name in (name for name in chosen if name in HOSTILE):
        report = Report("chaos", quick=quick, part=name)
        HOSTILE[name](report, seed)
        status |= report.finish()
    print(f"took {time.monotonic() - begin:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
