"""The disk tier: what it gives back is what was written, whatever the disk does, or nothing."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.engine_loop import Loop, Request
from kvpager.types import Instruction, Load, PageName, Tier
from pagedd_daemon.backends.base import Backend
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.backends.paged.load import BLOCK_TOKENS, Wishes, serve
from pagedd_daemon.backends.simulated import BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.tiers import diskfile
from pagedd_daemon.engine.tiers.disk import Blob, DiskTier, Moved
from pagedd_daemon.engine.tiers.diskfile import DiskFile, Io
from pagedd_daemon.engine.tiers.diskspace import swap_space
from pagedd_daemon.engine.tiers.opening import DiskWishes, open_disk
from pagedd_daemon.engine.tiers.records import Shape, bind
from pagedd_daemon.messages import Configure
from pagedd_daemon.models.config import Rope, uniform_attention
from pagedd_daemon.models.decoder import Decoder
from tests.support.driver import Driver, Judge
from tests.support.paged_backend import Plain, tiny_config, tiny_model
from tests.support.plain_llama import PlainLlama
from tests.support.tiny_model import write_tiny_model

SIZE = 1 << 20


@dataclass
class Faulty(Io):
    """Fails, shortens, corrupts or delays chosen calls, counted from 0."""

    reads: dict[int, str] = field(default_factory=dict)
    writes: dict[int, str] = field(default_factory=dict)
    read_calls: int = 0
    write_calls: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def pread(self, descriptor: int, into: memoryview, offset: int) -> int:
        what = self.reads.get(self.read_calls, "")
        self.read_calls += 1
        if what == "fails":
            raise OSError(errno.EIO, "Input/output error")
        if what == "late":
            self.gate.wait(60)
        short = what == "short" and len(into) > 1
        count = super().pread(descriptor, into[: len(into) // 2] if short else into, offset)
        if what == "corrupt":
            into[0] ^= 0x40
        return count

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        what = self.writes.get(self.write_calls, "")
        self.write_calls += 1
        if what == "fails":
            raise OSError(errno.EIO, "Input/output error")
        if what == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        short = what == "short" and len(data) > 1
        return super().pwrite(descriptor, data[: len(data) // 2] if short else data, offset)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tier(folder: Path, io: Io | None = None, *, readers: int = 0, clock: Clock | None = None,
         slots: int = 64) -> DiskTier:  # fmt: skip
    space = swap_space(folder, SIZE)
    shape = Shape(bind("disk"), slots, space.bytes)
    return DiskTier(
        DiskFile(space.descriptor, shape, io=io, readers=readers, clock=clock or Clock())
    )


def blob(number: int, slot: int, size: int = 5000) -> Blob:
    data = np.random.default_rng(number).integers(0, 256, size, np.uint8)
    return Blob(data, {slot: (0, 16)}, 16)


def wait(disk: DiskTier) -> Moved:
    while True:
        ended = disk.poll()
        if ended:
            (moved,) = ended
            return moved


def read(disk: DiskTier, number: int, slot: int) -> bytes | None:
    disk.get(number, [slot])
    moved = wait(disk)
    return moved.read[0][1].tobytes() if moved.ok else None


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskTier]:
    with closing(tier(tmp_path, readers=2)) as opened:
        yield opened


def test_what_is_read_is_what_was_written_and_a_slot_holds_its_last(disk: DiskTier) -> None:
    for turn in range(3):
        disk.put(turn, [blob(10 * turn + slot, slot, 1000 + 700 * slot) for slot in range(8)])
        assert wait(disk).ok
    for slot in range(8):
        assert (
            read(disk, 100 + slot, slot) == blob(20 + slot, slot, 1000 + 700 * slot).data.tobytes()
        )


def test_several_pages_of_one_piece_are_read_once(disk: DiskTier) -> None:
    data = np.arange(9000, dtype=np.int64).view(np.uint8)
    disk.put(1, [Blob(data, {3: (0, 16), 4: (16, 32)}, 32)])
    assert wait(disk).ok
    disk.get(2, [4, 3])
    ((extent, found),) = wait(disk).read
    assert found.tobytes() == data.tobytes()
    assert extent.slots == {3: (0, 16), 4: (16, 32)}


def test_a_tier_that_is_full_refuses_and_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    with closing(tier(tmp_path)) as disk:
        slot = 0
        while True:
            disk.put(slot, [blob(slot, slot, 100_000)])
            if not wait(disk).ok:
                break
            slot += 1
        assert slot >= 8
        assert read(disk, 100, slot) is None
        disk.put(101, [blob(7, 0, 100_000)])  # in the place of what was there
        assert wait(disk).ok
        assert read(disk, 102, 0) == blob(7, 0, 100_000).data.tobytes()
        assert disk.file.trouble == ""


@pytest.mark.parametrize("what", ["short", "fails", "full"])
def test_every_write_that_is_short_or_fails_costs_pages_and_never_gives_wrong_ones(
    tmp_path: Path, what: str
) -> None:
    for nth in range(12):
        io = Faulty()
        with closing(tier(tmp_path, io)) as disk:
            io.write_calls, io.writes = 0, {nth: what}
            for slot in range(3):
                disk.put(slot, [blob(slot, slot)])
                if wait(disk).ok:
                    disk.commit(slot, PageName(bytes([slot]) * 32, None))
            found = [read(disk, 10 + slot, slot) for slot in range(3)]
            for slot, data in enumerate(found):
                assert data in (None, blob(slot, slot).data.tobytes())
            if what == "short":
                assert None not in found
            elif nth < io.write_calls:
                assert "writing failed" in disk.file.trouble
                disk.put(50, [blob(1, 1)])
                assert not wait(disk).ok, "a disk that failed is used again"


@pytest.mark.parametrize("what", ["short", "fails", "corrupt"])
def test_every_read_that_is_short_fails_or_lies_costs_a_page_and_never_gives_a_wrong_one(
    tmp_path: Path, what: str
) -> None:
    for nth in range(4):
        io = Faulty()
        with closing(tier(tmp_path, io)) as disk:
            for slot in range(4):
                disk.put(slot, [blob(slot, slot)])
                assert wait(disk).ok
            io.read_calls, io.reads = 0, {nth: what}
            found = [read(disk, 10 + slot, slot) for slot in range(4)]
            for slot, data in enumerate(found):
                assert data in (None, blob(slot, slot).data.tobytes())
            if what == "short":
                assert None not in found
            else:
                assert found[nth] is None
            if what == "corrupt":
                assert (found.count(None), disk.counters()["disk_corrupt"]) == (1, 1)
                assert disk.file.trouble == ""
                assert disk.at(nth) is None, "what was corrupt once is offered again"
            if what == "fails":
                assert found[nth:] == [None] * (4 - nth)
                assert "reading failed" in disk.file.trouble


def test_a_late_read_counts_as_missing_and_the_tier_goes_on(tmp_path: Path) -> None:
    io, clock = Faulty(), Clock()
    with closing(tier(tmp_path, io, readers=1, clock=clock)) as disk:
        for slot in range(2):
            disk.put(slot, [blob(slot, slot)])
            assert wait(disk).ok
        io.reads = {io.read_calls: "late"}
        disk.get(5, [0])
        assert disk.poll() == []
        clock.now += diskfile.READ_DEADLINE_S + 1
        (moved,) = disk.poll()
        assert (moved.transfer, moved.ok) == (5, False)
        disk.get(6, [1])
        io.gate.set()
        assert wait(disk).read[0][1].tobytes() == blob(1, 1).data.tobytes()
        assert disk.counters()["disk_late"] == 1
        assert disk.file.trouble == ""


def test_a_truncated_file_gives_nothing(tmp_path: Path) -> None:
    with closing(tier(tmp_path)) as disk:
        disk.put(1, [blob(1, 1)])
        assert wait(disk).ok
        os.ftruncate(disk.file._descriptor, 16384)
        assert read(disk, 2, 1) is None


def test_more_than_may_wait_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskfile, "MOST_QUEUED_BYTES", 12_000)
    with closing(tier(tmp_path)) as disk:
        for number in range(3):
            disk.put(number, [blob(number, number)])
        assert {moved.transfer: moved.ok for moved in disk.poll()} == {0: True, 1: True, 2: False}


# ------------------------------------------------------------------------------------------ space


def test_swap_space_has_no_name_and_is_allocated(tmp_path: Path) -> None:
    space = swap_space(tmp_path / "new", SIZE)
    try:
        assert (space.bytes, space.notice) == (SIZE, "")
        assert list((tmp_path / "new").iterdir()) == []
        found = os.fstat(space.descriptor)
        assert found.st_nlink == 0
        assert found.st_blocks * 512 >= SIZE
        assert found.st_mode & 0o777 == 0o600
        assert not os.get_inheritable(space.descriptor)
    finally:
        os.close(space.descriptor)


def test_a_disk_with_less_room_has_a_smaller_tier_or_none_and_says_so(tmp_path: Path) -> None:
    def full(most: int) -> Callable[[int, int, int], None]:
        def allocate(descriptor: int, offset: int, size: int) -> None:
            if size > most:
                raise OSError(errno.ENOSPC, "No space left on device")

        return allocate

    space = swap_space(tmp_path, 64 << 20, full(20 << 20))
    assert space.bytes == 16 << 20
    assert "the disk tier has 0.0 GB and not 0.1: " in space.notice
    assert "No space left" in space.notice
    os.close(space.descriptor)
    none = swap_space(tmp_path, 64 << 20, full(0))
    assert (none.descriptor, none.bytes) == (-1, 0)
    assert "there is no disk tier" in none.notice


def test_a_folder_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    found = open_disk(DiskWishes(SIZE, str(tmp_path / "file")), bind("x"), 4096, pieces=False)
    assert (found.tier, found.slots) == (None, 0)
    (text,) = found.troubles()
    assert str(tmp_path / "file") in text


# --------------------------------------------------------------------------------- under backends

Make = Callable[[Path], Backend]


def _simulated(keep: bool) -> Make:
    def make(folder: Path) -> Backend:
        configure = Configure(
            "simulated", "", bytes(32), 2048, 24 * 16, 6 * 16 * BYTES_PER_TOKEN, 1,
            disk_bytes=SIZE, disk_folder=str(folder),
        )  # fmt: skip
        return SimulatedBackend.from_configure(configure, verify=True, keep_cached_on_gpu=keep)

    return make


def _llama(path: Path) -> Make:
    def make(folder: Path) -> Backend:
        configure = Configure(
            "llama.cpp", str(path), bytes(32), 0, 24 * 16, 8 * 9000, 1, kv_dtype="f32",
            flash_attention=False, disk_bytes=2 * SIZE, disk_folder=str(folder),
        )  # fmt: skip
        return LlamaBackend.load(configure, lambda _: None)

    return make


def _torch(model: Decoder, blocks: int = 24, ram: int = 6) -> Make:
    def make(folder: Path) -> Backend:
        block = BLOCK_TOKENS * model.config.kv_bytes_per_token(model.dtype.itemsize)
        disk = DiskWishes(4 * SIZE, str(folder))
        return serve(model, Wishes(blocks * BLOCK_TOKENS, ram * block, disk=disk))

    return make


def windowed_model() -> Decoder:
    """As Mistral and Gemma 2 are: every other layer sees the last 48 tokens."""
    import torch

    attention = uniform_attention(Rope(10_000.0, 16), [48, 0])
    config = replace(tiny_config(), architecture="MistralForCausalLM", attention=attention)
    return Decoder.random(config, torch.device("cpu"), torch.float64, 3)


def play(make: Make, folder: Path, judge: Judge | None, seeds: range) -> int:
    """Random histories in a pool and RAM too small; loads from disk."""
    loads = 0
    for seed in seeds:
        with closing(make(folder)) as backend:
            driver = Driver(backend)
            # What computing is worth beside loading, so that restores begin at both ends.
            driver.pager.observe(prefill_tokens_per_s=1000.0)
            apply = backend.apply

            def counted(instructions: Iterable[Instruction], apply: Any = apply) -> None:
                nonlocal loads
                kept = list(instructions)
                loads += sum(isinstance(i, Load) and i.tier is Tier.DISK for i in kept)
                apply(kept)

            backend.apply = counted  # type: ignore[method-assign]
            turns(driver, random.Random(seed), judge)
            assert backend.troubles() == []
    return loads


def turns(driver: Driver, dice: random.Random, judge: Judge | None) -> None:
    """Sequences that come back, and step aside for each other."""
    prompts = [[dice.randrange(3, 250) for _ in range(dice.randint(60, 200))] for _ in range(5)]
    for turn in range(25):
        prompt = dice.choice(prompts)
        assert driver.admit(turn, prompt) is not None
        driver.prefill(turn)
        driver.generate([turn], dice.randint(1, 5))
        if dice.random() < 0.4:
            driver.preempt(turn)
            driver.resume(turn)
            driver.prefill(turn)
            driver.generate([turn], 1)
        if judge is not None:
            driver.check(turn, judge)
        driver.free(turn)


@pytest.mark.parametrize("keep", [True, False])
def test_the_simulated_backend_reads_its_own_content_from_disk(tmp_path: Path, keep: bool) -> None:
    assert play(_simulated(keep), tmp_path, None, range(3)) > 10


@pytest.mark.parametrize("windowed", [False, True])
def test_texts_of_torch_are_those_of_a_plain_run_through_ram_and_disk(
    tmp_path: Path, windowed: bool
) -> None:
    model = windowed_model() if windowed else tiny_model()
    assert play(_torch(model), tmp_path, Plain(model).judge, range(2)) > 5


@pytest.mark.parametrize("windowed", [False, True])
def test_a_front_is_computed_while_its_back_comes_from_disk(tmp_path: Path, windowed: bool) -> None:
    model = windowed_model() if windowed else tiny_model()
    texts = [np.random.default_rng(n).integers(3, 250, 40).astype(np.int32) for n in range(5)]
    with closing(_torch(model, blocks=16, ram=1)(tmp_path)) as backend:
        loop = Loop(backend)
        pager = loop.engine._pool.pager
        for _ in range(30):  # whatever is measured then: a third is worth computing
            pager.observe(prefill_tokens_per_s=500.0)
            for lower in (Tier.RAM, Tier.DISK):
                pager.observe(load_tokens_per_s=1e3, store_tokens_per_s=1e9, tier=lower)
        pager.observe = lambda **rates: None  # type: ignore[method-assign]
        asked = [Request(text, 70) for text in texts]
        for request in asked:
            loop.submit(request)
        loop.run()
        loop.engine.validate()
        assert pager.stats().restores > 0
        plain = Plain(model)
        for request in asked:
            assert request.tokens == plain.greedy(request.prompt.tolist(), 70)


@pytest.mark.model
def test_texts_of_llama_are_those_of_a_plain_run_through_ram_and_disk(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    with closing(PlainLlama(path)) as plain:

        def judge(text: list[int]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
            after = plain.logits(text[:-1])
            rows = np.arange(len(text) - 1)
            good = after[rows, text[1:]] >= after.max(axis=1) - 1e-3
            return np.concatenate([[False], good])

        assert play(_llama(path), tmp_path, judge, range(3)) > 5


@pytest.mark.parametrize("kind", ["fails", "corrupt", "short"])
def test_texts_do_not_change_when_the_disk_fails_at_random(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        dice = random.Random(seed)
        io = Faulty(
            reads=dict.fromkeys(dice.sample(range(60), 6), kind),
            writes=dict.fromkeys(
                dice.sample(range(200), 4), "short" if kind == "corrupt" else kind
            ),
        )
        monkeypatch.setattr(diskfile, "Io", lambda io=io: io)
        # The oracle of the simulated backend raises at the first cell that is not what was written.
        with closing(_simulated(seed % 2 == 0)(tmp_path)) as backend:
            driver = Driver(backend)
            driver.pager.observe(prefill_tokens_per_s=1000.0)
            turns(driver, dice, None)
            assert all("disk tier" in text for text in backend.troubles())
