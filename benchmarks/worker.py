"""Processes of a measurement: each answers one order after another and is blocked in between.

An order and its answer are one line of JSON each, on the worker's standard input and output. A
worker that waits costs nothing, so two of them can own the machine alternately.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

from benchmarks.report import ROOT

Answer = dict[str, Any]


class WorkerError(Exception):
    """A worker died or answered with an error."""


class Worker:
    """A child process that runs ``python -m benchmarks.<module> ARGUMENTS``."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def order(self, **order: object) -> None:
        """Send an order; `answer` takes the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"{self._name} is gone: {error}") from error

    def answer(self) -> Answer:
        """Wait for the answer to the oldest order.

        Raises:
            WorkerError: The worker died, or says what went wrong.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self._name} ended with status {self._process.wait()}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self._name}: {answer['error']}")
        return answer

    def ask(self, **order: object) -> Answer:
        """`order` and `answer`."""
        self.order(**order)
        return self.answer()

    def close(self) -> None:
        """End the worker: it stops when its input does."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(handle: Callable[[Answer], Answer]) -> None:
    """The worker's side: answer orders until standard input ends."""
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:
            # Whatever it was, the parent must hear of it.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


async def serve_async(handle: Callable[[Answer], Awaitable[Answer]]) -> None:
    """`serve` for a worker that lives in an event loop: it goes on running between orders."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            answer = await handle(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
