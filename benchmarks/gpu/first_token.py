"""``python -m benchmarks.gpu.first_token MODEL``: load a model as an engine does, draw a token."""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.gpu.engine_loop import Loop, Request
from pagedd_daemon.backends.paged.load import load
from pagedd_daemon.messages import Configure


def main() -> int:
    """Exit status 0 when the token is there."""
    configure = Configure(
        backend="torch",
        model_path=sys.argv[1],
        model_digest=bytes(32),
        context_tokens=8192,
        kv_tokens=300_000 // 16 * 16,
        ram_bytes=0,
        threads=0,
    )
    backend = load(configure, lambda _: None)
    loop = Loop(backend)
    request = Request(np.array([17, 18, 19], np.int32), 1)
    loop.submit(request)
    loop.run()
    backend.close()
    return 0 if len(request.tokens) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
