"""Decode speed through the daemon: against the raw loop, and with a full pool."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Report, Row
from benchmarks.service import Daemon
from benchmarks.worker import Answer, Worker

PROMPT_TOKENS = 32
POOL_TOKENS = 8192
"""Of daemon and raw loop alike: 16 streams of 300 tokens with room to spare."""

GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
SAMPLINGS: tuple[tuple[str, Answer], ...] = (
    ("greedy", GREEDY),
    ("temperature 0.8, top-k 40, top-p 0.95", SAMPLED),
)
STREAMS = (1, 4, 8, 16)
PROCESSES = 4

OTHERS_TOKENS = 12_000
OTHERS_PROMPT = 1_000
LEAST = ">= 0.95"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    pairs: int
    seconds: float
    """A run of either side takes at least this long."""

    @staticmethod
    def of(quick: bool) -> Plan:
        """The committed run, or the quick one."""
        return Plan(pairs=3, seconds=1.0) if quick else Plan(pairs=15, seconds=3.0)


def random_prompt(source: random.Random, length: int) -> list[int]:
    """Token ids without meaning: nothing of them is cached, and no special token is among them."""
    return [source.randrange(1_000, 40_000) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens decoded in a time."""

    tokens: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else math.nan


def raw_rate(raw: Worker, prompts: Sequence[Sequence[int]], tokens: int, sampling: Answer) -> Rate:
    """One run of the raw loop."""
    answer = raw.ask(op="decode", prompts=prompts, tokens=tokens, sampling=sampling)
    return Rate(answer["tokens"], answer["seconds"])


def daemon_rate(
    apps: Sequence[Worker], prompts: Sequence[Sequence[int]], tokens: int, sampling: Answer
) -> Rate:
    """One run through the daemon, the streams spread over the apps.

    What counts lies between the moment every stream has its first token and the moment the first
    stream has its last: all streams decode all that time, as they do in the raw loop.
    """
    shares = [prompts[number :: len(apps)] for number in range(len(apps))]
    options = {"max_tokens": tokens, "ignore_eos": True, **sampling}
    busy = [(app, share) for app, share in zip(apps, shares, strict=True) if share]
    for app, share in busy:
        app.order(op="read", requests=[{"prompt": prompt, **options} for prompt in share])
    results = [result for app, _ in busy for result in app.answer()["results"]]
    for result in results:
        if "failure" in result or len(result["reply"]) != tokens:
            raise RuntimeError(f"a stream of the measurement did not finish: {result}")
    arrivals = [result["arrivals"] for result in results]
    start = max(times[0][0] for times in arrivals)
    end = min(times[-1][0] for times in arrivals)
    if end <= start:
        raise RuntimeError("the streams did not decode at the same time: is the machine busy?")
    counted = sum(count for times in arrivals for at, count in times if start < at <= end)
    return Rate(counted, end - start)


def spread(ratios: Sequence[float]) -> str:
    """Minimum, quartiles and maximum, as text."""
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"min {min(ratios):.2f}, quartiles {low:.2f}–{high:.2f}, max {max(ratios):.2f}"


def compare(
    plan: Plan, ours: Callable[[int], Rate], other: Callable[[int], Rate], names: tuple[str, str]
) -> tuple[float, str]:
    """The median of ours over theirs in interleaved pairs, and a note on the spread.

    Who begins alternates, so that neither always runs on a warmer machine.
    """
    ratios: list[float] = []
    rates: tuple[list[float], list[float]] = ([], [])
    shortest = math.inf
    for pair in range(plan.pairs):
        if pair % 2:
            theirs, mine = other(pair), ours(pair)
        else:
            mine, theirs = ours(pair), other(pair)
        ratios.append(mine.per_second / theirs.per_second)
        rates[0].append(mine.per_second)
        rates[1].append(theirs.per_second)
        shortest = min(shortest, mine.seconds, theirs.seconds)
    medians = [statistics.median(side) for side in rates]
    note = (
        f"{spread(ratios)} of {plan.pairs} pairs of at least {shortest:.1f} s; "
        f"{names[0]} {medians[0]:.0f}, {names[1]} {medians[1]:.0f} tok/s"
    )
    return statistics.median(ratios), note


@contextlib.contextmanager
def apps_of(daemon: Daemon, count: int = PROCESSES) -> Iterator[list[Worker]]:
    """Client processes, connected."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Worker("benchmarks.load", "--host", daemon.host, "--app", f"app-{number}")
            )
            for number in range(count)
        ]


def against_raw_loop(report: Report, daemon: Daemon, model: Path, threads: int) -> None:
    """Rows of decode speed at 1, 4, 8 and 16 streams."""
    plan = Plan.of(report.quick)
    source = random.Random(1)
    arguments = ("--model", str(model), "--cells", str(POOL_TOKENS), "--threads", str(threads))
    with Worker("benchmarks.raw_loop", *arguments) as raw, apps_of(daemon) as apps:
        for streams in STREAMS:
            for name, sampling in SAMPLINGS:
                tokens = _tokens_for(raw, streams, plan.seconds)
                pairs = [
                    [random_prompt(source, PROMPT_TOKENS) for _ in range(streams)]
                    for _ in range(plan.pairs)
                ]
                used = apps[:1] if streams == 1 else apps

                def ours(
                    pair: int,
                    pairs: list[list[list[int]]] = pairs,
                    tokens: int = tokens,
                    sampling: Answer = sampling,
                    used: Sequence[Worker] = used,
                ) -> Rate:
                    return daemon_rate(used, pairs[pair], tokens, sampling)

                def theirs(
                    pair: int,
                    pairs: list[list[list[int]]] = pairs,
                    tokens: int = tokens,
                    sampling: Answer = sampling,
                ) -> Rate:
                    return raw_rate(raw, pairs[pair], tokens, sampling)

                value, note = compare(plan, ours, theirs, ("daemon", "raw loop"))
                what = f"decode at {streams} stream{'s' * (streams > 1)}, {name}"
                report.add(Row(what, round(value, 3), "of the raw loop", LEAST, note))


def _tokens_for(raw: Worker, streams: int, seconds: float) -> int:
    """Tokens per stream, so many that either side is measured for more than ``seconds``."""
    source = random.Random(0)
    prompts = [random_prompt(source, PROMPT_TOKENS) for _ in range(streams)]
    trial = raw_rate(raw, prompts, max(8, 160 // streams), GREEDY)
    return _enough(seconds, trial, streams)


def _enough(seconds: float, trial: Rate, streams: int) -> int:
    """Tokens per stream for ``seconds`` in which all streams decode.

    The daemon's streams begin one after the other, since the others decode while a prompt is
    computed: two steps for each are allowed for.
    """
    return math.ceil(1.15 * seconds * trial.per_second / streams) + 2 * streams


def with_full_pool(report: Report, model: Path, threads: int) -> None:
    """The row of decode speed while the daemon holds cached tokens of others."""
    plan = Plan.of(report.quick)
    held = OTHERS_TOKENS // 4 if report.quick else OTHERS_TOKENS
    streams, source = 4, random.Random(2)
    arguments = ["--model", str(model), "--kv-tokens", str(2 * POOL_TOKENS)]
    arguments += ["--threads", str(threads), "--backend", "llama.cpp"]
    with Daemon(*arguments) as full, Daemon(*arguments) as empty:
        with apps_of(full, 1) as others:
            prompts = [random_prompt(source, OTHERS_PROMPT) for _ in range(held // OTHERS_PROMPT)]
            # One block more than a prompt fills, so that every token of it is in a full block.
            requests = [{"prompt": [*p, *p[:24]], "max_tokens": 1} for p in prompts]
            for result in others[0].ask(op="series", requests=requests)["results"]:
                if "failure" in result:
                    raise RuntimeError(f"the pool could not be filled: {result}")
        with apps_of(full) as full_apps, apps_of(empty) as empty_apps:
            trial = [random_prompt(source, PROMPT_TOKENS) for _ in range(streams)]
            speed = daemon_rate(full_apps, trial, 24, GREEDY)
            tokens = _enough(plan.seconds, speed, streams)

            def run(apps: list[Worker]) -> Rate:
                warm_up = [random_prompt(source, 8) for _ in range(streams)]
                daemon_rate(apps, warm_up, 8, GREEDY)
                pair = [random_prompt(source, PROMPT_TOKENS) for _ in range(streams)]
                return daemon_rate(apps, pair, tokens, GREEDY)

            def on_full(_: int) -> Rate:
                return run(full_apps)

            def on_empty(_: int) -> Rate:
                # A fresh engine: what the last pair left in the pool is gone.
                empty_apps[0].ask(op="reload")
                return run(empty_apps)

            value, note = compare(plan, on_full, on_empty, ("full", "empty"))
            cached = sum(full.cached_tokens(tier) for tier in ("gpu", "ram"))
            if cached < held:
                raise RuntimeError(f"the daemon held {cached} tokens of others, not {held}")
    what = f"decode at {streams} streams beside {held:,} cached tokens of others"
    report.add(Row(what, round(value, 3), "of an empty pool", LEAST, note))
