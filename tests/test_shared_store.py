"""The prefix store of a daemon that several users share: each sees, clears and loses its own."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kvpager.types import PageName
from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Backend
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.backends.simulated import BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.tiers.disk import Blob, DiskTier
from pagedd_daemon.engine.tiers.diskfile import (
    SLOWEST_BYTES_PER_S,
    WRITE_DEADLINE_S,
    DiskFile,
    Io,
)
from pagedd_daemon.engine.tiers.records import Shape, read_header
from pagedd_daemon.engine.tiers.store import clear
from pagedd_daemon.front import requests as r
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.eras import Eras
from pagedd_daemon.owners import join, split
from pagedd_daemon.private_files import ERAS_NAME, STORE_NAME, NotPrivateError, open_private
from tests.support.daemon import running_daemon
from tests.support.driver import Driver
from tests.support.front import Front, run
from tests.support.tiny_model import write_tiny_model

OWNER, ANN, BOB = 990, 1001, 1002
SHARED = Access(shared=True, owner=OWNER)
SIZE = 4 << 20

Make = Callable[[Path, list[tuple[int, int]]], Backend]


# ------------------------------------------------------------------------------------------- eras


def test_what_was_cleared_is_remembered_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / ERAS_NAME
    eras = Eras(path)
    assert (eras.of(ANN), eras.all(), path.exists()) == (0, [], False)
    for uid in (ANN, BOB, ANN):
        eras.next(uid)
    again = Eras(path)
    assert (again.of(ANN), again.of(BOB), again.of(OWNER)) == (2, 1, 0)
    assert sorted(again.all()) == [(ANN, 2), (BOB, 1)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [ERAS_NAME]


@pytest.mark.parametrize("text", ["1001\n", "1001 -1\n", "ann 1\n", "\0", "1 2 3\n"])
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / ERAS_NAME
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(NotPrivateError):
        Eras(path)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ERAS_NAME
    path.touch(0o644)
    path.chmod(0o644)
    with pytest.raises(NotPrivateError):
        Eras(path)


def test_a_write_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eras = Eras(tmp_path / ERAS_NAME)
    eras.next(ANN)

    def full(descriptor: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room"):
        eras.next(ANN)
    assert eras.of(ANN) == Eras(tmp_path / ERAS_NAME).of(ANN) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [ERAS_NAME]


def test_whoever_clears_gets_other_names_and_nobody_else_does(tmp_path: Path) -> None:
    key, eras = bytes(range(32)), Eras(tmp_path / ERAS_NAME)
    apps = Apps(secret=key, eras=eras)

    def told(uid: int) -> m.App:
        return apps.message(Account("editor", uid, key="1"))

    anns, bobs = told(ANN), told(BOB)
    assert (anns.owner, bobs.owner) == (ANN, BOB)
    eras.next(ANN)
    assert told(BOB) == bobs
    assert told(ANN).root != anns.root
    assert split(told(ANN).owner) == (ANN, 1)
    assert told(ANN) == Apps(secret=key, eras=Eras(tmp_path / ERAS_NAME)).message(
        Account("editor", ANN, key="1")
    )


# ------------------------------------------------------------------------------------ the control


def owned(*rows: tuple[int, int, int]) -> m.Snapshot:
    """What an engine says of (user, era, pages)."""
    return m.Snapshot({"owned": [[join(uid, era), pages] for uid, era, pages in rows]})


def test_a_user_sees_and_clears_its_own_and_administrators_see_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        apps = Apps(eras=Eras(tmp_path / ERAS_NAME))
        async with Front(access=SHARED, apps=apps) as front:

            async def kept(uid: int) -> object:
                return (await front.answer(r.CacheShow(id="s"), uid=uid))["users"]

            assert await kept(ANN) is None  # no model is loaded
            owner = front.connect("admin", uid=OWNER)
            load = owner.ask(r.Load)
            engine = await front.source.engine(0)
            await owner.end(load)
            block = front.source.ready.block_tokens
            front.service.board.take(owned((ANN, 0, 3), (BOB, 0, 5)))
            assert await kept(ANN) == [{"uid": ANN, "tokens": 3 * block}]
            assert await kept(BOB) == [{"uid": BOB, "tokens": 5 * block}]
            both = [{"uid": ANN, "tokens": 3 * block}, {"uid": BOB, "tokens": 5 * block}]
            assert await kept(OWNER) == await kept(0) == both
            assert (await front.answer(r.CacheClear(id="c"), uid=ANN))["type"] == "result"
            assert await kept(ANN) == []
            assert await kept(BOB) == [{"uid": BOB, "tokens": 5 * block}]
            front.service.board.take(owned((ANN, 0, 3), (ANN, 1, 2), (BOB, 0, 5)))
            assert await kept(ANN) == [{"uid": ANN, "tokens": 2 * block}]
            ann = front.connect("editor", uid=ANN)
            ann.ask(r.Generate, tokens=bytes(8))
            assert split((await engine.hears(m.Submit)).owner) == (ANN, 1)

    run(scenario())


def test_without_a_store_there_is_nothing_to_see_or_clear() -> None:
    async def scenario() -> None:
        async with Front(access=SHARED) as front:
            for request in (r.CacheShow(id="s"), r.CacheClear(id="c")):
                with pytest.raises(Exception, match="keeps nothing"):
                    front.control(request, uid=ANN)

    run(scenario())


# -------------------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")

    def llama(folder: Path, eras: list[tuple[int, int]]) -> Backend:
        configure = m.Configure(
            "llama.cpp", str(path), bytes(32), 0, 1024, 4 << 20, 1, kv_dtype="f32",
            flash_attention=False, disk_bytes=SIZE, disk_folder=str(folder), disk_persist=True,
            disk_eras=eras,
        )  # fmt: skip
        return LlamaBackend.load(configure, lambda _: None)

    def simulated(folder: Path, eras: list[tuple[int, int]]) -> Backend:
        configure = m.Configure(
            "simulated", "", bytes(32), 2048, 40 * 16, 40 * 16 * BYTES_PER_TOKEN, 1,
            disk_bytes=SIZE, disk_folder=str(folder), disk_persist=True, disk_eras=eras,
        )  # fmt: skip
        return SimulatedBackend.from_configure(configure, verify=True)

    return {"llama": llama, "simulated": simulated}


def prompt(seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, 250) for _ in range(65)]


def life(backend: Backend, *owners: int) -> list[int]:
    """Each owner asks a prompt of its own; how many tokens of each were found."""
    driver, found = Driver(backend), []
    for seq, owner in enumerate(owners):
        found.append(driver.admit(seq, prompt(owner), owner=owner) or 0)
        driver.prefill(seq)
        driver.free(seq)
    return found


def content(folder: Path) -> bytes:
    """The store's bytes of pages, without those that are zero."""
    raw = (folder / STORE_NAME).read_bytes()
    shape = read_header(raw, len(raw))
    assert shape is not None
    return raw[shape.data_offset :].replace(b"\0", b"")


@pytest.mark.model
@pytest.mark.parametrize("kind", ["simulated", "llama"])
def test_what_a_user_has_cleared_is_erased_when_the_store_is_opened_and_no_other_is(
    makers: dict[str, Make], kind: str, tmp_path: Path
) -> None:
    make = makers[kind]
    alone, both = tmp_path / "alone", tmp_path / "both"
    with closing(make(alone, [])) as backend:
        assert life(backend, BOB) == [0]
    with closing(make(both, [])) as backend:
        assert life(backend, BOB, ANN) == [0, 0]
    assert len(content(both)) > 1.5 * len(content(alone))
    with closing(make(both, [(ANN, 1), (OWNER, 3)])):
        pass
    left = len(content(both))
    assert left < 1.1 * len(content(alone)), "bytes of cleared pages are in the file still"
    with closing(make(both, [(ANN, 1)])) as backend:
        assert life(backend, BOB, ANN, join(ANN, 1)) == [64, 0, 0]
    with closing(make(both, [(ANN, 1)])) as backend:
        assert life(backend, join(ANN, 1), BOB) == [64, 64]


def test_who_removes_the_store_removes_what_was_said_of_it(tmp_path: Path) -> None:
    Eras(tmp_path / ERAS_NAME).next(ANN)
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_shows_and_clears_what_is_ones_own(tmp_path: Path) -> None:
    settings, store = tmp_path / "config.toml", tmp_path / "store"
    settings.write_text(f'[disk]\nbudget_gb = 0.01\npersist = true\npath = "{store}"\n')
    text, mine = prompt(1), os.getuid()
    with (
        running_daemon("simulated", config=str(settings), kv_tokens=4096, ram_gb=0.1) as running,
        running.connect("editor") as client,
        running.control() as control,
    ):

        def found() -> int:
            return client.complete(text, max_tokens=1).usage.cached_tokens

        assert (found(), found()) == (0, 64)
        while (control.cache() or {}).get(mine, 0) < 64:
            found()  # figures come with steps
        shown = running.command("cache", "show", "--mine", "--json")
        assert json.loads(shown.stdout)["tokens"] >= 64
        assert running.command("cache", "clear", "--mine").returncode == 0
        assert control.cache() == {}
        assert "0 tokens are kept" in running.command("cache", "show", "--mine").stdout
        assert (found(), found()) == (0, 64)
        control.clear_cache()
    assert (store / ERAS_NAME).read_text() == f"{mine} 2\n"
    with (
        running_daemon("simulated", config=str(settings), kv_tokens=4096, ram_gb=0.1) as running,
        running.connect("editor") as client,
        running.control() as control,
    ):
        assert client.complete(text, max_tokens=1).usage.cached_tokens == 0
        assert client.complete(text, max_tokens=1).usage.cached_tokens == 64


class Dies(Io):
    """Writes so many times, and never again."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if not self.left:
            raise OSError("killed")
        self.left -= 1
        return super().pwrite(descriptor, data, offset)


SHAPE = Shape(bytes(32), 8, 1 << 16)


def opened(path: Path, io: Io | None = None, clock: Callable[[], float] = float) -> DiskTier:
    """A tier without threads in the file at ``path``."""
    return DiskTier(DiskFile(open_private(path), SHAPE, io=io, readers=0, clock=clock))


def filled(path: Path) -> None:
    """Anns pages of ones in slots 0 to 3, Bobs of twos behind them."""
    path.touch(0o600)
    os.truncate(path, SHAPE.total_bytes)
    with closing(opened(path)) as tier:
        for slot in range(8):
            data = np.full(4096, 1 + slot // 4, np.uint8)
            tier.put(slot, [Blob(data, {slot: (0, 16)}, 16)])
            assert [moved.ok for moved in tier.poll()] == [True]
            tier.commit(slot, PageName(bytes([slot]) * 32, None, (ANN, BOB)[slot // 4]))
        tier.poll()


def test_whoever_is_killed_while_it_erases_begins_anew_and_no_byte_is_left(tmp_path: Path) -> None:
    for writes in range(9):
        path = tmp_path / str(writes)
        filled(path)
        with closing(opened(path, Dies(writes))) as tier:
            assert tier.erase(lambda name: name.owner == ANN) == 4
            tier.poll()
            assert bool(tier.file.trouble) == (writes < 8)  # four pages and their records
        with closing(opened(path)) as tier:
            tier.erase(lambda name: name.owner == ANN)
            assert [slot for slot, _ in tier.adoptable().pages] == [4, 5, 6, 7]
            tier.poll()
        data = path.read_bytes()[SHAPE.data_offset :]
        assert data.count(1) == 0
        assert data.count(2) == 4 * 4096


def test_what_is_written_behind_pages_that_are_erased_has_more_time(tmp_path: Path) -> None:
    now = 0.0
    filled(tmp_path / "store")
    with closing(opened(tmp_path / "store", clock=lambda: now)) as tier:
        tier.file.wipe(0, round(100 * SLOWEST_BYTES_PER_S))
        tier.put(1, [Blob(np.ones(4096, np.uint8), {0: (0, 16)}, 16)])
        now = WRITE_DEADLINE_S + 99
        job = tier.file._flights[0]
        assert not tier.file._is_late(job, now)
        assert tier.file._is_late(job, now + 2)
