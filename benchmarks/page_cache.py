"""A cold page cache for one file of an engine: what came out of memory says nothing of a disk."""

from __future__ import annotations

import os
from pathlib import Path


def drop_cache(process: int, folder: str) -> None:
    """Have the kernel forget what it holds of the file in ``folder`` (a part of its path) that a
    process has open; unlinked or not.

    Raises:
        FileNotFoundError: It has none.
    """
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if folder in target:
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what is not written yet cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            return
    raise FileNotFoundError(f"process {process} has no file in {folder}")
