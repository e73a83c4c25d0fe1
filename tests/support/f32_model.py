"""An F32 copy of the packaged model, made once and kept.

With F32 weights, F32 keys and values, and no flash attention, two ways to compute the same logits
differ by rounding alone, so that texts can be compared token by token.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import llama_cpp

from pagedd_daemon.backends.llama_api import messages

_ALL_F32 = 0
"""`LLAMA_FTYPE_ALL_F32`."""


def cache_folder() -> Path:
    """Where test models are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pagedd-tests"


def f32_copy(source: Path) -> Path:
    """The F32 copy of ``source``, 540 MB for a 135M model; written in some seconds if missing."""
    folder = cache_folder()
    target = folder / f"{source.stem}.F32.gguf"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    messages()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _ALL_F32
    params.allow_requantize = True
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / target.name
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(unfinished).encode(), ctypes.byref(params)
        )
        if status != 0:
            raise RuntimeError(f"cannot write an F32 copy of {source}: {status}")
        unfinished.replace(target)
    return target
