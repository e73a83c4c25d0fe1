"""The engine as a process of its own, over its socketpair."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from pagedd_daemon import messages as m
from pagedd_daemon.link import FrameReader, LinkError, frame, pack, unpack
from pagedd_daemon.params import SamplingParams, StopParams

CONFIGURE = m.Configure(
    backend="simulated",
    model_path="",
    model_digest=bytes(32),
    context_tokens=0,
    kv_tokens=4096,
    ram_bytes=1 << 20,
    threads=1,
    vocab_size=258,
    eog_tokens=(256,),
)


class Peer:
    """The front's end."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.sock = sock
        self.process = process
        self._reader = FrameReader()
        self._ready: list[m.ToEngine | m.ToFront] = []

    def send(self, message: m.ToEngine) -> None:
        self.sock.sendall(pack(message))

    def receive(self) -> m.ToEngine | m.ToFront:
        while not self._ready:
            data = self.sock.recv(1 << 16)
            assert data, "the engine hung up"
            self._ready += [unpack(body) for body in self._reader.feed(data)]
        return self._ready.pop(0)

    def until(self, kind: type) -> m.ToEngine | m.ToFront:
        while not isinstance(message := self.receive(), kind):
            pass
        return message


@contextmanager
def engine() -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "pagedd_daemon.engine", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            yield Peer(ours, process)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def submit(rid: int, max_tokens: int) -> m.Submit:
    sampling, stop = SamplingParams(temperature=0.0), StopParams(max_tokens, ignore_eos=True)
    return m.Submit(
        rid=rid,
        app="test",
        klass=1,
        root=bytes(32),
        prompt=np.arange(20, dtype="<i4").tobytes(),
        n=1,
        sampling={name: getattr(sampling, name) for name in sampling.__slots__},
        stop={name: getattr(stop, name) for name in stop.__slots__},
    )


def test_it_serves_a_request_that_came_before_the_model_was_loaded() -> None:
    with engine() as peer:
        peer.sock.sendall(pack(CONFIGURE) + pack(submit(1, 3)))
        ready = peer.until(m.Ready)
        assert isinstance(ready, m.Ready)
        assert ready.pool_tokens == 4096
        generated = 0
        while True:
            report = peer.until(m.StepReport)
            assert isinstance(report, m.StepReport)
            generated += sum(len(output.tokens) // 4 for output in report.outputs)
            if report.closed:
                break
        assert generated == report.closed[0].generated_tokens == 3
        peer.send(m.Shutdown())
        assert peer.process.wait(10) == 0


def test_it_exits_when_the_front_dies_in_the_middle_of_a_step() -> None:
    with engine() as peer:
        peer.send(replace(CONFIGURE, simulated_step_us=60_000_000))
        peer.until(m.Ready)
        peer.send(submit(1, 3))
        peer.send(m.AskSnapshot())
        peer.until(m.Snapshot)
        peer.sock.close()
        assert peer.process.wait(2) == 70


def test_a_model_that_cannot_be_loaded_is_named_and_the_process_ends() -> None:
    with engine() as peer:
        peer.send(replace(CONFIGURE, kv_tokens=1))
        failed = peer.until(m.Failed)
        assert isinstance(failed, m.Failed)
        assert failed.code == "E_MODEL"
        assert peer.process.wait(10) == 66


def test_frames_arrive_whole_however_the_bytes_are_cut() -> None:
    stream = pack(CONFIGURE) + pack(m.Cancel(7)) + pack(m.AskSnapshot())
    for size in (1, 2, 3, 7, len(stream)):
        reader = FrameReader()
        bodies = [
            body
            for at in range(0, len(stream), size)
            for body in reader.feed(stream[at : at + size])
        ]
        # msgpack has one kind of sequence
        first, *others = (unpack(body) for body in bodies)
        assert isinstance(first, m.Configure)
        assert replace(first, eog_tokens=tuple(first.eog_tokens)) == CONFIGURE
        assert others == [m.Cancel(7), m.AskSnapshot()]


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x91\xa4Nope", b"\x91\xa6Cancel"]
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(LinkError):
        unpack(body)


def test_a_frame_over_the_limit_is_refused_before_it_is_kept() -> None:
    with pytest.raises(LinkError):
        list(FrameReader().feed(b"\xff\xff\xff\xff"))
    assert frame(b"x") == b"\x01\x00\x00\x00x"
