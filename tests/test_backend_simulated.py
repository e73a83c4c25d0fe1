"""The simulated backend: content that shows every mistake, a known step time, faults on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvpager.types import CopyBlock, Load, Page, Release, Store, Tier
from pagedd_daemon.backends import load_backend
from pagedd_daemon.backends.base import Draw, ModelLoadError, Run, Step, StepFaultError
from pagedd_daemon.backends.chain import ContentError
from pagedd_daemon.backends.simulated import SimulatedBackend
from pagedd_daemon.backends.simulated_faults import Faults
from pagedd_daemon.engine.sampler import Drawn
from pagedd_daemon.messages import Configure
from tests.support.driver import Driver, Scenario
from tests.support.steps import greedy, ids

VOCAB = 300
EOG = 299
PROMPT = [72, 101, 108, 108, 111] * 9  # 45 tokens: two full blocks and 13 in the third

CONFIGURE = Configure(
    backend="simulated",
    model_path="",
    model_digest=bytes(32),
    context_tokens=0,
    kv_tokens=640,
    ram_bytes=16 * 8192 * 16,
    threads=0,
    vocab_size=VOCAB,
    eog_tokens=(EOG,),
    simulated_step_us=0,
)


class Bench:
    """A backend with sequences whose block tables are written by hand."""

    def __init__(self, *, verify: bool = True, faults: Faults | None = None) -> None:
        self.backend = SimulatedBackend.from_configure(CONFIGURE, verify=verify, faults=faults)
        self.epoch = 0

    def step(self, *parts: tuple[int, int, Sequence[int], list[int]], **params: Any) -> list[Drawn]:
        """``(seq, start, tokens, block table)`` of each run; the draw after each."""
        self.epoch += 1
        runs = [
            Run(seq, start, ids(tokens), ids(table), [Draw(seq, greedy(VOCAB, **params))])
            for seq, start, tokens, table in parts
        ]
        result = self.backend.collect(self.backend.launch(Step(self.epoch, runs)))
        assert [seq for seq, _ in result.drawn] == [part[0] for part in parts]
        return [drawn for _, drawn in result.drawn]

    def generate(self, seq: int, tokens: list[int], table: list[int], steps: int) -> list[int]:
        """Decode after ``tokens``, the last of which is not computed yet."""
        text = list(tokens)
        for _ in range(steps):
            at = len(text) - 1
            text.append(self.step((seq, at, text[at:], table))[0].token)
        return text[len(tokens) :]


def plain(tokens: Sequence[int], steps: int) -> list[int]:
    """What an undisturbed run generates."""
    bench = Bench()
    table = list(range(1, 39))
    first = bench.step((0, 0, tokens, table))[0].token
    return [first, *bench.generate(0, [*tokens, first], table, steps - 1)]


def test_the_same_prompt_gives_the_same_text_however_it_is_cut_and_wherever_it_lies() -> None:
    expected = plain(PROMPT, 30)
    for chunk in (1, 3, 16, 17):
        bench = Bench()
        table = [9, 4, 30, 2, 17]
        for start in range(0, len(PROMPT), chunk):
            drawn = bench.step((5, start, PROMPT[start : start + chunk], table))
        first = drawn[0].token
        assert [first, *bench.generate(5, [*PROMPT, first], table, 29)] == expected
    assert plain([*PROMPT[:-1], 110], 30) != expected
    assert plain([101, 72, *PROMPT[2:]], 30) != expected


def test_sequences_in_one_step_do_not_disturb_each_other() -> None:
    bench = Bench()
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(10)]
    prompts = [[i, *PROMPT[:20]] for i in range(10)]
    drawn = bench.step(*[(i, 0, prompts[i], tables[i]) for i in range(10)])
    assert [d.token for d in drawn] == [plain(p, 1)[0] for p in prompts]


def test_text_is_mostly_ascii_with_whole_characters_among_it_and_ends_sometimes() -> None:
    text = plain(PROMPT, 500)
    raw = bytes(t for t in text if t < 256)
    decoded = raw.decode("utf-8", "replace")
    assert decoded.count("\ufffd") <= 2
    assert {"é", "€", "😀"} <= set(decoded)
    assert sum(32 <= t <= 126 for t in text) > 400
    assert EOG in text


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_block_table_is_seen(index: int) -> None:
    for verify in (True, False):
        bench = Bench(verify=verify)
        first = bench.step((0, 0, PROMPT, [1, 2, 3]))[0].token
        bench.step((1, 0, [9, *PROMPT[1:]], [4, 5, 6]))
        right, wrong = [1, 2, 3], [1, 2, 3]
        wrong[index] += 3
        if verify:
            with pytest.raises(ContentError, match="sequence 0, position"):
                bench.step((0, 45, [first], wrong))
        else:
            text = bench.generate(0, [*PROMPT, first], wrong, 2)
            assert text != plain(PROMPT, 3)[1:]
        assert bench.generate(0, [*PROMPT, first], right, 2) == plain(PROMPT, 3)[1:]


def test_a_missed_copy_on_write_is_seen_and_a_copy_is_enough() -> None:
    for copy in (True, False):
        bench = Bench()
        bench.step((0, 0, PROMPT, [1, 2, 3]))
        mine = [1, 2, 3]
        if copy:
            bench.backend.apply([CopyBlock(seq=1, index=2, src=3, dst=7, tokens=13)])
            mine = [1, 2, 7]
        bench.step((0, 45, [50], [1, 2, 3]), (1, 45, [60], mine))
        if copy:
            bench.step((0, 46, [51], [1, 2, 3]), (1, 46, [61], mine))
        else:
            with pytest.raises(ContentError):
                bench.step((0, 46, [51], [1, 2, 3]), (1, 46, [61], mine))


def test_pages_come_back_from_ram_as_they_were() -> None:
    bench = Bench()
    first = bench.step((0, 0, PROMPT, [1, 2, 3]))[0].token
    pages = tuple(Page(i, i + 1, 5 - i, n) for i, n in enumerate((16, 16, 13)))
    bench.backend.apply([Store(70, 0, Tier.RAM, pages), Release(0)])
    assert [(t.transfer, t.ok) for t in bench.backend.poll_transfers()] == [(70, True)]
    assert bench.backend.memory().ram_tier == 3 * bench.backend.capabilities.block_bytes
    bench.step((1, 0, [8] * 48, [1, 2, 3]))
    back = tuple(replace(page, block=page.block + 20) for page in pages)
    bench.backend.apply([Load(71, 0, Tier.RAM, back)])
    with pytest.raises(ContentError):  # not before it has ended
        bench.step((0, 45, [first], [21, 22, 23]))
    assert [(t.transfer, t.ok) for t in bench.backend.poll_transfers()] == [(71, True)]
    assert bench.generate(0, [*PROMPT, first], [21, 22, 23, 24], 5) == plain(PROMPT, 6)[1:]


def test_a_block_reused_before_its_store_has_ended_is_seen() -> None:
    bench = Bench(faults=Faults(delay_polls=2))
    first = bench.step((0, 0, PROMPT, [1, 2, 3]))[0].token
    bench.backend.apply([Store(1, 0, Tier.RAM, (Page(0, 1, 0, 16),))])
    assert bench.backend.poll_transfers() == []
    bench.step((1, 0, [8] * 16, [1]))
    assert bench.backend.poll_transfers() == []
    assert len(bench.backend.poll_transfers()) == 1
    bench.backend.apply([Load(2, 0, Tier.RAM, (Page(0, 1, 0, 16),))])
    while not bench.backend.poll_transfers():
        pass
    with pytest.raises(ContentError):
        bench.step((0, 45, [first], [1, 2, 3]))


def test_faults_strike_the_step_the_transfer_and_the_request_they_name() -> None:
    faults = Faults(steps={1}, transfers={0}, nan_sequences={7})
    bench = Bench(faults=faults)
    bench.step((0, 0, PROMPT, [1, 2, 3]))
    with pytest.raises(StepFaultError):
        bench.step((0, 45, [1], [1, 2, 3]))
    expected = Bench()
    expected.step((0, 0, PROMPT, [1, 2, 3]))
    assert bench.step((0, 45, [1], [1, 2, 3])) == expected.step((0, 45, [1], [1, 2, 3]))
    good, bad = bench.step((0, 46, [2], [1, 2, 3]), (7, 0, [3], [9]))
    assert (good.token >= 0, bad.token) == (True, -1)
    bench.backend.apply([Store(4, 0, Tier.RAM, (Page(0, 1, 0, 16),))])
    assert [(t.transfer, t.ok) for t in bench.backend.poll_transfers()] == [(4, False)]


def test_a_step_takes_the_time_it_is_said_to_take() -> None:
    now = [100.0]
    waited: list[float] = []

    def wait(moment: float) -> None:
        waited.append(moment)
        now[0] = moment

    backend = SimulatedBackend(
        SimulatedBackend.from_configure(CONFIGURE).capabilities,
        step_s=0.002,
        token_s=0.0001,
        clock=lambda: now[0],
        wait=wait,
    )
    run = Run(0, 0, ids(PROMPT), ids([1, 2, 3]))
    handle = backend.launch(Step(1, [run]))
    now[0] += 0.001  # the caller's own work meanwhile is not waited for again
    result = backend.collect(handle)
    assert waited == [pytest.approx(100.0 + 0.002 + 45 * 0.0001)]
    assert result.seconds == pytest.approx(0.002 + 45 * 0.0001)
    assert result.drawn == []


def test_the_default_wait_is_never_short() -> None:
    import time

    backend = load_backend(replace(CONFIGURE, simulated_step_us=700), lambda _: None)
    begin = time.perf_counter()
    backend.collect(backend.launch(Step(1, [Run(0, 0, ids([1]), ids([1]))])))
    assert time.perf_counter() - begin >= 0.0007


def test_what_is_configured_is_what_is_served() -> None:
    caps = load_backend(CONFIGURE, lambda _: None).capabilities
    assert (caps.gpu_blocks, caps.block_tokens, caps.ram_blocks) == (40, 16, 16)
    assert (caps.vocab_size, caps.eog_tokens) == (VOCAB, frozenset({EOG}))
    assert caps.context_tokens == 39 * 16
    assert caps.model_digest == bytes(32)
    with pytest.raises(ModelLoadError, match="kv_tokens"):
        load_backend(replace(CONFIGURE, kv_tokens=16), lambda _: None)


def test_small_vocabularies_work_with_every_parameter() -> None:
    backend = load_backend(replace(CONFIGURE, vocab_size=7, eog_tokens=()), lambda _: None)
    sampler = greedy(
        7, temperature=0.9, top_k=3, top_p=0.9, logprobs=3, repetition_penalty=1.2, seed=4
    )
    run = Run(
        0, 0, ids([1, 2]), np.array([3], np.int32), [Draw(0, sampler), Draw(1, sampler.fork(1))]
    )
    result = backend.collect(backend.launch(Step(1, [run])))
    assert [seq for seq, _ in result.drawn] == [0, 1]
    for _, drawn in result.drawn:
        assert 0 <= drawn.token < 7
        assert len(drawn.top) == 3


class Plain:
    """Every text once more, in a pool of its own."""

    def judge(self, text: list[int]) -> npt.NDArray[np.bool_]:
        backend = SimulatedBackend.from_configure(replace(CONFIGURE, kv_tokens=2048))
        table = np.arange(128, dtype=np.int32)
        good = [False]
        for at in range(len(text) - 1):
            run = Run(0, at, ids(text[at : at + 1]), table, [Draw(0, greedy(VOCAB))])
            ((_, drawn),) = backend.collect(backend.launch(Step(at, [run]))).drawn
            good.append(drawn.token == text[at + 1])
        return np.array(good)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(50, 54))
def test_random_events_never_change_a_text(keep: bool, seed: int) -> None:
    """The pager against the content: with cached pages on the first tier, and without."""
    configure = replace(CONFIGURE, ram_bytes=50 * 16 * 8192)
    backend = SimulatedBackend.from_configure(configure, verify=True, keep_cached_on_gpu=keep)
    scenario = Scenario(Driver(backend), Plain().judge, seed)
    scenario.play(600)
    assert {"_admit", "_step", "_fork", "_preempt", "_resume", "_truncate"} <= set(scenario.done)


def test_failing_transfers_never_change_a_text() -> None:
    faults = Faults(transfers=set(range(0, 1000, 3)))
    configure = replace(CONFIGURE, ram_bytes=50 * 16 * 8192)
    backend = SimulatedBackend.from_configure(configure, verify=True, faults=faults)
    scenario = Scenario(Driver(backend), Plain().judge, 60)
    scenario.play(600)


def test_a_second_step_begins_when_the_first_has_ended() -> None:
    now = [0.0]

    def wait(moment: float) -> None:
        now[0] = max(now[0], moment)

    backend = SimulatedBackend(
        Bench().backend.capabilities, step_s=0.010, clock=lambda: now[0], wait=wait
    )
    steps = [backend.launch(Step(epoch, [])) for epoch in (1, 2)]
    for step in steps:
        backend.collect(step)
    assert now[0] == pytest.approx(0.020)
