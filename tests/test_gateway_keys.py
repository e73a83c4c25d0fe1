"""Whom a request over HTTP is for: API keys, headers, the process at the other end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pagedd import _keys
from pagedd_http import App
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import run, running_gateway

BODY = {"prompt": "x", "max_tokens": 2, "temperature": 0}
APPS = {"good": App("editor", "interactive")}


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


def classes(daemon: RunningDaemon) -> dict[str, str]:
    with daemon.control() as control:
        return {app["app"]: app["class"] for app in control.status()["apps"]}


def test_a_key_says_which_app_and_class_a_request_is_for(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for headers in (
            {"authorization": "Bearer good"},
            {"x-api-key": "good", "x-pagedd-app": "somebody-else"},
        ):
            assert (await client.post("/v1/completions", json=BODY, headers=headers)).is_success
        assert classes(daemon)["editor"] == "interactive"
        assert "somebody-else" not in classes(daemon)

    run(daemon, use, key_of=APPS.get)


def test_where_keys_are_required_nothing_else_opens(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        good = await client.get("/v1/models", headers={"authorization": "bearer good"})
        assert good.status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer bad"},
            {"authorization": "Basic good"},
            {"x-pagedd-app": "editor"},
        ):
            refused = await client.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.json()["error"]["type"] == "authentication_error"

    run(daemon, use, key_of=APPS.get, key_required=True)


def test_made_up_keys_are_none_but_revoked_ones_are_told(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        made_up = await client.get("/v1/models", headers={"authorization": "Bearer sk-none"})
        assert made_up.status_code == 200
        revoked = await client.get("/v1/models", headers={"authorization": "Bearer pagedd-x"})
        assert revoked.status_code == 401

    run(daemon, use)


def test_a_header_says_what_is_asked_for(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        headers = {"x-pagedd-app": "batch", "x-pagedd-priority": "background"}
        assert (await client.post("/v1/completions", json=BODY, headers=headers)).is_success
        assert classes(daemon)["batch"] == "background"
        wrong = await client.get("/v1/models", headers={"x-pagedd-priority": "urgent"})
        assert wrong.status_code == 400

    run(daemon, use)


def test_a_key_is_made_listed_and_revoked_while_a_gateway_runs(daemon: RunningDaemon) -> None:
    none = daemon.command("gateway", "--require-key", "--port", "0")
    assert none.returncode == 69
    made = json.loads(daemon.command("apps", "key", "add", "agent", "--json").stdout)
    file = Path(daemon.env["XDG_CONFIG_HOME"]) / "pagedd" / "keys.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert made["key"] not in file.read_text()
    assert made["id"] in daemon.command("apps", "key", "list").stdout
    with (
        running_gateway(daemon, "--require-key") as gateway,
        httpx.Client(base_url=gateway.address, timeout=60) as client,
    ):
        headers = {"authorization": f"Bearer {made['key']}"}
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
        assert "agent" in classes(daemon)
        assert daemon.command("apps", "key", "revoke", "agent").returncode == 0
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert daemon.command("apps", "key", "revoke", "agent").returncode == 66


def test_on_a_unix_socket_the_program_at_the_other_end_is_the_app(daemon: RunningDaemon) -> None:
    path = daemon.folder / "peer.sock"
    with (
        running_gateway(daemon, "--uds", str(path)),
        httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=60
        ) as client,
    ):
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert Path(sys.executable).resolve().name in classes(daemon)
        headers = {"x-pagedd-app": "named"}
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
        assert "named" in classes(daemon)


def test_keys_that_others_may_read_open_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pagedd" / "keys.json"
    secret, key = _keys.add(path, "agent", "normal")
    complaints: list[str] = []
    ring = _keys.KeyRing(path, lambda error: complaints.append(str(error)))
    assert ring.find(secret) == key
    assert ring.find(secret + "x") is None
    path.chmod(0o640)
    assert ring.find(secret) is None
    assert ring.find(secret) is None
    assert len(complaints) == 1
    with pytest.raises(_keys.KeyFileError, match="chmod 600"):
        _keys.add(path, "other", "normal")
    path.chmod(0o600)
    assert ring.find(secret) == key
    path.write_text("{")
    assert ring.find(secret) is None


def test_revoking_takes_one_key_or_all_of_an_app(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second, other = (_keys.add(path, app, "normal")[1] for app in ("a", "a", "b"))
    assert _keys.revoke(path, first.id) == [first]
    assert _keys.read(path) == [second, other]
    assert _keys.revoke(path, "a") == [second]
    assert _keys.revoke(path, "a") == []
    assert _keys.read(path) == [other]
