"""Energy counters of the machine: joules since some moment, of each device that tells.

NVIDIA GPUs tell through NVML (Volta and later), CPU packages through Linux's powercap (RAPL), whose
file is for root alone on most systems. What cannot be read is left out. Read only when somebody
asks, and never on the event loop.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

from pagedd_daemon.front.config import cuda_device_present

_POWERCAP = Path("/sys/class/powercap")

Source = Callable[[], float]


class Energy:
    """The machine's counters, found at the first reading."""

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._powercap = powercap
        self._sources: dict[str, Source] | None = None

    @property
    def silent(self) -> bool:
        """It is known that nothing can be read."""
        return self._sources == {}

    def read(self) -> Mapping[str, float]:
        """Joules by device: ``gpu0``, ``package-0``. May take some milliseconds, or a hundred the
        first time."""
        if self._sources is None:
            self._sources = {**_packages(self._powercap), **_gpus()}
        joules: dict[str, float] = {}
        for name, source in self._sources.items():
            # A device that is reset or unplugged is left out until it is back.
            with contextlib.suppress(Exception):
                joules[name] = source()
        return joules


def _packages(powercap: Path) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for zone in sorted(powercap.glob("intel-rapl:?")):  # AMD's too: the name is historical
        try:
            name = (zone / "name").read_text().strip()
            _microjoules(zone / "energy_uj")
        except (OSError, ValueError):
            continue
        found[name] = lambda file=zone / "energy_uj": _microjoules(file)  # type: ignore[misc]
    return found


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _gpus() -> dict[str, Source]:
    if not cuda_device_present():
        return {}
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, or a GPU that does not count
        return {}

    def source(handle: object) -> Source:
        return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

    return {f"gpu{index}": source(handle) for index, handle in enumerate(handles)}
