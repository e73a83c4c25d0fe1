"""An interactive app beside a hostile neighbour: how long it waits, against waiting alone.

In simulated time over the real scheduler and pager. The neighbour claims ``interactive`` too, as
anybody can, and as an app without settings is interactive with two samples at a time, the others
being normal.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvpager.types import PriorityClass
from tests.support.simulation import App, Job, World, p95, seeds

INTERACTIVE, NORMAL, _ = PriorityClass
SECONDS = 30.0


class Neighbour:
    """Apps of one scope under any number of names; two samples of theirs are interactive."""

    def __init__(self, world: World, names: int = 1) -> None:
        self.world = world
        self.apps = [world.app(f"bad{i}", scope="/bin/bad") for i in range(names)]

    def submit(
        self, app: App, prompt: int, max_tokens: int, *, n: int = 1, again: bool = True
    ) -> Job:
        live = [j for a in self.apps for j in a.jobs[-64:] if j.ended_s is None]
        klass = INTERACTIVE if sum(j.samples for j in live) + n <= 2 else NORMAL

        def then(_: Job) -> None:
            self.submit(app, prompt, max_tokens, n=n)

        return app.submit(
            prompt=prompt, max_tokens=max_tokens, n=n, klass=klass, then=then if again else None
        )


def submit_storm(world: World) -> None:
    bad = Neighbour(world)

    def wave() -> None:
        for _ in range(20):
            bad.submit(bad.apps[0], world.dice.randint(20, 400), 200, again=False)
        world.after(0.5, wave)

    for _ in range(200):
        bad.submit(bad.apps[0], world.dice.randint(20, 400), 200, again=False)
    wave()


def cancel_storm(world: World) -> None:
    bad = Neighbour(world)

    def wave() -> None:
        for _ in range(10):
            job = bad.submit(bad.apps[0], 300, 100, again=False)
            world.after(world.dice.random() * 0.3, lambda job=job: bad.apps[0].cancel(job))  # type: ignore[misc]
        world.after(0.1, wave)

    wave()


def slow_reader(world: World) -> None:
    bad = Neighbour(world)

    def one() -> None:
        job = bad.submit(bad.apps[0], 500, 2000, again=False)
        world.after(1.0, lambda: bad.apps[0].pause(job))

    for i in range(60):
        world.after(0.3 * i, one)


def most_samples(world: World) -> None:
    bad = Neighbour(world)
    for _ in range(16):
        bad.submit(bad.apps[0], 100, 300, n=16)


def hundred_names(world: World) -> None:
    bad = Neighbour(world, names=100)
    for app in bad.apps:
        bad.submit(app, world.dice.randint(50, 300), 150)


def victim_waits(
    seed: int, hostile: Callable[[World], None] | None, klass: PriorityClass
) -> list[float]:
    """Times to the first token of a person who asks, reads, and asks again."""
    world = World(seed)
    victim = world.app("editor", klass=klass)

    def ask() -> None:
        victim.submit(prompt=96, max_tokens=12, then=lambda _: read())

    def read() -> None:
        world.after(0.3 + world.dice.random() * 0.5, ask)

    if hostile is not None:
        hostile(world)
    world.at(2.0, ask)
    world.run(SECONDS)
    assert len(victim.ended()) >= 10
    assert {reason for job in victim.ended() for reason in job.reasons} == {"length"}
    return [job.ttft_s for job in victim.ended()]


@pytest.mark.parametrize("seed", seeds(1))
@pytest.mark.parametrize(
    "hostile", [submit_storm, cancel_storm, slow_reader, most_samples, hundred_names]
)
def test_a_hostile_neighbour_no_more_than_doubles_an_interactive_apps_wait(
    seed: int, hostile: Callable[[World], None]
) -> None:
    alone = p95(victim_waits(seed, None, INTERACTIVE))
    beside = p95(victim_waits(seed, hostile, INTERACTIVE))
    assert beside <= 2 * alone
