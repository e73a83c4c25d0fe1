"""How much of something each user has, and all of them together."""

from __future__ import annotations


class Tally:
    """Counts by user; who has nothing takes no room."""

    __slots__ = ("_of", "total")

    def __init__(self) -> None:
        self.total = 0
        self._of: dict[int, int] = {}

    def __bool__(self) -> bool:
        """Whether anybody has anything."""
        return bool(self._of)

    def add(self, uid: int, amount: int) -> None:
        """``amount`` more, or less where it is negative."""
        self.total += amount
        now = self._of.get(uid, 0) + amount
        if now:
            self._of[uid] = now
        else:
            self._of.pop(uid, None)

    def of(self, uid: int) -> int:
        """What this user has."""
        return self._of.get(uid, 0)

    def most(self) -> int:
        """The user who has most; somebody must have something."""
        return max(self._of, key=self._of.__getitem__)
