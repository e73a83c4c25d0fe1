"""All ways of decoding in one batch, in a pool at a quarter of the demand: the same texts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.messages import Configure
from pagedd_daemon.params import SamplingParams, StopParams
from tests.support.answers import Answer, Ask, Asking
from tests.support.cells import used_cells
from tests.support.methods import all_methods, demand_blocks, preempted, prompt
from tests.support.paged_backend import VOCAB as TORCH_VOCAB
from tests.support.paged_backend import tiny_backend, tiny_model
from tests.support.simulated import grammars_for, simulated
from tests.support.tiny_model import VOCAB, write_tiny_model

TOLERANCE = 1e-3


def identical(pressed: list[Answer], plain: list[Answer]) -> None:
    for mine, theirs in zip(pressed, plain, strict=True):
        assert mine.rejected is None
        assert mine.tokens == theirs.tokens
        assert [t.reason for t in mine.texts] == [t.reason for t in theirs.texts]
        scores = [text.score for text in theirs.texts if text.score is not None]
        assert [t.score for t in mine.texts if t.score is not None] == pytest.approx(scores)
        assert [p for p, _ in mine.prompt] == pytest.approx([p for p, _ in theirs.prompt])


@pytest.mark.parametrize("ram_pages", [0, 512])
@pytest.mark.parametrize("llama", [False, True])
def test_simulated_texts_are_identical(llama: bool, ram_pages: int) -> None:
    regex = Ask(prompt(8, 40, 256), stop=StopParams(max_tokens=40), regex="[a-z ]{10,30}!")
    asks = [*all_methods(256), regex]
    roomy = simulated(blocks=2048, llama=llama, verify=False)
    tight = simulated(blocks=demand_blocks(asks) // 4, ram_pages=ram_pages, llama=llama)
    with closing(grammars_for(roomy)) as grammars, closing(grammars_for(tight)) as others:
        plain = Asking(roomy, grammars).all(asks)
        asking = Asking(tight, others)
        identical(asking.all(asks), plain)
    assert preempted(asking) > 0
    asking.engine.validate()


def test_torch_texts_are_identical_in_float64() -> None:
    model, asks = tiny_model(), all_methods(TORCH_VOCAB)
    with closing(tiny_backend(model, blocks=512)) as roomy:
        plain = Asking(roomy).all(asks)
    with closing(tiny_backend(model, blocks=demand_blocks(asks) // 4, ram_pages=512)) as tight:
        asking = Asking(tight)
        identical(asking.all(asks), plain)
        assert preempted(asking) > 0
        asking.engine.validate()


def llama(path: Path, kv_tokens: int) -> LlamaBackend:
    configure = Configure(
        backend="llama.cpp",
        model_path=str(path),
        model_digest=bytes(32),
        context_tokens=1024,
        kv_tokens=kv_tokens,
        ram_bytes=64 << 20,
        threads=1,
        kv_dtype="f32",
        flash_attention=False,
    )
    return LlamaBackend.load(configure, lambda _: None)


@pytest.mark.model
def test_llama_texts_are_identical_in_full_precision(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    asks = all_methods(VOCAB)
    with closing(llama(path, 16 * 512)) as roomy:
        plain = Asking(roomy).all(asks)
    with closing(llama(path, 4 * demand_blocks(asks))) as tight:
        asking = Asking(tight)
        pressed = asking.all(asks)
        assert preempted(asking) > 0
    for mine, theirs in zip(pressed, plain, strict=True):
        assert mine.rejected is None
        for one, other in zip(mine.texts, theirs.texts, strict=True):
            if one.score is not None and other.score is not None:
                assert one.score == pytest.approx(other.score, abs=TOLERANCE)
            else:
                assert one.tokens == other.tokens


@pytest.mark.model
@pytest.mark.parametrize("length", [1000, 1008])
def test_eight_that_share_a_thousand_tokens_take_no_more_cells_when_they_are_back(
    tmp_path: Path, length: int
) -> None:
    stop = StopParams(60, ignore_eos=True)
    ask = Ask(prompt(1, length, VOCAB), 8, SamplingParams(seed=2), stop)
    with closing(llama(write_tiny_model(tmp_path / "tiny.gguf"), 16 * 128)) as backend:
        asking = Asking(backend)
        asking.ask(ask)
        scheduler = asking.engine._scheduler
        asking.run(until=lambda: any(s.generated >= 5 for s in scheduler.sequences()))
        scheduler.wake()  # a stretch ends, and the pager knows what was computed
        group = list(scheduler.sequences())
        cells, blocks = used_cells(backend._context), asking.blocks
        assert cells == length + sum(s.computed - length for s in group)
        scheduler._room.page_out(group[0])
        assert used_cells(backend._context) == 0
        scheduler.plan(0.0)  # lets them in again
        assert [s.state.value for s in group] == ["running"] * 8
        # The end of the prompt that fills no block was copied by each of them already, as the pager
        # counts; llama.cpp's cells had gone on sharing it.
        assert used_cells(backend._context) <= cells + 7 * (length % 16)
        assert asking.blocks <= blocks + 8  # one each for what it was given room for


@pytest.mark.parametrize("kind", ["simulated", "torch"])
def test_eight_that_share_a_thousand_tokens_take_no_more_blocks_when_they_are_back(
    kind: str,
) -> None:
    model = tiny_model() if kind == "torch" else None
    backend = tiny_backend(model, blocks=128, ram_pages=256) if model else simulated(blocks=128)
    text = prompt(1, 1000, 256)
    stop = StopParams(max_tokens=20, ignore_eos=True)
    ask = Ask(text[:990] if model else text, 8, SamplingParams(seed=2), stop)
    with closing(backend):
        asking = Asking(backend)
        rid = asking.ask(ask)
        scheduler = asking.engine._scheduler
        asking.run(until=lambda: any(s.generated >= 5 for s in scheduler.sequences()))
        scheduler.wake()
        group = list(scheduler.sequences())
        assert len(group) == 8
        before = asking.blocks
        scheduler._room.page_out(group[0])
        asking.run(until=lambda: len(scheduler._residents.preempted) == 8)
        asking.run(until=lambda: all(s.state.value == "running" for s in group))
        # Each may have got a block for its next token by now.
        assert asking.blocks <= before + 8
        assert asking.blocks < before * 1.2
        asking.run()
    assert [text.reason for text in asking.answers[rid].texts] == ["length"] * 8
