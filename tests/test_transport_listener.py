"""The socket directory: one daemon, nobody else's files, and never out of descriptors."""

from __future__ import annotations

import os
import resource
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pagedd_daemon.front.listener import (
    LOCK_NAME,
    AlreadyRunning,
    DescriptorGuard,
    SocketDirectory,
    SocketPathError,
    open_descriptors,
    raise_descriptor_limit,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pagedd"
    path.mkdir(mode=0o700)
    return path


def test_directory_and_socket_are_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pagedd"
    before = os.umask(0)
    try:
        directory = SocketDirectory(path)
        made = directory.listen("a.sock", 8)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "a.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE((path / LOCK_NAME).stat().st_mode) == 0o600
    made.close()
    directory.close()
    assert {entry.name for entry in path.iterdir()} == {LOCK_NAME}


def test_a_directory_open_to_others_is_refused_and_left(folder: Path) -> None:
    folder.chmod(0o750)
    with pytest.raises(SocketPathError, match="chmod 700"):
        SocketDirectory(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert list(folder.iterdir()) == []


def test_a_symbolic_link_or_a_file_as_directory_is_refused(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(SocketPathError, match="symbolic link"):
        SocketDirectory(link)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(SocketPathError):
        SocketDirectory(file)
    assert file.read_text() == "x"


def test_a_directory_of_another_user_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(SocketPathError, match="belongs to user"):
        SocketDirectory(folder)


HOLDER = """
import sys
from pathlib import Path
from pagedd_daemon.front.listener import SocketDirectory
directory = SocketDirectory(Path(sys.argv[1]))
directory.listen("a.sock", 8)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_daemon_is_told_of_the_first_and_changes_nothing(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        inode = (folder / "a.sock").stat().st_ino
        with pytest.raises(AlreadyRunning) as caught:
            SocketDirectory(folder)
        assert caught.value.pid == first.pid
        assert caught.value.path == folder / LOCK_NAME
        assert caught.value.started
        assert (folder / "a.sock").stat().st_ino == inode
        first.kill()
    # Killed: its socket is stale, and its lock is gone with it.
    directory = SocketDirectory(folder)
    with directory.listen("a.sock", 8), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(folder / "a.sock"))
    directory.close()


def test_a_stale_socket_is_reclaimed(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(folder / "a.sock"))
    directory = SocketDirectory(folder)
    with directory.listen("a.sock", 8), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(folder / "a.sock"))
    directory.close()


def test_a_new_listening_socket_takes_the_place_of_our_last_one(folder: Path) -> None:
    directory = SocketDirectory(folder)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    with directory.listen("a.sock", 8) as old:
        clients[0].connect(os.fspath(folder / "a.sock"))
        with directory.listen("a.sock", 8) as new:
            clients[1].connect(os.fspath(folder / "a.sock"))
            assert old.getsockname() != new.getsockname()
            for sock in (old, new):
                sock.accept()[0].close()
                with pytest.raises(BlockingIOError):
                    sock.accept()
    for client in clients:
        client.close()
    assert {entry.name for entry in folder.iterdir()} == {LOCK_NAME, "a.sock"}
    directory.close()


def test_anything_but_our_stale_socket_is_refused_and_kept(folder: Path) -> None:
    directory = SocketDirectory(folder)
    (folder / "file").write_text("precious")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "file")
    os.mkfifo(folder / "fifo")
    for name in ("file", "folder", "link", "fifo"):
        with pytest.raises(SocketPathError) as caught:
            directory.listen(name, 8)
        assert caught.value.path == folder / name
        assert os.path.lexists(folder / name)
    assert (folder / "file").read_text() == "precious"
    directory.close()


@pytest.mark.parametrize("queue_full", [False, True])
def test_the_socket_of_another_listening_program_is_kept(folder: Path, queue_full: bool) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(os.fspath(folder / "a.sock"))
        other.listen(0)
        if queue_full:
            waiting.connect(os.fspath(folder / "a.sock"))
        directory = SocketDirectory(folder)
        with pytest.raises(SocketPathError, match="another program"):
            directory.listen("a.sock", 8)
        directory.close()
        assert (folder / "a.sock").is_socket()


def test_closing_leaves_a_socket_that_took_the_place_of_ours(folder: Path) -> None:
    directory = SocketDirectory(folder)
    with directory.listen("a.sock", 8), socket.socket(socket.AF_UNIX) as other:
        (folder / "a.sock").unlink()
        other.bind(os.fspath(folder / "a.sock"))
        directory.close()
        assert (folder / "a.sock").is_socket()


def test_a_path_too_long_for_a_socket_is_named(folder: Path) -> None:
    directory = SocketDirectory(folder)
    with pytest.raises(SocketPathError, match="107"):
        directory.listen("x" * 107, 8)
    directory.close()


def test_the_guard_keeps_half_of_the_descriptors_whatever_comes_in() -> None:
    guard = DescriptorGuard(256)
    assert guard.batch == 18
    assert guard.has_room(110, 0)
    assert not guard.has_room(111, 0)
    assert guard.has_room(92, 1)
    assert not guard.has_room(93, 1)
    assert DescriptorGuard(1_000_000).backlog == 64


def test_open_descriptors_are_counted() -> None:
    before = open_descriptors()
    with open(os.devnull):
        assert open_descriptors() == before + 1


def test_the_soft_limit_is_raised_no_further_than_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert raise_descriptor_limit(1) == soft
    program = (
        "import resource\n"
        "from pagedd_daemon.front.listener import raise_descriptor_limit as up\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))\n"
        "print(up(100), up(1000), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout == "100 128 (128, 128)\n"
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
