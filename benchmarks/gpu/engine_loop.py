"""The engine's own loop, driven without processes: requests in, tokens and times out."""

from __future__ import annotations

import gc
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np

from kvpager.types import Tokens
from pagedd_daemon import messages as m
from pagedd_daemon.backends.base import Backend, Handle, Step, StepResult
from pagedd_daemon.engine.core import Engine
from pagedd_daemon.engine.grammar import Grammars
from pagedd_daemon.engine.loop import SWITCH_S
from pagedd_daemon.params import SamplingParams, StopParams

SALT = bytes(32)
NAP_S = 0.0005
"""Where nobody can run before a transfer ends."""


@dataclass(slots=True)
class Request:
    """One request and when its tokens came."""

    prompt: Tokens
    output: int
    sent_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    schema: str = ""
    """JSON schema that the output must match; empty: it is free and never ends by itself."""
    reason: str = ""
    """Why it ended."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one step went."""

    tokens: int
    runs: int
    launch_s: float
    """The host's, to launch it."""
    wait_s: float
    """The host's, until its result was there: 0 where the device waited for the host."""
    device_s: float


class Observed:
    """A backend whose results pass by a loop; everything else is its own."""

    def __init__(self, backend: Backend, loop: Loop) -> None:
        self._backend = backend
        self._loop = loop
        self._open: deque[tuple[int, int, float]] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def launch(self, step: Step) -> Handle:
        """See `Backend`."""
        begin = time.monotonic()
        handle = self._backend.launch(step)
        tokens = sum(len(run.tokens) for run in step.runs)
        self._open.append((tokens, len(step.runs), time.monotonic() - begin))
        return handle

    def collect(self, handle: Handle) -> StepResult:
        """See `Backend`."""
        begin = time.monotonic()
        result = self._backend.collect(handle)
        waited = time.monotonic() - begin
        self._loop.device_s += result.seconds
        self._loop.timings.append(Timing(*self._open.popleft(), waited, result.seconds))
        return result


class Loop:
    """Runs requests on an engine over ``backend``; may be used again and again."""

    def __init__(self, backend: Backend, grammars: Grammars | None = None) -> None:
        self.backend = backend
        sys.setswitchinterval(SWITCH_S)  # as the engine's own loop does
        observed = cast(Backend, Observed(backend, self))
        self.engine = Engine(observed, time.monotonic, grammars)
        self.requests: dict[int, Request] = {}
        self.moments: list[tuple[float, int]] = []
        """After every turn of the loop: when, and how many tokens had come by then."""
        self.device_s = 0.0
        """Seconds the device was busy with the steps that were collected, by its own events."""
        self.timings: list[Timing] = []
        """Of every step that was collected."""
        self._next = 0
        self._generated = 0

    def submit(self, request: Request, **sampling: object) -> int:
        """Give a request to the engine; returns its number."""
        self._next += 1
        params = asdict(SamplingParams(**{"temperature": 0.0, **sampling}))  # type: ignore[arg-type]
        stop = asdict(StopParams(max_tokens=request.output, ignore_eos=not request.schema))
        request.sent_s = time.monotonic()
        self.requests[self._next] = request
        self.engine.handle(
            m.Submit(
                rid=self._next,
                app="bench",
                klass=1,
                root=SALT,
                prompt=request.prompt.astype("<i4").tobytes(),
                n=1,
                sampling=params,
                stop=stop,
                grammar_kind="json_schema" if request.schema else "",
                grammar=request.schema,
            )
        )
        return self._next

    def turn(self) -> None:
        """One step of the engine's loop."""
        stepped = self.engine.step(self._said)
        self.moments.append((time.monotonic(), self._generated))
        if not stepped:
            # As the engine's own loop does: threads that copy want the interpreter, and from a loop
            # that never rests they get it every 5 ms, 250 pages in seconds.
            time.sleep(NAP_S)

    def run(self) -> float:
        """Until everything that was submitted is over; the seconds it took."""
        gc.collect()
        gc.freeze()  # as the engine's own loop does
        gc.set_threshold(50_000, 20, 50)
        begin = time.monotonic()
        self.moments.clear()
        while self.engine.has_work:
            self.turn()
        return time.monotonic() - begin

    def _said(self, report: m.StepReport) -> None:
        now = time.monotonic()
        for rid, cached in report.started:
            self.requests[rid].cached = cached
        for output in report.outputs:
            request = self.requests[output.rid]
            request.tokens += np.frombuffer(output.tokens, "<i4").tolist()
            request.first_s = request.first_s or now
            request.last_s = now
            self._generated += len(output.tokens) // 4
        for ended in report.ended:
            self.requests[ended.rid].reason = ended.reason
        for rejected in report.rejected:
            raise RuntimeError(f"request {rejected.rid} was rejected: {rejected.message}")


def prompts(count: int, length: int, vocab: int, seed: int) -> list[Tokens]:
    """Prompts that have nothing in common."""
    rng = np.random.default_rng(seed)
    return [rng.integers(10, vocab, length, dtype=np.int32) for _ in range(count)]


def decode_ms(loop: Loop, batch: int, prompt: int, steps: int, seed: int) -> list[float]:
    """Milliseconds of each step in which ``batch`` sequences decode and nothing else runs."""
    vocab = loop.backend.capabilities.vocab_size
    # Those that start first must not end before the last has started and decoded for a while.
    started = [Request(p, 10**6) for p in prompts(batch, prompt, vocab, seed)]
    rids = [loop.submit(request) for request in started]
    while not all(request.tokens for request in started):
        loop.turn()
    for _ in range(4):
        loop.turn()
    loop.moments.clear()
    for _ in range(steps + 1):
        loop.turn()
    moments = list(loop.moments)
    for rid in rids:
        loop.engine.handle(m.Cancel(rid))
    while loop.engine.has_work:
        loop.turn()
    assert moments[-1][1] - moments[0][1] == steps * batch, "a step was not a whole decode step"
    times = [at for at, _ in moments]
    return [1e3 * (b - a) for a, b in pairwise(times)]
