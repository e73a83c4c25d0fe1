"""KV that a request leaves behind and the engine holds."""

from __future__ import annotations

import pytest

from pagedd_daemon import messages as m
from tests.test_engine_core import Bench, prompt_of


def flood(bench: Bench, first: int) -> None:
    """More prefixes than both tiers have room for, one after another."""
    for rid in range(first, first + 12):
        bench.submit(rid, prompt_of(rid, 320), max_tokens=2)
        bench.run()


@pytest.mark.parametrize("llama", [False, True])
def test_what_a_request_left_behind_outlasts_a_flood_until_it_is_dropped(llama: bool) -> None:
    bench = Bench(kv_tokens=512, ram_blocks=64, llama=llama)
    prompt = prompt_of(7, 320)
    bench.submit(1, prompt, max_tokens=4, hold=True)
    bench.run()
    flood(bench, 100)
    bench.submit(2, prompt, max_tokens=4)
    bench.run()
    assert (bench.outcomes[2].cached or 0) >= 304
    assert bench.outcomes[2].tokens == bench.outcomes[1].tokens
    bench.engine.handle(m.Drop(1))
    bench.engine.handle(m.Drop(1))
    flood(bench, 200)
    bench.submit(3, prompt, max_tokens=4)
    bench.run()
    assert (bench.outcomes[3].cached or 0) < 304


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    bench = Bench(kv_tokens=512, ram_blocks=64)
    bench.submit(1, prompt_of(7, 320), max_tokens=50, hold=True)
    for _ in range(20):
        bench.step()
    bench.engine.handle(m.Cancel(1))
    bench.run()
    assert not bench.engine._scheduler._residents._held


def test_what_is_dropped_before_its_request_has_ended_is_not_held() -> None:
    bench = Bench(kv_tokens=512, ram_blocks=64)
    bench.submit(1, prompt_of(7, 320), max_tokens=4, hold=True)
    bench.engine.handle(m.Drop(1))
    bench.run()
    assert len(bench.outcomes[1].tokens[0]) == 4
    assert not bench.engine._scheduler._residents._held
