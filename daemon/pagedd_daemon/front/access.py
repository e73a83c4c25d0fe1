"""Whom the daemon serves, and who decides for everybody.

A daemon serves its own user, or, where it is shared, whoever the kernel lets to its sockets. Then
no user sees or changes anything of another's, and what concerns everybody is for administrators:
the daemon's own user, and root.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field

from pagedd_daemon.front.errors import WireError

OVERFLOW_UID = 65534
"""In a user namespace every user from outside appears as this one: it names nobody."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what, by user and group ids that the kernel says."""

    shared: bool = False
    """Whether others than `owner` are served."""
    group: int | None = None
    """Of those, only members of this group; None: everybody on the machine."""
    owner: int = field(default_factory=os.geteuid)
    """The user the daemon runs as."""

    def admits(self, uid: int) -> bool:
        """Whether this user may connect, as far as the user alone says."""
        return uid != OVERFLOW_UID and (self.shared or uid == self.owner)

    def belongs(self, uid: int, groups: Collection[int]) -> bool:
        """Whether a user who was admitted may ask anything, being a member of ``groups``."""
        return self.group is None or self.administers(uid) or self.group in groups

    def administers(self, uid: int) -> bool:
        """Whether this user decides for everybody."""
        return uid in (self.owner, 0)

    def view(self, uid: int) -> int | None:
        """The only user of whom this one is told anything; None: of all."""
        return uid if self.shared and not self.administers(uid) else None

    def require(self, uid: int, what: str) -> None:
        """Refuse what others would feel to a user who is one of several.

        Raises:
            WireError: ``E_FORBIDDEN``.
        """
        if self.view(uid) is not None:
            raise WireError(
                "E_FORBIDDEN",
                f"others share this daemon: only its own user (uid {self.owner}) and root may "
                f"{what}",
                details={"uid": uid, "owner": self.owner},
            )
