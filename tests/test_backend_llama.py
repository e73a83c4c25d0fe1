"""The llama.cpp backend: whatever the pager does, the texts are those of a plain run.

Most of it runs on a tiny random model, the same promises once more on the packaged one. Both in
F32 with F32 keys and values and no flash attention, where a different batch or chunk moves logits
by rounding alone; tokens may then differ only where the two best logits lie within 1e-3.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from kvpager.types import Load, Page, Release, Store, Tier
from pagedd_daemon.backends import load_backend
from pagedd_daemon.backends.base import ModelLoadError, StepFaultError
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.backends.llama_api import Model
from pagedd_daemon.messages import Configure
from tests.support.driver import Driver, Judge, Scenario
from tests.support.f32_model import f32_copy
from tests.support.plain_llama import PlainLlama
from tests.support.steps import greedy
from tests.support.tiny_model import VOCAB, write_tiny_model

pytestmark = pytest.mark.model

TOLERANCE = 1e-3
SEED = 31


class Plain(PlainLlama):
    """What every text must agree with."""

    def judge(self, text: list[int]) -> npt.NDArray[np.bool_]:
        """See `tests.support.driver.Judge`."""
        after = self.logits(text[:-1])
        good: npt.NDArray[np.bool_] = (
            after[np.arange(len(text) - 1), text[1:]] >= after.max(axis=1) - TOLERANCE
        )
        return np.concatenate([[False], good])


def configure(path: Path, **changes: object) -> Configure:
    base = Configure(
        backend="llama.cpp",
        model_path=str(path),
        model_digest=bytes(32),
        context_tokens=0,
        kv_tokens=1024,
        ram_bytes=4 << 20,
        threads=1,
        kv_dtype="f32",
        flash_attention=False,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def load(path: Path, **changes: object) -> LlamaBackend:
    return LlamaBackend.load(configure(path, **changes), lambda _: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def judge(tiny: Path) -> Iterator[Judge]:
    with closing(Plain(tiny)) as plain:
        yield plain.judge


def prompt(seed: int, length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, length)]


# ------------------------------------------------------------------------------ the same tokens


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 512])
def test_any_chunking_gives_the_plain_text(tiny: Path, judge: Judge, chunk: int) -> None:
    with closing(load(tiny)) as backend:
        driver = Driver(backend)
        driver.admit(1, prompt(1, 131))
        driver.prefill(1, chunk=chunk)
        driver.generate([1], 40)
        driver.check(1, judge)


def test_sixteen_sequences_in_a_batch_do_not_disturb_each_other(tiny: Path, judge: Judge) -> None:
    with closing(load(tiny, kv_tokens=2048)) as backend:
        driver = Driver(backend)
        for seq in range(16):
            driver.admit(seq, prompt(seq, 10 + 3 * seq))
        # Their prompts in one step, cut wherever it falls, beside those that decode already.
        while any(driver.missing(seq) > 1 for seq in range(16)):
            driver.step({seq: min(driver.missing(seq), 9 + seq) for seq in range(16)})
        driver.generate(range(16), 30)
        for seq in range(16):
            driver.check(seq, judge)


def test_a_running_prefix_is_shared_and_a_finished_one_comes_from_ram(
    tiny: Path, judge: Judge
) -> None:
    with closing(load(tiny)) as backend:
        driver = Driver(backend)
        stem = prompt(2, 100)
        driver.admit(1, stem)
        driver.prefill(1)
        assert driver.admit(2, [*stem, 9, 9]) == 96
        driver.prefill(2)
        driver.generate([1, 2], 20)
        for seq in (1, 2):
            driver.check(seq, judge)
            driver.free(seq)
        assert driver.pager.stats().gpu.used == 0
        assert driver.admit(3, [*stem, 8]) == 96
        driver.prefill(3)
        driver.generate([3], 20)
        driver.check(3, judge)


def test_children_share_the_partial_block_and_go_their_own_way(tiny: Path, judge: Judge) -> None:
    with closing(load(tiny)) as backend:
        driver = Driver(backend)
        driver.admit(0, prompt(3, 41))
        driver.prefill(0)
        driver.fork(0, {child: 20 + child for child in range(1, 6)})
        driver.fork(3, {7: 100, 8: 101})
        driver.generate([8, 1, 0, 3, 5, 7, 2, 4], 30)
        for seq in driver.texts:
            driver.check(seq, judge)


def test_a_swapped_sequence_continues_where_it_was(tiny: Path, judge: Judge) -> None:
    with closing(load(tiny)) as backend:
        driver = Driver(backend)
        for seq in (1, 2):
            driver.admit(seq, prompt(4 + seq, 50))
            driver.prefill(seq)
        for _ in range(20):  # every length of a partial block is met
            driver.preempt(1)
            assert 1 in driver.swapped
            driver.generate([2], 1)
            assert driver.resume(1)
            assert driver.missing(1) == 1
            driver.generate([1, 2], 1)
        for seq in (1, 2):
            driver.check(seq, judge)


@pytest.mark.parametrize("seed", range(SEED, SEED + 8))
def test_random_events_never_change_a_text(tiny: Path, judge: Judge, seed: int) -> None:
    with closing(load(tiny, kv_tokens=640, ram_bytes=50 * 8192)) as backend:
        scenario = Scenario(Driver(backend), judge, seed)
        scenario.play(500)
        assert {"_admit", "_step", "_fork", "_preempt", "_resume", "_truncate"} <= set(
            scenario.done
        ), seed


# ------------------------------------------------------------------------------ limits and faults


def test_three_hundred_prefixes_all_hit_with_256_ids(tiny: Path, judge: Judge) -> None:
    with closing(load(tiny, ram_bytes=16 << 20)) as backend:
        driver = Driver(backend, validate=False)
        prompts = [prompt(1000 + i, 33) for i in range(300)]
        for seq, tokens in enumerate(prompts):
            driver.admit(seq, tokens)
            driver.prefill(seq)
            driver.free(seq)
        for seq, tokens in enumerate(prompts, 1000):
            assert driver.admit(seq, tokens) == 32
            driver.prefill(seq)
            driver.generate([seq], 2)
            driver.check(seq, judge)
            driver.free(seq)


def test_as_many_sequences_run_at_once_as_are_announced(tiny: Path, judge: Judge) -> None:
    with closing(load(tiny, kv_tokens=8192)) as backend:
        driver = Driver(backend)
        most = backend.capabilities.max_sequences
        assert most == 252
        for seq in range(most):
            assert driver.admit(seq, prompt(seq, 4)) is not None
        assert driver.admit(most, prompt(most, 4)) is None
        for first in range(0, most, 84):
            driver.step(dict.fromkeys(range(first, first + 84), 4))
        driver.generate(range(most), 2)
        driver.preempt(7)  # every id is taken, and those kept back are enough to swap
        assert driver.resume(7)
        driver.generate(range(most), 2)
        for seq in range(0, most, 17):
            driver.check(seq, judge)


def test_a_failed_decode_leaves_everything_else_intact(tiny: Path, judge: Judge) -> None:
    with closing(load(tiny)) as backend:
        driver = Driver(backend)
        for seq in (1, 2):
            driver.admit(seq, prompt(20 + seq, 30))
            driver.prefill(seq)
        driver.generate([1, 2], 5)
        wrong = driver.texts[2][-1]
        driver.texts[2][-1] = VOCAB + 5  # llama.cpp refuses the batch for it
        with pytest.raises(StepFaultError, match="llama_decode returned"):
            driver.generate([1, 2], 1)
        driver.texts[2][-1] = wrong
        driver.generate([1, 2], 20)
        for seq in (1, 2):
            driver.check(seq, judge)


def test_cells_that_run_out_fail_the_step_and_not_the_process(tiny: Path, judge: Judge) -> None:
    with closing(load(tiny, kv_tokens=64)) as backend:
        driver = Driver(backend)
        driver.admit(1, prompt(5, 20))
        driver.prefill(1)
        context = backend._context
        used = context.cells - 22
        for start in range(0, used, 64):  # somebody else takes what the pager thinks is free
            n = min(64, used - start)
            context.tokens[:n] = 5
            context.positions[:n] = np.arange(start, start + n)
            context.sequences[:n] = 255
            context.wanted[:n] = 0
            assert context.decode(n) == 0
        driver.texts[1] += prompt(6, 10)
        driver.drawn_at[1] = []
        with pytest.raises(StepFaultError):
            driver.prefill(1)
        context.remove(255)
        driver.prefill(1)
        driver.generate([1], 5)
        driver.check(1, judge)


def test_a_transfer_that_cannot_be_done_is_reported_and_changes_nothing(tiny: Path) -> None:
    with closing(load(tiny)) as backend:
        backend.apply(
            [
                Store(1, 77, Tier.RAM, (Page(0, 0, 0, 16),)),
                Load(2, 78, Tier.RAM, (Page(0, 0, 9, 16),)),
                Release(78),
            ]
        )
        assert [(t.transfer, t.ok) for t in backend.poll_transfers()] == [(1, False), (2, False)]
        assert backend.poll_transfers() == []
        assert backend.memory().ram_tier == 0


def test_pages_nobody_wants_any_more_do_not_keep_memory(tiny: Path, judge: Judge) -> None:
    budget = 100 * 8192
    with closing(load(tiny, ram_bytes=budget)) as backend:
        driver = Driver(backend)
        driver.admit(0, prompt(8, 400))
        driver.prefill(0)
        table = driver.pager.block_table(0)
        dice = np.random.default_rng(SEED)
        slots = backend.capabilities.ram_blocks
        content: dict[int, int] = {}
        for transfer in range(60):
            first = int(dice.integers(0, 25 - 10))
            chosen = dice.choice(slots, 10, replace=False).tolist()
            pages = tuple(
                Page(first + i, int(table[first + i]), slot, 16) for i, slot in enumerate(chosen)
            )
            content.update((page.slot, page.index) for page in pages)
            backend.apply([Store(transfer, 0, Tier.RAM, pages)])
            assert all(t.ok for t in backend.poll_transfers())
            assert backend.memory().ram_tier <= budget
        # Whatever was packed meanwhile is still what it was.
        for slot, index in list(content.items())[:40]:
            seq = 1000 + slot
            page = Page(index, int(table[index]), slot, 16)
            backend.apply([Load(seq, seq, Tier.RAM, (page,))])
            assert all(t.ok for t in backend.poll_transfers())
            held = backend._context.held(backend._ids[seq])
            assert held == (16 * index, 16 * index + 15)
            backend.apply([Release(seq)])


def test_logprobs_and_sampling_go_through_the_shared_sampler(tiny: Path) -> None:
    with closing(load(tiny)) as backend:
        driver = Driver(backend)
        texts = []
        for seq in (1, 2):
            sampler = greedy(VOCAB, temperature=0.9, top_k=40, top_p=0.95, seed=5, logprobs=3)
            driver.admit(seq, prompt(9, 20), sampler)
            driver.prefill(seq, chunk=5 * seq)
            driver.generate([seq], 20)
            texts.append(driver.free(seq))
        assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------- loading


def test_what_cannot_be_loaded_is_named(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nowhere\.gguf") as missing:
        load_backend(configure(tmp_path / "nowhere.gguf"), lambda _: None)
    assert missing.value.code == "E_MODEL"
    assert missing.value.details["path"].endswith("nowhere.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:20_000])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf") as broken:
        load(cut)
    assert broken.value.details["messages"], "llama.cpp's own reasons"
    with pytest.raises(ModelLoadError, match="q4_0"):
        load(tiny, kv_dtype="q4_0")
    with pytest.raises(ModelLoadError, match="are available") as huge:
        load(tiny, kv_tokens=1 << 40)
    assert huge.value.details["kv_tokens"] == 1 << 40
    with pytest.raises(ModelLoadError, match="a pool of 16 tokens"):
        load(tiny, kv_tokens=16)


def test_capabilities_are_those_of_model_and_configuration(tiny: Path) -> None:
    seen: list[float] = []
    backend = LlamaBackend.load(configure(tiny, kv_tokens=0, threads=2), seen.append)
    with closing(backend):
        caps = backend.capabilities
        assert (caps.name, caps.device) == ("llama.cpp", "CPU (2 threads)")
        assert (caps.vocab_size, caps.context_tokens, caps.eog_tokens) == (
            VOCAB,
            4096,
            frozenset({2}),
        )
        assert caps.block_bytes == 16 * 2 * 2 * 32 * 4  # tokens, layers, K and V, width, F32
        assert caps.gpu_blocks * 16 >= caps.context_tokens
        assert not caps.keep_cached_on_gpu
        memory = backend.memory()
        assert memory.kv_pool >= caps.gpu_blocks * caps.block_bytes
        assert memory.weights > 100_000
        assert seen[-1] == 1.0
    backend.close()


def test_warnings_of_llama_cpp_are_logged(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    with caplog.at_level(logging.WARNING), pytest.raises(ModelLoadError):
        load(tmp_path / "none.gguf")
    assert any("llama.cpp:" in record.message for record in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "pagedd_daemon"):
        load(tiny).close()
    assert not caplog.records


# ---------------------------------------------------------------------------- the packaged model


def tokenize(path: Path) -> Callable[[str], list[int]]:
    model = Model(str(path), lambda _: None)
    vocab = llama_cpp.llama_model_get_vocab(model.pointer)

    def tokens(text: str) -> list[int]:
        raw = text.encode()
        out = (ctypes.c_int32 * 1024)()
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), out, len(out), True, False)
        return list(out[:n])

    return tokens


def test_a_model_folder_is_refused_with_what_can_run_it(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="runs GGUF files"):
        load(tmp_path)


@pytest.mark.slow
def test_the_packaged_model_gives_its_plain_text_through_every_path(smollm2_path: Path) -> None:
    path = f32_copy(smollm2_path)
    words = tokenize(smollm2_path)
    stem = words(
        "The history of the lighthouse begins long before electricity. Keepers carried oil to the "
        "lamp every night, and in the morning they cleaned the glass and wrote down the weather"
    )
    with closing(Plain(path)) as plain, closing(load(path, ram_bytes=64 << 20)) as backend:
        driver = Driver(backend)
        driver.admit(1, stem)
        driver.prefill(1, chunk=5)
        driver.fork(1, {2: words(" up")[-1], 3: words(" from")[-1]})
        driver.generate([1, 2, 3], 6)
        driver.preempt(2)
        driver.generate([1, 3], 4)
        assert driver.resume(2)
        driver.generate([3, 2, 1], 6)
        driver.free(3)
        assert driver.admit(4, [*stem, *words(" and the ships.")]) == len(stem) // 16 * 16 > 16
        driver.prefill(4)
        driver.generate([4, 1, 2], 6)
        for seq in (1, 2, 4):
            driver.check(seq, plain.judge)


def test_the_packaged_model_answers_as_it_is_shipped(smollm2_path: Path) -> None:
    words = tokenize(smollm2_path)
    with closing(load(smollm2_path, kv_dtype="f16", flash_attention=True)) as backend:
        driver = Driver(backend)
        driver.admit(1, words("The capital of France is"))
        driver.prefill(1)
        assert driver.texts[1][-1:] == words(" Paris")[-1:]
