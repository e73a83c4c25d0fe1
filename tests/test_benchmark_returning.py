"""What the stage `returning` of bench-gpu measures is what it says."""

from __future__ import annotations

from contextlib import closing

from benchmarks.gpu.engine_loop import Loop
from benchmarks.gpu.returning import come_back
from tests.support.paged_backend import tiny_backend, tiny_model


def test_an_agent_that_returns_finds_its_text_in_ram_and_not_in_the_pool() -> None:
    with closing(tiny_backend(tiny_model(), blocks=320, ram_pages=300)) as backend:
        loop = Loop(backend)
        for seed in (1, 20):
            found = come_back(loop, 160, seed)
            assert found.cached == 160
            assert found.loaded >= 9
