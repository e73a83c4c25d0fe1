"""``doctor``, ``plan``, ``top``, ``completion``: what they find and say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pagedd import _paths
from pagedd.cli import _checks, _machine, _plan, _top
from pagedd.cli._machine import Gpu
from tests.support.cli import run
from tests.support.daemon import environment, running_daemon

GPU = Gpu("Fast One", 24 * 10**9, 20 * 10**9, (8, 9))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without GPU and daemon."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    for module in (_checks, _plan):
        monkeypatch.setattr(module, "gpus", list)
    # What this very machine has of them is not what is tested.
    for name in ("_LOW_DISK_BYTES", "_LOW_MEMORY_BYTES", "_LEAST_FILES"):
        monkeypatch.setattr(_checks, name, 0)
    return tmp_path


def findings(state: str) -> dict[str, dict[str, str]]:
    document = run("doctor", "--json").document()
    return {row["check"]: row for row in document["findings"] if row["state"] == state}


def test_a_machine_on_which_all_can_work_is_told_so_and_what_is_missing(alone: Path) -> None:
    done = run("doctor")
    assert done.status == 0
    assert "no NVIDIA GPU: llama.cpp computes on the CPU" in done.out
    assert set(findings("warn")) == {"socket"}
    assert "pagedd service install" in findings("warn")["socket"]["advice"]


def test_what_cannot_work_is_named_with_what_to_do_and_exits_69(alone: Path) -> None:
    config = alone / "config_home" / "pagedd" / "config.toml"
    config.parent.mkdir()
    config.write_text("[serve]\nkv_tokens = -1\n")
    (alone / "run").mkdir(mode=0o755)
    models = alone / "cache_home" / "pagedd" / "models"
    models.mkdir(parents=True)
    (models / "bad.gguf").write_bytes(b"nothing")
    assert run("doctor").status == 69
    failed = findings("fail")
    assert set(failed) == {"settings", "socket"}
    assert "config.toml:2 serve.kv_tokens" in failed["settings"]["found"]
    assert failed["socket"]["advice"].startswith("Make it yours alone: chmod 700")
    assert "bad" in findings("warn")["models"]["found"]
    assert all(row["advice"] for row in (*failed.values(), *findings("warn").values()))


def test_a_directory_of_sockets_that_is_shared_is_looked_at_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, folder = os.getuid(), tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setattr(_paths, "SHARED_SOCKET_DIR", folder)
    for uid, mode, said in (
        (ours, 0o711, None),
        (ours, 0o710, None),
        (ours, 0o700, "cannot be entered by group"),
        (ours, 0o733, "can be written by others"),
        (ours + 1, 0o711, None),
        (ours + 1, 0o770, "can be written by others than uid"),
    ):
        folder.chmod(mode)
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        trouble = _checks._socket_directory(folder)
        assert (trouble is None) == (said is None), (uid, mode)
        if trouble is not None and said is not None:
            assert said in trouble[0]
            assert trouble[1].endswith(".") or str(folder) in trouble[1]
    monkeypatch.setattr(os, "getuid", lambda: ours)
    monkeypatch.setattr(_paths, "SHARED_SOCKET_DIR", tmp_path)
    folder.chmod(0o711)
    assert _checks._socket_directory(folder) == (
        f"{folder} is not yours alone",
        f"Make it yours alone: chmod 700 {folder}",
    )


@pytest.mark.parametrize(
    ("found", "packages", "expected"),
    [
        ([], True, ("gpu", "fail", "its driver does not answer")),
        ([GPU], False, ("torch", "warn", "the GPU is not used")),
        ([Gpu("Old", 1, 1, (6, 1))], False, ("gpu", "warn", "too old for bf16")),
    ],
)
def test_each_trouble_with_a_gpu_has_its_own_sentence(
    monkeypatch: pytest.MonkeyPatch,
    found: list[Gpu],
    packages: bool,
    expected: tuple[str, str, str],
) -> None:
    monkeypatch.setattr(_checks, "gpus", lambda: found)
    monkeypatch.setattr(_checks, "_has", lambda name: packages)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidia0")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    rows = [(f.check, f.state, f.found) for f in _checks._gpu()]
    assert any(row[:2] == expected[:2] and expected[2] in row[2] for row in rows), rows


def test_without_a_driver_there_are_no_gpus() -> None:
    if not Path("/dev/nvidiactl").exists():
        assert (_machine.gpus(), _machine.driver_version()) == ([], None)


def test_plan_says_what_a_model_takes_and_how_much_fits(
    alone: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan, "gpus", lambda: [GPU])
    document = run("plan", str(smollm2_path), "--context", "1000", "--json").document()
    cpu, gpu = document["places"]
    # 30 layers, 3 KV heads of 64 elements, keys and values, 2 bytes each.
    assert cpu["kv_bytes_per_1000_tokens"] == gpu["kv_bytes_per_1000_tokens"] == 23_040_000
    assert 90e6 < cpu["weights_bytes"] < smollm2_path.stat().st_size
    assert gpu["weights_bytes"] == 2 * 134_515_008
    free = GPU.free_bytes - gpu["weights_bytes"] - 2**30
    assert gpu["fits_tokens"] == free * 1000 // 23_040_000
    assert gpu["conversations"] == round(gpu["fits_tokens"] / 1000, 1)
    text = run("plan", str(smollm2_path)).out
    assert "Fast One" in text
    assert "23.0 MB" in text


def test_a_model_that_fits_nowhere_exits_69(
    alone: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        available = 10**6

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    failed = run("plan", str(smollm2_path))
    assert (failed.status, "fits nowhere" in failed.err) == (69, True)
    assert run("plan", "none").status == 66


def test_completions_are_printed_for_each_shell_and_answer(alone: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_PAGEDD_COMPLETE" in run("completion", shell).out
    done = subprocess.run(
        [sys.executable, "-c", "from pagedd.cli import main; main()"],
        env={
            **environment(alone),
            "_PAGEDD_COMPLETE": "bash_complete",
            "COMP_WORDS": "pagedd mod",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plain,models"]


def test_top_shows_apps_streams_tiers_and_watts() -> None:
    with running_daemon() as daemon:
        with daemon.connect("my-editor", "interactive") as client:
            client.complete("hello", max_tokens=5, ignore_eos=True)
            done = daemon.command("top")
            with daemon.control() as control:
                first = _top.look(control, None)
                second = _top.look(control, first)
        assert done.returncode == 0, done.stderr
        for word in ("ready", "simulated", "streams: 0 running", "GPU", "my-editor", "TOK/S"):
            assert word in done.stdout
        assert "status" in daemon.command("top", "--json").stdout
    joules = {"energy_joules": {"gpu0": 100.0}}, {"energy_joules": {"gpu0": 150.0}}
    one = _top.Frame(first.status, {**first.stats, **joules[0]}, 10.0, {})
    assert "no power meter" in _top.text(one)
    frame = _top.Frame(second.status, joules[1], 12.0, {"gpu0": 25.0})
    assert "gpu0 25 W" in _top.text(frame)


def test_importing_the_library_imports_neither_rich_nor_click() -> None:
    code = "import sys, pagedd; print(sorted({'rich', 'click', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]"
