"""An agent that returns after a pause: its first token from RAM, and from disk with a cold cache.

What the pool held meanwhile was somebody else's, so nothing of the agent's prompt is in it. For the
disk, what the page cache holds of its file is dropped before each return.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import pagedd
from benchmarks.decoding import random_prompt
from benchmarks.page_cache import drop_cache
from benchmarks.report import Report, Row
from benchmarks.service import Daemon

TOKENS = 4_000
"""Of the prompt that can be found again: a multiple of the pager's block."""
POOL_TOKENS = 8_192
_PATIENCE_S = 300.0
"""Computing a prompt takes half a minute on one core."""


def returning(report: Report, model: Path, threads: int) -> None:
    """Two rows: from RAM against computing again, and from disk against the pager's rates."""
    tokens = 512 if report.quick else TOKENS
    base = ("--model", str(model), "--backend", "llama.cpp", "--threads", str(threads))
    size = ("--kv-tokens", str(POOL_TOKENS))
    agents = 2
    source = random.Random(11)
    # One token more: the last of a prompt is always computed.
    prompts = [random_prompt(source, tokens + 1) for _ in range(agents)]
    with Daemon(*base, *size, "--ram-bytes", str(10**9)) as daemon:
        first = [_ttft(daemon, prompt) for prompt in prompts]
        again = [_ttft(daemon, prompt) for _ in range(5) for prompt in prompts]
        from_ram = _rate(daemon, "ram")
    recomputed, loaded = statistics.median(first), statistics.median(again)
    what = f"an agent returns with {tokens:,} tokens: first token, from RAM"
    note = (
        f"median of {len(again)}: {loaded * 1e3:.0f} ms ({_spread(again)}); computed again, "
        f"{recomputed * 1e3:,.0f} ms (median of {agents})"
    )
    report.add(Row(what, loaded / recomputed, "of computing again", "<= 0.02", note))
    with tempfile.TemporaryDirectory(prefix="pagedd-bench-disk-", dir=Path.home()) as folder:
        disk = ("--disk-bytes", str(10**9), "--disk-folder", folder)
        with Daemon(*base, *size, "--ram-bytes", "0", *disk) as daemon:
            _from_disk(report, daemon, prompts, tokens, loaded - tokens / from_ram)


def _from_disk(
    report: Report, daemon: Daemon, prompts: list[list[int]], tokens: int, beside_s: float
) -> None:
    """The row of returns from disk.

    Args:
        report: Takes it.
        daemon: With a disk tier and no RAM tier.
        prompts: Of the agents.
        tokens: Of each, that are loaded.
        beside_s: What the same return takes beside its loading, as measured from RAM.
    """
    for prompt in prompts:
        _ttft(daemon, prompt)
    _settle(daemon, len(prompts) * tokens)
    off: list[float] = []
    took: list[float] = []
    learning = 4 if report.quick else 10
    for turn in range(learning + (3 if report.quick else 12)):
        for prompt in prompts:
            _drop_cache(daemon)
            # The first loads tell the pager how fast the disk is; from then on it predicts.
            predicted = tokens / _rate(daemon, "disk") + beside_s if turn >= learning else 1.0
            seconds = _ttft(daemon, prompt)
            if turn >= learning:
                took.append(seconds)
                off.append(seconds / predicted - 1)
    median = statistics.median(off)
    what = f"an agent returns with {tokens:,} tokens: first token from disk, cold page cache"
    note = (
        f"median {median * 100:+.1f} % of {len(off)} returns, quartiles "
        f"{statistics.quantiles(off, n=4)[0] * 100:+.0f} to "
        f"{statistics.quantiles(off, n=4)[2] * 100:+.0f}; {statistics.median(took) * 1e3:.0f} ms; "
        "predicted: the pager's measured rate, and what the return from RAM took beside its loading"
    )
    report.add(Row(what, abs(median) * 100, "% off the prediction", "<= 10", note))


def _ttft(daemon: Daemon, prompt: list[int]) -> float:
    """Seconds to the first token of a greedy reply."""
    begin = time.perf_counter()
    options: pagedd.GenerateOptions = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True}
    stream = daemon.client.generate(prompt, timeout=_PATIENCE_S, **options)
    next(iter(stream))
    seconds = time.perf_counter() - begin
    stream.wait()
    return seconds


def _rate(daemon: Daemon, tier: str) -> float:
    """Tokens a second that the pager has seen come from ``tier``."""
    rate = float(daemon.stats()["pager"][f"{tier}_load_tokens_per_s"])
    assert rate > 0, f"nothing was loaded from {tier}: {daemon.stats()['kv']}"
    return rate


def _settle(daemon: Daemon, tokens: int) -> None:
    """Until all of it is on disk."""
    end = time.monotonic() + 60
    while daemon.cached_tokens("disk") < tokens:
        assert time.monotonic() < end, f"not on disk: {daemon.stats()['kv']}"
        time.sleep(0.1)


def _drop_cache(daemon: Daemon) -> None:
    """Have the kernel forget what it holds of the engine's file on disk."""
    (engine,) = [p for p in daemon.processes() if "pagedd_daemon.engine" in p.cmdline()]
    drop_cache(engine.pid, "pagedd-bench-disk-")


def _spread(seconds: list[float]) -> str:
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"quartiles {low * 1e3:.0f} to {high * 1e3:.0f}"
