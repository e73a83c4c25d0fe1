"""The short form of ``make chaos``: real processes, engines killed in the middle of things."""

from __future__ import annotations

import asyncio
import contextlib
import random

import psutil
import pytest

import pagedd
from benchmarks.chaos.served import ChaosDaemon
from benchmarks.chaos.streams import engine_of, play, prompts
from benchmarks.service import Daemon

TOKENS = 200
SIMULATED = ("--model", "simulated", "--backend", "simulated")
PROMPT = list(range(33, 97)) * 8


@pytest.mark.parametrize("kv_tokens", [16384, 1024])
def test_streams_whose_engine_is_killed_twice_get_the_text_of_an_undisturbed_run(
    kv_tokens: int,
) -> None:
    """With the small pool somebody is always being paged out or brought back."""
    dice = random.Random(kv_tokens)
    texts = prompts(5, 127)
    size = ("--kv-tokens", str(kv_tokens))
    with ChaosDaemon(*SIMULATED, *size) as daemon:
        plain = asyncio.run(play(daemon, texts, [], max_tokens=TOKENS))
        kills = 0
        for _ in range(2):
            points = sorted(dice.randrange(1, TOKENS - 40) for _ in range(2))
            round_ = asyncio.run(play(daemon, texts, points, max_tokens=TOKENS))
            kills += len(round_.killed)
            for record, wanted in zip(round_.records, plain.records, strict=True):
                assert record.failure == ""
                assert record.reply == wanted.reply, points
                assert record.counted == TOKENS
        deaths = daemon.client.ping()["engine_deaths"]
    assert deaths == kills >= 2


def samples(stream: pagedd.Stream) -> list[tuple[int, ...]]:
    return [sample.tokens for sample in stream.wait().samples]


def test_an_engine_killed_while_it_reads_a_prompt_costs_time_alone() -> None:
    with ChaosDaemon(*SIMULATED, "--token-us", "2000") as daemon:
        stream = daemon.client.generate(PROMPT, max_tokens=20, temperature=0.0, ignore_eos=True)
        while not daemon.status()["requests"]["running"]:
            pass  # asking takes as long as it takes the engine to answer
        engine_of(daemon).kill()
        found = samples(stream)
        assert daemon.client.ping()["engine_deaths"] == 1
        plain = daemon.client.generate(PROMPT, max_tokens=20, temperature=0.0, ignore_eos=True)
        assert found == samples(plain)


def test_an_engine_killed_while_it_loads_to_take_over_is_replaced_too() -> None:
    with ChaosDaemon(*SIMULATED) as daemon:
        options: pagedd.GenerateOptions = {
            "max_tokens": 300,
            "temperature": 1.0,
            "seed": 5,
            "n": 3,
            "ignore_eos": True,
        }
        plain = samples(daemon.client.generate(PROMPT, **options))
        assert len(set(plain)) == 3
        stream = daemon.client.generate(PROMPT, **options)
        next(stream)
        first = engine_of(daemon)
        first.kill()
        while (second := _another(daemon, first.pid)) is None:
            pass
        second.kill()
        assert samples(stream) == plain
        assert daemon.client.ping()["engine_deaths"] == 2


def _another(daemon: Daemon, pid: int) -> psutil.Process | None:
    """The engine that is being started in place of another."""
    for process in daemon.processes():
        with contextlib.suppress(psutil.Error):
            if process.pid != pid and "pagedd_daemon.engine" in process.cmdline():
                return process
    return None
