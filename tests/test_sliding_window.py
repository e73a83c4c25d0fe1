"""Layers that see a window only: what is swapped or restored is still what a plain run computes.

Keys behind the window are masked and not missing, so a page that comes back in the wrong place, or
not at all, shows only once a query looks at it: every text here is several windows long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvpager import Load, PreemptMode
from pagedd_daemon.backends.base import TransferResult
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.models.config import Rope, uniform_attention
from pagedd_daemon.models.decoder import Decoder
from tests.support.cells import used_cells
from tests.support.driver import Driver, Judge
from tests.support.gguf_models import write_gguf
from tests.support.hf_models import MODELS, write_model
from tests.support.paged_backend import Plain, tiny_backend, tiny_config
from tests.test_backend_llama import Plain as LlamaPlain
from tests.test_backend_llama import load

VOCAB = 160
"""Of the smaller model; the other has more."""
BLOCK = 16
LENGTH = 12 * BLOCK + 1


def prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB, length)]


@pytest.fixture(scope="module", params=[7, 16, 40], ids="window={}".format)
def model(request: pytest.FixtureRequest) -> Decoder:
    """A layer with a window shorter than a block, as long, or longer; and one that sees all."""
    config = tiny_config(attention=uniform_attention(Rope(10_000.0, 16), [request.param, 0]))
    return Decoder.random(config, torch.device("cpu"), torch.float64, 1)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers, every sixth of which sees all and the others 20 tokens."""
    folder = tmp_path_factory.mktemp("gemma")
    return write_gguf(write_model("gemma3", folder / "folder"), folder / "tiny.gguf", {})


@pytest.fixture(scope="module")
def judge(gemma: Path) -> Iterator[Judge]:
    with closing(LlamaPlain(gemma)) as plain:
        yield plain.judge


def swapped_group(driver: Driver, length: int) -> list[int]:
    """Four samples of one prompt, each some tokens on, that were swapped out together."""
    driver.admit(1, prompt(1, length))
    driver.prefill(1)
    driver.fork(1, {2: 11, 3: 12, 4: 13})
    group = [1, 2, 3, 4]
    driver.generate(group, 6)
    for seq in group:
        driver.preempt(seq)
    assert set(group) <= driver.swapped
    return group


def go_on(driver: Driver, group: list[int], judge: Judge) -> None:
    driver.generate(group, 30)  # past a window, so that queries see old keys and new ones
    for seq in group:
        driver.check(seq, judge)


# ---------------------------------------------------------------------------- torch, in float64


@pytest.mark.parametrize("bad", [False, True], ids=["whole", "pages-lost"])
def test_a_back_that_is_loaded_before_its_front_is_computed_gives_the_plain_text(
    model: Decoder, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(tiny_backend(model, blocks=16, ram_pages=40)) as backend:
        driver = Driver(backend)
        driver.admit(1, prompt(1, LENGTH))
        driver.prefill(1)
        driver.preempt(1, PreemptMode.SWAP)
        driver.admit(2, prompt(2, 15 * BLOCK))  # takes every block the victim had
        driver.prefill(2)
        driver.free(2)
        for _ in range(100):  # whatever was measured is forgotten
            driver.pager.observe(
                prefill_tokens_per_s=100.0, load_tokens_per_s=100.0, store_tokens_per_s=100.0
            )
        if bad:
            lose_loads(driver, monkeypatch)
        assert driver.resume(1)
        assert 0 <= driver.computed[1] < driver.until[1] < LENGTH
        driver.prefill(1)
        assert driver.pager.stats().restores == 1
        go_on(driver, [1], Plain(model).judge)


def lose_loads(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second load ends as one that failed."""
    poll, seen = driver.backend.poll_transfers, 0

    def failing() -> list[TransferResult]:
        nonlocal seen
        ended = []
        for result in poll():
            if isinstance(driver._pool._in_flight[result.transfer], Load):
                seen += 1
                result = replace(result, ok=bool(seen % 2))
            ended.append(result)
        return ended

    monkeypatch.setattr(driver.backend, "poll_transfers", failing)


def test_a_group_that_was_swapped_goes_on_and_shares_its_prompt_as_before(model: Decoder) -> None:
    with closing(tiny_backend(model, blocks=32, ram_pages=40)) as backend:
        driver = Driver(backend)
        group = swapped_group(driver, 6 * BLOCK)
        driver.admit(9, prompt(9, 30 * BLOCK))
        driver.prefill(9)
        driver.free(9)
        for seq in group:
            assert driver.resume(seq)
        shared = {tuple(driver.pager.block_table(seq)[:6]) for seq in group}
        assert len(shared) == 1
        go_on(driver, group, Plain(model).judge)


# ------------------------------------------------------------------------------------ llama.cpp


def gemma_backend(gemma: Path) -> LlamaBackend:
    backend = load(gemma, kv_tokens=512)
    assert backend._model.window_tokens == MODELS["gemma3"]().sliding_window
    return backend


@pytest.mark.model
@pytest.mark.parametrize("length", [5, 16, 33, 96])
def test_a_group_comes_back_into_no_more_cells_than_it_had(
    gemma: Path, judge: Judge, length: int
) -> None:
    with closing(gemma_backend(gemma)) as backend:
        driver = Driver(backend)
        group = swapped_group(driver, length)
        assert used_cells(backend._context) == 0
        for seq in group:
            assert driver.resume(seq)
        # Shared whole blocks once; the rest of each sequence is its own.
        own = sum(driver.computed[seq] - length // BLOCK * BLOCK for seq in group)
        assert used_cells(backend._context) <= length // BLOCK * BLOCK + own
        go_on(driver, group, judge)


@pytest.mark.model
@pytest.mark.parametrize("shared", [96, 64, 32, 16])
def test_any_part_of_a_prefix_that_waited_in_ram_is_used_by_the_next(
    gemma: Path, judge: Judge, shared: int
) -> None:
    # Its end looks at keys that the end of the whole prefix could not see any more.
    with closing(gemma_backend(gemma)) as backend:
        driver = Driver(backend)
        stem = prompt(5, 100)
        driver.admit(1, stem)
        driver.prefill(1)
        driver.free(1)
        assert driver.admit(2, [*stem[:shared], 9]) == shared
        driver.prefill(2)
        go_on(driver, [2], judge)
