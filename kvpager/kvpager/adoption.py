"""Pages that are in a lower tier from the start: an earlier life has left them there."""

from __future__ import annotations

from kvpager.errors import ImpossibleEventError
from kvpager.pool import Pool
from kvpager.prefix import DIGEST
from kvpager.tiers import LowerTier, SlotState
from kvpager.types import Adopt, PageName, Tier


def adopt(pool: Pool, event: Adopt) -> None:
    """Make cached pages of what ``event`` names.

    Raises:
        ImpossibleEventError: A slot is not free, or a name is none. Nothing has changed.
    """
    if event.tier is Tier.GPU:
        raise ImpossibleEventError("pages are adopted into a lower tier")
    tier = pool.lower[event.tier]
    _check(tier, event)
    by_digest: dict[bytes, tuple[int, PageName]] = {}
    for slot, name in event.pages:
        by_digest.setdefault(name.digest, (slot, name))
    waiting = dict(by_digest)
    placed: set[int] = set()
    for digest in by_digest:
        # A page is found again, and reclaimed leaf first, only if the one in front is known first.
        line: list[tuple[int, PageName]] = []
        at: bytes | None = digest
        while at is not None and (found := waiting.pop(at, None)) is not None:
            line.append(found)
            at = found[1].before
        for slot, name in reversed(line):
            if _place(pool, tier, slot, name):
                placed.add(slot)
    tier.adopt([slot for slot, _ in by_digest.values() if slot in placed])


def _check(tier: LowerTier, event: Adopt) -> None:
    seen: set[int] = set()
    for slot, name in event.pages:
        if not 0 <= slot < tier.total or tier.state[slot] != SlotState.FREE or slot in seen:
            raise ImpossibleEventError(f"slot {slot} of {event.tier.name} cannot be adopted")
        if len(name.digest) != DIGEST or (name.before is not None and len(name.before) != DIGEST):
            raise ImpossibleEventError(f"slot {slot} of {event.tier.name} has no name: {name}")
        seen.add(slot)


def _place(pool: Pool, tier: LowerTier, slot: int, name: PageName) -> bool:
    """Enter a page into the index; False if this tier has it already."""
    node = pool.index.find(name.digest)
    if node < 0:
        node = pool.index.add_after(name.digest, name.before, name.owner)
    elif pool.index.where[tier.tier][node] >= 0:
        return False
    tier.name(slot, node)
    return True
