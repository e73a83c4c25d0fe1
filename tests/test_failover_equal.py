"""An engine killed at random steps: the text is that of a plain run."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Backend
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.backends.paged.load import BLOCK_TOKENS, Wishes, serve
from pagedd_daemon.backends.simulated import BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.memory_file import create_memory
from pagedd_daemon.messages import Configure
from pagedd_daemon.params import SamplingParams
from tests.support.f32_model import f32_copy
from tests.support.paged_backend import VOCAB, tiny_model
from tests.support.plain_llama import PlainLlama
from tests.test_engine_core import SALT, sampling, stopping

PAGES = 128
LENGTH = 60
ASKED: list[dict[str, object]] = [
    {},
    {"temperature": 0.9, "seed": 4},
    {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {},
    {"temperature": 1.0, "seed": 6},
]

Make = Callable[[int], Backend]


def simulated(keep: bool) -> Make:
    def make(descriptor: int) -> Backend:
        configure = Configure(
            "simulated",
            "",
            bytes(32),
            context_tokens=2048,
            kv_tokens=60 * 16,
            ram_bytes=PAGES * 16 * BYTES_PER_TOKEN,
            threads=1,
            ram_fd=descriptor,
            simulated_step_us=0,
        )
        return SimulatedBackend.from_configure(configure, verify=True, keep_cached_on_gpu=keep)

    return make


def torch_float64() -> Make:
    model = tiny_model()

    def make(descriptor: int) -> Backend:
        block = BLOCK_TOKENS * model.config.kv_bytes_per_token(model.dtype.itemsize)
        return serve(model, Wishes(60 * BLOCK_TOKENS, PAGES * block, ram_fd=descriptor))

    return make


class Journal:
    """What a front keeps of some requests, through the lives of several engines."""

    def __init__(self, prompts: list[list[int]], asked: list[dict[str, object]]) -> None:
        self.prompts = prompts
        self.asked = asked
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.open = set(range(len(prompts)))

    def submit(self, engine: Engine) -> None:
        """Everything that has not ended, to a new engine."""
        for at in sorted(self.open):
            keys = SamplingParams.__slots__
            text = [*self.prompts[at], *self.tokens[at]]
            engine.handle(
                m.Submit(
                    rid=at,
                    app="app",
                    klass=1,
                    root=SALT,
                    prompt=np.asarray(text, "<i4").tobytes(),
                    n=1,
                    sampling=sampling(**{k: v for k, v in self.asked[at].items() if k in keys}),
                    stop=stopping(max_tokens=LENGTH),
                    generated=len(self.tokens[at]),
                )
            )

    def take(self, report: m.StepReport) -> None:
        for output in report.outputs:
            self.tokens[output.rid] += np.frombuffer(output.tokens, "<i4").tolist()
        self.open -= {ended.rid for ended in report.ended}
        assert not report.rejected

    def live(self, make: Make, descriptor: int, steps: int) -> int:
        """An engine's life of so many steps at most; pages it found of an earlier one."""
        backend = make(descriptor)
        # Time passes fast, so that few tokens are held back and lost with the engine.
        engine = Engine(backend, itertools.count(0.0, 0.1).__next__, write_through=True)
        self.submit(engine)
        for _ in range(steps):
            if not self.open:
                break
            engine.step(self.take, lambda: True)
            engine.validate()
        return engine._pool.pager.stats().loaded_pages


def _lives(make: Make, journal: Journal, seed: int) -> int:
    """Kill engines at random steps until everything has ended; pages loaded in all."""
    dice = random.Random(seed)
    descriptor = create_memory(64 << 20)
    loaded = 0
    try:
        while journal.open:
            loaded += journal.live(make, descriptor, dice.randrange(2, 40))
    finally:
        os.close(descriptor)
    return loaded


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["simulated", "cells", "torch"])
def test_texts_do_not_depend_on_when_engines_died(kind: str, seed: int) -> None:
    make = torch_float64() if kind == "torch" else simulated(keep=kind == "simulated")
    dice = np.random.default_rng(seed)
    prompts = [dice.integers(3, VOCAB - 3, n).tolist() for n in (9, 70, 33, 40, 100)]
    plain, killed = Journal(prompts, ASKED), Journal(prompts, ASKED)
    plain.live(make, -1, 10**6)
    assert all(len(tokens) == LENGTH for tokens in plain.tokens)
    loaded = _lives(make, killed, seed)
    assert killed.tokens == plain.tokens
    # In torch a thread copies, which may not have got to it before the engine was killed.
    assert loaded > 0 or kind == "torch"


@pytest.mark.model
def test_on_llama_cpp_every_token_is_the_best_of_a_plain_run(smollm2_path: Path) -> None:
    path = f32_copy(smollm2_path)
    configure = Configure(
        "llama.cpp", str(path), bytes(32), 1024, 4096, 64 << 20, 2,
        kv_dtype="f32", flash_attention=False,
    )  # fmt: skip

    def make(descriptor: int) -> Backend:
        return LlamaBackend.load(replace(configure, ram_fd=descriptor), lambda _: None)

    dice = np.random.default_rng(1)
    prompts = [dice.integers(100, 2000, n).tolist() for n in (20, 50, 33)]
    journal = Journal(prompts, [{}] * 3)
    assert _lives(make, journal, 7) > 0
    with closing(PlainLlama(path)) as plain:
        for prompt, tokens in zip(prompts, journal.tokens, strict=True):
            assert len(tokens) == LENGTH
            rows = plain.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
            behind = rows.max(axis=1) - rows[np.arange(LENGTH), tokens]
            assert behind.max() <= 1e-3, behind
