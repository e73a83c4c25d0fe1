"""The store that outlives the daemon: private, found again, and never a wrong page."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pagedd_daemon.backends.base import Backend
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.backends.paged.load import BLOCK_TOKENS, Wishes, serve
from pagedd_daemon.backends.simulated import BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.tiers.opening import DiskWishes
from pagedd_daemon.engine.tiers.records import RECORD_BYTES, TABLE_OFFSET
from pagedd_daemon.engine.tiers.store import clear, show
from pagedd_daemon.front.config import ConfigError
from pagedd_daemon.front.config_file import parse
from pagedd_daemon.messages import Configure
from pagedd_daemon.private_files import NotPrivateError, open_private, secret
from tests.support.driver import Driver
from tests.support.paged_backend import tiny_model
from tests.support.tiny_model import write_tiny_model

SIZE = 4 << 20

Make = Callable[..., Backend]


def _simulated(folder: Path, digest: bytes = bytes(32), *, keep: bool = True) -> Backend:
    configure = Configure(
        "simulated", "", digest, 2048, 40 * 16, 40 * 16 * BYTES_PER_TOKEN, 1,
        disk_bytes=SIZE, disk_folder=str(folder), disk_persist=True,
    )  # fmt: skip
    return SimulatedBackend.from_configure(configure, verify=True, keep_cached_on_gpu=keep)


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
    model = tiny_model()

    def llama(folder: Path, digest: bytes = bytes(32)) -> Backend:
        configure = Configure(
            "llama.cpp", str(path), digest, 0, 1024, 4 << 20, 1, kv_dtype="f32",
            flash_attention=False, disk_bytes=SIZE, disk_folder=str(folder), disk_persist=True,
        )  # fmt: skip
        return LlamaBackend.load(configure, lambda _: None)

    def torch(folder: Path, digest: bytes = bytes(32)) -> Backend:
        block = BLOCK_TOKENS * model.config.kv_bytes_per_token(model.dtype.itemsize)
        disk = DiskWishes(SIZE, str(folder), persist=True)
        return serve(model, Wishes(40 * BLOCK_TOKENS, 40 * block, disk=disk, model_digest=digest))

    def cells(folder: Path, digest: bytes = bytes(32)) -> Backend:
        return _simulated(folder, digest, keep=False)

    return {"simulated": _simulated, "cells": cells, "llama": llama, "torch": torch}


def text(seed: int, length: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(3, 250) for _ in range(length)]


PROMPTS = [text(seed, 60 + 20 * seed) for seed in range(4)]


def lives(backend: Backend) -> tuple[list[list[int]], int]:
    """The texts after each prompt, and how many tokens of the prompts were found."""
    driver = Driver(backend)
    texts, found = [], 0
    for seq, prompt in enumerate(PROMPTS):
        found += driver.admit(seq, prompt) or 0
        driver.prefill(seq)
        driver.generate([seq], 5)
        texts.append(driver.free(seq))
    return texts, found


WHOLE = sum((len(prompt) - 1) // 16 * 16 for prompt in PROMPTS)


@pytest.mark.model
@pytest.mark.parametrize("kind", ["simulated", "cells", "llama", "torch"])
def test_what_was_computed_is_found_after_a_restart_and_by_the_same_model_alone(
    makers: dict[str, Make], kind: str, tmp_path: Path
) -> None:
    make = makers[kind]
    with closing(make(tmp_path)) as first:
        wanted, found = lives(first)
        assert found == 0
    kept = show(tmp_path)
    assert kept is not None
    assert kept.tokens >= WHOLE
    assert not kept.in_use
    with closing(make(tmp_path)) as second:
        assert lives(second) == (wanted, WHOLE)
        while_open = show(tmp_path)
        assert while_open is not None
        assert while_open.in_use
    with closing(make(tmp_path, b"\x07" * 32)) as other:
        assert lives(other)[1] == 0


def _damage(path: Path, kind: str, dice: random.Random) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        if kind == "truncated":
            file.truncate(dice.randrange(size))
        elif kind == "bits of records":
            for _ in range(40):
                at = TABLE_OFFSET + dice.randrange(60 * RECORD_BYTES)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << dice.randrange(8)]))
        elif kind == "bits of pages":
            file.seek(0)
            data = bytearray(file.read())
            for at in range(TABLE_OFFSET + 4096 * 40, size, 977):
                data[at] ^= 1 << dice.randrange(8)
            file.seek(0)
            file.write(data)
        elif kind == "header":
            file.seek(dice.randrange(80))
            file.write(b"\xff")
        else:  # stale: each record where another one was
            file.seek(TABLE_OFFSET)
            table = file.read(60 * RECORD_BYTES)
            file.seek(TABLE_OFFSET + RECORD_BYTES)
            file.write(table[: 59 * RECORD_BYTES])


@pytest.mark.parametrize(
    "kind", ["truncated", "bits of records", "bits of pages", "header", "stale"]
)
def test_a_store_that_was_damaged_gives_the_same_texts(tmp_path: Path, kind: str) -> None:
    with closing(_simulated(tmp_path)) as plain:
        wanted, _ = lives(plain)
    for seed in range(4):
        dice = random.Random(seed)
        clear(tmp_path)
        with closing(_simulated(tmp_path)) as first:
            lives(first)
        _damage(tmp_path / "prefixes.kv", kind, dice)
        # The oracle raises at the first cell that is not what was computed for its sequence.
        with closing(_simulated(tmp_path)) as second:
            assert lives(second)[0] == wanted


def test_the_store_is_its_owners_alone_and_holds_no_token_ids_in_its_table(tmp_path: Path) -> None:
    with closing(_simulated(tmp_path)) as backend:
        lives(backend)
    path = tmp_path / "prefixes.kv"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    table = path.read_bytes()[TABLE_OFFSET : TABLE_OFFSET + 60 * RECORD_BYTES]
    for prompt in PROMPTS:
        for at in range(len(prompt) - 4):
            raw = b"".join(token.to_bytes(4, "little") for token in prompt[at : at + 4])
            assert raw not in table


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(b"mine")
    target.chmod(0o600)
    path.symlink_to(target)


def _fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def _readable(path: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o644)


def _two_names(path: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o600)
    path.with_name("second").hardlink_to(path)


@pytest.mark.parametrize("make", [_link, _fifo, _readable, _two_names, Path.mkdir])
def test_a_file_that_is_not_ones_own_is_refused_and_not_touched(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "prefixes.kv"
    make(path)
    with pytest.raises(OSError, match=r"prefixes\.kv") as refused:
        open_private(path)
    assert isinstance(refused.value, NotPrivateError)
    with closing(_simulated(tmp_path)) as backend:
        (trouble,) = backend.troubles()
        assert "there is no disk tier" in trouble
        assert lives(backend)[1] == 0
    if make is _link:
        assert path.with_name("elsewhere").read_bytes() == b"mine"


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with closing(_simulated(tmp_path)) as backend:
        assert "others could put files there" in backend.troubles()[0]
    with pytest.raises(NotPrivateError):
        secret(tmp_path / "key")
    tmp_path.chmod(0o700)


def test_two_daemons_do_not_share_a_store(tmp_path: Path) -> None:
    with closing(_simulated(tmp_path)), closing(_simulated(tmp_path)) as second:
        assert "another daemon uses" in second.troubles()[0]
        with pytest.raises(BlockingIOError):
            clear(tmp_path)
    assert (tmp_path / "prefixes.kv").exists()
    assert clear(tmp_path) > 0
    assert not (tmp_path / "prefixes.kv").exists()
    assert clear(tmp_path) == 0


def test_the_key_is_made_once_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    first = secret(path)
    assert len(first) == 32
    assert secret(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_bytes(b"short")
    with pytest.raises(NotPrivateError, match="holds 5 bytes"):
        secret(path)


def test_what_is_no_store_is_shown_as_such(tmp_path: Path) -> None:
    assert show(tmp_path) is None
    path = tmp_path / "prefixes.kv"
    for content in (b"", b"pageddKV", b"pageddKV" + b"\xff" * 200, os.urandom(5000)):
        path.write_bytes(content)
        path.chmod(0o600)
        found = show(tmp_path)
        assert found is not None
        assert (found.pages, found.binding) == (0, "")


def test_to_persist_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match=r"config.toml:2 disk\.persist: expected a budget_gb"):
        parse("[disk]\npersist = true\n", "config.toml")


def test_the_summary_can_be_printed_as_json(tmp_path: Path) -> None:
    from dataclasses import asdict

    with closing(_simulated(tmp_path)) as backend:
        lives(backend)
    found = show(tmp_path)
    assert found is not None
    assert json.loads(json.dumps(asdict(found)))["pages"] == found.pages > 0
