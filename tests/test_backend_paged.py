"""The paged engine on the CPU: whatever the pager does, the texts are those of a plain run.

In float64 a different batch or chunk moves logits by 1e-15, so texts must be exactly the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvpager import PreemptMode
from kvpager.types import Load, Page, Store, Tier
from pagedd_daemon.backends.base import (
    PENDING,
    Draw,
    ModelLoadError,
    Run,
    Step,
    StepFaultError,
)
from pagedd_daemon.backends.paged.backend import LEAST_PIECE_TOKENS, PagedBackend, cut
from pagedd_daemon.backends.paged.layout import (
    MIXED_BUCKETS,
    Buckets,
    StepShape,
    decode_buckets,
    layout,
)
from pagedd_daemon.backends.paged.load import Wishes, serve
from pagedd_daemon.backends.paged.staging import device_arrays
from pagedd_daemon.engine.sampler import Sampler, draw
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.params import SamplingParams, StopParams
from pagedd_kernels import StepBatch
from tests.support.driver import Driver, Scenario
from tests.support.paged_backend import VOCAB, Plain, tiny_backend, tiny_config, tiny_model
from tests.support.steps import greedy, ids

SEED = 17


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_model()


@pytest.fixture
def driver(model: Decoder) -> Iterator[Driver]:
    with closing(tiny_backend(model)) as backend:
        yield Driver(backend)


def prompt(seed: int, length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


# ------------------------------------------------------------------------------ the same tokens


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 512])
def test_any_chunking_gives_the_plain_text(driver: Driver, model: Decoder, chunk: int) -> None:
    driver.admit(1, prompt(1, 68))
    driver.prefill(1, chunk=chunk)
    driver.generate([1], 20)
    driver.check(1, Plain(model).judge)


def test_sequences_in_a_batch_do_not_disturb_each_other(driver: Driver, model: Decoder) -> None:
    for seq in range(12):
        driver.admit(seq, prompt(seq, 10 + 3 * seq))
    while any(driver.missing(seq) > 1 for seq in range(12)):
        driver.step({seq: min(driver.missing(seq), 9 + seq) for seq in range(12)})
    driver.generate(range(12), 20)
    for seq in range(12):
        driver.check(seq, Plain(model).judge)


def test_a_prefix_hit_gives_the_plain_text(driver: Driver, model: Decoder) -> None:
    stem = prompt(2, 100)
    driver.admit(1, stem + prompt(3, 9))
    driver.prefill(1)
    driver.free(1)
    assert driver.admit(2, stem + prompt(4, 9)) == 96
    driver.prefill(2)
    driver.generate([2], 20)
    driver.check(2, Plain(model).judge)


def test_forks_share_their_past_and_nothing_else(driver: Driver, model: Decoder) -> None:
    driver.admit(1, prompt(5, 40))
    driver.prefill(1)
    driver.fork(1, {2: 11, 3: 12, 4: 13})
    driver.generate([1, 2, 3, 4], 20)
    for seq in (1, 2, 3, 4):
        driver.check(seq, Plain(model).judge)


@pytest.mark.parametrize("mode", [PreemptMode.SWAP, PreemptMode.RECOMPUTE])
def test_a_preempted_sequence_goes_on_where_it_stopped(
    driver: Driver, model: Decoder, mode: PreemptMode
) -> None:
    driver.admit(1, prompt(6, 70))
    driver.prefill(1)
    driver.generate([1], 5)
    driver.preempt(1, mode)
    driver.admit(2, prompt(7, 900))  # takes the blocks the victim had
    driver.prefill(2)
    driver.free(2)
    assert driver.resume(1)
    driver.prefill(1)
    driver.generate([1], 20)
    driver.check(1, Plain(model).judge)


def test_random_histories_give_the_plain_texts(model: Decoder) -> None:
    with closing(tiny_backend(model, blocks=48, ram_pages=40)) as backend:
        scenario = Scenario(Driver(backend), Plain(model).judge, SEED)
        scenario.play(250)
        assert set(scenario.done) == {
            "_admit", "_step", "_fork", "_preempt", "_resume", "_truncate", "_end",
        }  # fmt: skip


def test_steps_padded_to_buckets_give_the_plain_texts(model: Decoder) -> None:
    with closing(tiny_backend(model)) as backend:
        # What a CUDA device replays as graphs is computed kernel by kernel here.
        backend._buckets = Buckets(decode_buckets(8), (16, 48, 96), 8)
        driver = Driver(backend)
        lengths = {1: 90, 2: 33, 3: 1, 4: 20, 5: 44}
        for seq, length in lengths.items():
            driver.admit(seq, prompt(40 + seq, length))
        driver.prefill(1)  # 90 tokens in a bucket of 96
        driver.step({1: 1, 2: 10, 3: 1})  # 12 in 16, a chunk among them
        driver.step({1: 1, 2: 23, 3: 1, 4: 20})  # 45 in 48
        driver.prefill(5)
        driver.generate([1, 2, 3, 4, 5], 12)  # 5 in 8
        for seq in lengths:
            driver.check(seq, Plain(model).judge)


def test_buckets_waste_little_and_hold_what_they_are_chosen_for() -> None:
    buckets = Buckets(decode_buckets(256), MIXED_BUCKETS, 256)
    shapes = set(buckets.shapes())
    for count in range(1, 257):
        shape = buckets.fit(count, count, decode=True)
        assert shape is not None
        assert shape.tokens == shape.sequences == shape.rows
        assert count <= shape.sequences <= count + (7 if count <= 64 else 15)
        assert shape in shapes
    for tokens in range(1, MIXED_BUCKETS[-1] + 1):
        shape = buckets.fit(tokens, min(tokens, 256), decode=False)
        assert shape is not None
        assert shape.tokens >= tokens
        assert shape.sequences > min(tokens, 256)
        assert shape in shapes
    assert buckets.fit(MIXED_BUCKETS[-1] + 1, 3, decode=False) is None
    assert buckets.fit(257, 257, decode=True) is None


def test_arrays_of_a_layout_are_aligned_and_do_not_overlap() -> None:
    for shape in (StepShape(1, 1, 1, True), StepShape(333, 7, 3, False)):
        where = layout(shape)
        ends = 0
        for name, item in [
            ("tokens", 4), ("sources", 4), ("positions", 4), ("slots", 8), ("query_starts", 4),
            ("context_lens", 4), ("logit_rows", 8), ("table_starts", 4),
        ]:  # fmt: skip
            section = getattr(where, name)
            assert section.offset >= ends
            assert section.offset % 16 == 0
            ends = section.offset + item * section.count
        assert where.tables >= ends


# -------------------------------------------------------------------------- two steps in flight


class Loop:
    """Decodes a few sequences with a second step launched before the first is collected."""

    def __init__(self, backend: PagedBackend, samplers: dict[int, Sampler]) -> None:
        self.backend = backend
        self.samplers = samplers
        self.texts: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}
        self._next_block = 0

    def table(self, seq: int, tokens: int) -> list[int]:
        table = self._tables.setdefault(seq, [])
        while len(table) * 16 < tokens:
            table.append(self._next_block)
            self._next_block += 1
        return table

    def run(self, prompts: dict[int, list[int]], steps: int) -> dict[int, list[int]]:
        """Prompts whole in the first step, then ``steps`` tokens of each; what was drawn."""
        backend = self.backend
        drawn: dict[int, list[int]] = {seq: [] for seq in prompts}
        in_flight = backend.launch(
            Step(1, [self._run(seq, 0, text) for seq, text in prompts.items()])
        )
        for number in range(1, steps + 1):
            runs = [
                self._run(seq, len(text) + number - 1, [PENDING])
                for seq, text in reversed(prompts.items())
            ]
            following = backend.launch(Step(1 + number, runs))
            for seq, one in backend.collect(in_flight).drawn:
                drawn[seq].append(one.token)
                self.samplers[seq].accept(one.token)
            in_flight = following
        for seq, one in backend.collect(in_flight).drawn:
            drawn[seq].append(one.token)
        return drawn

    def _run(self, seq: int, start: int, tokens: list[int]) -> Run:
        table = ids(self.table(seq, start + len(tokens)))
        return Run(seq, start, ids(tokens), table, [Draw(seq, self.samplers[seq])])


def test_tokens_the_host_does_not_know_yet_are_put_in_by_the_device(model: Decoder) -> None:
    prompts = {1: prompt(8, 20), 2: prompt(9, 33), 3: prompt(10, 5)}
    with closing(tiny_backend(model, asynchronous=True)) as backend:
        drawn = Loop(backend, {seq: greedy(VOCAB) for seq in prompts}).run(prompts, 20)
    for seq, text in prompts.items():
        assert drawn[seq] == Plain(model).greedy(text, 21)


FLAVOURS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 1.2, "presence_penalty": 0.7, "logit_bias": {5: 3.0, 9: -2.0}},
]


def sampler(index: int, **params: Any) -> Sampler:
    return Sampler(
        SamplingParams(seed=5, **params),
        StopParams(max_tokens=99, min_tokens=6, stop_token_ids=(7, 8)),
        index=index,
        prompt=ids(prompt(index, 12)),
        vocab_size=VOCAB,
        eog_tokens=frozenset({2}),
    )


def test_draws_are_those_of_the_samplers_in_numpy_even_a_step_ahead(model: Decoder) -> None:
    prompts = {at: prompt(at, 12) for at in range(len(FLAVOURS))}
    with closing(tiny_backend(model, asynchronous=True)) as backend:
        samplers = {at: sampler(at, **one) for at, one in enumerate(FLAVOURS)}
        drawn = Loop(backend, samplers).run(prompts, 15)
    for at, flavour in enumerate(FLAVOURS):
        reference, text = sampler(at, **flavour), list(prompts[at])
        for token in drawn[at]:
            logits = Plain(model).logits(text)[-1:].astype(np.float32)
            assert draw(logits, [(0, reference)])[0].token == token
            reference.accept(token)
            text.append(token)


def test_a_rewound_sampler_is_counted_anew(model: Decoder) -> None:
    params = {"temperature": 0.0, "frequency_penalty": 5.0}
    with closing(tiny_backend(model)) as backend:
        driver = Driver(backend)
        one = greedy(VOCAB, **params)
        driver.admit(1, prompt(3, 20), one)
        driver.prefill(1)
        driver.generate([1], 8)
        first = driver.texts[1][20:]
        driver.truncate(1, 21, first[1])
        one.rewind(2)
        driver.prefill(1)
        driver.generate([1], 6)
        assert driver.texts[1][20:] == first


def test_samples_of_one_prompt_are_drawn_from_one_row(model: Decoder) -> None:
    text = prompt(11, 30)
    samplers = [sampler(index, temperature=1.0) for index in range(5)]
    with closing(tiny_backend(model)) as backend:
        draws = [Draw(1, one) for one in samplers]
        run = Run(1, 0, ids(text), ids([3, 1]), draws)
        result = backend.collect(backend.launch(Step(1, [run])))
    logits = Plain(model).logits(text)[-1:].astype(np.float32)
    expected = draw(logits, [(0, one) for one in samplers])
    assert [one for _, one in result.drawn] == expected
    assert len({one.token for one in expected}) > 1


def test_log_probabilities_are_those_of_the_samplers_in_numpy(model: Decoder) -> None:
    texts = {1: prompt(12, 9), 2: prompt(13, 9), 3: prompt(14, 9)}
    asked = {1: -1, 2: 0, 3: 4}
    with closing(tiny_backend(model)) as backend:
        runs = [
            Run(seq, 0, ids(text), ids([seq]), [Draw(seq, greedy(VOCAB, logprobs=asked[seq]))])
            for seq, text in texts.items()
        ]
        found = dict(backend.collect(backend.launch(Step(1, runs))).drawn)
    for seq, text in texts.items():
        logits = Plain(model).logits(text)[-1:].astype(np.float32)
        (expected,) = draw(logits, [(0, greedy(VOCAB, logprobs=asked[seq]))])
        one = found[seq]
        assert one.token == expected.token
        assert (one.logprob is None) == (expected.logprob is None)
        assert one.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in expected.top]
        assert [p for _, p in one.top] == pytest.approx([p for _, p in expected.top], abs=1e-4)


# ------------------------------------------------------------------------------- what goes wrong


class Faulty:
    """A model that does what it is told to do wrong."""

    def __init__(self, model: Decoder) -> None:
        self.config, self.context_tokens = model.config, model.context_tokens
        self.device, self.dtype = model.device, model.dtype
        self.weight_bytes = 0
        self.inner = model
        self.most_tokens = 10**9
        self.nan_rows: list[int] = []

    def forward(self, batch: StepBatch, kv: torch.Tensor) -> torch.Tensor:
        if batch.num_tokens > self.most_tokens:
            raise torch.OutOfMemoryError(f"{batch.num_tokens} tokens are too many")
        logits = self.inner.forward(batch, kv)
        logits[self.nan_rows] = torch.nan
        return logits

    def rehearse(self, batch: StepBatch, kv: torch.Tensor) -> None:
        self.inner.rehearse(batch, kv)


def faulty_backend(model: Decoder) -> tuple[Faulty, PagedBackend]:
    faulty = Faulty(model)
    return faulty, serve(faulty, Wishes(kv_tokens=2048))


def test_a_step_that_runs_out_of_memory_is_computed_in_pieces(model: Decoder) -> None:
    faulty, backend = faulty_backend(model)
    with closing(backend):
        faulty.most_tokens = LEAST_PIECE_TOKENS + 10
        driver = Driver(backend)
        driver.admit(1, prompt(20, 300))
        driver.admit(2, prompt(21, 200))
        driver.prefill(1)
        driver.step({1: 1, 2: 200})
        driver.step({1: 1, 2: 1})
        for seq in (1, 2):
            driver.check(seq, Plain(model).judge)


def test_pieces_grow_again_when_there_is_memory(model: Decoder) -> None:
    faulty, backend = faulty_backend(model)
    with closing(backend):
        faulty.most_tokens = 40
        driver = Driver(backend)
        driver.admit(1, prompt(23, 200))
        driver.prefill(1)
        faulty.most_tokens = 10**9
        driver.generate([1], 260)
        driver.admit(2, prompt(24, 300))
        faulty.most_tokens = 299
        with pytest.MonkeyPatch.context() as patch:
            pieces: list[int] = []
            inner = faulty.inner.forward

            def forward(batch: StepBatch, kv: torch.Tensor) -> torch.Tensor:
                pieces.append(batch.num_tokens)
                return inner(batch, kv)

            patch.setattr(faulty.inner, "forward", forward)
            driver.prefill(2)
        assert pieces == [256, 44]
        for seq in (1, 2):
            driver.check(seq, Plain(model).judge)


def test_penalties_count_a_token_once_though_its_step_ran_out_of_memory(model: Decoder) -> None:
    faulty, backend = faulty_backend(model)
    with closing(backend):
        one, text = greedy(VOCAB, frequency_penalty=3.0), prompt(30, 10)
        handles = [backend.launch(Step(1, [Run(1, 0, ids(text), ids([0]), [Draw(1, one)])]))]
        faulty.most_tokens = LEAST_PIECE_TOKENS + 10
        long = Run(2, 0, ids(prompt(31, 300)), ids(range(2, 21)), ())
        for at in range(10, 13):
            pending = Run(1, at, ids([PENDING]), ids([0]), [Draw(1, one)])
            runs = [pending, long] if at == 10 else [pending]
            handles.append(backend.launch(Step(at, runs)))
            ((_, drawn),) = backend.collect(handles.pop(0)).drawn
            logits = Plain(model).logits(text)[-1:].astype(np.float32)
            assert drawn == draw(logits, [(0, one)])[0]
            one.accept(drawn.token)
            text.append(drawn.token)


def test_a_step_that_does_not_even_fit_in_the_smallest_pieces_is_refused(model: Decoder) -> None:
    faulty, backend = faulty_backend(model)
    with closing(backend):
        driver = Driver(backend)
        driver.admit(1, prompt(22, 40))
        faulty.most_tokens = 10
        with pytest.raises(StepFaultError, match="out of memory"):
            driver.prefill(1)
        faulty.most_tokens = 10**9
        driver.prefill(1)
        driver.generate([1], 3)
        driver.check(1, Plain(model).judge)


def test_logits_that_are_no_numbers_end_one_sequence_and_leave_the_others(model: Decoder) -> None:
    faulty, backend = faulty_backend(model)
    with closing(backend):
        faulty.nan_rows = [1]
        runs = [
            Run(seq, 0, ids(prompt(seq, 9)), ids([seq]), [Draw(seq, greedy(VOCAB))])
            for seq in range(3)
        ]
        first = backend.launch(Step(1, runs))
        faulty.nan_rows = []
        ahead = [
            Run(seq, 9, ids([PENDING]), ids([seq]), [Draw(seq, greedy(VOCAB))]) for seq in range(3)
        ]
        second = backend.launch(Step(2, ahead))
        tokens = [one.token for _, one in backend.collect(first).drawn]
        assert tokens[1] == -1
        followed = dict(backend.collect(second).drawn)
        for seq in (0, 2):
            expected = Plain(model).greedy(prompt(seq, 9), 2)
            assert [tokens[seq], followed[seq].token] == expected


def test_a_pool_that_does_not_fit_is_refused_with_the_figures(model: Decoder) -> None:
    with pytest.raises(ModelLoadError, match=r"a pool of \d+ tokens takes \d+ bytes") as refused:
        serve(model, Wishes(kv_tokens=10**12))
    assert refused.value.details["kv_tokens"] == 10**12


def test_cutting_a_step_keeps_order_and_draws_at_the_end() -> None:
    draws = [Draw(2, greedy(VOCAB))]
    one = Run(1, 5, ids([1]), ids([0]), [])
    two = Run(2, 8, ids([1, 2, 3, 4, 5]), ids([1]), draws)
    head, left = cut([one, two], 4)
    assert [(run.seq, run.start, run.tokens.tolist()) for run in head] == [
        (1, 5, [1]),
        (2, 8, [1, 2, 3]),
    ]
    assert [(run.seq, run.start, run.tokens.tolist(), run.draws) for run in left] == [
        (2, 11, [4, 5], draws)
    ]
    assert not head[1].draws
    assert cut([one, two], 1) == ([one], [two])
    assert cut([one, two], 6) == ([one, two], ())


# --------------------------------------------------------------------------------------- memory


def test_pages_come_back_from_ram_bit_for_bit(model: Decoder) -> None:
    with closing(tiny_backend(model, blocks=8, ram_pages=8)) as backend:
        kv = backend._arena.kv
        kv[1:] = torch.randn(kv[1:].shape, dtype=kv.dtype, generator=torch.manual_seed(3))
        before = kv[1:].clone()
        # Neighbours on both sides, neighbours on one side, and alone.
        pairs = [(0, 4), (1, 5), (2, 6), (5, 0), (7, 1), (3, 3)]
        pages = tuple(Page(at, block, slot, 16) for at, (block, slot) in enumerate(pairs))
        backend.apply([Store(1, 1, Tier.RAM, pages)])
        kv[1:] = 0
        moved = tuple(replace(page, block=(page.block + 3) % 8) for page in pages)
        backend.apply([Load(2, 1, Tier.RAM, moved)])
        assert [(t.transfer, t.ok) for t in backend.poll_transfers()] == [(1, True), (2, True)]
        for old, new in zip(pages, moved, strict=True):
            assert torch.equal(kv[1 + new.block], before[old.block])
        assert backend.memory().ram_tier == 6 * backend.capabilities.block_bytes


def test_what_a_step_may_hold_at_most_fits_its_buffers(model: Decoder) -> None:
    with closing(serve(model, Wishes(kv_tokens=256 * 64))) as backend:
        most = backend.capabilities.max_step_tokens
        one = sampler(0, temperature=1.0, top_p=0.5, logit_bias=dict.fromkeys(range(250), 1.0))
        runs = [
            Run(seq, 900, ids([1] * (most // 256)), ids([0] * 64), [Draw(seq, one)])
            for seq in range(256)
        ]
        assert len(backend.collect(backend.launch(Step(1, runs))).drawn) == 256


def test_the_pool_is_as_large_as_asked_and_the_context_no_larger_than_it() -> None:
    model = Decoder.random(tiny_config(), torch.device("cpu"), torch.float32, 1)
    with closing(serve(model, Wishes(kv_tokens=160))) as backend:
        caps = backend.capabilities
        assert (caps.gpu_blocks, caps.context_tokens, caps.kv_dtype) == (10, 144, "f32")
        assert caps.notice
        assert backend.memory().kv_pool == 11 * caps.block_bytes


@pytest.mark.parametrize("shape", [StepShape(24, 24, 24, True), StepShape(48, 9, 8, False)])
def test_every_row_of_a_step_of_padding_belongs_to_a_sequence(
    model: Decoder, shape: StepShape
) -> None:
    with closing(tiny_backend(model)) as backend:
        runner, where = backend._runner, layout(shape)
        runner._pad(where)
        arrays = device_arrays(runner.inputs, where)
        starts = arrays.query_starts.tolist()
        assert starts == sorted(starts)
        assert (starts[0], starts[-1]) == (0, shape.tokens)
        assert not arrays.context_lens.any()
        assert not shape.decode or starts == list(range(shape.tokens + 1))
