"""A new engine over the memory file of the last one: pages are found, and texts do not change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvpager.types import Load, Page, PageName, Release, Store, Tier
from pagedd_daemon.backends.base import Backend
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.backends.llama_api import SEQUENCE_IDS
from pagedd_daemon.backends.paged.load import BLOCK_TOKENS, Wishes, serve
from pagedd_daemon.backends.simulated import BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.backends.simulated_faults import Faults
from pagedd_daemon.memory_file import create_memory
from pagedd_daemon.messages import Configure
from tests.support.driver import Driver
from tests.support.paged_backend import VOCAB, tiny_model
from tests.support.tiny_model import write_tiny_model

RAM_BYTES = 8 << 20
PAGES = 64

Make = Callable[..., Backend]


@contextmanager
def memory() -> Iterator[int]:
    descriptor = create_memory(RAM_BYTES)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _simulated(keep: bool) -> Make:
    def make(descriptor: int, digest: bytes = bytes(32), faults: Faults | None = None) -> Backend:
        configure = Configure(
            "simulated",
            "",
            digest,
            context_tokens=2048,
            kv_tokens=40 * 16,
            ram_bytes=PAGES * 16 * BYTES_PER_TOKEN,
            threads=1,
            ram_fd=descriptor,
        )
        return SimulatedBackend.from_configure(
            configure, verify=True, keep_cached_on_gpu=keep, faults=faults
        )

    return make


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
    model = tiny_model()

    def llama(descriptor: int, digest: bytes = bytes(32)) -> Backend:
        configure = Configure(
            "llama.cpp", str(path), digest, 0, 1024, 4 << 20, 1, kv_dtype="f32",
            flash_attention=False, ram_fd=descriptor,
        )  # fmt: skip
        return LlamaBackend.load(configure, lambda _: None)

    def torch(descriptor: int, digest: bytes = bytes(32)) -> Backend:
        block = BLOCK_TOKENS * model.config.kv_bytes_per_token(model.dtype.itemsize)
        wishes = Wishes(40 * BLOCK_TOKENS, PAGES * block, ram_fd=descriptor, model_digest=digest)
        return serve(model, wishes)

    return {
        "simulated": _simulated(True),
        "cells": _simulated(False),
        "llama": llama,
        "torch": torch,
    }


def text(seed: int, length: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, VOCAB - 3, length).tolist()
    return found


def lived(driver: Driver, seq: int, prompt: list[int]) -> list[int]:
    """A prompt, eight tokens more, and its pages sent to RAM."""
    driver.admit(seq, prompt)
    driver.prefill(seq)
    driver.generate([seq], 8)
    driver.preempt(seq)
    driver.resume(seq)
    return driver.free(seq)


@pytest.mark.model
@pytest.mark.parametrize("kind", ["simulated", "cells", "llama", "torch"])
def test_the_next_engine_computes_only_the_tail(makers: dict[str, Make], kind: str) -> None:
    make = makers[kind]
    prompts = {1: text(1, 70), 2: text(2, 100), 3: [*text(1, 70)[:40], *text(3, 50)]}
    with closing(make(-1)) as plain:
        driver = Driver(plain)
        wanted = {seq: lived(driver, seq, prompt) for seq, prompt in prompts.items()}
    with memory() as descriptor:
        # Never closed, as if it had been killed.
        dead = Driver(make(descriptor))
        for seq, prompt in prompts.items():
            assert lived(dead, seq, prompt) == wanted[seq]
        with closing(make(descriptor)) as again:
            driver = Driver(again)
            for seq, prompt in prompts.items():
                cached = driver.admit(seq, prompt)
                assert cached == (len(prompt) - 1) // 16 * 16, "full pages are computed again"
                driver.prefill(seq)
                driver.generate([seq], 8)
                assert driver.free(seq) == wanted[seq]
            assert again.memory().ram_tier > 0
        with closing(make(descriptor, b"\x01" * 32)) as other:
            assert Driver(other).admit(1, prompts[1]) == 0, "pages of another model"


def test_a_store_that_failed_is_not_found() -> None:
    make = _simulated(False)
    prompt = text(4, 64)
    with memory() as descriptor:
        dead = Driver(make(descriptor, faults=Faults(transfers={0})))
        dead.admit(1, prompt)
        dead.prefill(1)
        dead.free(1)
        with closing(make(descriptor)) as again:
            assert Driver(again).admit(1, prompt) == 0


@pytest.mark.model
def test_packing_keeps_what_is_committed(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    budget = 100 * 8192
    configure = Configure(
        "llama.cpp", str(path), bytes(32), 0, 1024, budget, 1, kv_dtype="f32", flash_attention=False
    )
    dice = np.random.default_rng(31)
    with memory() as descriptor:
        dead = LlamaBackend.load(replace(configure, ram_fd=descriptor), lambda _: None)
        driver = Driver(dead)
        driver.admit(0, text(8, 400))
        driver.prefill(0)
        table = driver.pager.block_table(0)
        slots = dead.capabilities.ram_blocks
        content: dict[int, int] = {}
        for transfer in range(60):
            first = int(dice.integers(0, 25 - 10))
            chosen = dice.choice(slots, 10, replace=False).tolist()
            pages = tuple(
                Page(first + i, int(table[first + i]), slot, 16) for i, slot in enumerate(chosen)
            )
            store = Store(transfer, 0, Tier.RAM, pages)
            dead.apply([store])
            dead.commit(store, [PageName(bytes([page.index]) * 32, None) for page in pages])
            content.update((page.slot, page.index) for page in pages)
        assert dead.memory().ram_tier > budget * 3 // 4
        with closing(
            LlamaBackend.load(replace(configure, ram_fd=descriptor), lambda _: None)
        ) as it:
            (adopt,) = it.adoptable()
            assert {slot: name.digest[0] for slot, name in adopt.pages} == content
            for seq, (slot, index) in enumerate(content.items()):
                load = Load(seq, seq, Tier.RAM, (Page(index, int(table[index]), slot, 16),))
                it.apply([load])
                (result,) = it.poll_transfers()
                assert result.ok
                assert saved(it, seq, index) == saved(dead, 0, index)
                it.apply([Release(seq)])


def saved(backend: LlamaBackend, seq: int, index: int) -> bytes:
    """The state of one page of a sequence."""
    spare, buffer = SEQUENCE_IDS - 3, np.zeros(1 << 20, np.uint8)
    backend._context.share(backend._ids[seq], spare, index * 16, index * 16 + 16)
    size = backend._context.save(spare, buffer)
    backend._context.remove(spare)
    return buffer[:size].tobytes()
