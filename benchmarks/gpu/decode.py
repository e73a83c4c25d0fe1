"""Decode steps and the closed trace at the engine loop."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.gpu.engine_loop import Loop, Request, Timing, decode_ms
from benchmarks.gpu.model8b import backend_8b, decode_floor_ms, late_compiles
from benchmarks.report import Report, Row
from pagedd_daemon.backends.paged.layout import MIXED_BUCKETS

PROMPT = 512
MUST_MS = {1: 4.5, 8: 4.6, 32: 5.3, 64: 6.2, 128: 8.2, 256: 13.2}
GOAL_MS = {1: 4.1, 8: 4.2, 32: 4.8, 64: 5.6, 128: 7.2, 256: 11.5}
TRACE = Path(__file__).parents[1] / "workloads" / "closed-trace-1000.json"


def table(report: Report) -> None:
    """Milliseconds per decode step by batch."""
    backend, seconds = backend_8b()
    loop = Loop(backend)
    for part, value in seconds.items():
        report.add(Row(f"8B shape: {part.replace('_', '-')}", value, "s"))
    for batch, must in MUST_MS.items():
        steps = decode_ms(loop, batch, PROMPT, 120, seed=batch)
        quarter = sorted(steps)
        floor = decode_floor_ms(batch, PROMPT + 70)
        note = (
            f"goal {GOAL_MS[batch]}, floor {floor:.2f}; mean {statistics.mean(steps):.2f}, "
            f"5-95 %: {quarter[6]:.2f}-{quarter[-7]:.2f}"
        )
        value = statistics.median(steps)
        report.add(Row(f"decode step, batch {batch}", value, "ms", f"<= {must}", note))
    late_compiles(report, backend)
    backend.close()


def trace(report: Report) -> None:
    """1,000 requests at once, 256 in a batch."""
    backend, _ = backend_8b()
    loop = Loop(backend)
    shapes = json.loads(TRACE.read_text())["requests"]
    rng = np.random.default_rng(0)
    vocab = backend.capabilities.vocab_size
    requests = [Request(rng.integers(10, vocab, n, dtype=np.int32), out) for n, out in shapes]
    for request in requests:
        loop.submit(request)
    loop.timings.clear()
    loop.device_s = 0.0
    seconds = loop.run()
    tokens = sum(len(request.tokens) for request in requests)
    assert tokens == sum(out for _, out in shapes)
    note = f"{len(loop.moments)} steps, {tokens} tokens in {seconds:.1f} s; goal 16,000"
    report.add(Row("closed trace at the engine loop", tokens / seconds, "tok/s", ">= 14,000", note))
    _timings(report, loop)
    idle = 100 * (1 - loop.device_s / seconds)
    report.add(Row("idle GPU over the closed trace", idle, "%", "<= 3", "by CUDA events of steps"))
    late_compiles(report, backend)
    backend.close()


def _timings(report: Report, loop: Loop) -> None:
    """Mean times by kind of step: what is told of a run in which the device was idle."""
    largest = MIXED_BUCKETS[-1]
    kinds: dict[str, Callable[[Timing], bool]] = {
        "only decode": lambda t: t.tokens == t.runs,
        "prompts, in a graph": lambda t: t.runs < t.tokens <= largest,
        "prompts, without": lambda t: t.tokens > largest,
    }
    for kind, is_kind in kinds.items():
        steps = [t for t in loop.timings if is_kind(t)]
        if not steps:
            continue
        device, launch, wait = (
            1e3 * statistics.mean(getattr(t, name) for t in steps)
            for name in ("device_s", "launch_s", "wait_s")
        )
        late = sum(t.wait_s < 1e-4 for t in steps)
        note = (
            f"{len(steps)} steps, launched in {launch:.2f} ms, waited for {wait:.2f} ms; "
            f"{late} were over before the host came to look"
        )
        report.add(Row(f"closed trace, steps with {kind}: device", device, "ms", note=note))


def scan(report: Report) -> None:
    """Every context length from 1 to 2,048 at batch 1: no step stands out."""
    backend, _ = backend_8b()
    loop = Loop(backend)
    times: list[float] = []
    for _ in range(2):  # what stands out once is the machine's, twice it is ours
        request = Request(np.array([17], np.int32), 2047)
        loop.submit(request)
        loop.run()
        moments = [at for at, _ in loop.moments]
        found = [1e3 * (b - a) for a, b in pairwise(moments)][:2040]
        times = [min(a, b) for a, b in zip(times, found, strict=True)] if times else found
    worst, where = 0.0, 0
    for at in range(len(times)):
        near = times[max(0, at - 8) : at] + times[at + 1 : at + 9]
        ratio = times[at] / statistics.median(near)
        if ratio > worst:
            worst, where = ratio, at
    report.add(
        Row(
            "slowest step of contexts 1 to 2,048 over its neighbours' median",
            worst,
            "x",
            "<= 2",
            f"at {where} tokens: {times[where]:.2f} ms; median {statistics.median(times):.2f} ms",
        )
    )
    late_compiles(report, backend)
    backend.close()
