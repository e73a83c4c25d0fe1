"""The same messages over real sockets to a daemon of its own, and noise below the messages.

libzmq takes a connection's bytes apart itself, so there its handshake is attacked too: greetings
of other versions and mechanisms, commands that lie about their size, and bytes that are nothing.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from pathlib import Path

import msgpack
import zmq

from benchmarks.chaos.fields import TOKEN
from benchmarks.chaos.messages import Messages
from pagedd_daemon.front.limits import DEFAULT_LIMITS
from pagedd_daemon.front.listener import CONTROL_NAME, DATA_NAME

PATIENCE_S = 60.0
NOISE_EVERY = 40
"""Messages to one connection that speaks no ZMTP, or not all of it."""
_CONNECTIONS = 4
_PER_S = 0.8 * DEFAULT_LIMITS.messages_per_s
"""Messages a second, beside those of more than 4 KiB, which count several times."""
_BURST = DEFAULT_LIMITS.message_burst // 4

# ZMTP 3.1 (RFC 37), section 2: signature, version, mechanism, as-server, filler.
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
_PROPERTIES = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
_READY = b"\x04" + bytes([len(_PROPERTIES)]) + _PROPERTIES


def noise(dice: random.Random) -> bytes:
    """What a connection says that is no client's."""
    kind = dice.randrange(6)
    if kind == 0:
        return dice.randbytes(dice.choice((0, 1, 9, 64, 5000)))
    if kind == 1:
        return _GREETING[: dice.randrange(len(_GREETING))]
    if kind == 2:
        changed = bytearray(_GREETING)
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        return bytes(changed) + _READY
    if kind == 3:  # a command or frame that claims more than comes
        size = dice.choice((0, 255, 2**31, 2**63 - 1, 2**64 - 1))
        return _GREETING + b"\x06" + struct.pack(">Q", size) + b"\x05READY"
    if kind == 4:
        return _GREETING + _READY + b"\x01" * dice.choice((1, 64, 4096))
    return _GREETING + b"\x04" + bytes([len(_PROPERTIES)]) + dice.randbytes(200)


class Outside:
    """An attacker of a daemon that serves in ``folder``."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._messages = Messages(seed, _CONNECTIONS)
        self._dice = random.Random(seed + 1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = [self._open(DATA_NAME) for _ in range(_CONNECTIONS)]
        self._controls = [self._open(CONTROL_NAME) for _ in range(_CONNECTIONS)]
        self._tokens = [bytes(16)] * _CONNECTIONS
        self.answers = 0
        self.defects: list[str] = []
        """Answers that tell of a defect of the daemon."""

    def _open(self, name: str) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.DEALER)
        sock.set(zmq.LINGER, 0)
        # What is over the daemon's limit of a frame is for the daemon to refuse.
        sock.connect(f"ipc://{self._folder / name}")
        return sock

    def run(self, count: int) -> None:
        """Send so many messages, and read what is answered.

        Raises:
            TimeoutError: A message was not taken in time.
        """
        for number in range(_CONNECTIONS):
            self._hello(number)
        begin = time.monotonic()
        for at in range(count):
            sent = self._messages.next()
            frames = [frame.replace(TOKEN, self._tokens[sent.connection]) for frame in sent.frames]
            sockets = self._controls if sent.control else self._sockets
            if frames:
                self._send(sockets[sent.connection], frames)
            if at % NOISE_EVERY == 0:
                self._noise()
                self._keep_pace(at, begin)
            if at % 500 == 499:
                self._hello(self._dice.randrange(_CONNECTIONS))
            self._read()

    def _keep_pace(self, at: int, begin: float) -> None:
        """Wait, where the next message would be refused unread because there are too many."""
        allowed = begin + (at - _BURST) / _PER_S
        while (left := allowed - time.monotonic()) > 0:
            self._read()
            time.sleep(min(left, 0.01))

    def close(self) -> None:
        """Leave without a word."""
        self._context.destroy(linger=0)

    def _hello(self, number: int) -> None:
        """Again after what ended the connection; refused where nothing did."""
        hello = {"v": 1, "verb": "hello", "id": f"hello-{number}", "app": "a"}
        self._send(self._sockets[number], [msgpack.packb(hello)])

    def _send(self, sock: zmq.Socket[bytes], frames: list[bytes]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not sock.poll(5, zmq.POLLOUT):
            if time.monotonic() > end:
                raise TimeoutError("the daemon takes no message any more")
            self._read()
        sock.send_multipart(frames, zmq.DONTWAIT)

    def _read(self) -> None:
        for sock in (*self._sockets, *self._controls):
            with contextlib.suppress(zmq.Again):
                while True:
                    self._answer(sock.recv(zmq.DONTWAIT))

    def _answer(self, data: bytes) -> None:
        for event in msgpack.unpackb(data)["ev"]:
            self.answers += 1
            if event.get("code") == "E_INTERNAL":
                self.defects.append(repr(event))
            id = event.get("id", "")
            if event["type"] == "result" and id.startswith("hello-"):
                self._tokens[int(id.removeprefix("hello-"))] = event["token"]

    def _noise(self) -> None:
        name = self._dice.choice((DATA_NAME, CONTROL_NAME))
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.settimeout(PATIENCE_S)
            sock.connect(str(self._folder / name))
            sock.sendall(noise(self._dice))
