"""What there is in this machine, asked of the driver and never by loading torch."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def driver_version() -> str | None:
    """The NVIDIA driver's; None without one."""
    with _nvml() as library:
        if library is None:
            return None
        text = ctypes.create_string_buffer(96)
        if library.nvmlSystemGetDriverVersion(text, 96):
            return None
        return text.value.decode("ascii", "replace")


def gpus() -> list[Gpu]:
    """All that the driver shows; none without a driver."""
    found: list[Gpu] = []
    with _nvml() as library:
        if library is None:
            return found
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return found
        for index in range(count.value):
            handle, memory = ctypes.c_void_p(), _Memory()
            name = ctypes.create_string_buffer(96)
            major, minor = ctypes.c_int(), ctypes.c_int()
            failed = (
                library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
                or library.nvmlDeviceGetName(handle, name, 96)
                or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
                or library.nvmlDeviceGetCudaComputeCapability(
                    handle, ctypes.byref(major), ctypes.byref(minor)
                )
            )
            if not failed:
                text = name.value.decode("utf-8", "replace")
                capability = (major.value, minor.value)
                found.append(Gpu(text, memory.total, memory.free, capability))
    return found


@contextlib.contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """NVML, the driver's own library. By ctypes: the base install has no package for it."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if library.nvmlInit_v2():
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()
