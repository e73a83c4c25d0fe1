"""The device has no memory for a step: others give way, and everybody gets the text it would have
had."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.engine_loop import Loop, Request, prompts
from pagedd_daemon.backends.paged import backend as paged_backend
from pagedd_daemon.backends.paged import load
from pagedd_daemon.backends.paged.arena import PADDING_BLOCKS, PoolShape
from pagedd_daemon.backends.paged.backend import LEAST_PIECE_TOKENS, PagedBackend
from pagedd_daemon.backends.paged.load import BLOCK_TOKENS, Wishes, serve
from pagedd_daemon.engine import relief
from pagedd_daemon.models.decoder import Decoder
from pagedd_kernels import StepBatch
from tests.support.paged_backend import VOCAB, Plain, tiny_model
from tests.test_engine_core import Bench, prompt_of

# --------------------------------------------------------------------- fewer requests at a time


def crowd(bench: Bench, count: int = 6) -> None:
    for rid in range(count):
        bench.submit(rid, prompt_of(rid, 60 + 10 * rid), max_tokens=90, klass=1 + rid % 2)


def texts(bench: Bench) -> dict[int, list[int]]:
    return {rid: outcome.tokens[0] for rid, outcome in bench.outcomes.items()}


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("ram_blocks", [0, 1024])
@pytest.mark.parametrize("begins", [0, 8])
def test_a_step_of_too_many_is_tried_again_with_fewer(
    llama: bool, ram_blocks: int, begins: int
) -> None:
    quiet, tight = (Bench(llama=llama, ram_blocks=ram_blocks) for _ in range(2))
    for bench in (quiet, tight):
        crowd(bench)
    for _ in range(begins):
        tight.step()
    tight.backend.faults.most_runs = 2
    tight.run()
    quiet.run()
    assert texts(tight) == texts(quiet)
    assert all(outcome.rejected is None for outcome in tight.outcomes.values())
    stats = tight.engine._pool.pager.stats()
    assert stats.preemptions_swap + stats.preemptions_recompute > 0


def test_who_gives_way_is_the_least_important() -> None:
    bench = Bench()
    for rid, klass in enumerate((2, 0, 1)):
        bench.submit(rid, prompt_of(rid, 60), max_tokens=30, klass=klass)
    for _ in range(8):
        bench.step()
    bench.backend.faults.most_runs = 1
    ended: list[int] = []
    while bench.engine.has_work:
        for report in bench.step():
            ended += [one.rid for one in report.ended]
    assert ended == [1, 2, 0]


def test_whoever_is_in_a_hurry_does_not_wait_for_memory_that_others_have() -> None:
    bench = Bench()
    for rid in range(2):
        bench.submit(rid, prompt_of(rid, 60), max_tokens=300, klass=2)
    for _ in range(8):
        bench.step()
    bench.backend.faults.most_runs = 1
    for _ in range(8):
        bench.step()
    bench.submit(7, prompt_of(7, 60), max_tokens=5, klass=0)
    ended: list[int] = []
    while not ended:
        for report in bench.step():
            ended += [one.rid for one in report.ended]
    assert ended == [7]


def test_when_there_is_memory_again_everybody_runs() -> None:
    bench = Bench()
    crowd(bench, 4)
    for _ in range(6):
        bench.step()
    bench.backend.faults.most_runs = 1
    for _ in range(6):
        bench.step()
    assert bench.engine.snapshot().figures["sequences"]["running"] == 1
    bench.backend.faults.most_runs = 0
    for _ in range(2):
        bench.now += 1.1 * relief.QUIET_S
        for _ in range(3):
            bench.step()
    assert bench.engine.snapshot().figures["sequences"]["running"] == 4
    bench.run()


# -------------------------------------------------------------------- memory that fails on demand


@dataclass
class Device:
    """Memory that the pool, the steps and other programs share."""

    total: int
    others: int = 0
    pool: int = 0
    step_bytes_per_token: int = 0
    longest: int = 10**9
    """A step over longer texts than this finds no memory, whatever there is."""
    refused: int = 0

    @property
    def free(self) -> int:
        return self.total - self.others - self.pool


class SegmentArena:
    """On the CPU, what `VirtualArena` is on CUDA; what is given back reads as NaN."""

    elastic = True

    def __init__(self, shape: PoolShape, blocks: int, device: Device) -> None:
        self.kv = torch.zeros(shape.tensor_shape(blocks + PADDING_BLOCKS), dtype=shape.dtype)
        self._block_bytes = shape.block_bytes
        self._device = device
        self.blocks = blocks
        device.pool = self.bytes

    @property
    def bytes(self) -> int:
        return self.blocks * self._block_bytes

    def resize(self, blocks: int) -> int:
        room = self._device.free // self._block_bytes
        now = min(blocks, self.blocks + max(0, room))
        low, high = sorted((now + PADDING_BLOCKS, self.blocks + PADDING_BLOCKS))
        self.kv[low:high] = torch.nan if now < self.blocks else 0.0
        self.blocks = now
        self._device.pool = self.bytes
        return now

    def close(self) -> None:
        self.kv = torch.empty(0)


class Hungry:
    """A model whose steps take memory of the device."""

    def __init__(self, model: Decoder, device: Device) -> None:
        self.config, self.context_tokens = model.config, model.context_tokens
        self.device, self.dtype = model.device, model.dtype
        self.weight_bytes = 0
        self._inner, self._memory = model, device

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        wanted = batch.num_tokens * self._memory.step_bytes_per_token
        if wanted > self._memory.free or int(batch.context_lens.max()) > self._memory.longest:
            self._memory.refused += 1
            raise torch.OutOfMemoryError(f"{batch.num_tokens} tokens are too many")
        return self._inner.forward(batch, kv)

    def rehearse(self, batch: StepBatch, kv: Tensor) -> None:
        self._inner.rehearse(batch, kv)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_model()


def hungry(
    model: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    *,
    blocks: int,
    ram_pages: int = 64,
    asynchronous: bool = False,
) -> tuple[PagedBackend, Device]:
    """A backend whose pool is in the memory of a device that has no more than that."""
    block_bytes = BLOCK_TOKENS * model.config.kv_bytes_per_token(model.dtype.itemsize)
    device = Device(total=blocks * block_bytes)
    monkeypatch.setattr(
        load, "make_arena", lambda shape, most, first, _: SegmentArena(shape, first, device)
    )
    monkeypatch.setattr(paged_backend, "free_bytes", lambda _: device.free)
    monkeypatch.setattr(relief, "LEAST_BYTES", block_bytes)
    wishes = Wishes(blocks * BLOCK_TOKENS, ram_pages * block_bytes, asynchronous=asynchronous)
    return serve(Hungry(model, device), wishes), device


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("ram_pages", [0, 64])
def test_the_pool_gives_back_what_steps_lack_and_nobody_loses_a_token(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, ram_pages: int
) -> None:
    backend, device = hungry(
        model, monkeypatch, blocks=48, ram_pages=ram_pages, asynchronous=asynchronous
    )
    with closing(backend):
        loop = Loop(backend)
        requests = [Request(p, 40 + at) for at, p in enumerate(prompts(6, 50, VOCAB, 4))]
        for request in requests:
            loop.submit(request, frequency_penalty=1.0 if request.output == 42 else 0.0)
        for _ in range(12 if asynchronous else 2):
            loop.turn()
        # The smallest piece of a prompt takes the memory of twenty blocks.
        device.step_bytes_per_token = 20 * backend.capabilities.block_bytes // 16
        loop.run()
        loop.engine.validate()
        assert device.refused > 0
        assert loop.engine._scheduler.blocks < 48
        assert device.pool < device.total
        quiet = Loop(serve(model, Wishes(48 * BLOCK_TOKENS)))
        again = [Request(one.prompt, one.output) for one in requests]
        for request in again:
            quiet.submit(request, frequency_penalty=1.0 if request.output == 42 else 0.0)
        quiet.run()
    assert [one.tokens for one in requests] == [one.tokens for one in again]
    plain = requests[0]
    assert plain.tokens == Plain(model).greedy(plain.prompt.tolist(), plain.output)


def test_a_step_that_never_fits_ends_its_request_and_nobody_else(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, device = hungry(model, monkeypatch, blocks=64)
    with closing(backend):
        loop = Loop(backend)
        small = [Request(p, 20) for p in prompts(2, 20, VOCAB, 6)]
        for request in small:
            loop.submit(request)
        large = Request(prompts(1, 200, VOCAB, 7)[0], 5)
        device.longest = 150
        loop.submit(large)
        with pytest.raises(
            RuntimeError, match="3 was rejected: a step failed: the device is out of memory"
        ):
            loop.run()
        loop.run()
        loop.engine.validate()
    for request in small:
        assert request.tokens == Plain(model).greedy(request.prompt.tolist(), 20)


def test_a_prompt_is_cut_before_anybody_gives_way(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, device = hungry(model, monkeypatch, blocks=64)
    with closing(backend):
        device.others = -(LEAST_PIECE_TOKENS + 10)  # free, whatever the pool has
        device.step_bytes_per_token = 1
        loop = Loop(backend)
        request = Request(prompts(1, 500, VOCAB, 8)[0], 5)
        loop.submit(request)
        loop.run()
        assert device.refused > 0
        assert loop.engine._scheduler.blocks == 64
    assert request.tokens == Plain(model).greedy(request.prompt.tolist(), 5)


def test_what_a_table_of_counts_finds_no_memory_for_is_counted_once(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    flavour: dict[str, object] = {"frequency_penalty": 2.0}
    found = []
    for fails in (False, True):
        with closing(serve(model, Wishes(64 * BLOCK_TOKENS, asynchronous=True))) as backend:
            loop = Loop(backend)
            requests = [Request(p, 20) for p in prompts(3, 20, VOCAB, 9)]
            for request in requests:
                loop.submit(request, **flavour)
            for _ in range(6):
                loop.turn()
            if fails:
                refused = iter([True] * 3)
                inner = backend._counts._row_of

                def row_of(one: object, inner: object = inner, refused: object = refused) -> int:
                    if next(refused, False):  # type: ignore[call-overload]
                        raise torch.OutOfMemoryError("no memory for counts")
                    return int(inner(one))  # type: ignore[operator]

                monkeypatch.setattr(backend._counts, "_row_of", row_of)
            loop.run()
            found.append([request.tokens for request in requests])
    assert found[0] == found[1]
    assert np.unique([len(tokens) for tokens in found[0]]).tolist() == [20]
