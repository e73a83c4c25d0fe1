"""Whose turn it is: virtual token counters over users, scopes and names.

A pure module: no clock (time comes with what happens), no randomness, nothing of the pager. The
counters are those of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), with
two differences: they are hierarchical, and there is a set for each class.

* Within a class the user with the least counter comes first, of this user's scopes (control group
  or executable) the one with the least, and of that scope's names the one with the least. So a
  hundred names share what one name would get.
* What is computed is charged to all three: tokens divided by the app's weight to name and scope,
  tokens to the user.
* Only who has unmet demand is compared. Who gets some after a while without is lifted to the least
  of those who had, so idling earns no credit.
* A lower class whose demand is unmet is owed `LEAST_SHARE` of all that is charged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvpager.types import PriorityClass

W_OUT = 2
"""Charge of a generated token; a computed prompt token costs 1. A decode step reads all weights for
one token of each stream, a prompt's tokens share that reading."""
LEAST_SHARE = 0.05
"""Of all charged tokens: what a lower class with unmet demand gets, whatever is above it."""
WINDOW_S = 10.0
"""Seconds over which shares are promised and shown."""
_BUCKETS = 20
_QUANTUM_SHARE = 0.025
"""Of what is charged in `WINDOW_S`: how far an app must be ahead before one of its sequences is
paged out for another app. A quarter of a second of service keeps any ten seconds within a tenth."""
_LEAST_QUANTUM = 64
"""Charged tokens: with less, an idle daemon would page out for a difference of a few words."""
_OWED_SHARE = 0.004
"""Of what is charged in `WINDOW_S`: the debt to a lower class that is worth acting on. It is paid
back whole, so a class that lives on its least share comes in about once a second."""
_LEAST_OWED = 16
_SWEEP = 256
"""Children of one node between two looks for those that may be forgotten."""
_MOST_WINDOWS = 1024
"""Apps whose shares are kept, beside those that were charged in the last `WINDOW_S`."""


class AppId(NamedTuple):
    """An app as the kernel and it itself name it."""

    uid: int
    scope: str
    """Control group or executable of the peer process; ``""`` where neither could be learned."""
    name: str
    """What it calls itself."""


class Flow(NamedTuple):
    """The requests of one app in one class."""

    klass: PriorityClass
    app: AppId


class Window:
    """A sum over the last `WINDOW_S` seconds, in steps of half a second."""

    __slots__ = ("_bucket", "_sums", "total")

    def __init__(self) -> None:
        self._sums = [0.0] * _BUCKETS
        self._bucket = 0
        self.total = 0.0
        """As of the last call."""

    def add(self, amount: float, now: float) -> None:
        """``amount`` was charged at ``now``."""
        self.turn(now)
        self._sums[self._bucket % _BUCKETS] += amount
        self.total += amount

    def turn(self, now: float) -> float:
        """Forget what is too old; the sum."""
        bucket = int(now * _BUCKETS / WINDOW_S)
        if bucket != self._bucket:
            for passed in range(max(self._bucket + 1, bucket - _BUCKETS + 1), bucket + 1):
                self._sums[passed % _BUCKETS] = 0.0
            self._bucket = max(self._bucket, bucket)
            self.total = sum(self._sums)
        return self.total


class _Node:
    """A user, a scope or a name in one class; or the root of all of them."""

    __slots__ = ("active", "children", "floor", "promised", "virtual")

    def __init__(self) -> None:
        self.virtual = 0.0
        """Charged tokens, divided by weights."""
        self.promised = 0.0
        """Prompt tokens that are let in and not computed yet, divided by weights."""
        self.active = False
        """It has unmet demand."""
        self.floor = 0.0
        """Of its children: what a newcomer is lifted to."""
        self.children: dict[int | str, _Node] = {}

    def child(self, key: int | str) -> _Node:
        """The child of that name; made if there is none, at the floor."""
        node = self.children.get(key)
        if node is None:
            if len(self.children) % _SWEEP == _SWEEP - 1:
                self._sweep()
            node = self.children[key] = _Node()
            node.virtual = self.floor
        return node

    def _sweep(self) -> None:
        """Forget children that a lift would bring to the floor anyway."""
        for key, node in list(self.children.items()):
            idle = not (node.active or node.promised or node.children)
            if idle and node.virtual <= self.floor:
                del self.children[key]

    def activate(self, wanted: set[int | str]) -> None:
        """These children, and no others, have unmet demand now; lift those that had none."""
        before = [(key in wanted, node) for key, node in self.children.items() if node.active]
        staying = [node.virtual for stays, node in before if stays]
        if before:  # where all of them leave, whoever comes next starts beside them
            self.floor = max(self.floor, min(staying or [node.virtual for _, node in before]))
        for key, node in self.children.items():
            if key in wanted:
                if not node.active:
                    node.virtual = max(node.virtual, self.floor)
                node.active = True
            elif node.active:
                node.activate(set())
                node.active = False

    def raise_floor(self, child: _Node) -> None:
        """``child`` was charged while nobody else waited: who comes next starts beside it."""
        if not any(node.active for node in self.children.values()):
            self.floor = max(self.floor, child.virtual)


@dataclass(slots=True)
class _Class:
    """What is kept of one class."""

    root: _Node = field(default_factory=_Node)
    debt: float = 0.0
    """Tokens it is owed of its least share."""
    owed: bool = False
    """The debt is being paid back."""
    unmet: bool = False


class Fairness:
    """Counters of all apps, and what follows from them."""

    def __init__(self) -> None:
        self._classes = {klass: _Class() for klass in PriorityClass}
        self._weights: dict[AppId, float] = {}
        self._window = Window()
        self._of_apps: dict[AppId, Window] = {}
        self.charged = 0.0
        """All that was ever charged."""
        self._preempted_at = float("-inf")
        """`charged` when a sequence was last paged out for fairness."""

    # ------------------------------------------------------------------------------- what happens

    def set_weight(self, app: AppId, weight: float) -> None:
        """The app gets ``weight`` (> 0) times the share of one with weight 1."""
        assert weight > 0
        self._weights[app] = weight

    def forget(self, app: AppId) -> None:
        """Nothing of the app is live: its weight is told again with its next request."""
        self._weights.pop(app, None)

    def survey(self, unmet: Mapping[Flow, int], now: float) -> None:
        """Who has demand that is not being met: requests that wait, or are paged out, or whose
        prompt is not computed yet. With each, its prompt tokens that are let in and not computed.
        """
        total = self._window.turn(now)
        for klass, kept in self._classes.items():
            flows = [flow.app for flow in unmet if flow.klass is klass]
            kept.unmet = bool(flows)
            kept.debt = min(kept.debt, max(LEAST_SHARE * total, _LEAST_OWED))
            self._activate(kept.root, flows)
        for flow, promised in unmet.items():
            if promised:
                self.promise(flow, promised)
        if len(self._of_apps) > _MOST_WINDOWS:
            self._of_apps = {a: w for a, w in self._of_apps.items() if w.turn(now) > 0}

    def _activate(self, root: _Node, apps: list[AppId]) -> None:
        """Mark and lift the nodes of ``apps`` at all three levels; all promises are taken back."""
        tree: dict[int, dict[str, set[int | str]]] = {}
        for uid, scope, name in apps:
            tree.setdefault(uid, {}).setdefault(scope, set()).add(name)
            root.child(uid).child(scope).child(name)
        _clear_promises(root)
        root.activate(set(tree))
        for uid, scopes in tree.items():
            user = root.children[uid]
            user.activate(set(scopes))
            for scope, names in scopes.items():
                user.children[scope].activate(names)

    def promise(self, flow: Flow, tokens: int) -> None:
        """``tokens`` of the flow's prompts were let in and are not computed yet; holds until the
        next `survey`."""
        weight = self._weights.get(flow.app, 1.0)
        user, scope, name = self._path(flow)
        user.promised += tokens
        scope.promised += tokens / weight
        name.promised += tokens / weight

    def charge(self, flow: Flow, tokens: float, now: float) -> None:
        """``tokens`` were computed for the flow: generated ones counted `W_OUT` times, cached and
        swapped-in ones not at all."""
        self._book(flow, tokens)
        self._window.add(tokens, now)
        window = self._of_apps.get(flow.app)
        if window is None:
            window = self._of_apps[flow.app] = Window()
        window.add(tokens, now)

    def refund(self, flow: Flow, tokens: float, now: float) -> None:
        """What was charged before led to nothing: the step failed, or the tokens were overrun."""
        self.charge(flow, -tokens, now)

    def _book(self, flow: Flow, tokens: float) -> None:
        weight = self._weights.get(flow.app, 1.0)
        root = self._classes[flow.klass].root
        user, scope, name = self._path(flow)
        user.virtual += tokens
        scope.virtual += tokens / weight
        name.virtual += tokens / weight
        for parent, child in ((root, user), (user, scope), (scope, name)):
            parent.raise_floor(child)
        self.charged += tokens
        above = False
        for klass, kept in self._classes.items():
            if kept.unmet and above:
                kept.debt += LEAST_SHARE * tokens
            if klass is flow.klass:
                # What it gets beyond its share, because nobody above wanted it, is no payment in
                # advance; the end of the chunk that paid the debt is.
                least = float("-inf") if kept.owed else min(kept.debt, 0.0)
                kept.debt = max(least, kept.debt - tokens)
            above = above or kept.unmet or klass is flow.klass
            self._judge(kept)

    def _judge(self, kept: _Class) -> None:
        """Whether the class's debt is to be paid back now."""
        if kept.debt <= 0.0:
            kept.owed = False
        elif kept.debt >= max(_LEAST_OWED, _OWED_SHARE * self._window.total):
            kept.owed = True

    def preempted(self) -> None:
        """A sequence was paged out because `yields` said so, for another than a higher class."""
        self._preempted_at = self.charged

    # ------------------------------------------------------------------------------- what follows

    def owed(self, klass: PriorityClass) -> int:
        """Tokens the class must get before the classes above it, 0 for none."""
        kept = self._classes[klass]
        return max(1, int(kept.debt)) if kept.owed else 0

    def order(self, flows: Iterable[Flow]) -> list[Flow]:
        """Flows by turn, for letting requests in: owed classes, then by class, then least counter
        with what is promised."""
        return sorted(flows, key=self.turn)

    def turn(self, flow: Flow) -> tuple[float | int | str, ...]:
        """What `order` sorts by."""
        uid, scope, name = flow.app
        a, b, c = self._path(flow)
        return (
            self._rank(flow.klass),
            *(a.virtual + a.promised, uid),
            *(b.virtual + b.promised, scope),
            *(c.virtual + c.promised, name),
        )

    def work_order(self, flows: Iterable[Flow]) -> list[Flow]:
        """Flows by turn, for computing what was let in. Promises only decide between equals: a
        long prompt does not stand behind every short one that comes after it."""
        return sorted(flows, key=self._work_turn)

    def _work_turn(self, flow: Flow) -> tuple[float | int | str, ...]:
        a, b, c = self._path(flow)
        return (
            self._rank(flow.klass),
            *(a.virtual, a.promised, flow.app.uid),
            *(b.virtual, b.promised, flow.app.scope),
            *(c.virtual, c.promised, flow.app.name),
        )

    def ahead(self, one: Flow, other: Flow) -> float:
        """Charged tokens by which ``one`` is ahead of ``other``, where their paths part; negative
        if it is behind, 0 for the same app. Both are of one class."""
        for a, b in zip(self._path(one), self._path(other), strict=True):
            if a is not b:
                return a.virtual - b.virtual
        return 0.0

    @property
    def quantum(self) -> float:
        """Charged tokens by which an app must be ahead to be paged out for another of its class,
        and that must be charged between two such preemptions."""
        return max(_LEAST_QUANTUM, _QUANTUM_SHARE * self._window.total)

    def yields(self, running: Flow, asking: Flow) -> bool:
        """Whether a sequence of ``running`` may be paged out to let one of ``asking`` in.

        A lower class yields to a higher one unless it is owed its least share; a higher one yields
        to a class that is owed; within a class, an app that is ahead by more than `quantum`. The
        last two at most once per quantum of work, so nothing thrashes.
        """
        if running.klass > asking.klass:
            return not self.owed(running.klass)
        if self.charged - self._preempted_at < self.quantum:
            return False
        if running.klass < asking.klass:
            return bool(self.owed(asking.klass)) and not self.owed(running.klass)
        return self.too_far_ahead(running, asking)

    def too_far_ahead(self, one: Flow, other: Flow, quanta: float = 1.0) -> bool:
        """Whether ``one`` is ahead of ``other``, of the same class, by more than so many times
        `quantum`."""
        if one.klass is not other.klass:
            return False
        weight = max(self._weights.get(flow.app, 1.0) for flow in (one, other))
        return self.ahead(one, other) > quanta * self.quantum / weight

    def share(self, app: AppId, now: float) -> float:
        """Of all that was charged in the last `WINDOW_S`, the part charged to ``app``: 0 to 1."""
        total = self._window.turn(now)
        window = self._of_apps.get(app)
        return max(0.0, window.turn(now) / total) if window is not None and total > 0 else 0.0

    # ------------------------------------------------------------------------------------ helpers

    def _rank(self, klass: PriorityClass) -> int:
        return klass - len(PriorityClass) if self._classes[klass].owed else int(klass)

    def _path(self, flow: Flow) -> tuple[_Node, _Node, _Node]:
        uid, scope, name = flow.app
        user = self._classes[flow.klass].root.child(uid)
        of_scope = user.child(scope)
        return user, of_scope, of_scope.child(name)


def _clear_promises(node: _Node) -> None:
    for child in node.children.values():
        if child.promised:
            child.promised = 0.0
            _clear_promises(child)
