"""What the paged pool promises: shared prefixes, nobody killed, nothing thrown away."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.decoding import PROCESSES, apps_of, random_prompt
from benchmarks.report import Report, Row
from benchmarks.service import Daemon
from benchmarks.worker import Answer, Worker

SHARED_TOKENS = 1_000
OWN_TOKENS = 32
SHARERS = 8

PREFIXES = 300

EXACT_GAP = 1e-3
"""Logits: where the two best lie nearer, even exact arithmetic in another order may swap them."""
CHUNKS = (1, 64)
"""Chunkings of the two plain runs that show how far quantised logits move by themselves."""
MARGIN = 1.5
"""Times the largest move of the gap that was seen: how far below the best a token may lie."""


def shared_prefix(report: Report, daemon: Daemon) -> None:
    """The row of prompt tokens computed for a prefix that eight requests share."""
    source = random.Random(4)
    prefix = random_prompt(source, SHARED_TOKENS)
    prompts = [[*prefix, *random_prompt(source, OWN_TOKENS)] for _ in range(SHARERS)]
    with apps_of(daemon, 1) as apps:
        before = _computed(daemon)
        run(apps[0], [{"prompt": prompt, "max_tokens": 8} for prompt in prompts])
        computed = _computed(daemon) - before
    limit = SHARED_TOKENS + SHARERS * (OWN_TOKENS + 16)
    what = f"{SHARERS} requests share a {SHARED_TOKENS:,}-token prefix: prompt tokens computed"
    note = f"of {sum(map(len, prompts)):,} submitted together, {OWN_TOKENS} of its own each"
    report.add(Row(what, computed, "tokens", f"<= {limit:,}", note))


def _computed(daemon: Daemon) -> int:
    tokens = daemon.stats()["tokens"]
    return int(tokens["prompt"]) - int(tokens["cached"])


def many_prefixes(report: Report, daemon: Daemon) -> None:
    """The row of distinct cached prefixes, more than llama.cpp has sequence ids."""
    length = 20 if report.quick else 64
    source = random.Random(5)
    prompts = [random_prompt(source, length) for _ in range(PREFIXES)]
    requests = [{"prompt": prompt, "max_tokens": 1} for prompt in prompts]
    with apps_of(daemon, 1) as apps:
        # Fewer at once than the limit of one connection.
        for start in range(0, PREFIXES, 100):
            run(apps[0], requests[start : start + 100])
        held = {tier: daemon.cached_tokens(tier) for tier in ("gpu", "ram")}
        results = [r for n in range(0, PREFIXES, 100) for r in run(apps[0], requests[n : n + 100])]
    block = int(daemon.status()["models"][0]["block_tokens"])
    # The last token of a prompt is always computed: its logits are wanted.
    expected = (length - 1) // block * block
    hits = sum(result["usage"]["cached"] >= expected for result in results)
    note = f"{length} tokens each; held before: {held['ram']:,} in RAM, {held['gpu']:,} in cells"
    what = f"{PREFIXES} distinct cached prefixes: hits, from RAM"
    report.add(Row(what, hits if held["gpu"] == 0 else 0, "hits", f"== {PREFIXES}", note))


def run(app: Worker, requests: Sequence[dict[str, Any]]) -> list[Answer]:
    """Requests of one app, all at once.

    Raises:
        RuntimeError: One failed.
    """
    results: list[Answer] = app.ask(op="run", requests=list(requests))["results"]
    for result in results:
        if "failure" in result:
            raise RuntimeError(f"a request of the measurement failed: {result['failure']}")
    return results


class Demand:
    """Requests that need three times the pool, and how they are run."""

    def __init__(self, quick: bool) -> None:
        self.pool_tokens = 512 if quick else 2_048
        self.count = 12
        self.prompt_tokens = 64 if quick else 256
        self.tokens = 3 * self.pool_tokens // self.count - self.prompt_tokens
        source = random.Random(6)
        self.prompts = [random_prompt(source, self.prompt_tokens) for _ in range(self.count)]

    def run(self, pool_tokens: int, arguments: Sequence[str]) -> tuple[list[Answer], Answer]:
        """All requests at once, from several apps; their results and the daemon's ``stats``."""
        requests = [
            {
                "prompt": prompt,
                "max_tokens": self.tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "logprobs": 2,
            }
            for prompt in self.prompts
        ]
        with Daemon(*arguments, "--kv-tokens", str(pool_tokens)) as daemon, apps_of(daemon) as apps:
            for number, app in enumerate(apps):
                app.order(op="run", requests=requests[number::PROCESSES])
            results: list[Answer] = [{}] * self.count
            for number, app in enumerate(apps):
                results[number::PROCESSES] = app.answer()["results"]
            return results, daemon.stats()

    def finished(self, results: Sequence[Answer]) -> int:
        """How many got every token they asked for."""
        return sum(len(result.get("reply", ())) == self.tokens for result in results)


def pressure_exact(report: Report, model: Path, threads: int) -> None:
    """Rows of a demand of three times the pool, in full precision: the same tokens."""
    demand = Demand(report.quick)
    arguments = ["--model", str(model), "--backend", "llama.cpp", "--threads", str(threads)]
    arguments += ["--kv-dtype", "f32", "--no-flash-attention"]
    pressed, stats = demand.run(demand.pool_tokens, arguments)
    plain, _ = demand.run(4 * demand.pool_tokens, arguments)
    note = _pressure_note(demand, stats)
    done = demand.finished(pressed)
    what = "pool demand at 3 times its capacity, F32"
    report.add(Row(f"{what}: requests finished", done, "requests", f"== {demand.count}", note))
    same = sum(_same(a, b) for a, b in zip(pressed, plain, strict=True))
    note = f"the same tokens as unpressed, but where the two best logits lie within {EXACT_GAP:g}"
    report.add(Row(f"{what}: texts as unpressed", same, "texts", f"== {demand.count}", note))


def _same(pressed: Answer, plain: Answer) -> bool:
    """Whether two greedy replies agree up to where a tie, if any, parts them."""
    if "failure" in pressed or "failure" in plain:
        return False
    for mine, theirs, top in zip(pressed["reply"], plain["reply"], plain["top"], strict=True):
        if mine != theirs:
            return bool(abs(top[0] - top[1]) <= EXACT_GAP)
    return True


def pressure_quantised(report: Report, model: Path, threads: int) -> None:
    """Rows of a demand of three times the pool, with the model as it is shipped.

    Each text is teacher-forced through plain runs: no token may lie further below its position's
    best logit than `MARGIN` times what another chunking alone moves the gap of the two best.
    """
    demand = Demand(report.quick)
    arguments = ["--model", str(model), "--backend", "llama.cpp", "--threads", str(threads)]
    pressed, stats = demand.run(demand.pool_tokens, arguments)
    done = demand.finished(pressed)
    what = "pool demand at 3 times its capacity, Q4_1"
    note = _pressure_note(demand, stats)
    report.add(Row(f"{what}: requests finished", done, "requests", f"== {demand.count}", note))
    moved, below = 0.0, []
    cells = str(2 * (demand.prompt_tokens + demand.tokens))
    options = ("--model", str(model), "--cells", cells, "--threads", str(threads))
    with contextlib.closing(Worker("benchmarks.raw_loop", *options)) as raw:
        for prompt, result in zip(demand.prompts, pressed, strict=True):
            if "failure" in result:
                continue
            scores = [
                raw.ask(op="score", prompt=prompt, reply=result["reply"], chunk=chunk)
                for chunk in CHUNKS
            ]
            gaps = [
                [best - second for best, second in zip(s["best"], s["second"], strict=True)]
                for s in scores
            ]
            moved = max(moved, *(abs(a - b) for a, b in zip(*gaps, strict=True)))
            plain = scores[0]
            below.append(max(b - c for b, c in zip(plain["best"], plain["chosen"], strict=True)))
    allowed = MARGIN * moved
    fine = sum(distance <= allowed for distance in below)
    note = (
        f"no token more than δ = {allowed:.2f} below its position's best logit in a plain run; "
        f"worst {max(below, default=0):.2f}"
    )
    report.add(Row(f"{what}: texts as unpressed", fine, "texts", f"== {demand.count}", note))


def _pressure_note(demand: Demand, stats: Answer) -> str:
    pager = stats["pager"]
    return (
        f"{demand.count} requests of {demand.prompt_tokens + demand.tokens} tokens at once in a "
        f"pool of {demand.pool_tokens:,}; preempted {pager['preemptions_swap']} times by swap, "
        f"{pager['preemptions_recompute']} by recompute"
    )
