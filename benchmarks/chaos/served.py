"""A daemon of a chaos run, in processes of its own."""

from __future__ import annotations

import sys

from benchmarks.service import Daemon


class ChaosDaemon(Daemon):
    """A daemon of `benchmarks.chaos.serve`."""

    command = (sys.executable, "-m", "benchmarks.chaos.serve")


def serve(model: str, backend: str, *more: str) -> ChaosDaemon:
    """Started, with the model loaded."""
    return ChaosDaemon("--model", model, "--backend", backend, *more)
