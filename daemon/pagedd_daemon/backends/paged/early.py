"""What an engine on CUDA takes its time for beside imports, begun before torch is imported.

Loading torch takes the interpreter seconds, and the driver needs the interpreter for none of what
it does meanwhile. This module imports nothing that takes time.
"""

from __future__ import annotations

import ctypes
import threading


def begin_context() -> threading.Thread:
    """Have the driver make the context of the first device that torch will use, in a thread.

    It is the primary context, which torch finds there. Where there is no driver or no device,
    nothing happens: torch will say so.
    """
    thread = threading.Thread(target=_retain, name="cuda", daemon=True)
    thread.start()
    return thread


def _retain() -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    context = ctypes.c_void_p()
    if driver.cuInit(0) == 0:  # CUDA_SUCCESS
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
