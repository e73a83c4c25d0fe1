"""An agent that returns after a pause: its keys and values out of RAM, against computing them, and
from disk with a cold page cache, against what the pager's own rates say."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.gpu.engine_loop import Loop, Request, prompts
from benchmarks.gpu.model8b import KV_BYTES_PER_TOKEN, backend_8b, late_compiles
from benchmarks.page_cache import drop_cache
from benchmarks.report import Report, Row
from kvpager.types import Tokens
from pagedd_daemon.backends.paged.backend import PagedBackend
from pagedd_daemon.engine.tiers.opening import DiskWishes

TOKENS = 4000
NEW_TOKENS = 16
"""What the agent has to say when it returns."""
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Return:
    """One agent, twice."""

    cold_ms: float
    """To its first token, with nothing known of its text."""
    back_ms: float
    """The same when it returns."""
    cached: int
    """Tokens that were found then."""
    loaded: int
    """Pages that came out of RAM for it."""


def come_back(loop: Loop, tokens: int, seed: int) -> Return:
    """An agent asks, others take the whole pool, the agent asks again with a little more."""
    vocab = loop.backend.capabilities.vocab_size
    caps = loop.backend.capabilities
    first, *others = prompts(2 + caps.gpu_blocks * caps.block_tokens // tokens, tokens, vocab, seed)
    agent = Request(first, 1)
    _alone(loop, agent)
    for text in others:
        _alone(loop, Request(text, 1))
    before = _loaded(loop)
    rest = prompts(1, NEW_TOKENS, vocab, seed + 1)[0]
    again = Request(np.concatenate([first, rest]), 1)
    _alone(loop, again)
    cold, back = (1e3 * (r.first_s - r.sent_s) for r in (agent, again))
    return Return(cold, back, again.cached, _loaded(loop) - before)


def _wait_for_locks(backend: PagedBackend) -> None:
    """Until nothing more is page-locked: that happens in the background once memory is used."""
    before = -1
    while (locked := backend.counters()["locked_ram_slabs"]) != before:
        before = locked
        time.sleep(0.5)


def _alone(loop: Loop, request: Request) -> None:
    gc.collect()  # not while it counts; an engine does it once, at its start
    gc.freeze()
    loop.submit(request)
    loop.run()


def _loaded(loop: Loop) -> int:
    return int(loop.engine.snapshot().figures["pager"]["loaded_pages"])


def returning(report: Report) -> None:
    """The stage.

    The pool holds 80,000 tokens. What is evicted next, a sixteenth of a pool, is in RAM already: a
    prompt that is longer than that drops what lies behind it.
    """
    backend, _ = backend_8b(kv_gb=10.5, ram_gb=16.0)
    loop = Loop(backend)
    for seed in (1, 2):  # the second fills what there is of RAM
        come_back(loop, TOKENS, seed)
    _wait_for_locks(backend)
    found = [come_back(loop, TOKENS, seed=10 * (at + 1)) for at in range(REPEATS)]
    pages = min(one.loaded for one in found)
    whole = TOKENS // backend.capabilities.block_tokens
    note = f"of {whole}, the fewest of {REPEATS}"
    report.add(Row("pages that came out of RAM for an agent", pages, "", f">= {whole - 1}", note))
    cold = statistics.median(one.cold_ms for one in found)
    back = statistics.median(one.back_ms for one in found)
    what = f"an agent with {TOKENS:,} tokens returns: TTFT from RAM against recompute"
    note = f"{back:.1f} ms and {cold:.1f}; {found[0].cached} tokens found, {NEW_TOKENS} new"
    report.add(Row(what, back / cold, "x", "<= 0.2", note))
    late_compiles(report, backend)
    backend.close()


DISK_TOKENS = 4992
"""Of the pool then: two agents take turns in it, and each finds only what the other has left."""
LEARNING = 6
"""Returns of each agent from which the pager learns how fast disk and device are."""


def from_disk(report: Report) -> None:
    """The stage: a prefix store on disk and no RAM tier."""
    with tempfile.TemporaryDirectory(prefix="pagedd-bench-disk-", dir=Path.home()) as folder:
        disk = DiskWishes(8 * 10**9, folder, persist=True)
        backend, _ = backend_8b(kv_gb=DISK_TOKENS * KV_BYTES_PER_TOKEN / 1e9, disk=disk)
        loop = Loop(backend)
        # One token more: the last of a prompt is always computed.
        agents = prompts(2, TOKENS + 1, backend.capabilities.vocab_size, 31)
        for text in agents:
            _alone(loop, Request(text, 1))  # until all of it is on disk
        returns = [_return(loop, text) for _ in range(LEARNING + REPEATS) for text in agents]
        found = returns[2 * LEARNING :]
        median = statistics.median(one.off for one in found)
        low, _, high = statistics.quantiles([one.off for one in found], n=4)
        cached = min(one.cached for one in found)
        what = f"an agent with {TOKENS:,} tokens returns: TTFT from disk, cold page cache"
        note = (
            f"median {100 * median:+.1f} % of {len(found)} returns, quartiles {100 * low:+.0f} to "
            f"{100 * high:+.0f}; {1e3 * statistics.median(one.back_s for one in found):.0f} ms; "
            f"predicted: {found[-1].prefill:,.0f} tokens/s computed and {found[-1].load:,.0f} "
            f"loaded at once, and a prompt that is found; at least {cached} tokens found"
        )
        report.add(Row(what, 100 * abs(median), "% off the prediction", "<= 10", note))
        late_compiles(report, backend)
        backend.close()


@dataclass(frozen=True, slots=True)
class FromDisk:
    """One return from disk."""

    back_s: float
    cached: int
    prefill: float
    """Tokens per second that the pager had seen computed when it planned."""
    load: float
    """And loaded from disk."""
    beside_s: float
    """The same prompt's first token where all of it is found in the pool."""

    @property
    def off(self) -> float:
        """By which part it took longer than two pointers do that meet."""
        rate = self.prefill + self.load
        return self.back_s / (TOKENS / rate + self.beside_s) - 1 if self.load else 0.0


def _return(loop: Loop, text: Tokens) -> FromDisk:
    """The other agent had the pool; this one comes back, and asks once more."""
    rates = loop.engine.snapshot().figures["pager"]
    drop_cache(os.getpid(), "pagedd-bench-disk-")
    back, again = Request(text, 1), Request(text, 1)
    _alone(loop, back)
    _alone(loop, again)
    prefill, load = (
        float(rates.get(f"{name}_tokens_per_s") or 0) for name in ("prefill", "disk_load")
    )
    return FromDisk(
        back.first_s - back.sent_s, back.cached, prefill, load, again.first_s - again.sent_s
    )
