"""Tokens may wait for the next ones, for a known time and never when somebody waits for them."""

from __future__ import annotations

import math

import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.engine.outbox import AT_ONCE, Outbox
from pagedd_daemon.engine.sampler import Drawn

STEP_S = 0.010
HOLD_S = 0.040


def said(outbox: Outbox) -> m.StepReport | None:
    reports: list[m.StepReport] = []
    outbox.say(reports.append, 7)
    return reports[0] if reports else None


def test_a_first_token_an_end_and_an_error_are_due_at_once() -> None:
    outbox = Outbox()
    outbox.output(1, 0, Drawn(65), AT_ONCE)
    assert outbox.due(0.0, STEP_S)
    said(outbox)
    outbox.output(1, 0, Drawn(66), 0.01 + HOLD_S)
    assert not outbox.due(0.01, STEP_S)
    outbox.ended(m.Ended(1, 0, "length"))
    assert outbox.due(0.01, STEP_S)
    said(outbox)
    outbox.output(2, 0, Drawn(67), 0.02 + HOLD_S)
    outbox.rejected(m.Rejected(2, "E_ENGINE", "", {}))
    assert outbox.due(0.02, STEP_S)


@pytest.mark.parametrize("step_s", [0.003, 0.010, 0.019, 0.041, 0.5])
def test_no_token_waits_longer_than_the_hold(step_s: float) -> None:
    outbox = Outbox()
    now, oldest = 0.0, None
    for token in range(200):
        now += step_s
        oldest = now if oldest is None else oldest
        outbox.output(1, 0, Drawn(token), now + HOLD_S)
        assert now - oldest <= HOLD_S + 1e-9
        if outbox.due(now, step_s):
            assert said(outbox) is not None
            oldest = None


def test_tokens_of_one_sample_travel_together_with_their_logprobs() -> None:
    outbox = Outbox()
    for token in (65, 66):
        outbox.output(1, 0, Drawn(token, -0.5, ((token, -0.5),)), HOLD_S)
        outbox.output(1, 1, Drawn(token + 10), HOLD_S)
    report = said(outbox)
    assert report is not None
    assert report.steps == 7
    one, other = report.outputs
    assert (one.rid, one.index, one.tokens) == (1, 0, b"A\0\0\0B\0\0\0")
    assert one.logprobs == [(-0.5, [(65, -0.5)]), (-0.5, [(66, -0.5)])]
    assert (other.index, other.tokens, other.logprobs) == (1, b"K\0\0\0L\0\0\0", None)
    assert said(outbox) is None, "it was said already"


def test_what_may_wait_longer_travels_with_what_may_not() -> None:
    outbox = Outbox()
    outbox.output(1, 0, Drawn(65), 0.250)
    outbox.output(2, 0, Drawn(66), 0.050)
    outbox.output(1, 0, Drawn(67), 0.260)
    assert outbox.until == 0.050
    assert not outbox.due(0.039, STEP_S)
    assert outbox.due(0.041, STEP_S)
    report = said(outbox)
    assert report is not None
    assert [len(output.tokens) // 4 for output in report.outputs] == [2, 1]
    assert outbox.until == math.inf


def test_what_may_not_wait_is_due() -> None:
    outbox = Outbox()
    outbox.output(1, 0, Drawn(65), 5.0)
    assert outbox.due(5.0, 0.001)
    said(outbox)
    assert not outbox.due(5.0, 0.001), "there is nothing to say"
    outbox.started(1, 16)
    assert outbox.due(5.0, 0.001)
