"""Which model is loaded, and who waits for which: one at a time, first come, first served.

A request takes a `Lease` on a model and gives it back when it is over. While leases on the loaded
model are out, a request for another one waits, and so does everything that comes after it: taking
turns in order of arrival is what keeps either side from starving. When a model has been loaded,
everybody who waits for it by then is served at once, so two apps that alternate cost one switch
for each round and not for each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum

from pagedd_daemon.front.engine_link import Engine, Message
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.failover import Deaths, Next
from pagedd_daemon.front.model_ports import Clock, Entry, Source, Text, Timer, wire_error
from pagedd_daemon.messages import Failed, Ready

log = logging.getLogger("pagedd.models")

LOAD_MOST_S = 1800.0
"""Seconds after which an engine that loads is taken for stuck: 100 GB from a slow disk."""

_STOP_GRACE_S = 5.0
"""Seconds an unloaded engine gets to give its memory back."""


@dataclass(slots=True, eq=False)
class Model:
    """A model that serves."""

    entry: Entry
    text: Text
    engine: Engine
    ready: Ready
    leases: int = 0
    down: bool = False
    """Its engine has died, and no other has taken its place yet."""


class State(Enum):
    """Of the loaded model."""

    ASLEEP = "asleep"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


class Lease:
    """A claim on a model: waiting, then granted or refused, and at the end given back."""

    __slots__ = ("_granted", "_refused", "entry", "keep_alive_s", "model", "waiting")

    def __init__(
        self,
        granted: Callable[[Model], None],
        refused: Callable[[WireError], None],
        keep_alive_s: float | None = None,
    ) -> None:
        """``keep_alive_s``: seconds the model stays after this lease; None: as before."""
        self._granted = granted
        self._refused = refused
        self.keep_alive_s = keep_alive_s
        self.entry: Entry | None = None
        self.model: Model | None = None
        self.waiting = False

    def grant(self, model: Model) -> None:
        """The model serves. Called by `Models`."""
        self.waiting = False
        self.model = model
        model.leases += 1
        self._granted(model)

    def refuse(self, error: WireError) -> None:
        """The model cannot be had. Called by `Models`."""
        self.waiting = False
        self._refused(error)


@dataclass(slots=True, eq=False)
class _Unload:
    """Waits in the queue like a lease: what came before it is served first."""

    done: Callable[[str | None], None]


class Models:
    """Loads, switches and unloads models, and hands out leases on them."""

    def __init__(
        self,
        source: Source,
        clock: Clock,
        default: Entry | None,
        keep_alive_s: float,
        said: Callable[[Message], None],
        ended: Callable[[Model, str | None], None],
        replaced: Callable[[Model, WireError | None], None] = lambda model, error: None,
        deaths: Deaths | None = None,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """``said`` gets what the engine says; ``ended`` each model whose engine is gone, and how it
        died if nobody stopped it. ``replaced`` hears when another engine has taken the place of one
        that died in use, or why none will; ``lost`` when engines die too often to go on."""
        self._source = source
        self._clock = clock
        self._default = default
        self._default_keep_alive_s = self._keep_alive_s = keep_alive_s
        self._said = said
        self._ended = ended
        self._replaced = replaced
        self._lost = lost
        self.deaths = deaths or Deaths(5)
        self._queue: deque[Lease | _Unload] = deque()
        self._task: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._asleep: Entry | None = None
        self._timer: Timer | None = None
        self._expires: float | None = None
        self.starting: Entry | None = None
        """The model being loaded."""
        self.current: Model | None = None
        self.state = State.ASLEEP
        self.notice: str | None = None
        """What clients are told of how models are computed since engines have died."""
        self.trouble: str | None = None
        """Why the last engine died or was never ready; None once one serves again."""

    # ------------------------------------------------------------ what is asked

    def known(self, name: str | None) -> Entry | None:
        """The model that a request naming ``name`` means, if no disk must be read to tell.

        Without a name it is the loaded one, or the one that will be when its turn comes.

        Raises:
            WireError: ``E_NO_MODEL``: none is named, loaded or configured.
        """
        here = self.current.entry if self.current else self.starting or self._asleep
        if name is not None:
            for entry in (here, self._default):
                if entry is not None and (name == entry.name or name in entry.aliases):
                    return entry
            return None
        last = self._queue[-1] if self._queue else None
        if last is not None:
            here = last.entry if isinstance(last, Lease) else None
        if here is None and self._default is None:
            raise WireError("E_NO_MODEL", "no model is loaded and none is configured: name one")
        return here or self._default

    def acquire(self, lease: Lease, entry: Entry) -> None:
        """Ask for a model. The lease is granted before this returns where that model serves and
        nobody waits."""
        lease.entry = entry
        lease.waiting = True
        self._queue.append(lease)
        self._pump()

    def release(self, lease: Lease) -> None:
        """The holder of the lease is over, whatever the lease's state. Idempotent."""
        if lease.waiting:
            lease.waiting = False
            with contextlib.suppress(ValueError):  # being served in this very moment
                self._queue.remove(lease)
        elif lease.model is not None:
            lease.model.leases -= 1
            lease.model = None
        else:
            return
        self._pump()

    def unload(self, done: Callable[[str | None], None]) -> None:
        """Give the loaded model's memory back once everything asked for before is over."""
        self._queue.append(_Unload(done))
        self._pump()

    def keep_alive(self, seconds: float) -> None:
        """How long models stay from now on, where no request said otherwise."""
        if self._keep_alive_s == self._default_keep_alive_s != seconds:
            self._keep_alive_s = seconds
            self._stay()
            self._watch_idle()
        self._default_keep_alive_s = seconds

    @property
    def expires_s(self) -> float | None:
        """Seconds until the loaded model is unloaded if nobody uses it; None: never."""
        if self._expires is not None:
            return max(0.0, self._expires - self._clock.time())
        return None if math.isinf(self._keep_alive_s) else self._keep_alive_s

    async def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """End the engine for good. Everybody who still waits is refused."""
        waiting, self._queue = self._queue, deque()
        for item in waiting:
            if isinstance(item, Lease):
                item.refuse(WireError("E_DRAINING", "the daemon is shutting down"))
        self._stay()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self.current is not None:
            model, self.current = self.current, None
            await model.engine.stop(grace_s)
        self._source.forget()
        self.state = State.ASLEEP

    # ------------------------------------------------------------ what engines say

    def engine_said(self, engine: Engine, message: Message) -> None:
        """See `EngineListener`."""
        if engine is not self._engine:
            return
        waits = self._ready is not None and not self._ready.done()
        if isinstance(message, Ready) and waits:
            assert self._ready is not None
            self._ready.set_result(message)
        elif isinstance(message, Failed) and waits:
            assert self._ready is not None
            self._ready.set_exception(wire_error(message.code, message.message, message.details))
        else:
            self._said(message)

    def engine_gone(self, engine: Engine, status: int) -> None:
        """See `EngineListener`."""
        if engine is not self._engine:
            return
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self._engine = None
        if self._ready is not None and not self._ready.done():
            error = WireError("E_ENGINE", f"the engine ended with {how} while loading")
            self._ready.set_exception(error)
        elif self.current is not None and not self.current.down:
            log.error("engine %d ended with %s", engine.pid, how)
            self._died(self.current, how)

    def _died(self, model: Model, how: str) -> None:
        """The engine in use died: have another one take its place if anybody needs it."""
        self._stay()
        model.down = True
        following = self.deaths.another(self._clock.time())
        self.trouble = f"The engine ended with {how}; the next request loads the model again."
        self._ended(model, how)
        fallen = following is Next.FALL_BACK and self._source.fall_back()
        if fallen:
            self.notice = (
                f"The GPU engine died {self.deaths.total} times, the last with {how}: "
                "computing on the CPU until the daemon is started again."
            )
            log.error("%s", self.notice)
        if following is Next.FALL_BACK and not fallen:
            self.trouble = f"The engine died {self.deaths.total} times, the last with {how}."
            self.current, self.state, self._asleep = None, State.ASLEEP, model.entry
            self._replaced(model, WireError("E_ENGINE", self.trouble))
            self._lost()
        elif model.leases:
            self._start(self._replace(model, how))
        else:
            self.current, self.state, self._asleep = None, State.ASLEEP, model.entry
            self._pump()

    async def _replace(self, model: Model, how: str) -> None:
        """Give the model another engine."""
        self.trouble = f"The engine ended with {how} and is being replaced."
        try:
            fresh = await self._open(model.entry, model.text)
        except Exception as failure:
            error = failure
            if not isinstance(failure, WireError):
                log.exception("the engine of %s could not be replaced", model.entry.name)
                error = WireError("E_INTERNAL", f"{model.entry.name} could not be loaded")
            assert isinstance(error, WireError)
            self._not_replaced(model, error)
            return
        model.engine, model.ready, model.down = fresh.engine, fresh.ready, False
        self.state, self.trouble = State.READY, None
        log.warning("the engine of %s was replaced by %d", model.entry.name, model.engine.pid)
        self._replaced(model, None)

    def _not_replaced(self, model: Model, error: WireError) -> None:
        """The engine that was to take another's place died as well, or refused the model."""
        if error.code == "E_ENGINE" and model.leases:
            log.error("%s: %s", model.entry.name, error.message)
            # Not from within the task that it would begin anew.
            asyncio.get_running_loop().call_soon(self._died_again, model, error.message)
            return
        self.trouble = f"{model.entry.name} could not be loaded again: {error}"
        log.error("%s", self.trouble)
        self.current, self.state, self._asleep = None, State.ASLEEP, model.entry
        self._source.forget()
        self._replaced(model, error)

    def _died_again(self, model: Model, how: str) -> None:
        if self.current is model:
            self._died(model, how)

    # ------------------------------------------------------------ the queue

    def _pump(self) -> None:
        """Serve the head of the queue as far as it goes."""
        if self._task is not None and not self._task.done():
            return  # it may have brought this about: `_settled` goes on
        while self._queue and self.state in (State.ASLEEP, State.READY):
            head, model = self._queue[0], self.current
            if isinstance(head, _Unload):
                if model is None:
                    self._queue.popleft()
                    self._asleep = None
                    head.done(None)
                    continue
                if model.leases == 0:
                    self._start(self._unload(model))
                return
            assert head.entry is not None
            if model is None:
                self._start(self._load(head.entry))
                return
            if model.entry.name != head.entry.name:
                if model.leases == 0:
                    self._start(self._unload(model))
                return
            self._queue.popleft()
            self._give(head, model)
        self._watch_idle()

    def _take(self, entry: Entry) -> list[Lease]:
        """Everybody who waits for ``entry``, up to the next `_Unload`, out of the queue."""
        taken: list[Lease] = []
        kept: deque[Lease | _Unload] = deque()
        while self._queue and isinstance(self._queue[0], Lease):
            lease = self._queue.popleft()
            assert isinstance(lease, Lease)
            assert lease.entry is not None
            (taken if lease.entry.name == entry.name else kept).append(lease)
        self._queue.extendleft(reversed(kept))
        return taken

    def _give(self, lease: Lease, model: Model) -> None:
        self._stay()
        if lease.keep_alive_s is not None:
            self._keep_alive_s = lease.keep_alive_s
        lease.grant(model)

    # ------------------------------------------------------------ loading, unloading

    def _start(self, work: Coroutine[object, object, None]) -> None:
        assert self._task is None or self._task.done()
        # Set here and not by the task, which begins later: nobody else may start one meanwhile.
        model = self.current
        self.state = State.LOADING if model is None or model.down else State.UNLOADING
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.result()
            self._pump()

    async def _load(self, entry: Entry) -> None:
        self.starting = entry
        log.info("loading %s", entry.name)
        try:
            model = await self._open(entry)
        except Exception as failure:
            if isinstance(failure, WireError):
                error = failure
                log.error("%s could not be loaded: %s", entry.name, error)
            else:
                error = WireError("E_INTERNAL", f"{entry.name} could not be loaded")
                log.exception("%s could not be loaded", entry.name)
            self.state, self.starting = State.ASLEEP, None
            self.trouble = f"{entry.name} could not be loaded: {error}"
            self._source.forget()
            for lease in self._take(entry):
                lease.refuse(error)
            return
        self.state, self.starting, self.current = State.READY, None, model
        self.trouble, self._asleep = None, None
        self._keep_alive_s = self._default_keep_alive_s
        log.info("%s is ready on %s (%s)", entry.name, model.ready.backend, model.ready.device)
        model.leases += 1  # of our own: whoever is over at once must not end the model for the rest
        for lease in self._take(entry):
            if lease.waiting:
                self._give(lease, model)
        model.leases -= 1

    async def _open(self, entry: Entry, known: Text | None = None) -> Model:
        """Read the vocabulary (unless it is ``known``) while the engine's interpreter starts, then
        load the weights."""
        text = asyncio.ensure_future(self._text(entry, known))
        self._ready = ready = asyncio.get_running_loop().create_future()
        late = WireError("E_ENGINE", f"the engine was not ready after {LOAD_MOST_S:g} s")
        timer = self._clock.call_later(
            LOAD_MOST_S, lambda: None if ready.done() else ready.set_exception(late)
        )
        engine: Engine | None = None
        try:
            self._engine = engine = await self._source.spawn(self)
            engine.send(self._source.configure(entry, await text))
            model = Model(entry, await text, engine, await ready)
            if self._engine is not engine:
                raise WireError("E_ENGINE", "the engine ended as soon as it was ready")
            return model
        except BaseException as error:
            self._engine = None
            if engine is not None:
                await engine.stop(_STOP_GRACE_S)
            if isinstance(error, OSError):
                raise WireError("E_ENGINE", f"the engine could not be started: {error}") from error
            raise
        finally:
            timer.cancel()
            text.cancel()
            ready.cancel()

    async def _text(self, entry: Entry, known: Text | None) -> Text:
        return known if known is not None else await self._source.open_text(entry)

    async def _unload(self, model: Model) -> None:
        log.info("unloading %s", model.entry.name)
        self._stay()
        self._asleep = model.entry
        self._engine = self.current = None
        await model.engine.stop(_STOP_GRACE_S)
        self._source.forget()
        self._ended(model, None)
        self.state = State.ASLEEP
        while self._queue and isinstance(asked := self._queue[0], _Unload):
            self._queue.popleft()
            self._asleep = None
            asked.done(model.entry.name)

    # ------------------------------------------------------------ idleness

    def _watch_idle(self) -> None:
        """Start the clock of ``keep_alive`` when the last lease is back."""
        model = self.current
        if model is None or model.leases or self._timer or self.state is not State.READY:
            return
        if not math.isinf(self._keep_alive_s):
            self._expires = self._clock.time() + self._keep_alive_s
            self._timer = self._clock.call_later(self._keep_alive_s, self._expired)

    def _stay(self) -> None:
        """Somebody needs the model: stop the clock."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._expires = None

    def _expired(self) -> None:
        self._timer = self._expires = None
        model = self.current
        if model is not None and not model.leases and self.state is State.READY:
            self._start(self._unload(model))
