"""The set of helper processes: how many there are, and which of them does what is asked next.

Every process answers one request at a time, so whatever a request does to its process it does to
nobody else. One process more than ``workers`` is running, and a request that takes long gets
another one started beside it: others do not wait for it. Requests that may take long never have all
processes; else the oldest comes first. Opening a model opens it everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgpack

from pagedd_daemon.front.helper_process import (
    HelperDiedError,
    HelperError,
    HelperProcess,
    start_helper,
)
from pagedd_daemon.helper.protocol import HelperLimits
from pagedd_daemon.link import frame

_KEPT_MODELS = 2
"""Models a process keeps open: the one that serves, and the one that is about to."""
_EXTRA = 2
"""Processes started beside slow ones, at most."""
_HEAVY_BYTES = 64 * 1024
"""A larger request counts as one that may take long."""

_Queue = deque[tuple[int, asyncio.Future[HelperProcess]]]
"""With the number of each, by which the oldest is known."""


class HelperWorkers:
    """See the module. All calls from one event loop."""

    def __init__(self, workers: int, limits: HelperLimits) -> None:
        """No process yet; `start` starts them.

        Args:
            workers: Requests it should serve at the same time; one process more is kept ready.
            limits: Of time and memory.
        """
        self._limits = limits
        self._target = workers + 1
        self._workers: set[HelperProcess] = set()
        self._idle: list[HelperProcess] = []
        self._waiting: tuple[_Queue, _Queue] = (deque(), deque())
        """Requests without a process: light ones and heavy ones."""
        self._asked = 0
        self._heavy: set[HelperProcess] = set()
        """Processes that have a heavy request."""
        self._models: dict[str, bytes] = {}  # source to digest, oldest first
        self._starting = 0
        self._slow = 0
        self._failures = 0
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the helpers that run."""
        return tuple(w.process.pid for w in self._workers)

    async def start(self) -> None:
        """Start the processes and wait for the first to answer.

        Raises:
            HelperError: None does (``E_HELPER``).
        """
        self._refill()
        worker = await self._acquire(heavy=False)
        self._release(worker)

    async def close(self) -> None:
        """End all processes. Requests that run fail. Idempotent."""
        self._closing.set()
        workers = list(self._workers)
        for worker in workers:
            worker.kill()
        for queue in self._waiting:
            for _, waiter in queue:
                if not waiter.done():
                    waiter.set_exception(HelperError("E_HELPER", "the daemon is shutting down"))
        for worker in workers:
            await worker.reap()
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def open(self, source: str) -> dict[str, Any]:
        """Open a model in every process, even where it is open: the file may be another.

        Args:
            source: Absolute path, ``simulated`` or ``simulated-ids``.

        Raises:
            HelperError: The file is refused, or it takes too long.
            HelperDiedError: It ended the process.
        """
        self._models.pop(source, None)
        raw: dict[str, Any] = await self._shielded(self._perform_open(source))
        self._models[source] = raw["digest"]
        while len(self._models) > _KEPT_MODELS:
            del self._models[next(iter(self._models))]
        await asyncio.gather(*(self._shielded(self._warm(worker)) for worker in self._idle))
        return raw

    async def ask(
        self, source: str, digest: bytes, request: list[Any], seconds: float | None = None
    ) -> Any:
        """A request on a free process; once more if another cause than the request ended it.

        Args:
            source: The model it is about, opened there if it is not.
            digest: Of the model's file, which must not be another one.
            request: See `pagedd_daemon.helper.protocol`.
            seconds: How long it may take; None: by its size.

        Raises:
            HelperError: The helper's own answer, or none was free, or none came in time.
            HelperDiedError: The request ended its process.
        """
        return await self._shielded(self._perform(source, digest, request, seconds))

    # ------------------------------------------------------------------------------ one request

    async def _shielded(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run to its end even if the caller gives up: a process must be left in a known state."""
        if self._closing.is_set():
            work.close()
            raise HelperError("E_HELPER", "the daemon is shutting down")
        return await asyncio.shield(self._task(work))

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the caller may have gone

    async def _perform(
        self, source: str, digest: bytes, request: list[Any], seconds: float | None
    ) -> Any:
        body = frame(msgpack.packb(request))
        heavy = request[0] != "tokenize" or len(body) > _HEAVY_BYTES
        limits = self._limits
        at_most = seconds or limits.request_s + limits.request_s_per_mib * len(body) / 2**20

        async def work(worker: HelperProcess) -> Any:
            await self._ensure_open(worker, source, digest)
            return await self._timed(worker, body, at_most)

        return await self._on_a_process(work, heavy=heavy)

    async def _perform_open(self, source: str) -> dict[str, Any]:
        """Open a model on a free process, even if it has it open: the file may be another."""
        opened: dict[str, Any] = await self._on_a_process(
            lambda worker: self._open_on(worker, source), heavy=True
        )
        return opened

    async def _on_a_process(
        self, work: Callable[[HelperProcess], Awaitable[Any]], *, heavy: bool
    ) -> Any:
        for attempt in (1, 2):
            worker = await self._acquire(heavy=heavy)
            try:
                return await work(worker)
            except HelperDiedError as error:
                if error.culprit or attempt == 2 or self._closing.is_set():
                    raise
            finally:
                self._release(worker)
        raise AssertionError("unreachable")

    async def _timed(self, worker: HelperProcess, body: bytes, seconds: float) -> Any:
        """A call with its time limit; one that is slow makes room for another process."""
        slow: list[bool] = []
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._limits.slow_s, self._became_slow, slow)
        try:
            return await worker.call(body, seconds)
        finally:
            timer.cancel()
            self._slow -= len(slow)

    def _became_slow(self, slow: list[bool]) -> None:
        slow.append(True)
        self._slow += 1
        self._refill()

    async def _ensure_open(self, worker: HelperProcess, source: str, digest: bytes) -> None:
        """Open a model in a process that does not have it.

        Raises:
            HelperError: The file is not the one with this digest any more (``E_MODEL``).
        """
        if worker.models.get(source) == digest:
            return
        raw = await self._open_on(worker, source)
        if raw["digest"] != digest:
            raise HelperError(
                "E_MODEL", f"{source}: the file has changed since it was loaded", {"path": source}
            )

    async def _open_on(self, worker: HelperProcess, source: str) -> dict[str, Any]:
        worker.models.pop(source, None)
        body = frame(msgpack.packb(["open", source]))
        raw: dict[str, Any] = await worker.call(body, self._limits.open_s)
        worker.models[source] = raw["digest"]
        while len(worker.models) > _KEPT_MODELS:
            oldest = next(iter(worker.models))
            del worker.models[oldest]
            await worker.call(frame(msgpack.packb(["close", oldest])), self._limits.request_s)
        return raw

    async def _opens(self, worker: HelperProcess, source: str, digest: bytes) -> bool:
        """Whether a model can still be opened as it was."""
        try:
            await self._ensure_open(worker, source, digest)
        except HelperError:
            return False
        return True

    async def _warm(self, worker: HelperProcess) -> None:
        """Open the known models in an idle process, before a request needs them there."""
        if worker not in self._idle:
            return
        self._idle.remove(worker)
        try:
            for source, digest in tuple(self._models.items()):
                await self._ensure_open(worker, source, digest)
        except (HelperError, HelperDiedError):
            pass  # the request that needs the model there will say so
        finally:
            self._release(worker)

    # ------------------------------------------------------------------------- the set of workers

    async def _acquire(self, *, heavy: bool) -> HelperProcess:
        """A process to oneself.

        Raises:
            HelperError: None was free for too long.
        """
        if self._closing.is_set():
            raise HelperError("E_HELPER", "the daemon is shutting down")
        waiter: asyncio.Future[HelperProcess] = asyncio.get_running_loop().create_future()
        self._asked += 1
        self._waiting[heavy].append((self._asked, waiter))
        self._dispatch()
        done, _ = await asyncio.wait((waiter,), timeout=self._limits.queue_s)
        if not done:
            waiter.cancel()
            raise HelperError(
                "E_HELPER",
                "no helper process was free",
                {"seconds": self._limits.queue_s, "processes": len(self._workers)},
            )
        return waiter.result()

    def _dispatch(self) -> None:
        """Hand idle processes to waiting requests, the oldest first, but not all to heavy ones."""
        while self._idle:
            may = len(self._heavy) < max(len(self._workers) - 1, 1)
            queues = [queue for queue in self._waiting[: 1 + may] if queue]
            if not queues:
                return
            queue = min(queues, key=lambda queue: queue[0][0])
            _, waiter = queue.popleft()
            if not waiter.done():
                worker = self._idle.pop()
                if queue is self._waiting[True]:
                    self._heavy.add(worker)
                waiter.set_result(worker)

    def _release(self, worker: HelperProcess) -> None:
        """A request is over: the process is idle again, replaced, or not needed any more."""
        self._heavy.discard(worker)
        surplus = len(self._workers) > self._target + min(self._slow, _EXTRA)
        if worker.alive and not worker.retire and not surplus and not self._closing.is_set():
            self._idle.append(worker)
        else:
            self._task(self._discard(worker))
        self._dispatch()

    async def _discard(self, worker: HelperProcess) -> None:
        worker.kill()
        self._forget(worker)
        await worker.reap()

    def _forget(self, worker: HelperProcess) -> None:
        self._workers.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._refill()

    def _lost(self, worker: HelperProcess) -> None:
        """The socket of a process closed. If it serves a request, that one finds out itself."""
        if worker in self._idle and not self._closing.is_set():
            self._task(self._discard(worker))

    def _refill(self) -> None:
        """Start as many processes as there should be."""
        wanted = self._target + min(self._slow, _EXTRA)
        while not self._closing.is_set() and len(self._workers) + self._starting < wanted:
            self._starting += 1
            self._task(self._spawn())

    async def _spawn(self) -> None:
        """Start a process and make it ready; if it fails, once more after a while."""
        worker = None
        try:
            if self._failures:
                delay = min(0.2 * self._failures**2, 10.0)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), delay)
            if self._closing.is_set():
                return
            worker = await start_helper(self._limits, self._lost)
            await worker.call(frame(msgpack.packb(["ping"])), self._limits.open_s)
            for source, digest in tuple(self._models.items()):
                if not await self._opens(worker, source, digest):
                    self._models.pop(source, None)
            self._failures = 0
        except (HelperError, HelperDiedError, OSError):
            self._failures += 1
            if worker is not None:
                worker.kill()
                await worker.reap()
                worker = None
        finally:
            self._starting -= 1
        if worker is not None and not self._closing.is_set():
            self._workers.add(worker)
            self._release(worker)
        elif worker is not None:
            worker.kill()
            await worker.reap()
        else:
            self._refill()
