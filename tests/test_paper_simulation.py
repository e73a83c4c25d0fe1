"""The simulation behind `make bench-paper`: real pager and scheduler, time from the model."""

from __future__ import annotations

import pytest

from benchmarks.paper.model import POOL_SLOTS, LatencyModel
from benchmarks.paper.points import Point, run
from benchmarks.paper.policies import POLICIES
from benchmarks.paper.simulate import Outcome, Setting, Simulation
from benchmarks.paper.workload import Arrival, at_once, lengths, poisson


def simulate(policy: str, arrivals: list[Arrival], **setting: int | bool) -> Outcome:
    made = Setting(policy=policy, **setting)  # type: ignore[arg-type]
    return Simulation(made, arrivals, saturated=False).run()


def test_the_pool_is_the_papers() -> None:
    assert POOL_SLOTS == 15_728


def test_the_model_agrees_with_the_papers_own_requests_in_flight() -> None:
    """Little's law: in flight = rate x time in the system, at both of figure 13's loads."""
    model = LatencyModel()
    for rate, flying, prompt, output in (
        (2.0, 30.42, 161.31, 337.99),
        (30.0, 132.44, 19.31, 58.45),
    ):
        step = model.step(0, 0) + model.sequence_s * flying
        step /= 1 - rate * prompt * model.prefill_s
        assert rate * output * step == pytest.approx(flying, rel=0.06)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_alone_takes_exactly_what_the_model_says(policy: str) -> None:
    model = LatencyModel()
    outcome = simulate(policy, [Arrival(5.0, 30, 11)])
    seconds = model.step(1, 30) + 10 * model.step(1, 0)
    assert outcome.normalized_s == pytest.approx(seconds / 11)
    assert outcome.steps == 11
    assert outcome.seconds == pytest.approx(5.0 + seconds)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_shares_of_memory_add_up(policy: str) -> None:
    pairs = lengths("sharegpt", 150)
    outcome = Simulation(Setting(policy=policy), at_once(pairs), saturated=True).run()
    assert outcome.finished == 150
    shares = (outcome.token_state, outcome.reserved, outcome.internal, outcome.external)
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= 0.0


@pytest.mark.parametrize("policy", ["paged", "oracle"])
def test_a_run_is_repeated_exactly(policy: str) -> None:
    point = Point(policy, "alpaca", 120, rate=20.0)
    assert run(point) == run(point)


def test_max_holds_seven_requests_and_paging_more() -> None:
    pairs = lengths("sharegpt", 250)
    flying = {
        policy: Simulation(Setting(policy=policy), at_once(pairs), saturated=True).run().in_flight
        for policy in ("max", "oracle", "paged")
    }
    assert flying["max"] == pytest.approx(7.0)
    assert flying["max"] < flying["oracle"] < flying["paged"]


def test_a_static_batch_is_answered_when_all_of_it_has_ended() -> None:
    model = LatencyModel()
    outcome = simulate("static", [Arrival(0.0, 10, 5), Arrival(0.0, 10, 20)])
    seconds = model.step(2, 20) + 19 * model.step(2, 0)
    assert outcome.normalized_s == pytest.approx((seconds / 5 + seconds / 20) / 2)


def test_without_swap_space_the_pool_recomputes_and_every_request_still_ends() -> None:
    pairs = lengths("sharegpt", 150)
    outcome = simulate("paged", at_once(pairs), swap=False)
    assert outcome.finished == 150
    assert outcome.transfer_share == 0.0
    assert outcome.recomputed > 0
    assert outcome.computed_again > 0


def test_samples_share_the_blocks_of_their_prompt() -> None:
    # 160 prompt tokens are 10 blocks of 16; 4 samples of 16 tokens need one block each beyond.
    outcome = simulate("paged", [Arrival(0.0, 160, 16)], samples=4)
    assert outcome.finished == 1
    assert outcome.sharing_saved == pytest.approx(1 - (10 + 4) / 44)


def test_a_shared_prefix_is_computed_once() -> None:
    point = Point("paged", "prefix-80", 40)
    outcome = Simulation(
        Setting(prefix_tokens=80), at_once(lengths(point.shape, point.count)), saturated=False
    ).run()
    assert outcome.hit_tokens == 39 * 80


def test_poisson_arrivals_scale_with_the_rate_and_keep_their_order() -> None:
    pairs = lengths("alpaca", 2000)
    slow, fast = poisson(pairs, 1.0, 7), poisson(pairs, 4.0, 7)
    assert [a.prompt_tokens for a in slow] == [p for p, _ in pairs]
    assert slow[-1].at_s == pytest.approx(4 * fast[-1].at_s)
    assert slow[-1].at_s == pytest.approx(2000, rel=0.1)


def test_the_shapes_have_the_papers_means_and_fit_the_context() -> None:
    for shape, means in (("sharegpt", (161.31, 337.99)), ("alpaca", (19.31, 58.45))):
        pairs = lengths(shape, 20_000)
        assert len(pairs) == 20_000
        for side, mean in enumerate(means):
            assert sum(pair[side] for pair in pairs) / 20_000 == pytest.approx(mean, rel=0.02)
        assert max(map(sum, pairs)) <= 2048
    assert all(p <= 1024 and o <= 1024 for p, o in lengths("chat", 500))
