"""The tiers below the pool, in a whole daemon with the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import pagedd
from tests.support.daemon import RunningDaemon, running_daemon

pytestmark = pytest.mark.model

STORY = "The river ran through the valley, past the mill and the old bridge. " * 12


@pytest.fixture
def daemon(smollm2_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(str(smollm2_path), kv_tokens=1024, context=512, ram_gb=0.2) as running:
        yield running


def engine_of(daemon: RunningDaemon) -> psutil.Process:
    (engine,) = [p for p in daemon.family() if "pagedd_daemon.engine" in p.cmdline()]
    return engine


def ask(client: pagedd.Client) -> pagedd.Completion:
    return client.complete(STORY, temperature=0, max_tokens=8, ignore_eos=True)


def test_a_prompt_is_found_in_ram_after_the_engine_was_killed_and_not_after_an_unload(
    daemon: RunningDaemon,
) -> None:
    with daemon.connect("editor") as client:
        first = ask(client)
        assert first.usage.cached_tokens == 0
        pages = (first.usage.prompt_tokens - 1) // 16
        with daemon.control() as control:
            while control.stats()["kv"]["ram"]["cached"] < pages:
                pass  # the client has its text a moment before the pages are committed
        engine = engine_of(daemon)
        engine.kill()
        engine.wait(10)
        with daemon.control() as control:
            while control.status()["state"] == "ready":
                pass  # the front has not heard of it yet
        client.load()
        second = ask(client)
        assert engine_of(daemon).pid != engine.pid
        assert second.text == first.text
        assert second.usage.cached_tokens == 16 * pages
        client.unload()
        client.load()
        assert ask(client).usage.cached_tokens == 0
        maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
        assert "pagedd-kv" not in maps, "the front maps the tier"


def test_a_prompt_is_found_on_disk_after_a_restart_of_the_daemon(
    smollm2_path: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "config.toml"
    store = tmp_path / "store"
    settings.write_text(f'[disk]\nbudget_gb = 0.1\npersist = true\npath = "{store}"\n')
    found = []
    for _ in range(2):
        with (
            running_daemon(
                str(smollm2_path), config=str(settings), kv_tokens=1024, context=512, ram_gb=0.2
            ) as running,
            running.connect("editor") as client,
        ):
            found.append(ask(client))
            with running.control() as control:
                assert control.status()["degraded"] == []
    first, second = found
    assert (first.text, first.usage.cached_tokens) == (second.text, 0)
    assert second.usage.cached_tokens == (first.usage.prompt_tokens - 1) // 16 * 16
    shown = running.command("cache", "show", "--folder", str(store), "--json")
    assert json.loads(shown.stdout)["store"]["tokens"] >= second.usage.cached_tokens
    cleared = running.command("cache", "clear", "--folder", str(store), "--json")
    assert json.loads(cleared.stdout)["freed_bytes"] > 0
    assert list(store.iterdir()) == []
    assert "there is no store" in running.command("cache", "show", "--folder", str(store)).stdout
