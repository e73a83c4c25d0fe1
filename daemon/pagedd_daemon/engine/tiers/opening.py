"""The disk tier that an engine is told to have, or the reason why there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvpager.types import PageName
from pagedd_daemon.engine.tiers.disk import DiskTier
from pagedd_daemon.engine.tiers.diskfile import READERS, DiskFile
from pagedd_daemon.engine.tiers.diskspace import swap_space
from pagedd_daemon.engine.tiers.records import RECORD_BYTES, TABLE_OFFSET, Shape, TierFormatError
from pagedd_daemon.engine.tiers.store import store_space
from pagedd_daemon.messages import Configure
from pagedd_daemon.owners import split

log = logging.getLogger(__name__)

_EXTENT_SHARE = 7 / 8
"""Of the file that pages take where several are kept in one piece: an eighth is left for pages
that nobody wants any more."""

_FLUSH_S = 1.0
"""Seconds that the end of an engine waits for what is still to be written to the store."""


@dataclass(frozen=True, slots=True)
class DiskWishes:
    """What the engine is told of its disk tier."""

    bytes: int = 0
    """0: there is none."""
    folder: str = ""
    """Where its file lies."""
    persist: bool = False
    """Whether it is the prefix store, which stays when the engine ends."""
    eras: Mapping[int, int] = field(default_factory=dict)
    """Users who have cleared what they had there, and how often (`pagedd_daemon.owners`)."""

    @classmethod
    def of(cls, configure: Configure) -> DiskWishes:
        """What ``configure`` says of it."""
        eras = dict(configure.disk_eras)
        return cls(configure.disk_bytes, configure.disk_folder, configure.disk_persist, eras)

    def given_up(self, name: PageName) -> bool:
        """Whether a page is one that its user has cleared."""
        uid, era = split(name.owner)
        return era < self.eras.get(uid, 0)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk tier, or none."""

    tier: DiskTier | None = None
    slots: int = 0
    notice: str = ""
    persists: bool = False

    def counters(self) -> dict[str, int]:
        """Figures for ``stats``."""
        return {} if self.tier is None else self.tier.counters()

    def close(self) -> None:
        """Let go of it."""
        if self.tier is not None:
            self.tier.close(_FLUSH_S if self.persists else 0.0)

    def troubles(self) -> list[str]:
        """What is not as it was wished for, for people."""
        found = [self.notice] if self.notice else []
        if self.tier is not None and self.tier.file.trouble:
            found.append(f"the disk tier is not used any more: {self.tier.file.trouble}")
        return found


def open_disk(
    wishes: DiskWishes, binding: bytes, page_bytes: int, *, pieces: bool, readers: int = READERS
) -> Disk:
    """Open the tier.

    Args:
        wishes: How large, and where.
        binding: 32 bytes over all that the bytes of a page depend on.
        page_bytes: Of one page in the file, at most.
        pieces: Whether several pages are kept in one piece, of which some may be unwanted.
        readers: Threads that read; 0: nothing has a thread.
    """
    if not wishes.bytes:
        return Disk()
    make = store_space if wishes.persist else swap_space
    space = make(Path(wishes.folder), wishes.bytes)
    if space.descriptor < 0:
        log.warning("%s", space.notice)
        return Disk(notice=space.notice)
    room = (space.bytes - TABLE_OFFSET - 4096) * (_EXTENT_SHARE if pieces else 1)
    slots = max(0, int(room // (page_bytes + RECORD_BYTES)))
    shape = Shape(binding, slots, space.bytes)
    try:
        file = DiskFile(space.descriptor, shape, readers=readers)
    except (OSError, TierFormatError) as error:
        os.close(space.descriptor)
        log.warning("there is no disk tier: %s", error)
        return Disk(notice=f"there is no disk tier: {error}")
    if space.notice:
        log.warning("%s", space.notice)
    tier = DiskTier(file)
    if wishes.eras and (erased := tier.erase(wishes.given_up)):
        log.info("%d pages were erased that their users had cleared", erased)
    return Disk(tier, slots, space.notice, wishes.persist)
