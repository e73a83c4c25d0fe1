"""Part ``fuzz`` of ``make chaos``: structure-aware messages against the front.

Most go to a front in this process, at some thousand a second; some more over real sockets to a
daemon of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

import pagedd
from benchmarks.chaos.attacked import Front
from benchmarks.chaos.fields import TOKEN
from benchmarks.chaos.messages import Messages, Sent
from benchmarks.chaos.outside import NOISE_EVERY, Outside
from benchmarks.chaos.served import serve
from benchmarks.report import Report, Row

_T = TypeVar("_T")
CONNECTIONS = 8
MESSAGES = 1_000_000
FLAT_MIB = 32
"""What a front may hold more at the end: 16 MiB of answers are remembered for a resend, and what
lies between them in the heap."""
_TURN = 16
"""Messages between two turns of the event loop, which is as many as one poll may bring."""
_STEPS = 4
"""Of the engine in a turn."""
_LIFE = 600
"""Messages after which one of the connections is likely to end."""
_HELLO = b"\x84\xa1v\x01\xa4verb\xa5hello\xa2id\xa1h\xa3app\xa1a"
_MOST_BUSY = 64
"""Requests at the helpers beyond which the attacker waits: it is the front that is attacked."""


@dataclass
class Outcome:
    """What a run came to."""

    messages: int = 0
    answers: int = 0
    defects: list[str] = field(default_factory=list)
    """Uncaught exceptions, errors in the log, answers that tell of a defect."""
    longest_s: float = 0.0
    """The most that one message held the front."""
    longest: str = ""
    """What had been done to it."""
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Messages so far, and the bytes this process held."""
    how: Counter[str] = field(default_factory=Counter)

    @property
    def growth(self) -> int:
        """Bytes more at the end than after the first fifth."""
        settled = [held for at, held in self.memory if at >= self.messages // 5]
        return settled[-1] - settled[0] if settled else 0


class Attack:
    """Some connections of one attacker."""

    def __init__(self, front: Front, seed: int) -> None:
        self._front = front
        self._messages = Messages(seed, CONNECTIONS)
        self._dice = random.Random(seed + 1)
        self.outcome = Outcome()

    async def run(self, count: int) -> Outcome:
        """Send so many messages; then everything has to be over, and a newcomer served."""
        outcome, front = self.outcome, self._front
        for number in range(CONNECTIONS):
            front.hand_over(number, False, (_HELLO,))
        process = psutil.Process()
        for at in range(count):
            sent = self._messages.next()
            begin = time.perf_counter()
            try:
                self._send(sent)
            except Exception as error:
                outcome.defects.append(f"message {at} ({sent.how}): {error!r}")
            took = time.perf_counter() - begin
            if took > outcome.longest_s:
                outcome.longest_s, outcome.longest = took, f"{sent.how}, message {at}"
            outcome.how[sent.how] += 1
            if at % _TURN == 0:
                await self._turn()
            if at % max(1, count // 20) == 0:
                outcome.memory.append((at, _held(process)))
        await front.over()
        outcome.messages = count
        outcome.memory.append((count, _held(process)))
        outcome.answers = front.wire.answers
        outcome.defects += front.wire.defects + front.log.heard
        return outcome

    def _send(self, sent: Sent) -> None:
        number, dice, front = sent.connection, self._dice, self._front
        frames = sent.frames
        if frames and TOKEN in frames[0]:
            frames = (frames[0].replace(TOKEN, front.token(number)), *frames[1:])
        front.hand_over(number, sent.control, frames)
        chance = dice.random()
        if chance < 1 / _LIFE:
            front.connect(number)
            if dice.random() < 0.9:
                front.hand_over(number, False, (_HELLO,))
        elif chance < 2 / _LIFE:
            front.stall(number)
        elif chance > 0.95:
            front.read_again()

    async def _turn(self) -> None:
        for _ in range(_STEPS):
            self._front.turn()
        await asyncio.sleep(0)
        while self._front.busy > _MOST_BUSY:
            self._front.turn()
            await asyncio.sleep(0.0005)


def _held(process: psutil.Process) -> int:
    """Bytes that this process cannot give back: what malloc keeps for the next time is no leak."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(process.memory_full_info().uss)


async def attack(seed: int, count: int) -> Outcome:
    """A front of its own, attacked with ``count`` messages of ``seed``."""
    with tempfile.TemporaryDirectory(prefix="pagedd-fuzz-") as folder:
        async with Front(Path(folder), CONNECTIONS) as front:
            return await Attack(front, seed).run(count)


@dataclass
class OverSockets:
    """What a run over real sockets came to."""

    answers: int
    defects: list[str]
    growth: int
    """Bytes that the front held more at the end than after the first fifth."""
    alive: bool
    """The same front and engine serve a new client at the end."""


def patiently(call: Callable[[], _T]) -> _T:
    """A call that is made again where this process has sent too much, which it has."""
    try:
        return call()
    except pagedd.PageddError as error:
        if error.details.get("limit") != "messages_per_s":
            raise
        time.sleep(error.details["retry_ms"] / 1000)
    return patiently(call)


def attack_daemon(seed: int, count: int) -> OverSockets:
    """A daemon of its own, attacked over its sockets with ``count`` messages of ``seed``."""
    with serve("simulated", "simulated") as daemon:
        front = daemon.processes()[0]
        outside = Outside(daemon.socket_dir, seed)
        try:
            outside.run(count // 5)
            settled = front.memory_full_info().uss
            outside.run(count - count // 5)
        finally:
            outside.close()
        held = front.memory_full_info().uss
        text = patiently(
            lambda: daemon.client.generate("still there?", max_tokens=8, ignore_eos=True).wait()
        )
        deaths = patiently(daemon.client.ping)["engine_deaths"]
        alive = text.usage.generated_tokens == 8 and not deaths
        told = [line for line in daemon.log().splitlines() if _tells_of_a_defect(line)]
    return OverSockets(outside.answers, outside.defects + told, held - settled, alive)


def _tells_of_a_defect(line: str) -> bool:
    return " ERROR " in line or "Traceback" in line or "Assertion" in line


def part(report: Report, seed: int) -> None:
    """Rows of both."""
    count = 20_000 if report.quick else MESSAGES
    print(f"fuzz: {count:,} messages of seed {seed}")
    outcome = asyncio.run(attack(seed, count))
    for defect in outcome.defects[:5]:
        print(defect)
    note = f"{count:,} messages of seed {seed}, {len(outcome.how)} ways to be wrong; "
    note += f"{outcome.answers:,} answers"
    what = "fuzz: crashes, uncaught exceptions, errors in the log"
    report.add(Row(what, len(outcome.defects), "", "== 0", note))
    note = f"{outcome.memory[-1][1] / 2**20:.0f} MiB at the end, against after a fifth"
    growth = outcome.growth / 2**20
    report.add(Row("fuzz: growth of the attacked process", growth, "MiB", f"<= {FLAT_MIB}", note))
    what = "fuzz: longest that one message holds the front"
    report.add(Row(what, outcome.longest_s * 1e3, "ms", "<= 250", outcome.longest))
    beyond = count // 10
    sockets = attack_daemon(seed + 1, beyond)
    for defect in sockets.defects[:5]:
        print(defect)
    note = f"{beyond:,} messages and {beyond // NOISE_EVERY:,} connections that speak no ZMTP; "
    note += f"{sockets.answers:,} answers"
    wrong = len(sockets.defects) + (not sockets.alive)
    what = "fuzz over sockets: defects, deaths, and new clients that were not served"
    report.add(Row(what, wrong, "", "== 0", note))
    growth = sockets.growth / 2**20
    report.add(Row("fuzz over sockets: growth of the front", growth, "MiB", f"<= {FLAT_MIB}"))
