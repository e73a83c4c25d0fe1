"""A sample that another engine began: it goes on as if it had never stopped."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.params import SamplingParams
from tests.test_engine_core import EOG, SALT, Bench, sampling, stopping

PROMPT = [int(t) for t in np.random.default_rng(5).integers(32, 127, 70)]
ASKED: dict[str, dict[str, object]] = {
    "greedy": {},
    "drawn": {"temperature": 1.1, "seed": 7},
    "penalised": {
        "temperature": 0.9,
        "seed": 3,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
    },
    "scored": {"logprobs": 3},
}


def go_on(
    bench: Bench,
    rid: int,
    tokens: Sequence[int],
    *,
    index: int = 0,
    prompt: Sequence[int] = PROMPT,
    max_tokens: int = 60,
    **over: object,
) -> None:
    """Submit what was generated of a sample."""
    keys = SamplingParams.__slots__
    bench.engine.handle(
        m.Submit(
            rid=rid,
            app="app",
            klass=1,
            root=SALT,
            prompt=np.asarray([*prompt, *tokens], dtype="<i4").tobytes(),
            n=1,
            sampling=sampling(**{k: v for k, v in over.items() if k in keys}),
            stop=stopping(
                max_tokens=max_tokens, **{k: v for k, v in over.items() if k not in keys}
            ),
            generated=len(tokens),
            index=index,
        )
    )


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("kind", ASKED)
def test_a_sample_resumed_at_any_token_draws_what_it_would_have_drawn(
    kind: str, llama: bool
) -> None:
    plain = Bench(llama=llama)
    plain.submit(1, PROMPT, n=1, klass=1, max_tokens=60, **ASKED[kind])
    plain.run()
    wanted = plain.outcomes[1].tokens[0]
    assert len(wanted) == 60
    bench = Bench(llama=llama)
    for at in random.Random(kind).sample(range(1, 60), 12):
        go_on(bench, at, wanted[:at], index=0, prompt=PROMPT, max_tokens=60, **ASKED[kind])
    bench.run()
    for at, outcome in bench.outcomes.items():
        assert outcome.tokens[0] == wanted[at:], at
        assert outcome.reasons == {0: "length"}
        assert outcome.closed is not None
        assert outcome.closed.prompt_tokens == len(PROMPT)
        assert outcome.closed.generated_tokens == 60 - at


def test_samples_of_one_request_go_on_each_with_its_own_text_and_draws() -> None:
    plain = Bench()
    plain.submit(1, PROMPT, n=3, max_tokens=40, temperature=1.0, seed=11)
    plain.run()
    wanted = plain.outcomes[1].tokens
    assert len({tuple(tokens) for tokens in wanted.values()}) == 3
    bench = Bench()
    cuts = {0: 9, 1: 25, 2: 1}
    for index, at in cuts.items():
        go_on(
            bench,
            10 + index,
            wanted[index][:at],
            index=index,
            max_tokens=40,
            temperature=1.0,
            seed=11,
        )
    bench.run()
    for index, at in cuts.items():
        assert bench.outcomes[10 + index].tokens == {index: wanted[index][at:]}


def test_a_sample_that_had_all_its_tokens_ends_without_a_step() -> None:
    bench = Bench()
    go_on(bench, 1, [40] * 60)
    go_on(bench, 2, [40] * 20, prompt=[40] * 2028, max_tokens=100)
    bench.step()
    assert bench.engine.steps == 0
    assert [bench.outcomes[rid].reasons[0] for rid in (1, 2)] == ["length", "context"]
    assert bench.outcomes[1].closed is not None


def test_the_least_number_of_tokens_counts_those_of_before() -> None:
    bench = Bench()
    tokens = [40] * 30
    go_on(bench, 1, tokens, min_tokens=30, ignore_eos=False, logit_bias={EOG: 100.0})
    go_on(bench, 2, tokens, min_tokens=32, ignore_eos=False, logit_bias={EOG: 100.0})
    bench.run()
    assert [len(bench.outcomes[rid].tokens[0]) for rid in (1, 2)] == [0, 2]
    assert [bench.outcomes[rid].reasons[0] for rid in (1, 2)] == ["stop", "stop"]
