"""Limits of apps, who makes way for whom, and what is charged, over real scheduler and pager."""

from __future__ import annotations

import pytest

from kvpager.types import PriorityClass
from pagedd_daemon.engine.fairness import W_OUT
from pagedd_daemon.engine.turns import MOST_BYPASSES
from tests.support.simulation import App, Job, World, seeds

INTERACTIVE, NORMAL, BACKGROUND = PriorityClass


def most_running(world: World, app: App, seconds: float) -> int:
    """Requests of the app that were begun and not over at the same time, at most."""
    most = 0

    def look() -> None:
        nonlocal most
        running = {
            s.request.rid for s in world.engine._scheduler.sequences() if s.request.app == app.key
        }
        most = max(most, len(running))
        world.after(0.05, look)

    look()
    world.run(world.now + seconds)
    return most


def test_no_more_requests_of_an_app_run_than_may_and_all_of_them_end() -> None:
    world = World(1)
    app, other = world.app("limited", max_running=2), world.app("other")
    for _ in range(8):
        app.submit(prompt=40, max_tokens=10)
        other.submit(prompt=40, max_tokens=10)
    assert most_running(world, app, 10.0) == 2
    assert len(app.ended()) == len(other.ended()) == 8
    assert max(j.ended_s or 0 for j in other.jobs) < max(j.ended_s or 0 for j in app.jobs)


def test_an_app_at_its_ceiling_leaves_the_rest_of_the_pool_to_others() -> None:
    world = World(2, kv_tokens=2048)
    hog, other = world.app("hog", kv_ceiling=512), world.app("other")
    for _ in range(12):
        hog.submit(prompt=100, max_tokens=200)
    pager, most = world.engine._pool.pager, 0

    def look() -> None:
        nonlocal most
        root = world.engine._books.root(hog.message.root)
        most = max(most, pager.namespace_blocks(root))
        world.after(0.02, look)

    look()
    world.run(0.5)
    for _ in range(4):
        other.submit(prompt=300, max_tokens=20)
    world.run(60.0)
    assert 16 < most <= 32
    assert len(hog.ended()) == 12
    assert {reason for job in hog.jobs + other.jobs for reason in job.reasons} == {"length"}
    assert max(job.ttft_s for job in other.jobs) < 5.0


def test_a_request_above_its_apps_ceiling_is_refused_with_the_figures() -> None:
    world = World(3)
    app = world.app("small", kv_ceiling=64)
    job = app.submit(prompt=100, max_tokens=5)
    world.run(1.0)
    assert job.reasons == ["E_NEVER_FITS"]


def test_a_request_that_is_refused_takes_nobodys_place() -> None:
    world = World(3)
    app = world.app("small", kv_ceiling=64, max_running=1)
    refused, served = app.submit(prompt=100, max_tokens=5), app.submit(prompt=10, max_tokens=5)
    world.run(60.0)
    assert refused.reasons == ["E_NEVER_FITS"]
    assert served.reasons == ["length"]


def test_who_waits_for_the_blocks_of_a_step_in_flight_comes_in_when_that_has_ended() -> None:
    world = World(3, kv_tokens=192, ram_tokens=0, asynchronous=True)
    app = world.app("app")
    # The first one ends while the step after its last is in flight, which holds its blocks.
    jobs = [app.submit(prompt=150, max_tokens=n) for n in (2, 3, 2)]
    world.run(60.0)
    assert [job.reasons for job in jobs] == [["length"]] * 3


@pytest.mark.parametrize("polls", range(40))
def test_who_waits_for_blocks_that_are_still_written_through_comes_in_when_that_has_ended(
    polls: int,
) -> None:
    world = World(3, kv_tokens=192, write_through=True)
    world.backend.faults.delay_polls = polls  # the copy ends before, while and after it asks
    app = world.app("app")
    jobs = [app.submit(prompt=160, max_tokens=2), app.submit(prompt=170, max_tokens=2)]
    world.run(60.0)
    assert [job.reasons for job in jobs] == [["length"]] * 2


def test_running_sequences_below_their_floor_are_no_victims() -> None:
    world = World(4, kv_tokens=1024)
    kept = world.app("kept", klass=BACKGROUND, kv_floor=512)
    kept_job = kept.submit(prompt=200, max_tokens=200)
    world.run(1.0)
    crowd = world.app("crowd", klass=INTERACTIVE)
    for _ in range(8):
        crowd.submit(prompt=150, max_tokens=60)
    while kept_job.ended_s is None:
        before = world.preemptions
        world.run(world.now + 0.05)
        live = world.engine._scheduler.sequences()
        assert {q.state.value for q in live if q.request.app == kept.key} <= {"running"}, before
    assert kept_job.reasons == ["length"]


def test_interactive_work_does_not_wait_for_room_that_background_work_has() -> None:
    world = World(5, kv_tokens=2048)
    batch, person = world.app("batch", klass=BACKGROUND), world.app("person", klass=INTERACTIVE)
    for _ in range(10):
        batch.submit(prompt=150, max_tokens=400)
    world.run(4.0)
    job = person.submit(prompt=400, max_tokens=5)
    world.run(120.0)
    assert job.ttft_s < 1.0
    assert world.preemptions > 0
    assert {reason for j in batch.jobs for reason in j.reasons} == {"length"}
    assert len(batch.ended()) == 10


def test_nobody_makes_way_for_an_app_that_lacks_room_within_its_own_ceiling() -> None:
    world = World(6, kv_tokens=2048)
    batch = world.app("batch", klass=BACKGROUND)
    person = world.app("person", klass=INTERACTIVE, kv_ceiling=512)
    for _ in range(10):
        batch.submit(prompt=150, max_tokens=200)
    world.run(4.0)
    for _ in range(8):
        person.submit(prompt=200, max_tokens=100)
    world.run(300.0)
    assert len(batch.ended()) == 10
    assert len(person.ended()) == 8
    # Two fit under the ceiling at a time, so at most four times others make way, of whom each
    # grows meanwhile.
    assert world.preemptions <= 16


@pytest.mark.parametrize("seed", seeds(2))
def test_a_large_request_is_bypassed_a_bounded_number_of_times(seed: int) -> None:
    world = World(seed, kv_tokens=2048)
    small, large = world.app("small"), world.app("large")

    def again(_: Job | None = None) -> None:
        small.submit(prompt=60, max_tokens=60, then=again)

    for _ in range(24):
        again()
    world.run(1.0)
    job = large.submit(prompt=1700, max_tokens=4)
    request = world.engine._books.requests[job.rid]
    world.run(60.0)
    assert job.reasons == ["length"]
    assert request.bypassed <= MOST_BYPASSES


def test_prompts_are_charged_once_and_tokens_twice_and_nothing_found_is() -> None:
    world = World(6)
    app = world.app("app")
    prompt = world.ids(320)
    app.submit(prompt=prompt, max_tokens=10)
    world.run(10.0)
    first = world.served(-1, 10)["app"]
    assert first == 320 + W_OUT * 10
    again = app.submit(prompt=prompt, max_tokens=10)
    world.run(20.0)
    assert again.cached_tokens == 304
    assert world.served(-1, 20)["app"] - first == 320 - 304 + W_OUT * 10


def test_a_failed_step_is_charged_to_nobody() -> None:
    world = World(7)
    app = world.app("app")
    world.backend.faults.steps = {0}
    failing = app.submit(prompt=100, max_tokens=10)
    world.run(5.0)
    assert failing.reasons == ["E_ENGINE"]
    assert sum(world.served(-1, 5).values()) == 0


def test_work_lost_by_preemption_is_not_charged_again() -> None:
    world = World(8, kv_tokens=1024, ram_tokens=0)
    apps = [world.app(name) for name in ("a", "b")]
    for app in apps:
        for _ in range(4):
            app.submit(prompt=150, max_tokens=150)
    world.run(200.0)
    assert world.preemptions > 0
    for app in apps:
        assert len(app.ended()) == 4
        assert world.served(-1, 200)[app.message.name] == 4 * (150 + W_OUT * 150)


def test_a_person_whose_prefix_is_found_in_ram_takes_part_in_the_very_next_step() -> None:
    world = World(9, keep_cached_on_gpu=False)
    batch, person = world.app("batch", klass=BACKGROUND), world.app("person", klass=INTERACTIVE)
    batch.submit(prompt=64, max_tokens=400)
    prompt = world.ids(320)
    person.submit(prompt=prompt, max_tokens=1)
    world.run(2.0)
    asked = world.steps
    answered: list[int] = []
    job = person.submit(prompt=prompt, max_tokens=1, then=lambda _: answered.append(world.steps))
    world.run(4.0)
    assert job.cached_tokens == 304
    assert answered == [asked + 1]


def test_while_a_person_may_ask_the_prompts_of_others_come_in_short_chunks() -> None:
    def longest(*, person: bool) -> float:
        world = World(10, step_s=0.010, token_s=0.003)
        for _ in range(2):
            world.app("batch", klass=BACKGROUND).submit(prompt=600, max_tokens=50)
        if person:
            world.app("person", klass=INTERACTIVE).submit(prompt=20, max_tokens=4)
        world.run(2.0)
        begin = world.now
        world.run(4.0)
        return world.largest_chunk(begin)

    assert longest(person=True) <= 16 + 2 * W_OUT
    assert longest(person=False) > 32


def test_a_short_question_is_computed_whole_though_others_as_important_read() -> None:
    world = World(11, step_s=0.010, token_s=0.003)
    reader, person = (world.app(name, klass=INTERACTIVE) for name in ("reader", "person"))
    reader.submit(prompt=20, max_tokens=2_000)
    world.app("batch").submit(prompt=2_000, max_tokens=1)
    person.submit(prompt=40, max_tokens=1)
    world.run(2.0)
    asked = world.steps
    answered: list[int] = []
    person.submit(prompt=64, max_tokens=1, then=lambda _: answered.append(world.steps))
    world.run(3.0)
    assert answered == [asked + 1]
