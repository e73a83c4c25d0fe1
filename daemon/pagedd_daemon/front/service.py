"""What requests mean: the front's answer to every verb.

The transport hands over validated requests and takes events. Models, texts, streams, sessions and
status each have a module of their own; this one joins them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pagedd_daemon.front import requests as r
from pagedd_daemon.front import texts
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.accounts import Accounts
from pagedd_daemon.front.administration import Administration, AdminRequest
from pagedd_daemon.front.apps import Apps
from pagedd_daemon.front.background import Background
from pagedd_daemon.front.calls import Call, Calls, Peer
from pagedd_daemon.front.config import Settings
from pagedd_daemon.front.detokenizer import unpack_ids
from pagedd_daemon.front.embedding import Embedding, Embeddings
from pagedd_daemon.front.engine_link import Message
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.failover import Deaths
from pagedd_daemon.front.gate import Gate
from pagedd_daemon.front.limits import USERS, Limits
from pagedd_daemon.front.model_ports import Clock, Entry, Source
from pagedd_daemon.front.models import Lease, Model, Models, State
from pagedd_daemon.front.pins import Pins
from pagedd_daemon.front.ports import Connection, Event, Transport
from pagedd_daemon.front.serving import Serving, described
from pagedd_daemon.front.sessions import Sessions, Turn
from pagedd_daemon.front.status import Board
from pagedd_daemon.front.stream import Stream
from pagedd_daemon.front.streams import Streams
from pagedd_daemon.front.tally import Tally
from pagedd_daemon.front.watchdog import Watchdog
from pagedd_daemon.messages import Snapshot, StepReport

log = logging.getLogger("pagedd.service")

SLOW_FACTOR = 64
"""A client that does not read is given up at this many times the output limit."""

SLOW_S = 600.0
"""A client that does not read is given up after this many seconds."""


class FrontService:
    """Implements `pagedd_daemon.front.ports.Service`."""

    transport: Transport
    """Set before the transport starts; the two need each other."""

    def __init__(
        self,
        source: Source,
        clock: Clock,
        limits: Limits,
        *,
        version: str,
        default: Entry | None = None,
        keep_alive_s: float = 300.0,
        apps: Apps | None = None,
        settings: Settings | None = None,
        access: Access | None = None,
        on_settings: Callable[[Settings], None] = lambda settings: None,
        on_shutdown: Callable[[bool], None],
        on_defeat: Callable[[], None] = lambda: None,
        engine_deaths: int = 5,
    ) -> None:
        """``access``: whom the daemon serves; None: its own user. ``on_settings`` hears of settings
        that a reload replaced; ``on_shutdown`` of a client that asked the daemon to end, and
        whether to drain; ``on_defeat`` when ``engine_deaths`` engines have died within a minute and
        there is no other way to compute."""
        self._clock = clock
        self._limits = limits
        self._default = default
        self._version = version
        self._on_shutdown = on_shutdown
        self._apps = apps or Apps()
        self._access = access or Access()
        self._calls = Calls(
            limits, lambda connection, event: self.transport.send(connection, event)
        )
        self._sessions_open = Tally()
        self._background = Background(self._fail)
        self.models = Models(
            source,
            clock,
            default,
            keep_alive_s,
            self._engine_said,
            self._engine_ended,
            self._engine_replaced,
            Deaths(engine_deaths),
            on_defeat,
        )
        self._serving = Serving(self.models, source, self._access, self._background, self._fail)
        self._accounts = Accounts()
        self._gate = Gate(clock)
        self.watchdog = Watchdog(clock, self._engine_works, self._engine_stuck)
        self._streams = Streams(
            self.models, clock, self._apps, self._stream_over, self.watchdog.watch
        )
        self._embeddings = Embeddings(self._apps, self._result, self._fail)
        user_share = 1 / USERS if self._access.shared else 1.0
        self._pins = Pins(self.models, self._apps, self._streams, user_share)
        self._streams.pins = self._pins
        self.board = Board(
            self.models, self._streams, self._accounts, self._apps, clock, version, self.watchdog
        )
        self.administration = Administration(
            self._apps,
            self._accounts,
            self.models,
            self.board,
            clock,
            settings,
            on_settings,
            self._access,
        )

    # ------------------------------------------------------------ life of the daemon

    def preload(self, over: Callable[[WireError | None], None]) -> None:
        """Begin to load the configured model; requests need not wait for this call.

        ``over`` hears when it serves, or why it cannot.
        """
        assert self._default is not None

        def loaded(model: Model) -> None:
            self.models.release(lease)
            over(None)

        lease = Lease(loaded, over)
        self.models.acquire(lease, self._default)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.board.draining = True

    async def idle(self) -> None:
        """Wait until no request is live."""
        await self._calls.idle()

    async def stop(self, grace_s: float) -> None:
        """End what is still live, then the engine."""
        for call in self._calls.live():
            self._fail(call, WireError("E_DRAINING", "the daemon has shut down"))
        self.administration.stop()
        await self._background.stop()
        await self.models.stop(grace_s)

    # ------------------------------------------------------------ from the transport

    def opened(self, connection: Connection) -> dict[str, Any]:
        """See `ports.Service`."""
        account = self._accounts.open(
            connection.uid, connection.app, connection.priority, connection.program
        )
        sessions = Sessions(self._limits, self._clock, account, self._pins, self._sessions_open)
        self._calls.peers[connection] = Peer(connection, account, sessions)
        model = self.models.current
        return {
            "server": self._version,
            "model": described(model.entry, True) if model else None,
            "notice": self.board.notice or self.models.notice,
        }

    def request(self, connection: Connection, request: r.DataRequest) -> None:
        """See `ports.Service`."""
        peer = self._calls.peers[connection]
        try:
            if self._calls.answered_before(peer, request):
                return
            self._admit(peer, request)
            if isinstance(request, (r.Generation, r.Embed)):
                self._apps.admit(peer.account)
        except WireError as error:
            self.transport.send(connection, error.as_event(request.id, 0))
            return
        call = self._call(peer, request)
        self._calls.add(peer, call)
        if isinstance(call, Stream) and call.id in peer.foreseen:
            del peer.foreseen[call.id]
            self._streams.cancel(call)
        else:
            self._background.guard(call, lambda: self._start(peer, call, request))

    def control(
        self,
        uid: int,
        request: r.ControlRequest,
        connection: Connection | None,
        reply: Callable[[Event], None],
    ) -> None:
        """See `ports.Service`."""

        def result(fields: dict[str, Any]) -> None:
            reply({"id": request.id, "seq": 0, "type": "result", **fields})

        if isinstance(request, r.Cancel):
            result({"cancelled": self._cancel(uid, request, connection)})
        elif isinstance(request, r.Status):
            only = self._access.view(uid)
            self.board.fresh(lambda: result(self.board.status(only)))
        elif isinstance(request, r.Ping):
            result(self.board.ping())
        elif isinstance(request, AdminRequest):
            self.administration.answer(uid, request, reply, result)
        else:
            self._access.require(uid, "end it")
            result({})
            self._on_shutdown(request.drain)

    def closed(self, connection: Connection) -> None:
        """See `ports.Service`."""
        peer = self._calls.peers[connection]
        self._calls.forget(peer)
        if peer.slow is not None:
            peer.slow.cancel()
        for call in peer.live.values():
            if isinstance(call, Stream):
                self._streams.drop(call)
            else:
                self._end(call)
        peer.sessions.close()
        self._accounts.close(peer.account, connection.priority, self._clock.time())

    def lagging(self, connection: Connection, lagging: bool) -> None:
        """See `ports.Service`."""
        peer = self._calls.peers.get(connection)
        if peer is None:
            return
        self._streams.pause(_streams(peer), lagging)
        if peer.slow is not None:
            peer.slow.cancel()
        peer.slow = self._clock.call_later(SLOW_S, lambda: self._slow(peer)) if lagging else None

    # ------------------------------------------------------------ from the engine

    def _engine_said(self, message: Message) -> None:
        if isinstance(message, StepReport):
            self.watchdog.stepped()
            self._streams.report(message)
            self._embeddings.report(message.embedded)
            if not (self._streams.running or self._embeddings.running):
                self.watchdog.rest()
            self.board.stale = True
            self.transport.flush()
        elif isinstance(message, Snapshot):
            figures = message.figures
            self.watchdog.counted(figures.get("progress", 0), figures.get("median_step_s", 0.0))
            self.board.take(message)

    def _engine_ended(self, model: Model, how: str | None) -> None:
        if how is not None:
            self._streams.lost(model, how)
            self._embeddings.lost(how)
        self._pins.gone(model)
        self._streams.steps = 0
        self.watchdog.renewed()
        self.board.engine_gone()

    def _engine_replaced(self, model: Model, error: WireError | None) -> None:
        if error is None:
            self._streams.revive(model)
            self._embeddings.revive()
        else:
            self._streams.give_up(error)
            self._embeddings.give_up(error)

    def _engine_works(self) -> bool:
        working = self._streams.working or self._embeddings.running
        return self.models.state is State.READY and working

    def _engine_stuck(self, silent_s: float) -> None:
        model = self.models.current
        if model is not None:
            pid, bound_s = model.engine.pid, self.watchdog.bound_s
            log.error("engine %d: no step in %.0f s (bound %.0f s)", pid, silent_s, bound_s)
            model.engine.kill()

    # ------------------------------------------------------------ life of a request

    def _admit(self, peer: Peer, request: r.DataRequest) -> None:
        """Check that one more request may come in.

        Raises:
            WireError: ``E_DRAINING``, ``E_BUSY`` or ``E_SLOW``.
        """
        if self.board.draining:
            raise WireError("E_DRAINING", "the daemon is shutting down")
        connection = peer.connection
        at_most = SLOW_FACTOR * self._limits.output_bytes_per_connection
        if connection.lagging and self.transport.backlog_bytes(connection) > at_most:
            raise self._slow(peer)
        self._calls.admit(peer, request)

    def _slow(self, peer: Peer) -> WireError:
        """The client does not read: its streams end. Returns the error they end with."""
        backlog = self.transport.backlog_bytes(peer.connection)
        error = WireError(
            "E_SLOW",
            f"the client does not read: {backlog} bytes wait for it",
            details={"backlog_bytes": backlog},
        )
        for stream in _streams(peer):
            self._streams.fail(stream, error)
        return error

    def _call(self, peer: Peer, request: r.DataRequest) -> Call:
        if isinstance(request, r.Embed):
            return Embedding(self.transport, peer.connection, request, peer.account)
        if not isinstance(request, r.Generation):
            return Call(self.transport, peer.connection, request)
        peer.account.live += 1
        now = self._clock.time()
        return Stream(self.transport, peer.connection, request, peer.account, now)

    def _fail(self, call: Call, error: WireError) -> None:
        """End a request with an error."""
        if isinstance(call, Stream):
            self._streams.fail(call, error)
        elif not call.over:
            call.emit_error(error)
            self._end(call)

    def _result(self, call: Call, fields: dict[str, Any]) -> None:
        """End a request with its result."""
        if not call.over:
            call.emit("result", fields)
            self._end(call)

    def _end(self, call: Call) -> None:
        """The one way in which a request that does not generate is over."""
        call.over = True
        if isinstance(call, Embedding):
            self._embeddings.drop(call)
        self._calls.over(call)
        if call.lease is not None:
            self.models.release(call.lease)

    def _stream_over(self, stream: Stream) -> None:
        stream.account.live -= 1
        self._calls.over(stream)
        taken_back = stream.cancelled or stream.connection not in self._calls.peers
        self._gate.over(stream, taken_back=taken_back and not stream.counted)

    # ------------------------------------------------------------ the verbs

    def _start(self, peer: Peer, call: Call, request: r.DataRequest) -> None:
        if isinstance(request, r.Generation):
            assert isinstance(call, Stream)
            self._generate(peer, call, request)
        elif isinstance(request, r.SessionRequest):
            self._result(call, peer.sessions.answer(request))
        elif isinstance(request, r.Embed):
            assert isinstance(call, Embedding)
            inputs, embedding = request, call
            self._serving.hold(
                call,
                inputs.model,
                lambda m: self._background.later(call, self._embed(embedding, inputs, m)),
                inputs.keep_alive,
            )
        elif isinstance(request, texts.OfTexts):
            asked = request
            self._serving.hold(
                call,
                asked.model,
                lambda m: self._background.later(call, self._of_texts(call, asked, m)),
            )
        elif isinstance(request, r.Models):
            self._background.later(call, self._list(call))
        elif isinstance(request, r.Load):
            self._access.require(call.connection.uid, "have a model loaded")
            name = request.model or (self._default.name if self._default else None)
            self._serving.hold(call, name, lambda m: self._loaded(call, m), request.keep_alive)
        else:
            self._access.require(call.connection.uid, "have the model unloaded")
            self.models.unload(lambda name: self._result(call, {"unloaded": name}))

    def _generate(self, peer: Peer, stream: Stream, request: r.Generation) -> None:
        deadline_ms = request.deadline_ms or self._apps.settings(stream.account).deadline_ms
        if deadline_ms:
            late = WireError("E_DEADLINE", f"not done after {deadline_ms} ms")
            stream.timer = self._clock.call_later(
                deadline_ms / 1000, lambda: self._streams.fail(stream, late)
            )
        if isinstance(request, r.SessionSay):
            stream.turn = Turn(peer.sessions.get(request.session), request)

        kind, _ = request.constraint()

        def use(model: Model) -> None:
            if isinstance(request, r.Generate) and request.tokens is not None and not kind:
                self._streams.submit(stream, model, unpack_ids(request.tokens))
                self._gate.passed(stream)
            else:
                self._background.later(stream, self._submit_text(stream, model, request))

        def begin() -> None:
            self._serving.hold(stream, request.model, use, request.keep_alive)

        self._gate.enter(stream, lambda: self._background.guard(stream, begin))

    async def _submit_text(self, stream: Stream, model: Model, request: r.Generation) -> None:
        prompt = await texts.prompt(request, model, stream.turn)
        if not stream.over:  # it may have been cancelled meanwhile
            self._streams.submit(stream, model, prompt)
        self._gate.passed(stream)

    async def _embed(self, call: Embedding, request: r.Embed, model: Model) -> None:
        inputs = await texts.inputs(request, model)
        if not call.over:  # its client may have gone meanwhile
            self.watchdog.watch()
            self._embeddings.submit(call, model, inputs, normalize=request.normalize)

    async def _of_texts(self, call: Call, request: texts.OfTexts, model: Model) -> None:
        self._result(call, await texts.answer(request, model, self._limits.list_entries))

    async def _list(self, call: Call) -> None:
        self._result(call, {"models": await self._serving.listed()})

    def _loaded(self, call: Call, model: Model) -> None:
        self._result(call, {"model": described(model.entry, True)})

    def _cancel(self, uid: int, request: r.Cancel, connection: Connection | None) -> bool:
        """End what the request names, of the caller's own user; whether there was any."""
        streams = [
            stream
            for peer in self._calls.meant(uid, request, connection)
            for stream in _streams(peer)
            if request.target is None or stream.id == request.target
        ]
        for stream in streams:
            self._streams.cancel(stream)
        peer = None if connection is None else self._calls.peers.get(connection)
        if peer is not None and request.target is not None:
            call = peer.live.get(request.target)
            if isinstance(call, Embedding):
                self._fail(call, WireError("E_CANCELLED", "the request was cancelled"))
                return True
            if not streams:
                peer.foresee(request.target)
        return bool(streams)


def _streams(peer: Peer) -> list[Stream]:
    """Its live requests that generate."""
    return [call for call in peer.live.values() if isinstance(call, Stream)]
