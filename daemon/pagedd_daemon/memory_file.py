"""The memory file: where the RAM tier lies, so that it outlives the engine that filled it.

The front makes it and never maps it; each engine inherits its descriptor and maps it. It has no
name and is gone with the last process that holds it. Its size is sealed: what is mapped can
never become a SIGBUS because somebody truncated it.
"""

from __future__ import annotations

import fcntl
import os

PAGE = 4096
_TABLE_SHARE = 16
"""The table of records takes a sixteenth of the budget at most (pages of 2 KiB)."""

_SPARE_BYTES = 8 << 20
"""For byte strings whose size is known only once they are written."""


def memory_size(budget_bytes: int) -> int:
    """Bytes of the address range for a tier of ``budget_bytes``.

    Twice the budget, the table of records, and a little to spare. Only what was written to takes
    memory, so the range may be larger: byte strings of many sizes need room to be laid out in.
    """
    size = PAGE + 2 * budget_bytes + budget_bytes // _TABLE_SHARE + _SPARE_BYTES
    return -(-size // PAGE) * PAGE


def create_memory(budget_bytes: int) -> int:
    """An empty memory file for a tier of ``budget_bytes``; its descriptor, close-on-exec.

    Raises:
        OSError: The kernel refuses.
    """
    descriptor = os.memfd_create("pagedd-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, memory_size(budget_bytes))
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
