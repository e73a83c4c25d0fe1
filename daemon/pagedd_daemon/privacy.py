"""What a process that holds prompts keeps to itself."""

from __future__ import annotations

import ctypes
import os
import resource

DEBUGGABLE = "PAGEDD_DEBUGGABLE"
"""Set to 1, debuggers and profilers of the user may look into the processes."""
_PR_SET_DUMPABLE = 4


def keep_private() -> None:
    """No core file of this process, and none of its memory for other processes of the user.

    The limit keeps the kernel from writing a file. A core pattern with a pipe ignores it, and a
    debugger needs no core file: both ask whether the process may be dumped (prctl(2),
    PR_SET_DUMPABLE), which every exec resets, so each process says it for itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.environ.get(DEBUGGABLE) == "1":
        return
    # A sandbox may forbid it; the limit holds without.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
