"""What the daemon is told at its start."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_cache_dir, user_state_dir

BACKENDS = ("auto", "torch", "llama.cpp", "simulated")
KV_DTYPES = ("f16", "f32")


class ConfigError(Exception):
    """A setting that cannot be used; the daemon exits 78 (``EX_CONFIG``)."""


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or less where a control group says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def quarter_of_memory() -> int:
    """Bytes; what the RAM tier of KV may take by default."""
    return memory_bytes() // 4


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one daemon. What a reload changes makes a new one of these."""

    socket_dir: Path
    """Directory of the two sockets and the lock; made with mode 0700 where it is missing."""
    config_file: Path | None = None
    """``config.toml`` with the settings of apps; None: there are none, and none can be made."""
    model: str | None = None
    """Name or path of the model that requests without one get, loaded in the background at start;
    None: requests must name one."""
    backend: str = "auto"
    """``torch`` (the project's own engine, on the CUDA device or else on the CPU), ``llama.cpp``
    (the CPU), ``simulated`` (deterministic tokens and no weights, whatever the model), or ``auto``:
    torch where there is a GPU that can compute the model, else llama.cpp."""
    kv_tokens: int = 0
    """Tokens of the first KV tier; 0: chosen by the engine from the memory of the machine."""
    ram_bytes: int = field(default_factory=quarter_of_memory)
    """Bytes the RAM tier of KV may take. A quarter of the memory by default: the desktop, the
    weights and the page cache that holds them need the rest."""
    vram_bytes: int = 0
    """Bytes of GPU memory that a model, its KV and its steps may take; 0: nine tenths of what is
    free when it is loaded."""
    disk_bytes: int = 0
    """Bytes of the disk tier's file; 0: there is none. They are allocated when a model is loaded,
    so nobody's disk is filled unasked."""
    disk_folder: Path | None = None
    """Where that file lies; None: `pagedd`'s folder for caches, or for state if it persists."""
    disk_persist: bool = False
    """Whether it is a store of prefixes that outlives the daemon."""
    threads: int = 0
    """CPU threads that compute where no GPU does; 0: the number of physical cores."""
    context_tokens: int = 0
    """The longest sequence to serve, in tokens; 0: what the model was trained with."""
    kv_dtype: str = "f16"
    """Type of keys and values in llama.cpp: ``f16``, or ``f32`` for twice the memory and no
    rounding, which lets texts be compared token by token."""
    flash_attention: bool = True
    """Whether llama.cpp uses flash attention, its faster kernel; off where texts are compared."""
    keep_alive_s: float = 300.0
    """Seconds a model stays loaded after its last request, unless the request says otherwise;
    ``inf``: for ever; 0: not at all. Five minutes is what users of other desktop servers know."""
    log_level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``. Prompts are logged at no level."""
    drain_s: float = 30.0
    """Seconds live streams get to end by themselves after SIGTERM or ``shutdown``; well below the
    90 s after which service managers kill."""
    engine_deaths: int = 5
    """Engines that may die within a minute before the daemon computes on the CPU instead, or where
    it does so already, ends. Not a setting: measurements and tests kill more of them."""
    write_through: bool = True
    """Whether full blocks of live sequences are kept in the RAM tier too, for the next engine. Not
    a setting: what it costs is measured by turning it off."""
    shared: bool = False
    """Whether other users of the machine are served too."""
    group: str | None = None
    """Of those, only members of this group; None: everybody who may enter ``socket_dir``."""
    pinned: frozenset[str] = frozenset()
    """Fields that the command line gave: a reload of the file leaves them as they are."""
    simulated_step_us: int = 1000
    """Simulated backend only: fixed part of a step's time, in microseconds."""
    simulated_token_us: int = 0
    """Simulated backend only: further microseconds per input token of a step."""

    def __post_init__(self) -> None:
        """Check what a person may have typed.

        Raises:
            ConfigError: Naming the setting.
        """
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"KV type must be {' or '.join(KV_DTYPES)}, not {self.kv_dtype!r}")
        if self.group is not None and not self.shared:
            raise ConfigError(f"group {self.group!r} is given, and the daemon is not shared")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"unknown log level {self.log_level!r}")
        for name in (
            "kv_tokens",
            "ram_bytes",
            "vram_bytes",
            "disk_bytes",
            "threads",
            "context_tokens",
            "simulated_step_us",
            "simulated_token_us",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative")
        if self.ram_bytes > (there := memory_bytes()):
            raise ConfigError(
                f"ram_gb is {self.ram_bytes / 1e9:g}, and this machine has {there / 1e9:.1f} GB"
            )
        for name in ("keep_alive_s", "drain_s"):
            value = getattr(self, name)
            if math.isnan(value) or value < 0:
                raise ConfigError(f"{name} must be a number of seconds, 0 or more")


def disk_place(folder: Path | None, persist: bool) -> Path:
    """Where the file of the disk tier lies: in ``folder``, or where such files belong."""
    base = user_state_dir if persist else user_cache_dir
    return folder or Path(base("pagedd"))


def cuda_device_present(exists: Callable[[str], bool] = os.path.exists) -> bool:
    """Whether the NVIDIA driver offers a GPU."""
    return exists("/dev/nvidia0") or exists("/dev/dxg")


def gpu_usable() -> bool:
    """Whether there is a GPU and the packages to use it; they are found and not imported."""
    return cuda_device_present() and importlib.util.find_spec("torch") is not None
