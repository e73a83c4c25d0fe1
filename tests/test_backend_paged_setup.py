"""What the paged engine checks and says before it serves."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kvpager.types import PageName
from pagedd_daemon.backends.base import ModelLoadError
from pagedd_daemon.backends.paged.caches import use_cache_folder
from pagedd_daemon.backends.paged.choice import try_cuda
from pagedd_daemon.backends.paged.load import load
from pagedd_daemon.backends.paged.slabs import RamTier
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.records import bind
from pagedd_daemon.messages import Configure


def configure(path: Path, vocab_size: int = 0) -> Configure:
    return Configure(
        backend="torch",
        model_path=str(path),
        model_digest=bytes(32),
        context_tokens=0,
        kv_tokens=0,
        ram_bytes=0,
        threads=1,
        vocab_size=vocab_size,
    )


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")  # so that it is put back
    return tmp_path


def test_kernels_are_kept_in_a_folder_that_only_its_owner_may_enter(cache_home: Path) -> None:
    folder = use_cache_folder()
    assert folder == cache_home / "pagedd" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(folder))
    assert use_cache_folder() == folder


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_kernels_are_not_loaded_from_a_folder_that_others_may_enter(
    cache_home: Path, mode: int
) -> None:
    use_cache_folder().chmod(mode)
    with pytest.raises(ModelLoadError, match=r"nobody else may enter") as refused:
        use_cache_folder()
    assert refused.value.details["mode"] == mode


def test_a_cache_folder_that_is_a_link_is_refused(cache_home: Path) -> None:
    (cache_home / "pagedd").mkdir()
    (cache_home / "elsewhere").mkdir(mode=0o700)
    (cache_home / "pagedd" / "kernels").symlink_to(cache_home / "elsewhere")
    with pytest.raises(ModelLoadError, match="folder of your own"):
        use_cache_folder()


def test_without_a_cuda_device_the_reason_is_said(tmp_path: Path) -> None:
    backend, notice = try_cuda(configure(tmp_path), lambda _: None)
    assert backend is None
    assert "torch finds no CUDA device" in notice
    assert "on the CPU" in notice


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=str(tmp_path)) as refused:
        load(configure(tmp_path), lambda _: None)
    assert refused.value.code == "E_MODEL"


def test_a_vocabulary_larger_than_the_model_is_refused(smollm2_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="the tokeniser knows 50000 tokens") as refused:
        load(configure(smollm2_path, vocab_size=50_000), lambda _: None)
    assert refused.value.details["model"] < 50_000


def ram_tier(slots: int, page_values: int) -> tuple[RamStore, RamTier]:
    budget = slots * page_values * 4
    store = RamStore(-1, budget, bind("test"), slots)
    return store, RamTier(store, slots, page_values, torch.float32, lock=False)


def test_ram_is_taken_as_pages_come_and_a_slot_keeps_its_place() -> None:
    _, tier = ram_tier(10_000, 4096)
    assert tier.bytes == 0
    tier.stored([0, 9_999])
    tier.pages(0, 2)[1] = 7.0
    tier.pages(9_999, 1)[:] = 8.0
    assert tier.pages(1, 1).unique().tolist() == [7.0]
    assert tier.address(1, 1) == tier.pages(1, 1).data_ptr()
    assert tier.address(9_999, 1) == tier.pages(9_999, 1).data_ptr()
    assert tier.bytes == 2 * tier.page_bytes
    tier.close()
    assert tier.bytes == 0


def test_slabs_begin_at_pages_of_the_system_and_hold_what_records_say() -> None:
    store, tier = ram_tier(30, 1_000_003)  # 16 pages a slab, none of a round size
    tier.stored([17])
    tier.pages(17, 1)[:] = 3.0
    tier.commit(17, PageName(bytes(32), None), 16)
    base = store.data.ctypes.data
    (record,) = store.committed()
    assert record.length == 4 * 1_000_003
    assert (tier.address(16, 1) - base) % 4096 == 0
    data = store.data[record.offset : record.offset + record.length]
    assert np.unique(data.view(np.float32)).tolist() == [3.0]
    tier.stored([17])
    assert store.committed() == []
    tier.close()
