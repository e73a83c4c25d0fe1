"""Sampling on tensors draws the tokens that the NumPy sampler draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pagedd_daemon.engine.sampler import Sampler, draw
from pagedd_daemon.params import StopParams
from pagedd_kernels import sample
from tests.support.sampling import EOG, PROMPT, VOCAB, params_of, random_logits, sampler

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 300, "min_p": 0.01},
    {"temperature": 2.5, "top_k": 1},
    {"temperature": 0.8, "typical_p": 0.6},
    {"temperature": 1.0, "typical_p": 0.9, "top_p": 0.7, "top_k": 100},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 3},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 0},
    {"temperature": 1.0, "logit_bias": {3: 4.0, 17: -2.5}, "logprobs": 2},
    {"temperature": 1e-4, "top_p": 0.5},
]


def rows(count: int, **stop: Any) -> list[Sampler]:
    made = []
    for row in range(count):
        one = sampler(
            index=row,
            stop=StopParams(max_tokens=100, **stop),
            seed=row,
            **SETTINGS[row % len(SETTINGS)],
        )
        for token in range(row % 7):
            one.accept(3 * token % VOCAB)
        made.append(one)
    return made


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("stop", [{}, {"ignore_eos": True}, {"min_tokens": 4}])
def test_a_batch_of_all_settings_draws_what_numpy_draws(spread: float, stop: Any) -> None:
    rng = np.random.default_rng(int(spread * 10))
    for _ in range(6):
        samplers = rows(39, **stop)
        logits = random_logits(rng, len(samplers), spread)
        expected = draw(logits.copy(), list(enumerate(samplers)))
        got = sample(torch.from_numpy(logits), params_of(samplers))
        assert got.tokens.tolist() == [d.token for d in expected]
        assert got.logprobs is not None
        assert got.top_tokens is not None
        assert got.top_logprobs is not None
        for row, drawn in enumerate(expected):
            if drawn.logprob is not None:
                assert got.logprobs[row].item() == pytest.approx(drawn.logprob, abs=1e-5)
                kept = len(drawn.top)
                assert got.top_tokens[row, :kept].tolist() == [t for t, _ in drawn.top]
                assert got.top_logprobs[row, :kept].tolist() == pytest.approx(
                    [p for _, p in drawn.top], abs=1e-5
                )


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    samplers = rows(26)
    logits = torch.from_numpy(random_logits(np.random.default_rng(4), len(samplers), 2.0))
    together = sample(logits, params_of(samplers)).tokens
    alone = [sample(logits[i : i + 1], params_of([s])).tokens for i, s in enumerate(samplers)]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 5}])
def test_a_row_that_is_no_numbers_ends_alone(setting: dict[str, Any]) -> None:
    samplers = [sampler(seed=i, **setting) for i in range(4)]
    logits = torch.from_numpy(random_logits(np.random.default_rng(5), 4, 1.0))
    whole = sample(logits, params_of(samplers)).tokens.tolist()
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    got = sample(logits, params_of(samplers)).tokens.tolist()
    assert got == [whole[0], -1, -1, whole[3]]


def test_counts_follow_the_draws_on_the_device() -> None:
    samplers = [
        sampler(seed=i, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.4)
        for i in range(3)
    ]
    rng = np.random.default_rng(6)
    params = params_of(samplers)
    for step in range(8):
        logits = random_logits(rng, 3, 1.0)
        expected = [d.token for d in draw(logits.copy(), list(enumerate(samplers)))]
        assert params.uniform is not None
        params.uniform.copy_(torch.tensor([s.uniform() for s in samplers]))
        assert sample(torch.from_numpy(logits), params).tokens.tolist() == expected, step
        for one, token in zip(samplers, expected, strict=True):
            one.accept(token)


def test_the_prompt_and_end_of_generation_tokens_matter() -> None:
    """The settings above would not notice if the made-up prompt were empty."""
    assert PROMPT.size
    assert EOG
