"""The fast sampler against a slow, obvious one, and the promises about its random numbers."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pagedd_daemon.engine.sampler import Drawn, Sampler, draw
from pagedd_daemon.params import SamplingParams, StopParams

VOCAB = 400
EOG = frozenset({2, 5})
PROMPT = np.array([7, 9, 9, 30, 31], np.int32)
SEED = 20250607
Logits = npt.NDArray[np.float32]


def sampler(
    *, index: int = 0, stop: StopParams | None = None, vocab: int = VOCAB, **params: Any
) -> Sampler:
    return Sampler(
        SamplingParams(**params),
        stop or StopParams(max_tokens=100),
        index=index,
        prompt=PROMPT,
        vocab_size=vocab,
        eog_tokens=EOG,
    )


def random_logits(rng: np.random.Generator, rows: int, spread: float, vocab: int = VOCAB) -> Logits:
    """Rounded to quarters, so that ties are common."""
    return (np.round(rng.normal(0, spread, (rows, vocab)) * 4) / 4).astype(np.float32)


def reference(row: Logits, s: Sampler, generated: list[int]) -> int:
    """The semantics of `SamplingParams`, one obvious step after the other, over the whole row."""
    p, stop = s.params, s.stop
    logit = [float(x) for x in row]
    for token, bias in p.logit_bias.items():
        logit[token] = float(np.float32(logit[token] + bias))
    counts = Counter(generated)
    seen = set(generated)
    if p.repetition_penalty != 1:
        seen |= set(PROMPT.tolist())
    for token in seen:
        x = logit[token]
        x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        x -= counts[token] * p.frequency_penalty + (counts[token] > 0) * p.presence_penalty
        logit[token] = float(np.float32(x))
    forbidden = set(EOG) if stop.ignore_eos else set()
    if len(generated) < stop.min_tokens:
        forbidden |= EOG | set(stop.stop_token_ids)
    ids = [i for i in range(len(logit)) if i not in forbidden and logit[i] > -math.inf]
    ids.sort(key=lambda i: (-logit[i], i))
    if p.temperature == 0:
        return ids[0]

    def weights(kept: list[int], temperature: float) -> list[float]:
        return [math.exp((logit[i] - logit[kept[0]]) / temperature) for i in kept]

    if p.top_k:
        ids = ids[: p.top_k]
    if p.typical_p < 1:
        w = weights(ids, 1.0)
        q = {i: x / math.fsum(w) for i, x in zip(ids, w, strict=True)}
        entropy = -math.fsum(x * math.log(x) for x in q.values() if x > 0)
        order = sorted(ids, key=lambda i: round(abs(-math.log(q[i]) - entropy), 9))
        total, kept = 0.0, []
        for i in order:
            kept.append(i)
            total += q[i]
            if total > p.typical_p:
                break
        ids = [i for i in ids if i in set(kept)]
    if p.top_p < 1:
        w = weights(ids, 1.0)
        running = list(itertools.accumulate(w))
        ids = ids[: next(n for n, x in enumerate(running) if x >= p.top_p * running[-1]) + 1]
    if p.min_p > 0:
        ids = [i for i in ids if logit[i] >= logit[ids[0]] + math.log(p.min_p)]
    running = list(itertools.accumulate(weights(ids, p.temperature)))
    target = s.uniform() * running[-1]
    return next(i for i, x in zip(ids, running, strict=True) if x >= target)


GRID: list[dict[str, Any]] = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m, "typical_p": y}
    for t, k, p, m, y in itertools.product(
        (0.0, 0.05, 0.8, 3.0), (0, 1, 40, 390, 5000), (0.3, 0.95, 1.0), (0.0, 0.08), (0.6, 1.0)
    )
]


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
def test_draws_what_the_slow_reference_draws_for_every_combination(spread: float) -> None:
    rng = np.random.default_rng(SEED)
    for case, params in enumerate(GRID):
        s = sampler(seed=case, **params)
        logits = random_logits(rng, 4, spread)
        history: list[int] = []
        for row in logits:
            expected = reference(row, s, history)
            (drawn,) = draw(row[None], [(0, s)])
            assert drawn.token == expected, (SEED, case, params, spread, len(history))
            s.accept(drawn.token)
            history.append(drawn.token)


def test_draws_what_the_reference_draws_with_bias_penalties_and_stops() -> None:
    rng = np.random.default_rng(SEED)
    dice = random.Random(SEED)
    for case in range(400):
        params: dict[str, Any] = dict(
            dice.choice(GRID),
            repetition_penalty=dice.choice([1.0, 1.3, 0.7]),
            presence_penalty=dice.choice([0.0, 0.9, -2.0]),
            frequency_penalty=dice.choice([0.0, 0.4]),
            logit_bias=dice.choice([{}, {3: 4.0, 9: -100.0}, {2: 30.0, 5: 31.0, 44: 20.0}]),
            seed=case,
        )
        stop = StopParams(
            max_tokens=50,
            min_tokens=dice.choice([0, 3]),
            ignore_eos=dice.random() < 0.5,
            stop_token_ids=dice.choice([(), (44, 3)]),
        )
        s = sampler(stop=stop, **params)
        history: list[int] = []
        for row in random_logits(rng, 5, 3.0, 60):
            expected = reference(row, s, history)
            (drawn,) = draw(row[None], [(0, s)])
            assert drawn.token == expected, (SEED, case, params, stop, history)
            s.accept(drawn.token)
            history.append(drawn.token)


def test_the_reach_that_a_sampler_learned_never_changes_a_draw() -> None:
    rng = np.random.default_rng(SEED)
    settings: list[dict[str, Any]] = [{"top_k": 40, "top_p": 0.95}, {"top_p": 0.9}, {}]
    for params in settings:
        learned = sampler(**params)
        for spread in (0.01, 30.0, 1.0, 0.2, 8.0):
            row = random_logits(rng, 1, spread, 5000)
            fresh = sampler(**params)
            fresh.generated = learned.generated
            assert draw(row, [(0, learned)]) == draw(row, [(0, fresh)])
            learned.accept(0)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"temperature": 1.0}, 8),
        ({"temperature": 2.0, "top_k": 5}, 5),
        ({"temperature": 0.7, "top_p": 0.9}, 8),
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any], allowed: int) -> None:
    row = np.array([[1.0, 0.5, 0.0, -0.5, -1.0, -1.5, 0.2, 0.9]], np.float32)
    s = sampler(seed=SEED, vocab=8, stop=StopParams(max_tokens=9), **params)
    s = Sampler(s.params, s.stop, index=0, prompt=PROMPT[:0], vocab_size=8, eog_tokens=frozenset())
    draws = 20_000
    seen: Counter[int] = Counter()
    for _ in range(draws):
        (drawn,) = draw(row, [(0, s)])
        seen[drawn.token] += 1
        s.accept(drawn.token)
    kept = sorted(range(8), key=lambda i: -row[0, i])[:allowed]
    if "top_p" in params:
        mass = np.exp(row[0, kept].astype(float))
        kept = kept[: int(np.searchsorted(mass.cumsum() / mass.sum(), params["top_p"])) + 1]
    weight = {i: math.exp(float(row[0, i]) / params["temperature"]) for i in kept}
    total = sum(weight.values())
    assert set(seen) == set(kept)
    chi2 = sum((seen[i] - draws * w / total) ** 2 / (draws * w / total) for i, w in weight.items())
    assert chi2 < 24.3  # p = 0.001 at 7 degrees of freedom, the most there are here


def test_batching_and_the_order_of_rows_change_nothing() -> None:
    rng = np.random.default_rng(SEED)
    logits = random_logits(rng, 16, 3.0)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 40, "top_p": 0.95, "temperature": 0.8},
        {"top_p": 0.5, "logprobs": 2},
        {"repetition_penalty": 1.2, "temperature": 0.0},
    ]
    pairs = [(i, sampler(index=i, seed=3, **settings[i % 4])) for i in range(16)]
    before = logits.copy()
    alone = [draw(logits[i : i + 1], [(0, s)])[0] for i, s in pairs]
    assert draw(logits, pairs) == alone
    order = rng.permutation(16)
    assert draw(logits, [pairs[i] for i in order]) == [alone[i] for i in order]
    assert (logits == before).all()


def test_randomness_depends_on_seed_index_and_position_only() -> None:
    def stream(seed: int, index: int) -> list[float]:
        s = sampler(seed=seed, index=index)
        out = []
        for token in range(50):
            out.append(s.uniform())
            s.accept(token)
        return out

    assert stream(1, 0) == stream(1, 0)
    streams = [tuple(stream(seed, index)) for seed in range(4) for index in range(4)]
    assert len({x for values in streams for x in values}) == 16 * 50
    assert sampler(seed=2**63 - 1).uniform() == sampler(seed=2**63 - 1).uniform()
    # Fixed for ever: a request resumed by another version or machine must draw the same.
    assert stream(42, 1)[:2] == [0.577125795355946, 0.3397220955490139]


def test_a_fork_goes_its_own_way_and_leaves_the_parent_alone() -> None:
    parent = sampler(frequency_penalty=3.0, temperature=0.0)
    parent.accept(10)
    child = parent.fork(1)
    row = np.zeros((1, VOCAB), np.float32)
    row[0, 10], row[0, 11] = 7.0, 5.0
    child.accept(10)
    assert draw(row, [(0, parent), (0, child)]) == [Drawn(11), Drawn(11)]
    row[0, 10] = 8.5  # above 5 after one penalty of 3, below after two
    assert draw(row, [(0, parent), (0, child)]) == [Drawn(10), Drawn(11)]
    assert (parent.generated, child.generated) == (1, 2)
    assert parent.fork(0).uniform() == parent.uniform()
    assert parent.fork(1).uniform() != parent.uniform()


def test_rewinding_forgets_tokens_in_every_respect() -> None:
    params: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "top_k": 50}
    rng = np.random.default_rng(SEED)
    logits = random_logits(rng, 8, 2.0)
    straight, detour = sampler(**params), sampler(**params)
    for token in (4, 4, 8):
        straight.accept(token)
        detour.accept(token)
    for token in (100, 4, 200):
        detour.accept(token)
    detour.rewind(3)
    assert detour.generated == 3
    for at in range(8):
        assert draw(logits, [(at, detour)]) == draw(logits, [(at, straight)])


def test_penalties_keep_up_with_a_long_text() -> None:
    s = sampler(presence_penalty=1.0, frequency_penalty=0.5, temperature=0.0)
    history = [i % 300 for i in range(700)]
    for token in history:
        s.accept(token)
    row = random_logits(np.random.default_rng(SEED), 1, 2.0)
    assert draw(row, [(0, s)])[0].token == reference(row[0], s, history)


def test_no_end_token_before_min_tokens_and_none_at_all_with_ignore_eos() -> None:
    row = np.zeros((1, VOCAB), np.float32)
    row[0, [2, 5, 40]] = [30.0, 29.0, 28.0]
    row[0, 50] = 27.0
    patient = StopParams(max_tokens=9, min_tokens=2, stop_token_ids=(40,))
    stubborn = StopParams(max_tokens=9, min_tokens=1, ignore_eos=True, stop_token_ids=(40,))
    settings: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.01}, {"top_k": 1}]
    for params in settings:
        s, t = sampler(stop=patient, **params), sampler(stop=stubborn, **params)
        tokens = []
        for _ in range(3):
            drawn = draw(row, [(0, s), (0, t)])
            tokens.append((drawn[0].token, drawn[1].token))
            s.accept(50)
            t.accept(50)
        assert tokens == [(50, 50), (50, 40), (2, 40)]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = random_logits(np.random.default_rng(SEED), 1, 2.0)
    s = sampler(logprobs=20, logit_bias={77: 100.0}, temperature=0.3, presence_penalty=2.0)
    (drawn,) = draw(row, [(0, s)])
    exact = row[0].astype(np.float64)
    exact -= math.log(math.fsum(math.exp(x) for x in exact))
    assert drawn.token == 77
    assert drawn.logprob == pytest.approx(exact[77], abs=1e-12)
    order = sorted(range(VOCAB), key=lambda i: (-exact[i], i))[:20]
    assert [i for i, _ in drawn.top] == order
    assert [x for _, x in drawn.top] == pytest.approx([exact[i] for i in order], abs=1e-12)
    (bare,) = draw(row, [(0, sampler(logprobs=0))])
    assert bare.logprob is not None
    assert bare.top == ()


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.5}, {}])
def test_logits_that_are_no_numbers_end_their_own_row_only(params: dict[str, Any]) -> None:
    logits = random_logits(np.random.default_rng(SEED), 3, 2.0)
    logits[1, 399] = np.nan
    samplers = [sampler(logprobs=3, **params) for _ in range(3)]
    bad = draw(logits, list(enumerate(samplers)))
    assert [d.token < 0 for d in bad] == [False, True, False]
    assert bad[1] == Drawn(-1)
    logits[1] = -np.inf
    assert draw(logits, [(1, samplers[1])]) == [Drawn(-1)]


def test_extreme_parameters_stay_finite_and_quiet() -> None:
    row = random_logits(np.random.default_rng(SEED), 1, 5.0)
    row[0, 100:] = -np.inf
    top = int(row[0].argmax())
    settings: list[dict[str, Any]] = [
        {"temperature": 5e-324},
        {"temperature": 5e-324, "top_k": 300},
        {"top_p": 5e-324},
        {"typical_p": 1e-9, "top_k": 1},
        {"min_p": 1.0},
    ]
    for params in settings:
        assert draw(row, [(0, sampler(**params))])[0].token == top, params
    settings = [{"temperature": 100.0, "top_k": 390}, {"repetition_penalty": 1e-300}]
    for params in settings:
        assert 0 <= draw(row, [(0, sampler(**params))])[0].token < 100
