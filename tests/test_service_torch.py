"""The whole daemon with the real model, through the paged engine on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import RunningDaemon, running_daemon

pytestmark = pytest.mark.model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def daemon(smollm2_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(
        str(smollm2_path), backend="torch", kv_tokens=320, context=256, threads=1
    ) as it:
        yield it


def test_it_says_that_it_computes_on_the_cpu(daemon: RunningDaemon) -> None:
    with daemon.control() as control:
        status = control.status()
    assert status["backend"] == "torch"
    assert status["device"].startswith("CPU (")
    assert any("no CUDA device" in text for text in status["degraded"])


def test_apps_get_text_and_share_what_was_computed(daemon: RunningDaemon) -> None:
    with daemon.connect() as client:
        whole = client.generate(PROMPT, max_tokens=12, temperature=0).text()
        assert "Paris" in whole
        again = client.generate(PROMPT, max_tokens=12, temperature=0)
        assert again.text() == whole
        chat = client.session(system="You are terse. You are helpful. You answer in one sentence.")
        chat.say("Hello.", max_tokens=8).text()
        reply = chat.say("Name a river.", max_tokens=8)
        assert reply.text()
        assert reply.result.usage.cached_tokens >= 16
        three = client.generate(PROMPT, max_tokens=4, n=3)
        three.text()
        assert len(three.result.samples) == 3


def test_more_than_the_pool_holds_pages_somebody_out_and_fails_nobody(
    daemon: RunningDaemon,
) -> None:
    with daemon.connect() as client:
        alone = client.generate(PROMPT, max_tokens=40, temperature=0).text()
        streams = [
            client.generate(f"{at} and {PROMPT}", max_tokens=70, min_tokens=70) for at in range(5)
        ]
        again = client.generate(PROMPT, max_tokens=40, temperature=0)
        assert again.text() == alone
        for stream in streams:
            stream.text()
            assert stream.result.usage.generated_tokens == 70
    with daemon.control() as control:
        stats = control.stats()
    assert stats["pager"]["preemptions_swap"] + stats["pager"]["preemptions_recompute"] > 0
    assert stats["backend"]["late_compiles"] == 0
