"""One daemon and processes of several users of the machine, by the kernel's word."""

from __future__ import annotations

import grp
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedd_daemon.front.limits import for_several_users
from tests.support.as_user import ROOT, User
from tests.support.daemon import RunningDaemon, running_daemon

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can have processes of several users"
)
OWNER, ANN, BOB = 64_990, 64_001, 64_002
"""In no file of users: to the kernel they are numbers."""
PREFIX = "A long beginning that is worth finding again. " * 8


def owner() -> int:
    """Whom the daemon runs as: root, where the checkout is closed to others."""
    command = [sys.executable, "-c", "import pagedd_daemon.front.server"]
    done = subprocess.run(command, cwd="/", user=OWNER, group=OWNER, extra_groups=[], check=False)
    return OWNER if done.returncode == 0 else 0


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(config_text="[serve]\nshared = true\n", user=owner()) as running:
        yield running


@pytest.fixture
def ann(daemon: RunningDaemon) -> Iterator[User]:
    with User(ANN, daemon.host) as user:
        yield user


@pytest.fixture
def bob(daemon: RunningDaemon) -> Iterator[User]:
    with User(BOB, daemon.host) as user:
        yield user


def test_two_users_are_answered_and_neither_finds_what_the_other_asked(
    ann: User, bob: User
) -> None:
    for user in (ann, bob):
        assert user.does("connect", app="editor") == 1
    first = ann.does("generate", prompt=PREFIX, max_tokens=4, temperature=0)
    assert first["text"]
    assert first["cached"] == 0
    again = ann.does("generate", prompt=PREFIX, max_tokens=4, temperature=0)
    assert again["cached"] > again["prompt"] // 2
    foreign = bob.does("generate", prompt=PREFIX, max_tokens=4, temperature=0)
    assert (foreign["text"], foreign["cached"]) == (first["text"], 0)


def test_neither_sees_nor_cancels_what_the_other_does(
    daemon: RunningDaemon, ann: User, bob: User
) -> None:
    ann.does("connect", app="diary")
    bob.does("connect", app="agent")
    assert ann.does("begin", prompt="a", max_tokens=3000, ignore_eos=True)
    seen = {}
    for user in (ann, bob):
        for verb in ("status", "stats"):
            seen[user.uid, verb] = user.does("control", verb=verb)["apps"]
    for user, app in ((ann, "diary"), (bob, "agent")):
        for verb in ("status", "stats"):
            rows = seen[user.uid, verb]
            assert app in {row["app"] for row in rows}
            assert {row["uid"] for row in rows} == {user.uid}
    with daemon.control() as control:  # root's
        everybody = {(row["app"], row["uid"]) for row in control.status()["apps"]}
    assert {("diary", ANN), ("agent", BOB)} <= everybody
    assert bob.does("control", verb="cancel_requests") is False
    assert bob.does("control", verb="cancel_requests", app="diary") is False
    assert ann.does("control", verb="cancel_requests") is True
    assert ann.does("end") == "cancelled"


def test_what_concerns_all_is_for_root_and_the_daemons_own_user(
    daemon: RunningDaemon, ann: User
) -> None:
    ann.does("connect", app="editor")
    of_models: list[tuple[str, dict[str, str]]] = [
        ("load", {}),
        ("unload", {}),
        ("load", {"model": "/etc/passwd"}),
    ]
    for verb, options in of_models:
        answer = ann.does("call", verb=verb, **options)
        assert (answer["code"], answer["uid"]) == ("E_FORBIDDEN", ANN)
    of_all: list[tuple[str, dict[str, Any]]] = [
        ("shutdown", {}),
        ("reload", {}),
        ("metrics", {}),
        ("stats", {"blocks": True}),
        ("set_app", {"name": "editor", "settings": {"weight": 5}}),
    ]
    for verb, asked in of_all:
        answer = ann.does("control", verb=verb, **asked)
        assert (verb, answer["code"]) == (verb, "E_FORBIDDEN")
    with daemon.control() as control:
        assert "pagedd_" in control.metrics()
        assert control.set_app("editor", {"weight": 5})["settings"]["weight"] == 5
    assert ann.does("generate", prompt="a", max_tokens=1)["text"]


def test_a_user_at_its_limit_of_connections_does_not_keep_another_out(ann: User, bob: User) -> None:
    most = for_several_users().connections_per_user
    assert ann.does("connect", app="greedy", times=most) == most
    refused = ann.does("connect", app="greedy")
    assert (refused["code"], refused["limit"], refused["max"]) == (
        "E_LIMIT", "connections_per_user", most,
    )  # fmt: skip
    assert bob.does("connect", app="editor") == 1
    assert bob.does("generate", prompt="b", max_tokens=2)["text"]
    assert ann.does("generate", prompt="a", max_tokens=2)["text"]


def test_a_group_is_served_and_a_stranger_to_it_is_not_whatever_the_modes_are() -> None:
    group = next(g for g in grp.getgrall() if g.gr_gid not in (0, 65534))
    config = f'[serve]\nshared = true\ngroup = "{group.gr_name}"\n'
    with (
        running_daemon(config_text=config, user=owner(), groups=[group.gr_gid]) as daemon,
        User(ANN, daemon.host, [7, group.gr_gid]) as ann,
        User(BOB, daemon.host, [7]) as bob,
    ):
        paths = [
            daemon.socket_dir,
            *(daemon.socket_dir / n for n in ("pagedd.sock", "control.sock")),
        ]
        assert [path.stat().st_mode & 0o777 for path in paths] == [0o710, 0o660, 0o660]
        assert {path.stat().st_gid for path in paths} == {group.gr_gid}
        assert ann.does("connect", app="editor") == 1
        assert ann.does("generate", prompt="a", max_tokens=2)["text"]
        assert ann.does("control", verb="ping")["healthy"]
        refused = bob.does("connect", app="editor")
        assert (refused["error"], refused["code"]) == ("AccessDenied", "E_ACCESS")
        for path, mode in zip(paths, (0o711, 0o666, 0o666), strict=True):
            path.chmod(mode)  # somebody means well
        details = {"uid": BOB, "group": group.gr_gid}
        for refused in (bob.does("connect", app="editor"), bob.does("control", verb="ping")):
            assert refused["code"] == "E_FORBIDDEN"
            assert refused.items() >= details.items()
        assert ann.does("generate", prompt="a", max_tokens=2)["text"]


def test_a_daemon_that_is_not_shared_admits_no_other_user_whatever_the_modes_are() -> None:
    with running_daemon(user=owner(), load=False) as daemon, User(ANN, daemon.host) as ann:
        assert ann.does("connect", app="editor")["error"] == "AccessDenied"
        for path in (daemon.socket_dir, *daemon.socket_dir.glob("*.sock")):
            path.chmod(0o777)
        assert ann.does("connect", app="editor")["error"] == "AccessDenied"


def test_a_group_that_is_not_there_and_a_directory_open_to_others_keep_it_from_running(
    tmp_path: Path,
) -> None:
    group = next(g for g in grp.getgrall() if g.gr_gid not in (0, 65534))
    wide = tmp_path / "wide"
    wide.mkdir()
    os.chown(wide, 0, group.gr_gid)
    wide.chmod(0o755)
    for arguments, said in (
        (["--shared", "--group", "no-such-group"], "no group 'no-such-group'"),
        (["--group", group.gr_name], "not shared"),
        (["--shared", "--group", group.gr_name], "open to others than group"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pagedd", "serve", "--backend", "simulated",
             "--socket-dir", str(wide), *arguments],
            capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 78
        assert said in done.stderr
