"""The engine over the paged backend, in float64: texts do not depend on how steps are arranged."""

from __future__ import annotations

import statistics
from contextlib import closing

import numpy as np
import pytest

from benchmarks.gpu.engine_loop import Loop, Request, decode_ms, prompts
from pagedd_daemon.models.decoder import Decoder
from tests.support.paged_backend import VOCAB, Plain, tiny_backend, tiny_model


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_model()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_texts_are_those_of_a_plain_run_though_the_pool_holds_a_third(
    model: Decoder, asynchronous: bool
) -> None:
    stem = prompts(1, 30, VOCAB, 50)[0]
    texts = [np.concatenate([stem, p]) for p in prompts(6, 21, VOCAB, 5)]
    with closing(tiny_backend(model, blocks=12, ram_pages=10, asynchronous=asynchronous)) as it:
        loop = Loop(it)
        requests = [Request(text, 24 + at) for at, text in enumerate(texts)]
        for request in requests:
            loop.submit(request)
        loop.run()
        stats = loop.engine._pool.pager.stats()
        loop.engine.validate()
    assert stats.preemptions_swap + stats.preemptions_recompute > 0
    for request in requests:
        assert request.tokens == Plain(model).greedy(request.prompt.tolist(), request.output)


def test_samples_of_a_seed_are_the_same_alone_and_in_a_crowd_a_step_ahead_or_not(
    model: Decoder,
) -> None:
    flavour = {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.3, "seed": 12}
    found = []
    for crowd, asynchronous in [(0, False), (0, True), (5, False), (5, True)]:
        with closing(tiny_backend(model, asynchronous=asynchronous)) as backend:
            loop = Loop(backend)
            for at, text in enumerate(prompts(crowd, 33, VOCAB, 8)):
                loop.submit(Request(text, 20 + at), temperature=1.0, seed=at)
            request = Request(prompts(1, 19, VOCAB, 9)[0], 25)
            loop.submit(request, **flavour)
            loop.run()
        found.append(request.tokens)
    assert len(found[0]) == 25
    assert all(tokens == found[0] for tokens in found)


def test_the_benchmark_times_decode_steps_only(model: Decoder) -> None:
    with closing(tiny_backend(model, asynchronous=True)) as backend:
        steps = decode_ms(Loop(backend), batch=3, prompt=20, steps=6, seed=1)
    assert len(steps) == 6
    assert statistics.median(steps) > 0
