"""Whose pages a tier keeps, and whose turn it is to make room."""

from __future__ import annotations

from kvpager.blocks import LruList

_WHOSE = (1 << 32) - 1
"""The bits of `kvpager.types.Admit.owner` that say whose a page is."""


class _Share:
    """What one owner has."""

    __slots__ = ("cached", "kept")

    def __init__(self, cached: LruList) -> None:
        self.cached = cached
        """Its cached slots, oldest first."""
        self.kept = 0
        """Its pages that no swapped-out sequence holds: cached, or about to be."""


class ByOwner:
    """The pages of a tier that are there to be found again, each owner's by itself."""

    def __init__(self, size: int) -> None:
        """None yet, of ``size`` slots."""
        self._size = size
        self._shares: dict[int, _Share] = {}
        self.counts: dict[int, int] = {}
        """How many pages there are of each `Admit.owner`, of whom there is any."""

    def count(self, owner: int, more: int) -> None:
        """A page of the owner is kept (1), or kept no longer (-1)."""
        self._share(owner).kept += more
        now = self.counts.get(owner, 0) + more
        if now:
            self.counts[owner] = now
        else:
            del self.counts[owner]

    def cached(self, owner: int) -> LruList:
        """The list that a cached slot of the owner is in."""
        return self._share(owner).cached

    def giver(self, asking: int) -> LruList:
        """The slots of whoever is to make room for a page of ``asking``, -1 for nobody's: who has
        most, that page counted. Somebody must have a cached slot."""
        asking = asking & _WHOSE if asking >= 0 else -1
        most = max(
            (share.kept + (who == asking), who != asking, who)
            for who, share in self._shares.items()
            if share.cached.count
        )
        return self._shares[most[2]].cached

    def _share(self, owner: int) -> _Share:
        found = self._shares.get(owner & _WHOSE)
        if found is None:
            beside = next((share.cached for share in self._shares.values()), None)
            found = self._shares[owner & _WHOSE] = _Share(LruList(self._size, beside))
        return found
