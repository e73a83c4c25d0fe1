"""Per-namespace quotas: how much of the first tier the sequences of one root may hold, and keep.

A page belongs to one root, so no block is ever shared between namespaces, and each counts its own.
"""

from __future__ import annotations


class Namespace:
    """All sequences with one root."""

    __slots__ = ("ceiling", "floor", "members", "root", "used")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.members = 0
        """Its live sequences."""
        self.used = 0
        """Blocks that its running sequences hold; shared ones count once."""
        self.floor = 0
        """Blocks it keeps while others above their floor can be preempted instead."""
        self.ceiling = 0
        """Blocks it may hold, 0 for all."""

    def room(self) -> int | None:
        """Blocks it may still take, None for any number."""
        return max(0, self.ceiling - self.used) if self.ceiling else None

    def over(self) -> int:
        """Blocks it holds beyond its floor."""
        return max(0, self.used - self.floor)


class Quotas:
    """The namespaces that have sequences or a quota."""

    def __init__(self) -> None:
        self.by_root: dict[bytes, Namespace] = {}
        self._limited = 0

    @property
    def active(self) -> bool:
        """Whether any namespace has a quota."""
        return self._limited > 0

    def set(self, root: bytes, floor: int, ceiling: int) -> None:
        """Give a namespace a quota; two zeros take it away."""
        space = self.get(root)
        self._limited -= bool(space.floor or space.ceiling)
        space.floor, space.ceiling = floor, ceiling
        self._limited += bool(floor or ceiling)
        self._forget_if_idle(space)

    def get(self, root: bytes) -> Namespace:
        """The namespace of a root; made if there is none."""
        space = self.by_root.get(root)
        if space is None:
            space = self.by_root[root] = Namespace(root)
        return space

    def ceiling(self, root: bytes) -> int:
        """The ceiling of a root, 0 for none."""
        space = self.by_root.get(root)
        return space.ceiling if space is not None else 0

    def join(self, root: bytes) -> Namespace:
        """The namespace of a sequence that has come to life."""
        space = self.get(root)
        space.members += 1
        return space

    def leave(self, space: Namespace) -> None:
        """A sequence of it has ended."""
        space.members -= 1
        self._forget_if_idle(space)

    def _forget_if_idle(self, space: Namespace) -> None:
        if not (space.members or space.floor or space.ceiling):
            del self.by_root[space.root]
