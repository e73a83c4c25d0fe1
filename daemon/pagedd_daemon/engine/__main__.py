"""``python -m pagedd_daemon.engine --fd N``: the engine process, spawned by the front."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import time

from pagedd_daemon import messages as m
from pagedd_daemon.backends import load_backend, prepare
from pagedd_daemon.backends.base import ModelLoadError
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.engine.loop import Disconnected, FrontLink, run
from pagedd_daemon.engine.vram import Watch
from pagedd_daemon.privacy import keep_private

log = logging.getLogger("pagedd.engine")


def serve(link: FrontLink) -> int:
    """Load what the first message says, then serve. Returns the exit status."""
    first: list[m.ToEngine] = []
    while not first:
        first = link.receive(None)
    configure = first.pop(0)
    assert isinstance(configure, m.Configure)
    link.die_with_front()
    try:
        backend = load_backend(configure, lambda fraction: link.send(m.Loading(fraction)))
    except ModelLoadError as error:
        link.send(m.Failed(error.code, str(error), error.details))
        return 66
    caps = backend.capabilities
    link.send(
        m.Ready(
            backend=caps.name,
            device=caps.device,
            vocab_size=caps.vocab_size,
            context_tokens=caps.context_tokens,
            pool_tokens=caps.gpu_blocks * caps.block_tokens,
            block_tokens=caps.block_tokens,
            eog_tokens=tuple(sorted(caps.eog_tokens)),
            kv_dtype=caps.kv_dtype,
            ram_tokens=caps.ram_blocks * caps.block_tokens,
            notice=caps.notice,
        )
    )
    grammars = Grammars(configure, caps)
    vram: Watch | None = None
    try:
        engine = Engine(backend, time.monotonic, grammars, write_through=configure.write_through)
        if backend.elastic is not None:
            vram = Watch(caps, backend.elastic, lambda: engine.blocks)
        run(engine, link, first, vram)
    finally:
        if vram is not None:
            vram.close()
        grammars.close()
        backend.close()
    return 0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="pagedd-engine")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front")
    parser.add_argument("--prepare", default="", help="backend that will probably be asked for")
    parser.add_argument("--log-level", default="WARNING")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s engine %(levelname)s %(message)s"
    )
    keep_private()
    # The front decides when to stop; a Ctrl-C in the terminal reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = FrontLink(socket.socket(fileno=arguments.fd))
    prepare(arguments.prepare)
    try:
        return serve(link)
    except Disconnected:
        return 70


if __name__ == "__main__":
    sys.exit(main())
