"""Pools that shrink and grow while sequences run."""

from __future__ import annotations

from kvpager import (
    Admitted,
    Deferred,
    Free,
    Pressure,
)
from tests.support.pager_caller import Caller, ids


def test_pressure_drains_blocks_and_gives_them_back() -> None:
    caller = Caller(gpu=8)
    caller.prompt(1, ids(12))
    caller.prompt(2, ids(12, 50))
    caller(Free(1))
    caller(Pressure(3))
    stats = caller.pager.stats()
    # The cached blocks 0 to 2 stay; 3 to 5 drain when their sequence lets go of them.
    assert (stats.gpu.total, stats.gpu.used) == (6, 3)
    (answer,) = caller.admit(3, ids(13, 90))
    assert isinstance(answer, Deferred)
    caller(Free(2))
    assert caller.pager.stats().gpu.total == 3
    caller(Pressure(8))
    assert caller.admit(3, ids(20, 90))[-1] == Admitted(3, 0, False)


# ---------------------------------------------------------------------------------- bad input
