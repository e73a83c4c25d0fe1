"""Beams as sequences: a survivor forks its parent's blocks, a dead beam gives its own back.

The beams of a request are one group of the pager. Each of them takes its place in steps by itself;
when all have their candidates, wherever and whenever they were computed, the search takes a step
(`pagedd_daemon.engine.beams`). A group that is paged out keeps the candidates it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.engine.beams import BeamSearch
from pagedd_daemon.engine.room import Room
from pagedd_daemon.engine.sampler import Drawn
from pagedd_daemon.engine.work import SequenceState
from pagedd_daemon.params import BeamParams, SamplingParams

if TYPE_CHECKING:
    from pagedd_daemon.engine.work import Request, Sequence

_PATIENCE = 3
"""How often a group alone in the pool is let in anew before it is taken to be too large."""


class BeamGroup:
    """The beams of one request."""

    def __init__(self, request: Request, search: BeamSearch) -> None:
        """No beam yet."""
        self.request = request
        self.search = search
        self.members: list[Sequence] = []
        """The beams in the order of `BeamSearch.running`."""
        self.tangled = 0
        """How often it stood in its own way since it last took a step."""
        self._found: dict[int, Drawn] = {}
        """Candidates by sequence."""
        self._last_index = 0

    def report(self, sequence: Sequence, drawn: Drawn) -> None:
        """A beam has its candidates. After a preemption it may get them a second time."""
        self._found[sequence.seq] = drawn

    @property
    def ready(self) -> bool:
        """Whether the search can take a step: every beam has candidates, and is where it can be
        forked."""
        if not self.members or len(self._found) < len(self.members) or self.search.over:
            return False
        return all(
            s.state is SequenceState.RUNNING and s.until < 0 and not s.drawing and not s.pending
            for s in self.members
        )

    @property
    def torn(self) -> bool:
        """Whether some of its beams are paged out, and others hold blocks and wait for them."""
        states = {sequence.state for sequence in self.members}
        return SequenceState.PREEMPTED in states and SequenceState.RUNNING in states

    def take_found(self) -> list[Drawn]:
        """The candidates of each beam; forgets them."""
        found = [self._found[sequence.seq] for sequence in self.members]
        self._found.clear()
        return found

    def indices(self, count: int) -> range:
        """Numbers for so many new beams, within the request."""
        first = self._last_index + 1
        self._last_index += count
        return range(first, first + count)


def search_for(request: Request, params: BeamParams, caps: Capabilities) -> BeamGroup:
    """The search that a request asks for; what its draws are to bring from now on."""
    room = caps.context_tokens - request.prompt_tokens
    request.stop = replace(request.stop, max_tokens=min(request.stop.max_tokens, room))
    search = BeamSearch(params, request.stop, caps.eog_tokens, request.sampling.logprobs)
    request.sampling = SamplingParams(temperature=0.0, logprobs=search.candidates)
    return BeamGroup(request, search)


class Forks(Protocol):
    """What the scheduler does with sequences."""

    def fork(self, parent: Sequence, indices: Iterable[int]) -> list[Sequence]:
        """Sequences that share all of the parent's blocks."""
        ...

    def end(
        self, sequence: Sequence, *, keep_tokens: int | None = None, cache: bool = True
    ) -> None:
        """A sequence is over."""
        ...


class Branches:
    """All searches that are going on."""

    def __init__(self, scheduler: Forks, room: Room) -> None:
        self._scheduler = scheduler
        self._room = room
        self._groups: dict[int, BeamGroup] = {}
        """By the number of the request."""
        self.over: list[Request] = []
        """Requests whose search is over, until the caller clears this."""

    def begin(self, group: BeamGroup) -> None:
        """Its request has been let in."""
        group.members = list(group.request.sequences.values())
        self._groups[group.request.rid] = group

    def advance(self) -> None:
        """Every search that can takes a step."""
        for group in self._groups.values():
            if group.ready:
                self._step(group)

    def end(self, group: BeamGroup, *, cache: bool = True) -> None:
        """Its request is over: the blocks of its beams are given back. Those of the beam nearest to
        the best text stay in the cache, if ``cache``."""
        self._groups.pop(group.request.rid, None)
        best = group.search.ended[0].tokens() if group.search.ended else []
        tokens = [drawn.token for drawn in best]
        kept = max(group.members, key=lambda s: _common(s, tokens), default=None)
        for sequence in sorted(group.members, key=lambda s: s is kept):
            self._scheduler.end(sequence, cache=cache and sequence is kept)
        group.members = []
        group.request.sequences.clear()

    def untangle(self) -> bool:
        """Nobody can run. Where that is so because groups came back in part and keep the room that
        their other beams need, they make way: all but one, or the only one, to begin anew.

        Returns:
            Whether there are such groups.
        """
        torn = [g for g in self._groups.values() if g.torn and not g.request.paused]
        for group in torn[1:] or torn:
            resident = next(s for s in group.members if s.state is SequenceState.RUNNING)
            group.tangled += 1
            if len(torn) == 1 and group.tangled > _PATIENCE and not self._room.shrunk:
                self._room.stranded.append(resident)
            else:
                self._room.page_out(resident)
        return bool(torn)

    def _step(self, group: BeamGroup) -> None:
        group.tangled = 0
        steps = group.search.advance(group.take_found())
        if group.search.over:
            self.over.append(group.request)
            return
        children = Counter(step.parent for step in steps)
        for rank, sequence in enumerate(group.members):
            if not children[rank]:
                # First, as the sequence ids they give back may be needed for the forks.
                del group.request.sequences[sequence.index]
                self._scheduler.end(sequence, cache=False)
        lines: dict[int, Iterator[Sequence]] = {}
        for rank, count in children.items():
            parent = group.members[rank]
            more = self._scheduler.fork(parent, group.indices(count - 1)) if count > 1 else []
            lines[rank] = iter([parent, *more])
        group.members = [next(lines[step.parent]) for step in steps]
        for sequence, step in zip(group.members, steps, strict=True):
            sequence.tokens.append(step.token)


def _common(sequence: Sequence, tokens: list[int]) -> int:
    """Generated tokens of a beam that are those of a text."""
    prompt = sequence.request.prompt_tokens
    mine = sequence.tokens.view(prompt, len(sequence.tokens)).tolist()
    pairs = enumerate(zip(mine, tokens, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(mine), len(tokens)))
