"""Memory: giving half of a pool back while conversations run, and pages over PCIe."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu.engine_loop import Loop, Request, decode_ms, prompts
from benchmarks.gpu.model8b import KV_BYTES_PER_TOKEN, backend_8b
from benchmarks.report import Report, Row
from kvpager.types import Load, Page, Store, Tier
from pagedd_daemon.backends.paged.arena import PoolShape, make_arena
from pagedd_daemon.backends.paged.slabs import RamTier
from pagedd_daemon.backends.paged.transfers import Transfers
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.records import bind

POOL_GB = 8.6


def give_back(report: Report) -> None:
    """Half of an 8 GiB pool, with conversations in it; nobody loses anything."""
    backend, _ = backend_8b(kv_gb=POOL_GB, ram_gb=12.0)
    loop = Loop(backend)
    vocab = backend.capabilities.vocab_size
    texts = prompts(24, 1500, vocab, 7)
    requests = [Request(text, 400) for text in texts]
    for request in requests:
        loop.submit(request)
    while not all(request.tokens for request in requests):
        loop.turn()
    blocks = backend.capabilities.gpu_blocks
    size = backend.memory().kv_pool
    free = torch.cuda.mem_get_info()[0]
    begin = time.monotonic()
    loop.engine._scheduler.resize(blocks // 2)
    said = None
    while said is None and time.monotonic() - begin < 60:
        if torch.cuda.mem_get_info()[0] - free >= 0.45 * size:
            said = 1e3 * (time.monotonic() - begin)
        else:
            loop.turn()
    copied = loop.engine._pool.pager.stats()
    stored = copied.stored_pages * backend.capabilities.block_bytes
    floor = 1e3 * stored / 50e9
    loop.run()
    lost = sum(len(request.tokens) != request.output for request in requests)
    note = f"{stored / 2**30:.1f} GiB went to RAM, {floor:.0f} ms at 50 GB/s, and moves in the pool"
    value = float("nan") if said is None else said - floor
    report.add(
        Row("giving back half of an 8 GiB pool, beside the copies", value, "ms", "<= 50", note)
    )
    report.add(Row("conversations lost by that", lost, "", "== 0", f"of {len(requests)}"))
    backend.close()


def pinned_rates(size: int = 1 << 30) -> tuple[float, float]:
    """Bytes per second of one large copy, into the device and out of it."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    return (
        size / _seconds(lambda: device.copy_(host, non_blocking=True)),
        size / _seconds(lambda: host.copy_(device, non_blocking=True)),
    )


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        begin = time.monotonic()
        work()
        torch.cuda.synchronize()
        times.append(time.monotonic() - begin)
    return statistics.median(times[1:])


def swap(report: Report) -> None:
    """Scattered blocks of three sizes between pool and RAM, against one large pinned copy."""
    fast_in, fast_out = pinned_rates()
    report.add(Row("pinned copy into the device", fast_in / 1e9, "GB/s"))
    report.add(Row("pinned copy out of the device", fast_out / 1e9, "GB/s"))
    for layers, must in ((8, 75), (16, 85), (32, 90)):
        shape = PoolShape(layers, 16, 8, 128, torch.bfloat16)
        into, out = _rates(shape)
        mb = shape.block_bytes / 2**20
        for name, rate, best in (("in", into, fast_in), ("out", out, fast_out)):
            share = 100 * rate / best
            note = f"{rate / 1e9:.1f} GB/s"
            what = f"swap {name}, scattered blocks of {mb:g} MiB, of the pinned rate"
            report.add(Row(what, share, "%", f">= {must}", note))
    _slowed(report)


def _rates(shape: PoolShape) -> tuple[float, float]:
    """Bytes per second in and out, over 1,024 blocks in transfers of 64."""
    device, count, group = torch.device("cuda", 0), 1024, 64
    arena = make_arena(shape, count, count, device)
    arena.resize(count)
    store = RamStore(-1, (count + 64) * shape.block_bytes, bind("memory"), count)
    ram = RamTier(store, count, shape.block_bytes // 2, shape.dtype, lock=True)
    transfers = Transfers(arena.kv, ram, device)
    blocks = np.random.default_rng(1).permutation(count).tolist()
    slots = np.random.default_rng(2).permutation(count).tolist()
    pages = [Page(at, b, s, 16) for at, (b, s) in enumerate(zip(blocks, slots, strict=True))]
    groups = [tuple(pages[at : at + group]) for at in range(0, count, group)]
    number = 0

    def turn(kind: type[Store] | type[Load]) -> float:
        nonlocal number
        torch.cuda.synchronize()
        begin = time.monotonic()
        for part in groups:
            number += 1
            transfers.submit(kind(number, 1, Tier.RAM, part))
        ended = 0
        while ended < len(groups):
            results = transfers.poll()
            assert all(result.ok for result in results)
            ended += len(results)
            if not results:
                time.sleep(1e-4)
        return time.monotonic() - begin

    turn(Store)
    deadline = time.monotonic() + 60  # the slabs are locked in the background
    while ram.locked_slabs * ram.slab_pages < count and time.monotonic() < deadline:
        time.sleep(0.05)
    size = count * shape.block_bytes
    out = size / statistics.median(turn(Store) for _ in range(3))
    into = size / statistics.median(turn(Load) for _ in range(3))
    transfers.close()
    ram.close()
    arena.close()
    return into, out


def _slowed(report: Report) -> None:
    """Decode steps while pages go out and come in all the time, against quiet ones."""
    backend, _ = backend_8b(ram_gb=6.0)
    loop = Loop(backend)
    quiet = statistics.median(decode_ms(loop, 32, 512, 100, seed=1))
    last = backend.capabilities.gpu_blocks - 1
    count = min(256, backend.capabilities.ram_blocks // 2)
    number, open_ = 10**6, 0
    launch = backend.launch

    def busy(step: object) -> object:
        nonlocal number, open_
        open_ -= len(backend._transfers.poll())
        if open_ < 4:
            number += 2
            # The far end of a pool that is all but empty, so no sequence is disturbed.
            pages = tuple(Page(at, last - at, at, 16) for at in range(0, count, 8))
            more = tuple(Page(at, last - at, at, 16) for at in range(1, count, 8))
            backend.apply([Store(number, 1, Tier.RAM, pages), Load(number + 1, 1, Tier.RAM, more)])
            open_ += 2
        return launch(step)  # type: ignore[arg-type]

    backend.apply([Store(1, 1, Tier.RAM, tuple(Page(a, last - a, a, 16) for a in range(count)))])
    time.sleep(2.0)
    backend.launch = busy  # type: ignore[method-assign, assignment]
    swapping = statistics.median(decode_ms(loop, 32, 512, 200, seed=2))
    slower = 100 * (swapping / quiet - 1)
    note = f"batch 32: {quiet:.2f} ms quiet, {swapping:.2f} swapping both ways all the time"
    report.add(Row("decode slowed by swapping", slower, "%", "<= 5", note))
    backend.close()


assert KV_BYTES_PER_TOKEN * 16 == 1 << 21, "the 8B shape has blocks of 2 MiB"
