"""How the engine learns what a step costs, and how it cuts chunks by it."""

from __future__ import annotations

import random

from pagedd_daemon.engine.pace import DECODE_TARGET_S, PREFILL_TARGET_S
from pagedd_daemon.engine.stepcost import StepCost


def learned(decode_s: float, per_token_s: float, *, mixed: bool) -> StepCost:
    cost = StepCost()
    for _ in range(60):
        if not mixed:
            cost.observe(4, 0, decode_s)
        cost.observe(4, 50, decode_s + 50 * per_token_s)
    return cost


def test_a_chunk_beside_decodes_fills_the_step_and_no_more() -> None:
    budget = learned(0.020, 0.002, mixed=False).prefill_budget(4, 512, 32, DECODE_TARGET_S)
    assert abs(0.020 + budget * 0.002 - DECODE_TARGET_S) < 0.02


def test_the_short_ends_of_prompts_do_not_have_the_next_one_cut() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe(0, 6000, 0.150)
        cost.observe(0, 16, 0.008)
    assert cost.prefill_budget(0, 8192, 32, PREFILL_TARGET_S) == 8192


def test_without_decodes_a_step_may_take_longer() -> None:
    budget = learned(0.020, 0.002, mixed=False).prefill_budget(0, 512, 32, PREFILL_TARGET_S)
    assert abs(budget * 0.002 - PREFILL_TARGET_S) < 0.05


def test_prompts_always_advance_and_never_exceed_the_step() -> None:
    cost = learned(10.0, 1.0, mixed=False)
    assert cost.prefill_budget(4, 512, 32, DECODE_TARGET_S) == 32
    assert learned(0.001, 1e-6, mixed=False).prefill_budget(4, 512, 32, DECODE_TARGET_S) == 512


def test_one_slow_step_is_forgotten_where_every_step_has_prompts() -> None:
    cost = learned(0.020, 0.002, mixed=True)
    usual = cost.prefill_budget(4, 512, 32, DECODE_TARGET_S)
    cost.observe(4, 0, 2.0)
    assert cost.prefill_budget(4, 512, 32, DECODE_TARGET_S) == 32
    for _ in range(60):
        cost.observe(4, 50, 0.120)
    assert cost.prefill_budget(4, 512, 32, DECODE_TARGET_S) > usual / 2


def test_streams_per_step_are_limited_where_they_are_what_takes_the_time() -> None:
    cost = StepCost()
    assert cost.decodes_within(DECODE_TARGET_S) > 1000
    for streams in range(10, 74):
        cost.observe(streams, 16 * (streams % 3), 0.020 + 0.004 * streams + 0.032 * (streams % 3))
    assert abs(cost.decodes_within(DECODE_TARGET_S) - 25) <= 1
    for _ in range(200):
        cost.observe(25, 0, 0.120)
    assert abs(cost.decodes_within(DECODE_TARGET_S) - 25) <= 1, (
        "what was learned holds while nothing varies"
    )


def test_no_stream_is_left_out_where_a_step_takes_long_by_itself() -> None:
    cost = StepCost()
    for streams in range(10, 74):
        cost.observe(streams, 0, 0.500 + 0.004 * streams)
    assert cost.decodes_within(DECODE_TARGET_S) >= 100, "as many as would double it"


def test_before_the_number_of_streams_has_changed_one_costs_what_a_prompts_token_does() -> None:
    cost = StepCost()
    assert cost.decodes_within(0.060) > 1_000
    for _ in range(31):
        cost.observe(64, 0, 0.2)
    cost.observe(64, 64, 0.392)
    assert 16 <= cost.decodes_within(0.060) <= 18, "8 ms of a step are not theirs"


def test_steps_with_prompts_and_few_streams_do_not_hide_what_a_stream_costs() -> None:
    dice = random.Random(1)
    cost = StepCost()
    for step in range(400):
        streams, prompt = (8, 60) if step % 12 == 0 else (14, 0)
        noise = dice.uniform(0.92, 1.25)
        cost.observe(streams, prompt, noise * (0.008 + 0.0033 * streams + 0.0031 * prompt))
        if step > 60:
            assert cost.decodes_within(0.060) <= 20


def test_a_machine_that_was_busy_for_a_while_does_not_make_streams_look_free() -> None:
    dice = random.Random(2)
    cost = StepCost()
    for step in range(400):
        streams, prompt = (8, 60) if step % 12 == 0 else (14, 0)
        slow = 3.0 if 200 <= step < 216 else 1.0
        noise = slow * dice.uniform(0.95, 1.1)
        cost.observe(streams, prompt, noise * (0.008 + 0.0033 * streams + 0.0031 * prompt))
        if step > 60:
            assert cost.decodes_within(0.060) <= 28
