"""Log-probabilities of prompts: every position, once, whatever is cached, cut or paged out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pagedd_daemon.backends.base import SCORED_ROWS, Backend, Handle, Step
from pagedd_daemon.backends.llama import LlamaBackend
from pagedd_daemon.messages import Configure
from pagedd_daemon.params import BeamParams, SamplingParams, StopParams
from tests.support.answers import Answer, Ask, Asking
from tests.support.paged_backend import Plain as PlainTorch
from tests.support.paged_backend import tiny_backend, tiny_model
from tests.support.plain_llama import PlainLlama
from tests.support.simulated import plain_logprobs, simulated
from tests.support.simulation import seeds
from tests.support.tiny_model import write_tiny_model
from tests.test_engine_core import prompt_of

STOP = StopParams(max_tokens=6, ignore_eos=True)


def expected(prompt: list[int], top: int) -> list[tuple[float, list[tuple[int, float]]]]:
    logprobs = plain_logprobs()
    entries = []
    for at in range(1, len(prompt)):
        row = logprobs(prompt[:at])
        best = sorted(range(len(row)), key=lambda token: (-row[token], token))[:top]
        entries.append((row[prompt[at]], [(token, row[token]) for token in best]))
    return entries


def check(answer: Answer, prompt: list[int], top: int) -> None:
    wanted = expected(prompt, top)
    assert [p for p, _ in answer.prompt] == pytest.approx([p for p, _ in wanted])
    for (_, mine), (_, theirs) in zip(answer.prompt, wanted, strict=True):
        assert [token for token, _ in mine] == [token for token, _ in theirs]
        assert [p for _, p in mine] == pytest.approx([p for _, p in theirs])


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 150])
def test_every_token_of_a_prompt_but_the_first_is_scored(length: int, llama: bool) -> None:
    prompt = prompt_of(1, length)
    asking = Asking(simulated(llama=llama))
    ask = Ask(prompt, 2, SamplingParams(seed=3), STOP, prompt_logprobs=3)
    (answer,) = asking.all([ask])
    check(answer, prompt, 3)
    (plain,) = Asking(simulated(llama=llama)).all([Ask(prompt, 2, SamplingParams(seed=3), STOP)])
    assert answer.tokens == plain.tokens


@pytest.mark.parametrize("llama", [False, True])
def test_a_cached_prefix_is_computed_again_and_then_shared_as_ever(llama: bool) -> None:
    prompt = prompt_of(2, 120)
    asking = Asking(simulated(llama=llama))
    first, scored, last = (
        asking.all([Ask(prompt, stop=STOP, prompt_logprobs=top)])[0] for top in (-1, 0, -1)
    )
    check(scored, prompt, 0)
    assert scored.tokens == first.tokens == last.tokens
    assert scored.closed is not None
    assert scored.closed.cached_tokens == 0
    assert last.closed is not None
    assert last.closed.cached_tokens == 112


@pytest.mark.parametrize("seed", seeds(8))
@pytest.mark.parametrize("llama", [False, True])
def test_no_position_is_lost_or_told_twice_when_prompts_are_paged_out(
    llama: bool, seed: int
) -> None:
    print(f"replay with PAGEDD_SEED={seed}")
    dice = random.Random(seed)
    asking = Asking(simulated(blocks=40, ram_pages=dice.choice([0, 200]), llama=llama))
    stem = prompt_of(seed, 90)
    prompts = [stem[: dice.randrange(1, 90)] + prompt_of(at, 60) for at in range(5)]
    rids = [
        asking.ask(Ask(p, stop=STOP, prompt_logprobs=dice.choice([0, 2]) if at % 2 else -1))
        for at, p in enumerate(prompts)
    ]
    scheduler = asking.engine._scheduler
    while asking.engine.has_work:
        asking.step()
        asking.engine.validate()
        running = [s for s in scheduler.sequences() if s.removable]
        if running and dice.random() < 0.2:
            scheduler._room.page_out(dice.choice(running))
    for at, rid in enumerate(rids):
        answer = asking.answers[rid]
        assert [p for p, _ in answer.prompt] == pytest.approx(
            [p for p, _ in expected(prompts[at], 0)] if at % 2 else []
        )


class Watched:
    """A backend that remembers how many rows of logits its largest step had."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.most_rows = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def launch(self, step: Step) -> Handle:
        scored = sum(len(run.follows) for run in step.runs if run.follows is not None)
        self.most_rows = max(self.most_rows, scored)
        return self._backend.launch(step)


def test_a_step_never_has_more_rows_of_logits_than_a_fixed_number() -> None:
    watched = Watched(simulated())
    asks = [Ask(prompt_of(at, 300), stop=STOP, prompt_logprobs=1) for at in range(3)]
    answers = Asking(watched).all(asks)  # type: ignore[arg-type]
    assert [len(answer.prompt) for answer in answers] == [299] * 3
    assert 0 < watched.most_rows <= SCORED_ROWS


def test_logits_that_are_no_numbers_end_the_request() -> None:
    backend = simulated()
    backend.faults.nan_sequences.add(1)
    one, other = Asking(backend).all(
        [Ask(prompt_of(1, 90), stop=STOP, prompt_logprobs=1), Ask(prompt_of(2, 30), stop=STOP)]
    )
    assert one.rejected is not None
    assert "NaN" in one.rejected.message
    assert other.texts[0].reason == "length"


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    peak = rows.max(axis=1, keepdims=True)
    return np.asarray(rows - peak - np.log(np.exp(rows - peak).sum(axis=1, keepdims=True)))


def test_scores_on_torch_are_those_of_a_plain_run() -> None:
    model = tiny_model()
    prompt = prompt_of(4, 200)
    rows = log_softmax(PlainTorch(model).logits(prompt))
    with closing(tiny_backend(model)) as backend:
        asks = [
            Ask(prompt, 2, stop=STOP, prompt_logprobs=4, beams=BeamParams(3)),
            Ask(prompt[:50], stop=STOP, prompt_logprobs=0),
            Ask(prompt_of(5, 30), stop=STOP),
        ]
        answers = Asking(backend).all(asks)
    for answer, ask in zip(answers[:2], asks, strict=False):
        length = len(ask.prompt)
        wanted = rows[np.arange(length - 1), prompt[1:length]]
        assert [p for p, _ in answer.prompt] == pytest.approx(wanted.tolist(), abs=1e-5)
    for at, (_, top) in enumerate(answers[0].prompt):
        best = np.argsort(-rows[at], kind="stable")[:4]
        assert [token for token, _ in top] == best.tolist()
        assert [p for _, p in top] == pytest.approx(rows[at][best].tolist(), abs=1e-5)
    assert not answers[2].prompt


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("scored") / "tiny.gguf")


@pytest.fixture
def llama(tiny: Path) -> Iterator[LlamaBackend]:
    configure = Configure(
        backend="llama.cpp",
        model_path=str(tiny),
        model_digest=bytes(32),
        context_tokens=0,
        kv_tokens=1024,
        ram_bytes=4 << 20,
        threads=1,
        kv_dtype="f32",
        flash_attention=False,
    )
    with closing(LlamaBackend.load(configure, lambda _: None)) as backend:
        yield backend


@pytest.mark.model
def test_scores_on_llama_cpp_are_those_of_a_plain_run(tiny: Path, llama: LlamaBackend) -> None:
    vocab = llama.capabilities.vocab_size
    prompt = [3 + token % (vocab - 3) for token in prompt_of(6, 150)]
    with closing(PlainLlama(tiny)) as plain:
        rows = log_softmax(plain.logits(prompt))
    asking = Asking(llama)
    asks = [Ask(prompt, stop=STOP, prompt_logprobs=2), Ask(prompt[:9], stop=STOP)]
    answers = asking.all(asks)
    wanted = rows[np.arange(149), prompt[1:]].tolist()
    assert [p for p, _ in answers[0].prompt] == pytest.approx(wanted, abs=1e-3)
    for at, (_, top) in enumerate(answers[0].prompt):
        best = np.sort(rows[at])[::-1][:2].tolist()
        assert [p for _, p in top] == pytest.approx(best, abs=1e-3)
