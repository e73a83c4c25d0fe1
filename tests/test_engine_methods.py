"""All ways of decoding in one batch, in a pool at a quarter of the demand: the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.messages import Configure
from pagedd_daemon.params import BeamParams, SamplingParams, StopParams
from tests.support.answers import Answer, Ask, Asking
from tests.support.paged_backend import VOCAB as TORCH_VOCAB
from tests.support.paged_backend import tiny_backend, tiny_model
from tests.support.simulated import simulated
from tests.support.tiny_model import VOCAB, write_tiny_model

STOP = StopParams(max_tokens=40, ignore_eos=True)
TOLERANCE = 1e-3


def prompt(seed: int, length: int, vocab: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, vocab, length)]


def all_methods(vocab: int) -> list[Ask]:
    """Greedy, sampled, four samples, ranked ones, beams, and prompts that begin alike."""
    stem = prompt(0, 48, vocab)
    drawn = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=11)
    scored = SamplingParams(temperature=0.9, seed=12, logprobs=0)
    return [
        Ask(prompt(1, 50, vocab), stop=STOP),
        Ask(prompt(2, 60, vocab), 1, drawn, STOP),
        Ask(prompt(3, 70, vocab), 4, drawn, STOP),
        Ask(prompt(4, 40, vocab), 4, scored, STOP),
        Ask(prompt(5, 80, vocab), 4, stop=STOP, beams=BeamParams(4)),
        Ask(prompt(6, 30, vocab), 2, stop=STOP, beams=BeamParams(3, 0.5, "never")),
        *(Ask([*stem, *prompt(10 + at, 9, vocab)], stop=STOP) for at in range(3)),
        Ask(prompt(7, 90, vocab), stop=STOP, prompt_logprobs=1),
    ]


def demand_blocks(asks: Sequence[Ask], block: int = 16) -> int:
    """Blocks of all requests at once, each text on its own."""
    return sum(
        max(ask.n, ask.beams.width if ask.beams else 1)
        * -(-(len(ask.prompt) + ask.stop.max_tokens) // block)
        for ask in asks
    )


def preempted(asking: Asking) -> int:
    stats = asking.engine._pool.pager.stats()
    return stats.preemptions_swap + stats.preemptions_recompute


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
    asks = all_methods(256)
    plain = Asking(simulated(blocks=2048, llama=llama, verify=False)).all(asks)
    asking = Asking(simulated(blocks=demand_blocks(asks) // 4, ram_pages=ram_pages, llama=llama))
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
        asking.run(until=lambda: all(len(t.tokens) >= 5 for t in asking.answers[rid].texts))
        scheduler = asking.engine._scheduler
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
