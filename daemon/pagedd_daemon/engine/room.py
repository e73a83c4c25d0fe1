"""Room in the pool for those who run: asking the pager for it, and whom to page out."""

from __future__ import annotations

from collections.abc import Iterable

from kvpager.types import DeferReason, Preempt, Reserve, Reserved
from pagedd_daemon.engine.residents import Residents
from pagedd_daemon.engine.turns import Turns
from pagedd_daemon.engine.work import Sequence, SequenceState


class Room:
    """Gives running sequences room for their next tokens, at the expense of the least important."""

    def __init__(self, residents: Residents, turns: Turns) -> None:
        self._residents = residents
        self._turns = turns
        self.shrunk = False
        """Whether the pool has fewer blocks than it began with."""
        self.at_ceiling: frozenset[int] = frozenset()
        """Sequences that were refused room last, since their namespace has all it may have."""
        self.stranded: list[Sequence] = []
        """Sequences alone in a full pool, which cannot grow; until the caller clears this."""

    def make(self, decodes: list[Sequence], *, in_flight: bool) -> tuple[list[Sequence], bool]:
        """Room for one more token of each; whom it could not be made for sits this step out.

        Args:
            decodes: Who asks.
            in_flight: Whether a step is: then everybody can wait for it.

        Returns:
            Who has room, and whether somebody was short of it.
        """
        pressed = False
        ready: list[Sequence] = []
        asking = decodes
        while asking:
            short = self.reserve(asking, [1] * len(asking))
            ready += [s for s in asking if s.seq not in short]
            asking = [s for s in asking if s.seq in short]
            if not asking:
                break
            pressed = True
            if self._residents.pool.room_coming or self.somebody_leaves():
                break  # room may be on its way already, from a victim of the last step
            victim = self._victim(asking[0], must=not ready, in_flight=in_flight)
            if victim is None:
                break
            self.page_out(victim)
            self._residents.hear()
            ready = [s for s in ready if s.state is SequenceState.RUNNING]
            asking = [s for s in asking if s.state is SequenceState.RUNNING]
        return ready, pressed

    def give_way(self) -> None:
        """The pool has shrunk below what runs: page out the least important until the rest fits."""
        while self.shrunk and self._residents.pool.pager.excess() and not self.somebody_leaves():
            running = [s for s in self._residents.sequences.values() if s.removable]
            if not running:
                return
            self.page_out(self.choose(self._turns.victims(running)) or running[-1])
            self._residents.hear()

    def make_way(self, asking: Sequence) -> None:
        """No step is in flight and none can follow: page somebody out for ``asking``'s prompt."""
        if not self._others(asking):
            return
        victim = self._victim(asking, must=True, in_flight=False)
        if victim is not None:
            self.page_out(victim)
            self._residents.hear()

    def page_out(self, victim: Sequence) -> None:
        """Have it give its blocks back, as soon as no step in flight needs them."""
        for member in victim.request.sequences.values():
            if member.state is SequenceState.RUNNING:
                member.state = SequenceState.LEAVING
        self._residents.tell(Preempt(victim.seq))

    def somebody_leaves(self) -> bool:
        """Whether a victim's blocks come back once the step in flight is over."""
        return any(s.state is SequenceState.LEAVING for s in self._residents.sequences.values())

    def choose(self, groups: Iterable[list[int]]) -> Sequence | None:
        """The pager's choice in the first group in which it has one."""
        for group in groups:
            removable = [seq for seq in group if self._residents.sequences[seq].removable]
            chosen = self._residents.pool.pager.choose_victim(removable)
            if chosen is not None:
                return self._residents.sequences[chosen]
        return None

    def reserve(self, sequences: list[Sequence], counts: list[int]) -> set[int]:
        """Ask the pager for room; returns the sequences it had none for."""
        verdicts = self._residents.pool.handle(
            Reserve(tuple(s.seq for s in sequences), tuple(counts))
        )
        for verdict in verdicts:
            if isinstance(verdict, Reserved):
                at_ceiling = (s.seq for s in verdict.short if s.reason is DeferReason.QUOTA)
                self.at_ceiling = frozenset(at_ceiling)
                return {shortage.seq for shortage in verdict.short}
        raise AssertionError("Reserve was not answered")

    def _victim(self, asking: Sequence, *, must: bool, in_flight: bool) -> Sequence | None:
        """Whom to page out: a paused one (its client does not read), else by turn and by the
        pager's choice.

        The pager spares whoever was just resumed. With ``must`` nobody else could go on either, so
        then the newest other one is taken; if there is none, ``asking`` is stranded. Beams of one
        search do not make way for each other: they can only go on together.
        """
        must = must and not in_flight
        running = self._helpful(asking)
        others = self._others(asking)
        if asking.seq in self.at_ceiling:
            must = must or (not others and not in_flight)
        paused = [s for s in running if s.request.paused]
        if others and (chosen := self.choose(self._turns.victims(paused or running))):
            return chosen
        if others and must:
            return others[-1]
        if must and self.shrunk and asking.seq not in self.at_ceiling:
            return asking  # until the pool grows again
        if must:
            self.stranded.append(asking)
        return None

    def _helpful(self, asking: Sequence) -> list[Sequence]:
        """Whose room ``asking`` could have, itself included."""
        running = [s for s in self._residents.sequences.values() if s.removable]
        if asking.seq in self.at_ceiling:  # only its own namespace can give it room
            running = [s for s in running if s.request.root == asking.request.root]
        return running

    def _others(self, asking: Sequence) -> list[Sequence]:
        """The same, without itself and, of a search, the beams beside it."""
        group = asking.request if asking.request.beams is not None else None
        return [s for s in self._helpful(asking) if s is not asking and s.request is not group]
