"""Loads the models it is told of, one a line, as helper and engine do; may be killed by one."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from pagedd_daemon.models.errors import ModelError
from pagedd_daemon.models.gguf_header import read_header


def _as_helper() -> Callable[[Path], None]:
    """The vocabulary alone."""
    from pagedd_daemon.helper.vocabulary import LlamaVocabulary

    return lambda path: LlamaVocabulary(read_header(path)).close()


def _with_llama() -> Callable[[Path], None]:
    """The weights, and a token computed with them."""
    from pagedd_daemon.backends.llama_api import Context, ContextOptions, Model

    def load(path: Path) -> None:
        try:
            model = Model(str(path), lambda _: None)
        except OSError as error:
            raise ModelError(str(error)) from error
        with closing(model):
            reason = model.unsupported()
            if reason is not None:
                raise ModelError(reason)
            with closing(Context(model, ContextOptions(64, 32, 1, "f16", True))) as context:
                context.tokens[0] = context.positions[0] = context.sequences[0] = 0
                context.wanted[0] = 1
                if context.decode(1):
                    raise ModelError("llama.cpp refused a step")

    return load


def _with_torch() -> Callable[[Path], None]:
    """The weights, and a token computed with them."""
    import torch

    from pagedd_daemon.models.decoder import Decoder
    from tests.support.paged import PagedSequences

    def load(path: Path) -> None:
        decoder = Decoder.load(path, torch.device("cpu"), torch.float32, context_tokens=32)
        PagedSequences(decoder, [4]).step({0: [0, 1, 2, 3]})

    return load


def main() -> int:
    """For each path on standard input a line: ``loaded``, ``refused`` or ``wrong``, seconds, and
    what was said."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    load = {"helper": _as_helper, "llama": _with_llama, "torch": _with_torch}[sys.argv[1]]()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        begin, said = time.perf_counter(), ""
        try:
            load(Path(line.rstrip("\n")))
            verdict = "loaded"
        except ModelError as error:
            verdict, said = "refused", str(error)
        except Exception as error:
            verdict, said = "wrong", repr(error)
        took = time.perf_counter() - begin
        said = " ".join(said.split())[:300]
        print(verdict, f"{took:.4f}", said, file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
