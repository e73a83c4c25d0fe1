"""The engine over the simulated backend: whole requests, message in, reports out."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kvpager.types import PriorityClass
from pagedd_daemon import messages as m
from pagedd_daemon.backends.simulated import BLOCK_TOKENS, BYTES_PER_TOKEN, SimulatedBackend
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.params import SamplingParams, StopParams

SALT = bytes(32)
EOG = 256


def sampling(**over: object) -> dict[str, object]:
    defaults = SamplingParams(temperature=0.0)
    return {name: over.get(name, getattr(defaults, name)) for name in defaults.__slots__}


def stopping(**over: object) -> dict[str, object]:
    defaults = StopParams(max_tokens=8, ignore_eos=True)
    return {name: over.get(name, getattr(defaults, name)) for name in defaults.__slots__}


@dataclass
class Outcome:
    """Everything the engine said of one request."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, str] = field(default_factory=dict)
    closed: m.Closed | None = None
    rejected: m.Rejected | None = None
    cached: int | None = None


class Bench:
    """An engine with a fake clock, and the outcomes by request."""

    def __init__(
        self,
        *,
        kv_tokens: int = 4096,
        ram_blocks: int = 1024,
        llama: bool = False,
        verify: bool = True,
        page_s: float = 0.0,
    ) -> None:
        self.now = 0.0
        configure = m.Configure(
            backend="simulated",
            model_path="",
            model_digest=bytes(32),
            context_tokens=2048,
            kv_tokens=kv_tokens,
            ram_bytes=ram_blocks * BLOCK_TOKENS * BYTES_PER_TOKEN,
            threads=1,
            vocab_size=258,
            eog_tokens=(EOG,),
        )
        capabilities = replace(
            SimulatedBackend.from_configure(configure, keep_cached_on_gpu=not llama).capabilities,
            asynchronous=not llama,
        )
        self.backend = SimulatedBackend(
            capabilities,
            step_s=0.010,
            token_s=0.002,
            page_s=page_s,
            verify=verify,
            clock=lambda: self.now,
            wait=self._wait,
        )
        self.engine = Engine(self.backend, lambda: self.now)
        self.outcomes: dict[int, Outcome] = defaultdict(Outcome)

    def _wait(self, moment: float) -> None:
        self.now = max(self.now, moment)

    def submit(
        self,
        rid: int,
        prompt: Sequence[int],
        *,
        n: int = 1,
        klass: int = 1,
        **over: object,
    ) -> None:
        keys = SamplingParams.__slots__
        hold = bool(over.pop("hold", False))
        self.engine.handle(
            m.Submit(
                rid=rid,
                app=f"app{rid % 3}",
                klass=klass,
                root=SALT,
                prompt=np.asarray(prompt, dtype="<i4").tobytes(),
                n=n,
                sampling=sampling(**{k: v for k, v in over.items() if k in keys}),
                stop=stopping(**{k: v for k, v in over.items() if k not in keys}),
                hold=hold,
            )
        )

    def step(self) -> list[m.StepReport]:
        reports: list[m.StepReport] = []
        self.engine.step(reports.append)
        for report in reports:
            self._take(report)
        return reports

    def _take(self, report: m.StepReport) -> None:
        for output in report.outputs:
            ids = np.frombuffer(output.tokens, dtype="<i4").tolist()
            assert output.index not in self.outcomes[output.rid].reasons, "spoke after its end"
            self.outcomes[output.rid].tokens[output.index] += ids
        for ended in report.ended:
            assert ended.index not in self.outcomes[ended.rid].reasons, "ended twice"
            self.outcomes[ended.rid].reasons[ended.index] = ended.reason
        for closed in report.closed:
            self.outcomes[closed.rid].closed = closed
        for rejected in report.rejected:
            self.outcomes[rejected.rid].rejected = rejected
        for rid, cached in report.started:
            self.outcomes[rid].cached = cached

    def run(self, most_steps: int = 20_000) -> None:
        for _ in range(most_steps):
            if not self.engine.has_work:
                return
            self.step()
            self.engine.validate()
        raise AssertionError("requests did not end")


def prompt_of(seed: int, length: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, length)]


def test_a_request_runs_to_its_length_and_is_closed_with_its_figures() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(1, 40), max_tokens=5)
    bench.run()
    outcome = bench.outcomes[1]
    assert len(outcome.tokens[0]) == 5
    assert outcome.reasons == {0: "length"}
    assert outcome.closed is not None
    assert (outcome.closed.prompt_tokens, outcome.closed.generated_tokens) == (40, 5)


def test_samples_share_the_prompt_and_differ_by_their_draws() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(2, 50), n=4, temperature=1.0, seed=7, max_tokens=12)
    bench.run()
    outcome = bench.outcomes[1]
    assert sorted(outcome.tokens) == [0, 1, 2, 3]
    assert len({tuple(t) for t in outcome.tokens.values()}) == 4
    assert bench.engine.snapshot().figures["tokens"]["prompt"] == 50


def test_a_prefix_in_flight_is_computed_once() -> None:
    bench = Bench(kv_tokens=16384)
    shared = prompt_of(3, 1000)
    for rid in range(8):
        bench.submit(rid, shared + prompt_of(100 + rid, 32))
    bench.run()
    figures = bench.engine.snapshot().figures["tokens"]
    assert figures["prompt"] - figures["cached"] <= 1000 + 8 * 48


@pytest.mark.parametrize("llama", [False, True])
def test_a_full_pool_pages_out_and_changes_nothing(llama: bool) -> None:
    roomy, tight = Bench(kv_tokens=32768, llama=llama), Bench(kv_tokens=1024, llama=llama)
    for bench in (roomy, tight):
        for rid in range(12):
            bench.submit(rid, prompt_of(rid, 120), max_tokens=150)
        bench.run()
    for rid in range(12):
        assert tight.outcomes[rid].tokens == roomy.outcomes[rid].tokens
        assert tight.outcomes[rid].reasons == {0: "length"}
    pager = tight.engine.snapshot().figures["pager"]
    assert pager["preemptions_swap"] + pager["preemptions_recompute"] > 0


@pytest.mark.parametrize(("page_s", "swaps"), [(0.001, True), (1.0, False)])
def test_victims_are_swapped_or_computed_again_by_what_transfers_were_seen_to_take(
    page_s: float, swaps: bool
) -> None:
    # Computing takes 2 ms a token, so 32 ms a page.
    bench = Bench(kv_tokens=640, page_s=page_s)
    for rid in range(24):
        bench.submit(rid, prompt_of(rid, 40), max_tokens=100, ignore_eos=True)
    bench.run()
    stats = bench.engine._pool.pager.stats()
    assert stats.preemptions_swap + stats.preemptions_recompute > 8
    assert (stats.preemptions_swap > stats.preemptions_recompute) is swaps


def test_a_full_pool_without_a_ram_tier_recomputes_and_changes_nothing() -> None:
    roomy, tight = Bench(kv_tokens=32768), Bench(kv_tokens=1024, ram_blocks=0)
    for bench in (roomy, tight):
        for rid in range(6):
            bench.submit(rid, prompt_of(rid, 200), max_tokens=100)
        bench.run()
    assert all(tight.outcomes[r].tokens == roomy.outcomes[r].tokens for r in range(6))
    assert tight.engine.snapshot().figures["pager"]["preemptions_recompute"] > 0


def test_a_request_that_can_never_fit_is_refused_with_the_figures() -> None:
    bench = Bench(kv_tokens=256)
    bench.submit(1, prompt_of(1, 400))
    bench.submit(2, prompt_of(2, 20))
    bench.run()
    rejected = bench.outcomes[1].rejected
    assert rejected is not None
    assert rejected.code in ("E_NEVER_FITS", "E_TOO_LONG")
    assert max(v for v in rejected.details.values() if isinstance(v, int)) >= 400
    assert bench.outcomes[2].reasons == {0: "length"}


def test_a_cancel_frees_everything_at_once() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(1, 100), max_tokens=500, n=3)
    for _ in range(10):
        bench.step()
    bench.engine.handle(m.Cancel(1))
    bench.step()
    assert bench.outcomes[1].reasons == dict.fromkeys(range(3), "cancelled")
    assert not bench.engine.has_work
    assert bench.engine.snapshot().figures["kv"]["gpu"]["used"] == 0


def test_a_stop_found_by_the_front_truncates_tokens_and_usage() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(1, 30), max_tokens=100)
    for _ in range(20):
        bench.step()
    bench.engine.handle(m.Finish(1, 0, 7))
    bench.step()
    closed = bench.outcomes[1].closed
    assert closed is not None
    assert closed.generated_tokens == 7
    assert bench.outcomes[1].reasons == {0: "stop"}


def test_a_paused_request_takes_no_part_and_gives_way() -> None:
    bench = Bench(kv_tokens=512)
    bench.submit(1, prompt_of(1, 300), max_tokens=60)
    for _ in range(6):
        bench.step()
    bench.engine.handle(m.Pause(1))
    bench.step()  # says what the step before the pause brought
    before = len(bench.outcomes[1].tokens[0])
    bench.submit(2, prompt_of(2, 300), max_tokens=20)
    bench.run()
    assert bench.outcomes[2].reasons == {0: "length"}
    assert len(bench.outcomes[1].tokens[0]) == before
    bench.engine.handle(m.Unpause(1))
    bench.run()
    alone = Bench()
    alone.submit(1, prompt_of(1, 300), max_tokens=60)
    alone.run()
    assert bench.outcomes[1].tokens == alone.outcomes[1].tokens


def test_logits_that_are_no_numbers_end_their_request_alone_and_nothing_of_it_is_cached() -> None:
    bench = Bench()
    text = prompt_of(1, 100)
    bench.backend.faults.nan_sequences.add(1)
    bench.submit(1, text, max_tokens=5)
    bench.submit(2, prompt_of(2, 100), max_tokens=5)
    bench.run()
    assert bench.outcomes[1].rejected is not None
    assert "NaN" in bench.outcomes[1].rejected.message
    assert bench.outcomes[2].reasons == {0: "length"}
    bench.submit(4, text, max_tokens=5)
    bench.run()
    assert bench.outcomes[4].cached == 0
    assert bench.outcomes[4].reasons == {0: "length"}


def test_a_failed_step_ends_its_requests_and_nobody_else() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(1, 30), max_tokens=50)
    for _ in range(4):
        bench.step()
    bench.backend.faults.steps.add(bench.engine.steps)
    bench.step()
    bench.step()  # collects it
    assert bench.outcomes[1].rejected is not None
    assert bench.outcomes[1].rejected.code == "E_ENGINE"
    bench.submit(2, prompt_of(1, 30), max_tokens=5)
    bench.run()
    assert bench.outcomes[2].reasons == {0: "length"}


def test_classes_are_admitted_in_order_of_importance() -> None:
    bench = Bench(kv_tokens=512)
    for rid in range(4):
        bench.submit(rid, prompt_of(rid, 300), klass=2, max_tokens=10)
    bench.submit(9, prompt_of(9, 300), klass=0, max_tokens=10)
    order: list[int] = []
    while bench.engine.has_work:
        order += [rid for report in bench.step() for rid, _ in report.started]
    assert order.index(9) <= 1


@pytest.mark.parametrize("llama", [False, True])
def test_random_traffic_under_pressure_gives_everybody_the_text_of_a_quiet_machine(
    llama: bool,
) -> None:
    seed = int(os.environ.get("PAGEDD_SEED", random.SystemRandom().randrange(2**32)))
    print(f"replay with PAGEDD_SEED={seed}")
    for round_ in range(8):
        rng = random.Random(f"{seed}-{round_}")
        prefixes = [prompt_of(rng.randrange(10**6), rng.randrange(1, 200)) for _ in range(3)]
        tight = Bench(
            kv_tokens=16 * rng.randrange(40, 80), ram_blocks=rng.choice([0, 30, 400]), llama=llama
        )
        plans = [
            (
                rng.choice(prefixes) + prompt_of(rng.randrange(10**6), rng.randrange(1, 120)),
                {
                    "n": rng.choice([1, 1, 1, 3]),
                    "klass": rng.randrange(3),
                    "max_tokens": rng.randrange(1, 90),
                    "temperature": rng.choice([0.0, 0.9]),
                    "ignore_eos": rng.random() < 0.5,
                    "frequency_penalty": rng.choice([0.0, 0.0, 0.5]),
                    "seed": rng.randrange(2**60),
                },
            )
            for _ in range(14)
        ]
        for rid, (prompt, options) in enumerate(plans):
            tight.submit(rid, prompt, **options)  # type: ignore[arg-type]
            for _ in range(rng.randrange(0, 12)):
                tight.step()
                tight.engine.validate()
        tight.run()
        quiet = Bench(kv_tokens=65536, verify=False)
        for rid, (prompt, options) in enumerate(plans):
            quiet.submit(rid, prompt, **options)  # type: ignore[arg-type]
        quiet.run()
        for rid in range(len(plans)):
            assert tight.outcomes[rid].tokens == quiet.outcomes[rid].tokens, f"request {rid}"
            assert tight.outcomes[rid].closed is not None


def test_nobody_waits_for_a_prefix_whose_client_does_not_read() -> None:
    bench = Bench()
    prompt = prompt_of(3, 600)
    bench.submit(1, prompt, max_tokens=5)
    bench.step()
    bench.engine.handle(m.Pause(1))
    bench.submit(2, prompt, max_tokens=5)
    for _ in range(100):
        bench.step()
    assert bench.outcomes[2].reasons == {0: "length"}
    assert not bench.outcomes[1].reasons
    bench.engine.handle(m.Unpause(1))
    bench.run()
    assert bench.outcomes[1].tokens[0][:1] == bench.outcomes[2].tokens[0][:1]


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("ram_blocks", [0, 1024])
def test_a_pool_that_shrinks_and_grows_changes_nobodys_text(llama: bool, ram_blocks: int) -> None:
    quiet = Bench(kv_tokens=8192, llama=llama, ram_blocks=ram_blocks)
    hard = Bench(kv_tokens=2048, llama=llama, ram_blocks=ram_blocks)
    dice = np.random.default_rng(5)
    for bench in (quiet, hard):
        for rid in range(10):
            bench.submit(rid, prompt_of(rid % 4, 100 + 20 * rid), n=1 + rid % 3, max_tokens=80)
    scheduler = hard.engine._scheduler
    for blocks in (100, 40, 12, 70, 3, 25, 128):
        scheduler.resize(blocks)
        for _ in range(int(dice.integers(3, 30))):
            hard.step()
            hard.engine.validate()
        total = hard.engine._pool.pager.stats().gpu.total
        assert total == blocks, (total, blocks)
    hard.run()
    quiet.run()
    for rid in range(10):
        assert hard.outcomes[rid].tokens == quiet.outcomes[rid].tokens
        assert set(hard.outcomes[rid].reasons.values()) == {"length"}


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_prompt_that_a_shrinking_pool_pages_out_amid_a_step_goes_on_later(steps: int) -> None:
    bench = Bench(kv_tokens=1024)
    for rid in range(3):
        bench.submit(rid, prompt_of(rid, 300))
    for _ in range(steps):
        bench.step()
    for blocks in (40, 24, 64):
        bench.engine._scheduler.resize(blocks)
        bench.step()
        bench.step()
    bench.run()
    assert [bench.outcomes[rid].reasons for rid in range(3)] == [{0: "length"}] * 3


@pytest.mark.parametrize("fails", [frozenset(), frozenset({9, 11, 14, 20})])
def test_a_front_computed_while_the_back_is_loaded_changes_nobodys_text(
    fails: frozenset[int],
) -> None:
    # A page takes 32 ms to compute and 34 to load, so half of the pages are worth computing.
    quiet, tight = Bench(kv_tokens=32768), Bench(kv_tokens=1024, page_s=0.034)
    tight.backend.faults.delay_polls = 3
    tight.backend.faults.transfers = set(fails)
    for bench in (quiet, tight):
        for rid in range(10):
            bench.submit(rid, prompt_of(rid, 300), max_tokens=100)
        bench.run()
    for rid in range(10):
        assert tight.outcomes[rid].tokens == quiet.outcomes[rid].tokens
        assert tight.outcomes[rid].reasons == {0: "length"}
    assert tight.engine._pool.pager.stats().restores > 2


def test_a_message_that_waits_is_handled_after_the_step_at_hand() -> None:
    bench = Bench(llama=True)
    bench.submit(1, prompt_of(1, 30), max_tokens=40)
    for _ in range(3):
        bench.step()
    steps = bench.engine.steps
    bench.engine.step(lambda report: None, lambda: True)
    assert bench.engine.steps == steps + 1


@pytest.mark.parametrize(
    ("klass", "said"),
    [
        # Steps take 12 ms: four follow the first within the 50 ms that it may be held back.
        (PriorityClass.INTERACTIVE, [5, 5, 5]),
        (PriorityClass.NORMAL, [11]),
        (PriorityClass.BACKGROUND, []),
    ],
)
def test_steps_that_nothing_interrupts_follow_one_another_while_tokens_may_wait(
    klass: PriorityClass, said: list[int]
) -> None:
    bench = Bench(llama=True)
    bench.submit(1, prompt_of(1, 30), klass=klass, max_tokens=40)
    bench.step()
    steps, reports = bench.engine.steps, bench.step()
    assert bench.engine.steps - steps == 16
    assert [len(report.outputs[0].tokens) // 4 for report in reports] == said


def test_background_tokens_go_along_with_interactive_ones() -> None:
    bench = Bench(llama=True)
    bench.submit(1, prompt_of(1, 30), klass=PriorityClass.BACKGROUND, max_tokens=40)
    bench.submit(2, prompt_of(2, 30), klass=PriorityClass.INTERACTIVE, max_tokens=40)
    while not (bench.outcomes[1].tokens[0] and bench.outcomes[2].tokens[0]):
        bench.step()
    reports = bench.step()
    assert reports
    for report in reports:
        first, second = (len(output.tokens) // 4 for output in report.outputs)
        assert first == second


def test_what_was_drawn_before_a_step_failed_is_said() -> None:
    bench = Bench(llama=True)
    bench.submit(1, prompt_of(1, 30), max_tokens=40)
    bench.step()
    before = len(bench.outcomes[1].tokens[0])
    bench.backend.faults.steps.add(bench.engine.steps + 2)
    bench.step()
    assert len(bench.outcomes[1].tokens[0]) == before + 2
    assert bench.outcomes[1].rejected is not None
    alone = Bench()
    alone.submit(1, prompt_of(1, 30), max_tokens=40)
    alone.run()
    assert alone.outcomes[1].tokens[0][: before + 2] == bench.outcomes[1].tokens[0]
