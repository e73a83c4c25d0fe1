"""The whole daemon in simulated time: thousands of worlds, each told by its seed.

Front, scheduler and pager are the real ones; sockets, helpers, clock and the model's arithmetic are
not. A failure names its seed, and ``PAGEDD_FRONT_SEED=<seed> pytest tests/test_front_simulation.py
-k replay`` tells that world again. ``PAGEDD_FRONT_WORLDS=<count>`` tells more of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from pagedd_daemon.front import streams
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.failover import Journalled, resumed
from pagedd_daemon.front.gate import Gate
from pagedd_daemon.front.journal import Journal
from pagedd_daemon.front.pins import Pins
from pagedd_daemon.messages import Submit
from tests.support.sim.asked import BrokenPromiseError
from tests.support.sim.loop import StandstillError
from tests.support.sim.oracle import Oracle
from tests.support.sim.world import World

WORLDS = int(os.environ.get("PAGEDD_FRONT_WORLDS", "2000"))
REPLAY = int(os.environ.get("PAGEDD_FRONT_SEED", "0"))


_COMMON = (
    *("length", "stop", "cancelled", "E_BUSY", "E_DRAINING"),
    *("deaths", "hangs", "preempted", "loaded", "shrunk"),
)
"""What must happen in one of a hundred worlds at least: others would prove nothing."""


def told(seeds: range, oracle: Oracle) -> Counter[str]:
    """Tell these worlds; how their requests have ended, and what happened meanwhile."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        try:
            seen += World(seed, oracle).run().seen
        except Exception as error:
            how = f"PAGEDD_FRONT_SEED={seed} pytest tests/test_front_simulation.py -k replay"
            raise AssertionError(f"world {seed} failed: {error}\nreplay: {how}") from error
    return seen


@pytest.mark.timeout(1200)  # 40 s of CPU, on a machine that may be busy with something else
def test_in_thousands_of_worlds_every_request_ends_once_and_says_what_the_model_says() -> None:
    seen = told(range(WORLDS), Oracle())
    print(*seen.most_common(), sep="\n")
    for what in _COMMON:
        assert seen[what] > WORLDS / 100, (what, seen)


def test_replay_of_one_world() -> None:
    world = World(REPLAY, Oracle())
    try:
        world.run()
    finally:
        print(*world.log, sep="\n")


def test_the_same_seed_tells_the_same_world() -> None:
    for seed in range(20):
        first, second = World(seed, Oracle()).run(), World(seed, Oracle()).run()
        assert first.log == second.log


# ------------------------------------------------------------------------------- broken on purpose


def _forgets_a_token(submit: Submit, samples: Sequence[Journalled]) -> Iterator[Submit]:
    """Has a new engine begin a token too early."""
    for one in resumed(submit, samples):
        if one.generated:
            one = replace(one, prompt=one.prompt[:-4], generated=one.generated - 1)
        yield one


def _nothing(*_: object, **__: object) -> None:
    """Does not do what it should."""


BROKEN: dict[str, tuple[object, str, object]] = {
    "a token is said again after an engine died": (streams, "resumed", _forgets_a_token),
    "nobody gives back a model": (streams.Streams, "_release", _nothing),
    "samples are held for ever": (Apps, "leave", _nothing),
    "nobody follows at the gate": (Gate, "passed", _nothing),
    "what a closed session held stays": (Pins, "unpin", _nothing),
    "what got lost is not said again": (Journal, "since", lambda journal, after: iter(())),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_defect_is_found_within_some_hundred_worlds(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    owner, name, instead = BROKEN[what]
    monkeypatch.setattr(owner, name, instead)
    with pytest.raises((BrokenPromiseError, StandstillError)):
        _run(300)


def _run(worlds: int) -> None:
    oracle = Oracle()
    for seed in range(worlds):
        World(seed, oracle).run()
