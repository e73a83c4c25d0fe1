"""What apps get beside each other, in simulated time over the real scheduler and pager."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvpager.types import PriorityClass
from tests.support.simulation import App, Job, World, seeds

INTERACTIVE, NORMAL, BACKGROUND = PriorityClass
Draw = Callable[[random.Random], tuple[int, int]]
"""Prompt tokens and most generated tokens of a request."""

SHAPES: dict[str, Draw] = {
    "chats": lambda d: (d.randint(16, 200), d.randint(10, 60)),
    "long texts": lambda d: (d.randint(16, 64), d.randint(300, 900)),
    "long prompts": lambda d: (d.randint(600, 2500), d.randint(1, 20)),
}


def backlog(app: App, shape: Draw, waiting: int = 80) -> None:
    """Keep so many requests of the app alive from now on: more than can run."""

    def submit(_: Job | None = None) -> None:
        prompt, tokens = shape(app.world.dice)
        app.submit(prompt=prompt, max_tokens=tokens, then=submit)

    for _ in range(waiting):
        submit()


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize(
    "shapes", [("chats", "chats"), ("long texts", "chats"), ("long prompts", "long texts")]
)
def test_two_backlogged_apps_share_any_ten_seconds_by_weight(
    seed: int, weight: float, shapes: tuple[str, str]
) -> None:
    world = World(seed, kv_tokens=4096)
    one, two = world.app("one", weight=weight), world.app("two")
    for app, shape in zip((one, two), shapes, strict=True):
        backlog(app, SHAPES[shape])
    world.run(26.0)
    chunk = world.largest_chunk(1.0)
    for got in world.windows(1.0, 26.0):
        total = sum(got.values())
        for name, share in (("one", weight / (1 + weight)), ("two", 1 / (1 + weight))):
            assert abs(got[name] - share * total) <= max(0.1 * share * total, 2 * chunk), got


@pytest.mark.parametrize("seed", seeds(3))
@pytest.mark.parametrize(
    "shapes", [("chats", "chats"), ("long texts", "chats"), ("long prompts", "long texts")]
)
@pytest.mark.parametrize("low", [NORMAL, BACKGROUND])
def test_a_lower_class_gets_a_twentieth_of_any_ten_seconds(
    seed: int, shapes: tuple[str, str], low: PriorityClass
) -> None:
    world = World(seed, kv_tokens=4096)
    high, below = world.app("high", klass=INTERACTIVE), world.app("low", klass=low)
    backlog(high, SHAPES[shapes[0]])
    backlog(below, SHAPES[shapes[1]])
    world.run(26.0)
    chunk = world.largest_chunk(1.0)
    shares = []
    for got in world.windows(1.0, 26.0):
        total = sum(got.values())
        shares.append(got["low"] / total)
        assert got["low"] >= 0.05 * total - max(0.1 * 0.05 * total, 2 * chunk), got
    assert max(shares) < 0.4, "the class above comes first"
