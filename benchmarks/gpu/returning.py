"""An agent that returns after a pause: its keys and values out of RAM, against computing them."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu.engine_loop import Loop, Request, prompts
from benchmarks.gpu.model8b import backend_8b, late_compiles
from benchmarks.report import Report, Row
from pagedd_daemon.backends.paged.backend import PagedBackend

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
