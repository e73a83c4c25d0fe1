"""Shares between apps, on a server that computes one chunk at a time on a simulated clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager.types import PriorityClass
from pagedd_daemon.engine.fairness import WINDOW_S, AppId, Fairness, Flow

INTERACTIVE, NORMAL, BACKGROUND = PriorityClass
RATE = 400.0
"""Charged tokens a second."""


def flow(name: str, *, scope: str = "", uid: int = 1, klass: PriorityClass = NORMAL) -> Flow:
    return Flow(klass, AppId(uid, scope or f"/bin/{name}", name))


class Server:
    """Serves whoever's turn it is, a chunk at a time."""

    def __init__(self, chunk_of: Callable[[Flow], int]) -> None:
        self.fair = Fairness()
        self.now = 0.0
        self.log: list[tuple[float, Flow, int]] = []
        """When each chunk ended, whose it was, and its tokens."""
        self._chunk_of = chunk_of

    def serve(self, flows: Iterable[Flow], seconds: float) -> None:
        """All of ``flows`` have more demand than can be met, for that long."""
        end = self.now + seconds
        while self.now < end:
            self.fair.survey(dict.fromkeys(flows, 0), self.now)
            chosen = self.fair.work_order(flows)[0]
            tokens = self._chunk_of(chosen)
            self.now += tokens / RATE
            self.fair.charge(chosen, tokens, self.now)
            self.log.append((self.now, chosen, tokens))

    def served(self, begin: float = 0.0, end: float = float("inf")) -> dict[Flow, int]:
        sums: dict[Flow, int] = defaultdict(int)
        for at, whose, tokens in self.log:
            if begin < at <= end:
                sums[whose] += tokens
        return sums

    def windows(self) -> Iterable[dict[Flow, int]]:
        """What each got in every ten seconds that begin with a chunk's end."""
        got: dict[Flow, int] = defaultdict(int)
        first = 0
        for at, whose, tokens in self.log:
            got[whose] += tokens
            while self.log[first][0] <= at - WINDOW_S:
                got[self.log[first][1]] -= self.log[first][2]
                first += 1
            if at >= WINDOW_S:
                yield got


CHUNKS = st.integers(2, 60)


@given(weight=st.sampled_from([1.0, 3.0, 0.5]), a=CHUNKS, b=CHUNKS)
@settings(max_examples=15)
def test_two_backlogged_apps_share_any_ten_seconds_by_weight(weight: float, a: int, b: int) -> None:
    one, two = flow("one"), flow("two")
    server = Server(lambda whose: a if whose == one else b)
    server.fair.set_weight(one.app, weight)
    server.serve([one, two], 20.0)
    for got in server.windows():
        total = got[one] + got[two]
        for whose, share in ((one, weight / (weight + 1)), (two, 1 / (weight + 1))):
            assert abs(got[whose] - share * total) <= max(0.1 * share * total, 2 * max(a, b))


@given(chunk=CHUNKS, low=st.sampled_from([NORMAL, BACKGROUND]))
@settings(max_examples=10)
def test_a_lower_class_gets_a_twentieth_of_any_ten_seconds(chunk: int, low: PriorityClass) -> None:
    above, below = flow("above", klass=INTERACTIVE), flow("below", klass=low)
    server = Server(lambda _: chunk)
    server.serve([above, below], 20.0)
    for got in server.windows():
        total = got[above] + got[below]
        slack = max(0.1 * 0.05 * total, 2 * chunk)
        assert 0.05 * total - slack <= got[below] <= 0.05 * total + max(slack, 0.02 * total)


def test_a_class_that_is_owed_nothing_waits_for_the_class_above_it() -> None:
    above, below = flow("above", klass=INTERACTIVE), flow("below", klass=BACKGROUND)
    fair = Fairness()
    fair.survey({above: 0, below: 0}, 0.0)
    for at in range(10):
        fair.charge(above, 10, at * 0.1)
    assert fair.order([below, above]) == [above, below]
    assert fair.yields(below, above)
    assert not fair.yields(above, below)


def test_each_class_is_owed_its_share_when_three_have_demand() -> None:
    flows = [flow(str(k), klass=k) for k in PriorityClass]
    server = Server(lambda _: 16)
    server.serve(flows, 40.0)
    got = server.served(20.0, 40.0)
    total = sum(got.values())
    for low in flows[1:]:
        assert 0.045 <= got[low] / total <= 0.06


@given(names=st.integers(2, 100), chunk=st.integers(1, 20))
@settings(max_examples=10)
def test_a_hundred_names_share_what_one_would_get(names: int, chunk: int) -> None:
    honest = flow("honest")
    many = [flow(f"name{i}", scope="/bin/many") for i in range(names)]
    server = Server(lambda _: chunk)
    server.serve([honest, *many], 10.0)
    got = server.served()
    total = sum(got.values())
    assert abs(got[honest] - total / 2) <= max(0.05 * total, 2 * chunk)
    assert max(got[m] for m in many) - min(got[m] for m in many) <= 2 * chunk


def test_users_share_before_scopes_and_scopes_before_names() -> None:
    alone = flow("alone", uid=2)
    first = flow("first")
    twins = [flow(name, scope="/bin/twin") for name in ("x", "y")]
    server = Server(lambda _: 8)
    server.serve([alone, first, *twins], 20.0)
    got = server.served()
    total = sum(got.values())
    for whose, share in ((alone, 1 / 2), (first, 1 / 4), (twins[0], 1 / 8), (twins[1], 1 / 8)):
        assert abs(got[whose] - share * total) <= max(0.05 * total * share, 16)


@given(idle=st.floats(0.0, 60.0), chunk=st.integers(1, 40))
@settings(max_examples=10)
def test_idling_earns_no_credit_and_having_been_alone_costs_none(idle: float, chunk: int) -> None:
    busy, idler = flow("busy"), flow("idler")
    server = Server(lambda _: chunk)
    server.serve([idler], 1.0)
    server.serve([busy], idle)
    server.serve([busy, idler], 4.0)
    got = server.served(1.0 + idle + chunk / RATE, server.now)
    assert abs(got[busy] - got[idler]) <= 3 * chunk


def test_service_without_rivals_costs_nothing_later() -> None:
    fair = Fairness()
    early, late = flow("early"), flow("late")
    fair.survey({}, 0.0)
    fair.charge(early, 100_000, 0.0)  # all of its demand was met: nobody waited
    fair.survey({late: 0}, 20.0)
    fair.survey({late: 0, early: 0}, 20.0)
    assert fair.ahead(early, late) == 0.0


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 500), st.booleans()), max_size=40),
)
def test_a_refund_leaves_no_trace_in_whose_turn_it_is(
    history: list[tuple[int, int, bool]],
) -> None:
    """Of the same history with and without failed steps, the same order comes out."""
    flows = [flow(str(i)) for i in range(3)]
    plain, failing = Fairness(), Fairness()
    for fair in (plain, failing):
        fair.survey(dict.fromkeys(flows, 0), 0.0)
    for which, tokens, fails in history:
        failing.charge(flows[which], tokens, 0.0)
        if fails:
            failing.refund(flows[which], tokens, 0.0)
        else:
            plain.charge(flows[which], tokens, 0.0)
    assert failing.order(flows) == plain.order(flows)
    assert [failing.ahead(flows[0], f) for f in flows] == [plain.ahead(flows[0], f) for f in flows]


def test_a_promise_lets_the_other_app_in_first_but_delays_no_work() -> None:
    fair = Fairness()
    long, short = flow("a-long"), flow("short")
    fair.survey({long: 6000, short: 0}, 0.0)
    assert fair.order([long, short]) == [short, long]
    fair.charge(short, 10, 0.0)
    assert fair.work_order([long, short]) == [long, short]
    fair.survey({long: 0, short: 0}, 0.0)
    assert fair.order([long, short]) == [long, short]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 200)), min_size=1, max_size=200))
@settings(max_examples=30)
def test_preemption_within_a_class_is_paid_for_by_work(history: list[tuple[bool, int]]) -> None:
    fair = Fairness()
    one, two = flow("one"), flow("two")
    fair.survey({one: 0, two: 0}, 0.0)
    charged, preemptions, least = 0, 0, fair.quantum
    for first, tokens in history:
        fair.charge(one if first else two, tokens, 0.0)
        charged += tokens
        for running, asking in ((one, two), (two, one)):
            if fair.yields(running, asking):
                assert fair.ahead(running, asking) > least
                fair.preempted()
                preemptions += 1
                assert not fair.yields(running, asking)
    assert preemptions <= 1 + charged / least


def test_apps_that_left_are_forgotten() -> None:
    fair = Fairness()
    for number in range(5000):
        one = flow(f"n{number}", scope=f"s{number % 7}")
        fair.survey({one: 5}, float(number))
        fair.charge(one, 5, float(number))
    roots = [kept.root for kept in fair._classes.values()]
    scopes = [
        s for root in roots for user in root.children.values() for s in user.children.values()
    ]
    assert sum(len(scope.children) for scope in scopes) < 2000
    assert len(fair._of_apps) <= 1025


def test_shares_are_those_of_the_last_ten_seconds() -> None:
    fair = Fairness()
    one, two = flow("one"), flow("two")
    fair.charge(one, 300, 0.0)
    fair.charge(two, 100, 5.0)
    assert fair.share(one.app, 5.0) == 0.75
    assert fair.share(one.app, 12.0) == 0.0
    assert fair.share(two.app, 12.0) == 1.0
    assert fair.share(two.app, 100.0) == 0.0
