"""Where compiled kernels are kept, and how many were compiled too late."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from pagedd_daemon.backends.base import ModelLoadError


def use_cache_folder() -> Path:
    """Have compiled kernels kept in the project's own cache folder; before Triton is imported.

    What is in there is loaded as code, so nobody else may write to it.

    Raises:
        ModelLoadError: It belongs to somebody else, or is open to others.
    """
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("pagedd")) / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ModelLoadError(
            f"compiled kernels cannot be kept in {folder}: {error.strerror}", {"path": str(folder)}
        ) from error
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or mode & 0o077:
        raise ModelLoadError(
            f"{folder} must be a folder of your own that nobody else may enter (mode 0700): "
            f"compiled kernels are loaded from it; it has mode {mode:04o} and owner "
            f"{status.st_uid}",
            {"path": str(folder), "mode": mode, "owner": status.st_uid},
        )
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")
    return folder


class CompileCounter:
    """Counts kernels that are compiled or loaded for a new shape. After warm-up each is a defect:
    somebody's stream stood still meanwhile (vllm 45631)."""

    def __init__(self) -> None:
        """Counts from now on; there is one per process, since Triton has one hook."""
        import triton

        self.count = 0
        self.names: list[str] = []
        """The last of them."""
        triton.knobs.runtime.jit_post_compile_hook = self._compiled

    def reset(self) -> None:
        """Warm-up is over."""
        self.count = 0
        self.names.clear()

    def _compiled(self, *_: Any, repr: str = "", **__: Any) -> None:
        self.count += 1
        self.names = [*self.names[-7:], repr.partition("[")[0]]
