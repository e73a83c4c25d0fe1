"""Whose pages are whose: one number that front, engine and the files of both mean the same by.

A user is its uid. What it keeps on disk it may clear: from then on it is in another *era*, whose
pages have other names, so that nothing from before is found again by anybody, and what was stored
in an earlier era is erased when the store is next opened.
"""

from __future__ import annotations

_ERA = 32
MOST_ERAS = (1 << 31) - 1


def join(uid: int, era: int) -> int:
    """`kvpager.types.Admit.owner` of the pages of a user in an era."""
    return uid | era << _ERA


def split(owner: int) -> tuple[int, int]:
    """User and era of a page."""
    return owner & (1 << _ERA) - 1, owner >> _ERA
