"""The paged engine on a CUDA device: what `benchmarks.gpu` says must hold."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from benchmarks.gpu.checks import config, texts_against_cpu
from benchmarks.gpu.constrained import byte_grammars, matched, run_all, schema_requests
from benchmarks.gpu.engine_loop import Loop, Request, prompts
from benchmarks.gpu.returning import come_back
from benchmarks.report import Report
from pagedd_daemon.backends.paged.backend import PagedBackend
from pagedd_daemon.backends.paged.load import Wishes, serve
from pagedd_daemon.models.decoder import Decoder

pytestmark = pytest.mark.gpu


def small(**wishes: object) -> PagedBackend:
    """Four layers of random weights."""
    model = Decoder.random(config(), torch.device("cuda", 0), torch.bfloat16, 3)
    return serve(model, Wishes(**wishes))  # type: ignore[arg-type]


def test_the_engine_on_cuda_agrees_with_the_cpu_and_keeps_every_page() -> None:
    report = Report("gpu-test", quick=False)
    texts_against_cpu(report)
    assert [row for row in report.rows if not row.ok] == []


def test_constrained_texts_match_and_compile_nothing_while_they_are_served() -> None:
    with (
        closing(small(kv_tokens=64_000, eog_tokens=frozenset({256}))) as backend,
        closing(byte_grammars(backend.capabilities)) as grammars,
    ):
        schemas, requests = schema_requests(64, backend.capabilities.vocab_size)
        run_all(Loop(backend, grammars), requests, 16)
        assert matched(schemas, requests) == len(schemas)
        assert backend.counters()["late_compiles"] == 0


def test_an_agent_that_returns_finds_its_text_in_ram() -> None:
    with closing(small(kv_tokens=16_000, ram_bytes=1 << 30)) as backend:
        found = come_back(Loop(backend), 480, seed=1)
        assert found.cached == 480
        assert found.loaded >= 29


def test_a_start_says_what_its_parts_took_and_captures_every_bucket() -> None:
    with closing(small(kv_tokens=16_000)) as backend:
        assert [p.name for p in backend.load_report.parts] == ["compile", "run", "graphs", "pool"]
        counters = backend.counters()
        assert counters["start_graphs"] == counters["graphs"] > 0


def test_a_step_without_memory_costs_nobody_a_token() -> None:
    """Steps in pieces, a smaller pool, fewer requests at a time: whatever it takes."""
    with closing(small(kv_tokens=1 << 20, ram_bytes=1 << 28)) as backend:
        loop = Loop(backend)
        requests = [Request(text, 30) for text in prompts(8, 3000, config().vocab_size, 11)]
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - (16 << 20)
        others = torch.empty(free, dtype=torch.uint8, device="cuda")
        for request in requests:
            loop.submit(request, logprobs=5)
        loop.run()
        loop.engine.validate()
        del others
    assert [len(request.tokens) for request in requests] == [30] * 8
