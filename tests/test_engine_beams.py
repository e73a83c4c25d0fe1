"""Beam search on the simulated backend: the texts of a plain search, whatever the pool does."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Draw, Run, Step
from pagedd_daemon.backends.simulated import SimulatedBackend
from pagedd_daemon.engine.beams import BeamSearch
from pagedd_daemon.engine.sampler import Drawn
from pagedd_daemon.params import BeamParams, StopParams
from tests.support.beam_search import Found, search
from tests.support.simulation import seeds
from tests.support.steps import greedy, ids
from tests.test_engine_core import EOG, SALT, Bench, prompt_of, sampling, stopping

VOCAB = 258
LETTERS = tuple(range(97, 117))
"""Ids that the simulated text holds often: as stop ids they end beams early and late."""


class BeamBench(Bench):
    """A bench that knows of searches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scores: dict[int, dict[int, float | None]] = defaultdict(dict)

    def search(
        self, rid: int, prompt: list[int], beams: BeamParams, *, n: int = 0, **stop: Any
    ) -> None:
        """Submit a search; ``n`` 0 asks for all the beams."""
        self.engine.handle(
            m.Submit(
                rid=rid,
                app=f"app{rid % 3}",
                klass=1,
                root=SALT,
                prompt=np.asarray(prompt, dtype="<i4").tobytes(),
                n=n or beams.width,
                sampling=sampling(),
                stop=stopping(**stop),
                beams={name: getattr(beams, name) for name in beams.__slots__},
            )
        )

    def _take(self, report: m.StepReport) -> None:
        for ended in report.ended:
            self.scores[ended.rid][ended.index] = ended.score
        super()._take(report)

    def found(self, rid: int) -> list[Found]:
        """What a search has brought."""
        outcome = self.outcomes[rid]
        found = []
        for index in sorted(outcome.reasons):
            score = self.scores[rid][index]
            assert score is not None
            found.append(Found(outcome.tokens[index], score, outcome.reasons[index]))
        return found


def same(found: list[Found], expected: list[Found]) -> None:
    assert [(one.tokens, one.reason) for one in found] == [
        (one.tokens, one.reason) for one in expected
    ]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected])


def plain_logprobs() -> Callable[[list[int]], list[float]]:
    """The simulated model as a function of whole texts."""
    caps = Bench(kv_tokens=4096).backend.capabilities
    backend = SimulatedBackend(caps)
    known: dict[tuple[int, ...], list[float]] = {}

    def logprobs(text: list[int]) -> list[float]:
        key = tuple(text)
        if key not in known:
            table = np.arange(-(-len(text) // caps.block_tokens), dtype=np.int32)
            draw = Draw(1, greedy(VOCAB, logprobs=VOCAB))
            step = Step(1, [Run(1, 0, ids(text), table, [draw])])
            ((_, drawn),) = backend.collect(backend.launch(step)).drawn
            known[key] = [value for _, value in sorted(drawn.top)]
        return known[key]

    return logprobs


def some_search(dice: random.Random) -> tuple[BeamParams, dict[str, Any]]:
    """A search of any shape, and when its texts end."""
    beams = BeamParams(
        width=dice.choice([1, 2, 3, 4, 4, 8, 16]),
        length_penalty=dice.choice([-1.0, 0.0, 0.6, 1.0, 1.0, 2.0]),
        early_stopping=dice.choice([True, False, "never"]),
    )
    stop = {
        "max_tokens": dice.choice([1, 2, 7, 24]),
        "min_tokens": dice.choice([0, 0, 3]),
        "ignore_eos": dice.random() < 0.5,
        "stop_token_ids": tuple(dice.sample(LETTERS, dice.choice([0, 1, 6, 16]))),
    }
    return beams, stop


@pytest.mark.parametrize("seed", seeds(12))
@pytest.mark.parametrize("llama", [False, True])
def test_texts_scores_and_order_are_those_of_a_plain_search(llama: bool, seed: int) -> None:
    print(f"replay with PAGEDD_SEED={seed}")
    dice = random.Random(seed)
    bench, logprobs = BeamBench(llama=llama), plain_logprobs()
    asked = [some_search(dice) for _ in range(4)]
    for rid, (beams, stop) in enumerate(asked):
        bench.search(rid, prompt_of(rid + 10 * seed, dice.randrange(1, 70)), beams, **stop)
    dice = random.Random(seed)
    for _ in asked:
        some_search(dice)
    bench.run()
    for rid, (beams, stop) in enumerate(asked):
        prompt = prompt_of(rid + 10 * seed, dice.randrange(1, 70))
        settings = StopParams(**stopping(**stop))  # type: ignore[arg-type]
        same(bench.found(rid), search(logprobs, prompt, beams, settings, {EOG}))
        assert bench.outcomes[rid].closed is not None
    assert bench.engine.snapshot().figures["kv"]["gpu"]["used"] == 0


def test_fewer_texts_than_beams_are_the_best_of_them() -> None:
    bench = BeamBench()
    beams = BeamParams(width=6)
    bench.search(1, prompt_of(1, 40), beams, max_tokens=15)
    bench.search(2, prompt_of(1, 40), beams, n=2, max_tokens=15)
    bench.run()
    assert bench.found(2) == bench.found(1)[:2]
    closed = bench.outcomes[2].closed
    assert closed is not None
    assert closed.generated_tokens == 30


def test_equal_scores_go_to_the_better_beam_and_then_to_the_lowest_id() -> None:
    level = tuple((token, -1.0) for token in range(8))
    beam_search = BeamSearch(BeamParams(width=3), StopParams(max_tokens=3), (), -1)
    assert [s.token for s in beam_search.advance([Drawn(0, -1.0, level)])] == [0, 1, 2]
    steps = beam_search.advance([Drawn(0, -1.0, level)] * 3)
    assert [(s.parent, s.token) for s in steps] == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("seed", seeds(10))
@pytest.mark.parametrize("llama", [False, True])
def test_beams_that_are_paged_out_at_random_steps_find_the_same(llama: bool, seed: int) -> None:
    print(f"replay with PAGEDD_SEED={seed}")
    dice = random.Random(seed)
    quiet = BeamBench(kv_tokens=1 << 15, llama=llama, verify=False)
    tight = BeamBench(
        kv_tokens=16 * dice.randrange(40, 60), ram_blocks=dice.choice([0, 20, 400]), llama=llama
    )
    for rid in range(6):
        beams = BeamParams(dice.choice([2, 4, 6]), 1.0, dice.choice([True, False, "never"]))
        prompt = prompt_of(rid % 4, dice.randrange(1, 150))
        stop: dict[str, Any] = {"max_tokens": dice.randrange(1, 50), "stop_token_ids": LETTERS[:3]}
        quiet.search(rid, prompt, beams, **stop)
        tight.search(rid, prompt, beams, **stop)
    scheduler = tight.engine._scheduler
    for _ in range(4000):
        if not tight.engine.has_work:
            break
        tight.step()
        tight.engine.validate()
        running = [s for s in scheduler.sequences() if s.removable]
        if running and dice.random() < 0.1:
            scheduler._room.page_out(dice.choice(running))
    else:
        raise AssertionError("searches did not end")
    quiet.run()
    for rid in range(6):
        assert tight.found(rid) == quiet.found(rid), rid
    assert tight.engine.snapshot().figures["kv"]["gpu"]["used"] == 0


@pytest.mark.parametrize("ram_blocks", [0, 400])
@pytest.mark.parametrize("llama", [False, True])
def test_searches_that_fill_the_pool_take_turns_and_all_end(llama: bool, ram_blocks: int) -> None:
    quiet = BeamBench(kv_tokens=1 << 15, llama=llama, verify=False)
    tight = BeamBench(kv_tokens=16 * 34, ram_blocks=ram_blocks, llama=llama)
    for bench in (quiet, tight):
        for rid in range(8):
            bench.search(rid, prompt_of(rid, 60), BeamParams(4), max_tokens=60)
        bench.run()
    for rid in range(8):
        assert tight.found(rid) == quiet.found(rid)
    pager = tight.engine.snapshot().figures["pager"]
    assert pager["preemptions_swap"] + pager["preemptions_recompute"] > 0


@pytest.mark.parametrize("llama", [False, True])
def test_beams_that_outgrow_the_pool_end_where_they_are_with_what_they_have(llama: bool) -> None:
    bench = BeamBench(kv_tokens=16 * 20, llama=llama)
    beams = BeamParams(8, early_stopping="never")
    bench.search(1, prompt_of(1, 100), beams, max_tokens=1000)
    bench.search(2, prompt_of(2, 30), BeamParams(2), max_tokens=10)
    bench.run()
    texts = bench.found(1)
    assert {one.reason for one in texts} == {"context"}
    assert len({tuple(one.tokens) for one in texts}) == 8
    assert [one.score for one in texts] == sorted((one.score for one in texts), reverse=True)
    assert {one.reason for one in bench.found(2)} == {"length"}


def test_a_cancelled_search_gives_everything_back() -> None:
    bench = BeamBench()
    bench.search(1, prompt_of(1, 100), BeamParams(4), max_tokens=500)
    for _ in range(20):
        bench.step()
    bench.engine.handle(m.Cancel(1))
    bench.step()
    bench.run()
    assert bench.outcomes[1].reasons == dict.fromkeys(range(4), "cancelled")
    assert not bench.outcomes[1].tokens
    assert bench.engine.snapshot().figures["kv"]["gpu"]["used"] == 0


def test_logits_that_are_no_numbers_end_the_search_alone() -> None:
    bench = BeamBench()
    bench.backend.faults.nan_sequences.add(3)  # the second beam
    bench.search(1, prompt_of(1, 100), BeamParams(4), max_tokens=30)
    bench.submit(2, prompt_of(2, 100), max_tokens=30)
    bench.run()
    rejected = bench.outcomes[1].rejected
    assert rejected is not None
    assert "NaN" in rejected.message
    assert bench.outcomes[2].reasons == {0: "length"}
    assert bench.engine.snapshot().figures["kv"]["gpu"]["used"] == 0


def test_a_step_that_fails_ends_the_search_and_nobody_else() -> None:
    bench = BeamBench()
    bench.search(1, prompt_of(1, 30), BeamParams(4), max_tokens=50)
    for _ in range(9):
        bench.step()
    bench.backend.faults.steps.add(bench.engine.steps)
    bench.run()
    rejected = bench.outcomes[1].rejected
    assert rejected is not None
    assert rejected.code == "E_ENGINE"
    bench.search(2, prompt_of(1, 30), BeamParams(4), max_tokens=5)
    bench.run()
    assert len(bench.found(2)) == 4


def test_a_vocabulary_that_is_too_small_for_the_beams_is_named() -> None:
    bench = BeamBench()
    bench.search(1, prompt_of(1, 30), BeamParams(129), max_tokens=5)
    bench.step()
    rejected = bench.outcomes[1].rejected
    assert rejected is not None
    assert (rejected.code, rejected.details["vocab_size"]) == ("E_FIELD", VOCAB)


def test_a_search_whose_client_does_not_read_waits_and_finds_the_same() -> None:
    bench = BeamBench(kv_tokens=512)
    bench.search(1, prompt_of(1, 200), BeamParams(4), max_tokens=20)
    for _ in range(12):
        bench.step()
    bench.engine.handle(m.Pause(1))
    bench.submit(2, prompt_of(2, 300), max_tokens=20)
    bench.run()
    assert bench.outcomes[2].reasons == {0: "length"}
    assert not bench.outcomes[1].reasons
    bench.engine.handle(m.Unpause(1))
    bench.run()
    alone = BeamBench()
    alone.search(1, prompt_of(1, 200), BeamParams(4), max_tokens=20)
    alone.run()
    assert bench.found(1) == alone.found(1)
