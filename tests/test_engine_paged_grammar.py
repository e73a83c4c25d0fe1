"""Constrained output on the paged engine: masks go to the device, and only who has one waits."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Step
from pagedd_daemon.backends.paged.backend import LEAST_PIECE_TOKENS, PagedBackend
from pagedd_daemon.backends.paged.drawing import Drawer, Flight
from pagedd_daemon.backends.paged.load import Wishes, serve
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.helper.vocabulary import ByteVocabulary
from pagedd_daemon.params import SamplingParams, StopParams
from tests.support.paged_backend import Plain, tiny_model

EOG = 256
MODEL = tiny_model()


class Bench:
    """Texts of an engine over the tiny model, whose ids below 256 are bytes."""

    def __init__(self, engine: Engine, backend: PagedBackend) -> None:
        self.engine = engine
        self.backend = backend
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.reasons: dict[tuple[int, int], str] = {}
        self.logprobs: dict[tuple[int, int], list[float]] = {}
        self.rejected: list[m.Rejected] = []

    def ask(
        self, rid: int, kind: str = "", text: str = "", *, n: int = 1, **params: object
    ) -> None:
        sampling = SamplingParams(seed=rid, **params)  # type: ignore[arg-type]
        prompt = np.arange(10 + rid, dtype="<i4") % 250
        stop = asdict(StopParams(max_tokens=60))
        self.engine.handle(
            m.Submit(
                rid, "app", 1, bytes(32), prompt.tobytes(), n, asdict(sampling), stop,
                grammar_kind=kind, grammar=text,
            )
        )  # fmt: skip

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def step(self) -> None:
        if not self.engine.step(self._said):
            time.sleep(1e-3)  # a grammar is being compiled

    def text(self, rid: int, index: int = 0) -> str:
        assert self.reasons[rid, index] == "stop"
        return bytes(self.tokens[rid, index]).decode()

    def _said(self, report: m.StepReport) -> None:
        for output in report.outputs:
            ids = np.frombuffer(output.tokens, "<i4").tolist()
            self.tokens.setdefault((output.rid, output.index), []).extend(ids)
            values = [value for value, _ in output.logprobs or ()]
            self.logprobs.setdefault((output.rid, output.index), []).extend(values)
        for ended in report.ended:
            self.reasons[ended.rid, ended.index] = ended.reason
        self.rejected += report.rejected


@contextmanager
def bench(*, asynchronous: bool) -> Iterator[Bench]:
    wishes = Wishes(kv_tokens=2048, eog_tokens=frozenset({EOG}), asynchronous=asynchronous)
    vocabulary = ByteVocabulary()
    configure = m.Configure(
        "torch", "", bytes(32), 0, 0, 0, 1,
        piece_lengths=pack_ids(vocabulary.piece_lengths), pieces=vocabulary.pieces,
    )  # fmt: skip
    with (
        closing(serve(MODEL, wishes)) as backend,
        closing(Grammars(configure, backend.capabilities)) as grammars,
    ):
        yield Bench(Engine(backend, time.monotonic, grammars), backend)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_kind_of_grammar_is_kept_to_and_free_rows_are_as_they_were(
    asynchronous: bool,
) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    with bench(asynchronous=asynchronous) as it:
        it.ask(1, "regex", "(yes|no), [0-9]{3}", temperature=1.0, n=3)
        it.ask(2, "json_schema", json.dumps(schema), temperature=0.7, top_k=30, logprobs=2)
        it.ask(3, "grammar", 'start: "a" NAME "!"\nNAME: /[A-Z][a-z]{1,9}/', temperature=0.0)
        it.ask(4, temperature=0.0)
        it.run()
    assert not it.rejected
    for index in range(3):
        assert re.fullmatch("(yes|no), [0-9]{3}", it.text(1, index))
    assert len({it.text(1, index) for index in range(3)}) > 1
    assert 2 <= len(json.loads(it.text(2))) <= 3
    assert re.fullmatch("a[A-Z][a-z]{1,9}!", it.text(3))
    free = it.tokens[4, 0]
    assert free == Plain(MODEL).greedy(list(range(14)), len(free))


def test_sampled_constrained_texts_do_not_depend_on_what_runs_beside_them() -> None:
    texts = []
    for others in (0, 6):
        with bench(asynchronous=True) as it:
            it.ask(1, "regex", "[a-z]{8,20}", temperature=1.0)
            for rid in range(2, 2 + others):
                it.ask(rid, temperature=1.0)
            it.run()
            texts.append(it.text(1))
    assert texts[0] == texts[1]


def test_constrained_rows_take_part_in_every_step() -> None:
    runs = []
    with bench(asynchronous=True) as it:
        launch = it.backend.launch

        def watched(step: Step) -> Flight:
            runs.append(len(step.runs))
            return launch(step)

        it.backend.launch = watched  # type: ignore[method-assign]
        for rid in range(1, 4):
            it.ask(rid, "regex", "[a-z]{20}", temperature=1.0)
        it.run()
    assert all(re.fullmatch("[a-z]{20}", it.text(rid)) for rid in range(1, 4))
    # Each of 20 tokens and what is computed in vain behind the last: the three are let in one by
    # one at worst, and no step is without those that have begun.
    assert len(runs) <= 20 + 1 + 2
    assert sum(runs) == 3 * (20 + 1)


def test_penalties_and_logprobs_are_the_same_whether_draws_wait_or_not() -> None:
    found = []
    for asynchronous in (False, True):
        with bench(asynchronous=asynchronous) as it:
            it.ask(1, "regex", "[a-z]{20,30}", temperature=1.0, frequency_penalty=2.0, logprobs=2)
            it.ask(2, temperature=1.0, presence_penalty=1.0, logprobs=1)
            it.run()
            found.append((it.tokens, it.logprobs))
    assert found[0][0] == found[1][0]
    for key, values in found[0][1].items():
        assert found[1][1][key] == pytest.approx(values)


@pytest.mark.parametrize("most_tokens", [0, LEAST_PIECE_TOKENS + 10])
def test_without_memory_draws_that_wait_come_in_pieces_or_again(most_tokens: int) -> None:
    """With none for a draw its step is tried again; with little for a pass it comes in pieces."""
    with bench(asynchronous=True) as plain:
        _ask_beside_a_long_prompt(plain)
        plain.run()
    with bench(asynchronous=True) as it, pytest.MonkeyPatch.context() as patch:
        if most_tokens:
            it.backend._piece_tokens = LEAST_PIECE_TOKENS
        else:
            _fail_once(patch)
        _ask_beside_a_long_prompt(it)
        it.run()
    assert not it.rejected
    assert it.tokens == plain.tokens


def _ask_beside_a_long_prompt(it: Bench) -> None:
    for rid in range(1, 4):
        it.ask(rid, "regex", "[a-z]{20}", temperature=1.0, frequency_penalty=1.0)
    for _ in range(6):
        it.step()
    it.ask(600, temperature=0.0)


def _fail_once(patch: pytest.MonkeyPatch) -> None:
    """The second draw that waits finds no memory."""
    finish_late, calls = Drawer.finish_late, 0

    def unlucky(self: Drawer) -> None:
        nonlocal calls
        calls += self.late_of() is not None
        finish_late(self)
        if calls == 2:
            calls += 1
            raise torch.OutOfMemoryError("none left")

    patch.setattr(Drawer, "finish_late", unlucky)
