"""Two-pointer restore: what is there meets what is loaded, and nothing is done twice or missed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpager import Restore, meeting_point


def simulate(
    blocks: int, compute_s: float, load_s: float, *, lost: frozenset[int] = frozenset()
) -> tuple[float, int, int]:
    """Restore with one device and one link, a block at a time each.

    Returns:
        Seconds, blocks computed, blocks loaded well.
    """
    plan = Restore(0, blocks)
    now = 0.0
    computing: tuple[float, range] | None = None
    loading: tuple[float, int] | None = None
    computed = loaded = 0
    while plan.remaining:
        if computing is None and (todo := plan.next_compute(1)):
            computing = (now + compute_s, todo)
        if loading is None and (fetch := plan.next_loads(1)):
            loading = (now + load_s, fetch[0])
        ends = [item[0] for item in (computing, loading) if item is not None]
        assert ends, "blocks are missing, and nothing is on its way"
        now = min(ends)
        if computing is not None and computing[0] == now:
            plan.computed(computing[1])
            computed += len(computing[1])
            computing = None
        elif loading is not None:
            if loading[1] in lost:
                plan.lost(loading[1])
            else:
                plan.loaded(loading[1])
                loaded += 1
            loading = None
    assert plan.ready == blocks
    return now, computed, loaded


@pytest.mark.parametrize(("compute_s", "load_s"), [(1.0, 1.0), (1.0, 3.0), (5.0, 1.0)])
def test_both_together_take_n_over_the_sum_of_their_rates(compute_s: float, load_s: float) -> None:
    blocks = 1000
    seconds, computed, loaded = simulate(blocks, compute_s, load_s)
    best = blocks / (1 / compute_s + 1 / load_s)
    assert best <= seconds <= best + max(compute_s, load_s)
    assert computed + loaded == blocks
    assert abs(computed - meeting_point(blocks, 1 / compute_s, 1 / load_s)) <= 1


@given(
    blocks=st.integers(0, 40),
    compute_s=st.integers(1, 9),
    load_s=st.integers(1, 9),
    lost=st.frozensets(st.integers(0, 39)),
)
def test_whatever_is_lost_is_computed_and_nothing_twice(
    blocks: int, compute_s: int, load_s: int, lost: frozenset[int]
) -> None:
    seconds, computed, loaded = simulate(blocks, compute_s, load_s, lost=lost)
    assert computed + loaded == blocks
    # Never slower than doing without the store: a lost load costs no more than its own block, and
    # the one load that may still be waited for.
    assert seconds <= blocks * compute_s + load_s


def test_a_block_lost_behind_the_meeting_point_costs_just_itself() -> None:
    plan = Restore(2, 6)
    assert plan.next_loads(3) == (7, 6, 5)
    assert plan.next_compute(8) == range(2, 5)
    plan.loaded(7)
    plan.lost(6)
    plan.loaded(5)
    assert plan.ready == 2
    plan.computed(range(2, 5))
    assert plan.ready == 6
    assert plan.next_loads(9) == ()
    assert plan.next_compute(8) == range(6, 7)
    plan.computed(range(6, 7))
    assert (plan.ready, plan.remaining) == (8, 0)


def test_reports_that_do_not_fit_are_refused() -> None:
    plan = Restore(0, 3)
    for report in (plan.loaded, plan.lost):
        with pytest.raises(ValueError, match="was not loading"):
            report(2)
    with pytest.raises(ValueError, match="was not computing"):
        plan.computed(range(1))
    assert plan.next_loads(1) == (2,)
    plan.loaded(2)
    with pytest.raises(ValueError, match="was not loading"):
        plan.loaded(2)
    with pytest.raises(ValueError, match="cannot restore"):
        Restore(0, -1)
