"""The pool follows the memory of its device."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.backends.paged.arena import PoolShape
from pagedd_daemon.backends.paged.load import Wishes, pool_growth
from pagedd_daemon.backends.simulated import SimulatedBackend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.loop import FrontLink, run
from pagedd_daemon.engine.vram import GROW_AFTER_S, SPARE_BYTES, Follower, Watch
from pagedd_daemon.link import FrameReader, pack, unpack
from tests.support.simulated import simulated

MIB = 1 << 20
BLOCKS = 8192
TOTAL = 24 << 30
SPARE = SPARE_BYTES


def capabilities(blocks: int = BLOCKS, context: int = 8192) -> Capabilities:
    """Blocks of one MiB."""
    caps = simulated(blocks=16).capabilities
    return replace(caps, gpu_blocks=blocks, block_bytes=MIB, context_tokens=context)


@dataclass
class Pool:
    """A pool that does at once as it is told."""

    follower: Follower
    free: int
    blocks: int = BLOCKS
    now: float = 0.0

    def look(self, seconds: float = 1.0) -> int:
        """One look later; blocks of the pool."""
        self.now += seconds
        wanted = self.follower.blocks(self.now, self.blocks, self.blocks, self.free)
        self.free += (self.blocks - wanted) * MIB
        self.blocks = wanted
        return wanted


def pool(free: int = 2 * SPARE, context: int = 8192) -> Pool:
    return Pool(Follower(capabilities(context=context), TOTAL, free), free)


def test_the_pool_gives_back_what_others_lack_and_no_more() -> None:
    it = pool()
    assert it.look() == BLOCKS
    it.free = SPARE // 2
    assert it.look() == BLOCKS
    it.free = SPARE // 4
    assert it.look() == BLOCKS - 3 * SPARE // 4 // MIB
    assert it.free == SPARE
    assert it.look() == it.look()


def test_the_pool_keeps_room_for_the_longest_text_or_a_quarter() -> None:
    for context, floor in [(8192, 513), (10**6, BLOCKS // 4)]:
        it = pool(context=context)
        for _ in range(20):
            it.free = 0
            it.look()
        assert it.blocks == floor


def test_the_pool_takes_back_what_has_been_free_for_a_while() -> None:
    it = pool()
    it.free = 0
    small = it.look()
    it.free += 6 * SPARE
    for _ in range(int(GROW_AFTER_S)):
        assert it.look() == small
    it.free = SPARE  # taken for a moment
    it.look()
    it.free = 6 * SPARE
    for _ in range(int(GROW_AFTER_S)):
        assert it.look() == small
    assert it.look() == BLOCKS
    assert it.free >= SPARE


def test_the_pool_never_takes_what_shall_be_free() -> None:
    it = pool()
    it.free = 0
    it.look()
    small, it.free = it.blocks, 3 * SPARE // 2
    for _ in range(30):
        it.look()
    assert it.blocks == small + SPARE // 2 // MIB
    assert it.free == SPARE


def test_a_pool_that_is_being_vacated_is_not_made_smaller_for_the_same_want() -> None:
    follower = Follower(capabilities(), TOTAL, SPARE)
    wanted = follower.blocks(1.0, BLOCKS, BLOCKS, 0)
    assert wanted < BLOCKS
    assert follower.blocks(2.0, wanted, BLOCKS, 0) == wanted


def test_a_pool_that_a_step_made_smaller_waits_like_any_other() -> None:
    it = pool()
    it.free = 6 * SPARE
    it.look()
    it.blocks -= 100
    for _ in range(int(GROW_AFTER_S)):
        assert it.look() == BLOCKS - 100
    assert it.look() == BLOCKS


def test_a_pool_that_was_asked_to_leave_little_is_left_as_it_was_asked_for() -> None:
    it = pool(free=10 * MIB)
    for _ in range(20):
        assert it.look() == BLOCKS


# ---------------------------------------------------------------------------------- the whole way


class Device:
    """An elastic pool whose device others use, too."""

    def __init__(self, caps: Capabilities, total_blocks: int) -> None:
        self._block_bytes = caps.block_bytes
        self.total_bytes = total_blocks * caps.block_bytes
        self.others = 0
        self.there = caps.gpu_blocks

    def free_bytes(self) -> int:
        return self.total_bytes - self.there * self._block_bytes - self.others

    def grow(self, blocks: int) -> int:
        self.there = min(blocks, self.there + max(0, self.free_bytes() // self._block_bytes))
        return self.there


class Elastic(SimulatedBackend):
    """A simulated backend that gives memory back."""

    def apply(self, instructions: object) -> None:
        super().apply(instructions)  # type: ignore[arg-type]
        for instruction in instructions:  # type: ignore[attr-defined]
            if type(instruction).__name__ == "Shrunk":
                assert isinstance(self.elastic, Device)
                self.elastic.there = instruction.gpu_blocks


def snapshots_until(
    front: socket.socket, reader: FrameReader, holds: Callable[[dict[str, int]], bool]
) -> m.Snapshot:
    front.settimeout(30.0)
    while True:
        for body in reader.feed(front.recv(1 << 16)):
            message = unpack(body)
            if isinstance(message, m.Snapshot) and holds(message.figures["kv"]["gpu"]):
                return message


def test_an_idle_engine_gives_memory_to_others_says_so_and_takes_it_back() -> None:
    caps = simulated(blocks=400).capabilities
    device = Device(caps, 500)
    backend = Elastic(caps, elastic=device)
    clock = iter(range(10**9))
    engine = Engine(backend, lambda: 0.0)
    front, ours = socket.socketpair()
    watch = Watch(
        caps, device, lambda: engine.blocks, look_s=0.002, clock=lambda: float(next(clock))
    )
    serving = threading.Thread(target=run, args=(engine, FrontLink(ours), [], watch))
    serving.start()
    reader = FrameReader()
    try:
        device.others = 90 * caps.block_bytes
        small = snapshots_until(front, reader, lambda kv: kv["blocks_total"] < 400)
        assert 280 < small.figures["kv"]["gpu"]["blocks_total"] < 400
        assert "other programs use the GPU's memory" in small.figures["troubles"][-1]
        assert device.there == engine.blocks
        device.others = 0
        large = snapshots_until(front, reader, lambda kv: kv["blocks_total"] == 400)
        assert large.figures["troubles"] == []
    finally:
        front.sendall(pack(m.Shutdown()))
        serving.join(30.0)
        watch.close()
        front.close()
        ours.close()
    assert not serving.is_alive()


def test_a_device_in_trouble_leaves_the_pool_as_it_is() -> None:
    caps = simulated(blocks=400).capabilities
    device = Device(caps, 500)
    watch = Watch(caps, device, lambda: 400, look_s=0.001)
    looked = threading.Event()

    def fails() -> int:
        looked.set()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device.free_bytes = fails  # type: ignore[method-assign]
    assert looked.wait(30.0)
    watch._thread.join(30.0)
    assert not select.select([watch], [], [], 0)[0]
    assert watch.wanted() is None
    watch.close()


@pytest.mark.parametrize(
    ("wishes", "free", "held", "more"),
    [
        (Wishes(), 1000, 0, 900),
        (Wishes(kv_tokens=16 * 50), 1000, 0, 40),
        (Wishes(vram_bytes=700), 1000, 500, 200),
        (Wishes(kv_tokens=16 * 500, vram_bytes=700), 1000, 500, 200),
        (Wishes(vram_bytes=400), 1000, 500, 0),
    ],
)
def test_the_pool_takes_what_was_asked_for_and_no_more_than_it_may(
    wishes: Wishes, free: int, held: int, more: int
) -> None:
    shape = PoolShape(1, 16, 1, 8, torch.float32)
    size = shape.block_bytes
    asked = replace(wishes, vram_bytes=wishes.vram_bytes * size)
    assert pool_growth(asked, shape, 10, free * size, held * size) == more
