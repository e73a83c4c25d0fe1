"""The two ROUTER sockets: who is let in, what arrives, and whom it is handed to.

Everything happens in the event loop's thread, and nothing here ever waits for a client. A message
costs one `decode` and one call of the service. Who is connected is kept in
`pagedd_daemon.front.peers`, what waits for whom in `pagedd_daemon.front.output`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from pagedd_daemon.front import requests as r
from pagedd_daemon.front import wire
from pagedd_daemon.front.access import Access
from pagedd_daemon.front.auth import (
    ZAP_ENDPOINT,
    Authenticator,
    Credentials,
    peer_groups,
    self_test,
)
from pagedd_daemon.front.errors import WireError, limit_error
from pagedd_daemon.front.identity import UNKNOWN, Program, pin, program
from pagedd_daemon.front.limits import Limits, as_map
from pagedd_daemon.front.listener import (
    CONTROL_NAME,
    DATA_NAME,
    DescriptorGuard,
    SocketDirectory,
    open_descriptors,
    raise_descriptor_limit,
)
from pagedd_daemon.front.output import Output
from pagedd_daemon.front.peers import Peer, Peers
from pagedd_daemon.front.ports import Connection, Event, Service
from pagedd_daemon.front.rates import Rates
from pagedd_daemon.front.router import Router, refuse_identity
from pagedd_daemon.front.zmqloop import Watched

log = logging.getLogger(__name__)

_BATCH = 64
"""Connections decided on before the loop may do something else."""
_IDENTIFY_S = 2.0
"""How long it may take to read what program a peer is; then it is served as an unknown one."""
_GUARD_S = 1.0
"""While clients wait for room: how often to look again."""
_GLANCE_NODES = 64
"""Values of a refused message among which its id is looked for: to refuse must be cheap."""


class ZmqTransport:
    """Implements `pagedd_daemon.front.ports.Transport`."""

    def __init__(
        self,
        socket_dir: Path,
        limits: Limits,
        service: Service,
        inherited: Mapping[str, socket.socket] | None = None,
        access: Access | None = None,
    ) -> None:
        """``inherited``: sockets of the service manager's that listen in ``socket_dir``;
        ``access``: whom it serves, by default the daemon's own user."""
        self._access = access or Access()
        self._path = socket_dir
        self._inherited = inherited
        self._limits = limits
        self._glance = replace(limits, total_nodes=_GLANCE_NODES, map_entries=_GLANCE_NODES)
        self._rates = Rates(limits, time.monotonic)
        # Of its own: who asks too much may still take back what was let in.
        self._control_rates = Rates(limits, time.monotonic)
        self._service = service
        self._authenticator = Authenticator(self._access, self._crowded)
        self._peers = Peers(self._drop)
        self._last_number = 0
        self._servers: list[Router] = []
        self._guard_timer: asyncio.TimerHandle | None = None
        self._identifying = ThreadPoolExecutor(2, thread_name_prefix="identity")

    # ------------------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Takes the socket directory and serves.

        Raises:
            AlreadyRunning: Another daemon holds the directory.
            SocketPathError: The directory, or what lies in it, cannot be used.
            AuthenticationBroken: A connection that must be refused was let in.
        """
        self._loop = loop = asyncio.get_running_loop()
        self._output = Output(loop, self._limits, self._peers, drop=self._drop, lagging=self._lags)
        self._directory = SocketDirectory(self._path, self._inherited, self._access)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # For each client a connection and a control connection, both with a listening socket, and a
        # pidfd; twice that for the guard.
        wanted = 2 * (5 * self._limits.connections + 256)
        self._guard = DescriptorGuard(raise_descriptor_limit(wanted))
        self._zap = self._context.socket(zmq.REP)
        self._zap.set(zmq.LINGER, 0)
        self._zap.bind(ZAP_ENDPOINT)
        self._watched_zap = Watched(loop, self._zap, self._authenticate)
        try:
            backlog = self._guard.backlog
            self._data = Router(
                self._context,
                loop,
                partial(self._directory.listen, DATA_NAME, backlog),
                self._limits,
                message=self._data_message,
                has_room=self._has_room,
                changed=self._data_changed,
                signalled=self._output.retry,
                count_users=self._access.shared,
            )
            self._output.router = self._data
            self._servers.append(self._data)
            self._control = Router(
                self._context,
                loop,
                partial(self._directory.listen, CONTROL_NAME, backlog),
                self._limits,
                message=self._control_message,
                has_room=self._has_room,
                changed=self._control_changed,
                count_users=self._access.shared,
            )
            self._servers.append(self._control)
            for name in (DATA_NAME, CONTROL_NAME):
                endpoint = f"ipc://{self._path / name}"
                await self_test(self._authenticator, endpoint, self._limits.handshake_ms / 1000)
        except BaseException:
            await self._close(0.0)
            raise

    async def stop(self, flush_s: float) -> None:
        """Gives clients ``flush_s`` to take what waits for them, and closes."""
        end = self._loop.time() + flush_s
        await self._output.drain(flush_s)
        await self._close(max(0.0, end - self._loop.time()))

    async def _close(self, linger_s: float) -> None:
        if self._guard_timer is not None:
            self._guard_timer.cancel()
        self._output.close()
        self._peers.close()
        self._identifying.shutdown(wait=False, cancel_futures=True)
        for server in self._servers:
            server.close(int(linger_s * 1000))
        self._watched_zap.close()
        self._zap.close(linger=0)
        # Waits for what lingers, so not in the loop's thread.
        await self._loop.run_in_executor(None, self._context.term)
        self._directory.close()

    # ---------------------------------------------------------------------------------- for service

    def send(self, connection: Connection, event: Event) -> None:
        """Queue an event. Events queued in one turn of the event loop travel as one message.

        An event for a connection that is closed is dropped.
        """
        peer = self._peers.by_number.get(connection.number)
        if peer is not None:
            self._output.queue(peer, wire.pack_event(event))

    def flush(self) -> None:
        """Send now what is queued, without waiting for the end of the turn."""
        self._output.flush()

    def backlog_bytes(self, connection: Connection) -> int:
        """Bytes that wait for this peer."""
        peer = self._peers.by_number.get(connection.number)
        return 0 if peer is None else peer.bytes

    # ----------------------------------------------------------------------------- data connections

    def _data_message(self, route: bytes, user: Credentials, frames: list[zmq.Frame]) -> None:
        peer = self._peers.by_route.get(route)
        id = ""
        try:
            self._count(self._rates, user, frames)
            message = wire.decode([frame.bytes for frame in frames], self._limits)
            request = wire.parse_data(message, self._limits)
            id = request.id
            if isinstance(request, r.Hello):
                self._hello(route, user, frames[-1], request)
            elif peer is None:
                raise WireError("E_HELLO", "the first message must be hello")
            elif isinstance(request, r.Bye):
                self._output.queue(peer, wire.pack_event(_result(id, {})))
                self._output.push(peer)
                self._drop(peer)
            elif peer.connection.lagging:
                raise WireError(
                    "E_SLOW",
                    "too much waits to be read on this connection",
                    details={"backlog_bytes": peer.bytes},
                )
            elif not peer.hello:
                self._request(peer, request)
            elif len(peer.early) < self._limits.requests_per_connection:
                peer.early.append(request)
            else:
                at_most = self._limits.requests_per_connection
                raise WireError(
                    "E_BUSY",
                    f"{at_most} requests wait for the answer to hello",
                    details={"limit": "requests_per_connection", "max": at_most},
                )
        except Exception as error:
            event = _error(error).as_event(id or getattr(error, "id", ""), 0)
            if peer is not None and peer.open:
                self._output.queue(peer, wire.pack_event(event))
            else:
                self._data.answer(route, event)

    def _hello(self, route: bytes, user: Credentials, frame: zmq.Frame, hello: r.Hello) -> None:
        if route in self._peers.by_route:
            raise WireError("E_HELLO", "this connection has said hello already")
        refuse_identity(route)
        # What libzmq says of a connection precedes its messages; so is it gone already?
        fd = int(frame.get(zmq.SRCFD))
        if not self._data.is_connected(fd):
            return
        self._check_member(user, [frame])
        for count, limit in (
            (len(self._peers.by_route), "connections"),
            (self._peers.users.of(user.uid), "connections_per_user"),
        ):
            if count >= (at_most := getattr(self._limits, limit)):
                raise limit_error(limit, count + 1, at_most)
        self._last_number += 1
        connection = Connection(
            number=self._last_number,
            token=secrets.token_bytes(16),
            uid=user.uid,
            pid=user.pid,
            app=hello.app,
            priority=hello.priority,
            client=hello.client,
        )
        peer = Peer(connection, route, fd, hello=hello.id)
        self._peers.add(peer)
        self._identify(peer)

    def _identify(self, peer: Peer) -> None:
        """Has a thread look what program the peer is: the loop does not wait for file systems."""
        pid = peer.connection.pid
        pidfd = pin(peer.fd, pid)
        if pidfd is None:
            self._identified(peer, UNKNOWN)
            return
        looked: asyncio.Future[Program] = asyncio.wrap_future(
            self._identifying.submit(program, pid, pidfd)
        )
        late = self._loop.call_later(_IDENTIFY_S, self._identified, peer, UNKNOWN)

        def done(found: asyncio.Future[Program]) -> None:
            os.close(pidfd)
            late.cancel()
            self._identified(peer, UNKNOWN if found.cancelled() else found.result())

        looked.add_done_callback(done)

    def _identified(self, peer: Peer, found: Program) -> None:
        """Answers hello, and what came after it."""
        if not peer.open or not peer.hello:
            return
        id, peer.hello = peer.hello, ""
        peer.connection.program = found
        fields = {
            "token": peer.connection.token,
            "pid": os.getpid(),
            "limits": as_map(self._limits),
            **self._service.opened(peer.connection),
        }
        self._output.queue(peer, wire.pack_event(_result(id, fields)))
        early, peer.early = peer.early, []
        for request in early:
            self._request(peer, request)

    def _request(self, peer: Peer, request: r.DataRequest) -> None:
        try:
            self._service.request(peer.connection, request)
        except Exception as error:
            self._output.queue(peer, wire.pack_event(_error(error).as_event(request.id, 0)))

    def _drop(self, peer: Peer) -> None:
        """Forgets a peer and tells the service, once."""
        if not peer.open:
            return
        peer.open = False
        self._output.forget(peer)
        self._peers.remove(peer)
        if not peer.hello:
            self._tell(self._service.closed, peer.connection)

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        """Calls the service; a defect of its must not keep other clients from being served."""
        try:
            what(*arguments)
        except Exception:
            log.exception("the service failed")

    def _lags(self, peer: Peer, lagging: bool) -> None:
        self._tell(self._service.lagging, peer.connection, lagging)

    def _data_changed(self, gone: list[int]) -> None:
        for fd in gone:
            peer = self._peers.by_fd.get(fd)
            if peer is not None:
                self._drop(peer)
        self._reconsider()

    # -------------------------------------------------------------------------------------- control

    def _control_message(self, route: bytes, user: Credentials, frames: list[zmq.Frame]) -> None:
        def reply(event: Event) -> None:
            self._control.answer(route, event)

        id = ""
        try:
            refuse_identity(route)
            self._check_member(user, frames)
            self._count(self._control_rates, user, frames)
            message = wire.decode([frame.bytes for frame in frames], self._limits)
            request = wire.parse_control(message, self._limits)
            id = request.id
            connection: Connection | None = None
            if isinstance(request, r.Cancel) and request.token is not None:
                peer = self._peers.by_token.get(request.token)
                if peer is None or peer.connection.uid != user.uid:
                    raise WireError("E_TOKEN", "no connection has this token")
                connection = peer.connection
            self._service.control(user.uid, request, connection, reply)
        except Exception as error:
            reply(_error(error).as_event(id or getattr(error, "id", ""), 0))

    def _control_changed(self, gone: list[int]) -> None:
        self._reconsider()

    # ---------------------------------------------------------------------------------- all of them

    def _count(self, rates: Rates, user: Credentials, frames: list[zmq.Frame]) -> None:
        """Refuses a message of a process that sends too many, before it is looked at.

        Raises:
            WireError: ``E_BUSY``.
        """
        try:
            rates.spend(user, sum(map(len, frames)))
        except WireError as error:
            error.id = wire.salvaged_id(frames[0].bytes if frames else b"", self._glance)
            raise

    def _check_member(self, user: Credentials, frames: list[zmq.Frame]) -> None:
        """Refuses who is not of the group that the daemon serves. The mode of the sockets keeps
        them out before; this is for a mode that somebody has changed. (A message without frames
        is refused for that, and by whose connection it came is not known.)

        Raises:
            WireError: ``E_FORBIDDEN``.
        """
        group = self._access.group
        if group is None or not frames:
            return
        groups = {user.gid, *peer_groups(int(frames[-1].get(zmq.SRCFD)))}
        if not self._access.belongs(user.uid, groups):
            raise WireError(
                "E_FORBIDDEN",
                f"this daemon serves members of group {group}; uid {user.uid} is none",
                details={"uid": user.uid, "group": group},
            )

    def _crowded(self, uid: int) -> bool:
        """Whether a user of several has all the connections that are kept for one, and as many
        again that have not said hello: no user can use up the descriptors of all."""
        if not self._access.shared:
            return False
        most = 2 * self._limits.connections_per_user
        return any(server.opened(uid) > most for server in self._servers)

    def _authenticate(self) -> None:
        for _ in range(_BATCH):
            try:
                request = self._zap.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._zap.send_multipart(self._authenticator.answer(request), zmq.DONTWAIT)

    def _has_room(self) -> bool:
        unsettled = sum(server.unsettled for server in self._servers)
        return self._guard.has_room(open_descriptors(), unsettled)

    def _reconsider(self) -> None:
        """Lets waiting clients in if there is room; looks again later while some wait."""
        for server in self._servers:
            server.reconsider()
        if self._guard_timer is None and any(server.held for server in self._servers):
            log.warning("%d descriptors are open: new clients wait", open_descriptors())
            self._guard_timer = self._loop.call_later(_GUARD_S, self._reconsider_on_time)

    def _reconsider_on_time(self) -> None:
        self._guard_timer = None
        self._reconsider()


def _result(id: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"id": id, "seq": 0, "type": "result", **fields}


def _error(error: Exception) -> WireError:
    """What to answer for an exception: anything but a `WireError` is a defect, and logged."""
    if isinstance(error, WireError):
        return error
    log.error("a request failed", exc_info=error)
    return WireError("E_INTERNAL", f"a defect of the daemon ({type(error).__name__})")
