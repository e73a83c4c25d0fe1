"""What the gateway refuses, and what becomes of requests when client or daemon go away."""

from __future__ import annotations

import asyncio
import queue
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import pagedd
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.fake_daemon import FakeDaemon, Peer, Request
from tests.support.gateway import events, run, running_gateway, with_gateway

GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated") as running:
        yield running


async def until(happened: Callable[[], bool]) -> None:
    """Looks until another process has done something."""

    def look() -> None:
        deadline = time.monotonic() + 30
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    await asyncio.to_thread(look)


def used(control: pagedd.Control) -> int:
    return int(control.status()["kv"]["gpu"]["used"])


def test_other_names_and_pages_of_others_are_refused(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for headers, status in (
            ({"host": "127.0.0.1:11500"}, 200),
            ({"host": "[::1]:11500"}, 200),
            ({"host": "LOCALHOST"}, 200),
            ({"host": "rebound.example"}, 403),
            ({"host": "127.0.0.1.rebound.example"}, 403),
            ({"host": ""}, 403),
            ({"origin": "http://localhost"}, 200),
            ({"origin": "http://localhost:3000"}, 403),
            ({"origin": "https://page.example"}, 403),
            ({"origin": "null"}, 403),
        ):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == status, headers
            assert "access-control-allow-origin" not in response.headers

    run(daemon, use)


def test_bodies_are_limited_however_they_come(daemon: RunningDaemon) -> None:
    async def parts() -> Any:
        for _ in range(40):
            yield b"x" * 100

    async def use(client: httpx.AsyncClient) -> None:
        for content in (b"x" * 3000, parts()):
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_long"

    run(daemon, use, body_bytes=2000)


def test_an_app_names_itself_in_a_header(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        headers = {"x-pagedd-app": "my-page"}
        body = {"prompt": "x", **GREEDY}
        assert (await client.post("/v1/completions", json=body, headers=headers)).is_success
        with daemon.control() as control:
            (app,) = [app for app in control.status()["apps"] if app["app"] == "my-page"]
        assert app["generated_tokens"] == 8
        refused = await client.get("/v1/models", headers={"x-pagedd-app": "no such name!"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "app")

    run(daemon, use)


def test_away_is_503_until_the_daemon_is_there(tmp_path: Path) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        away = await client.get("/v1/models")
        assert away.status_code == 503
        assert int(away.headers["retry-after"]) >= 1
        assert away.json()["error"]["type"] == "server_error"

    with_gateway(f"unix://{tmp_path}/pagedd.sock", use)


def test_a_daemon_that_does_not_answer_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedd_http.daemon.OPEN_S", 0.2)

    async def use(client: httpx.AsyncClient) -> None:
        response = await client.get("/v1/models")
        assert (response.status_code, "did not answer" in response.text) == (503, True)

    with (
        tempfile.TemporaryDirectory(prefix="pagedd-") as folder,
        socket.socket(socket.AF_UNIX) as s,
    ):
        s.bind(f"{folder}/pagedd.sock")
        s.listen()
        with_gateway(f"unix://{folder}/pagedd.sock", use)


def test_a_stream_that_fails_on_its_way_says_so_in_its_last_event() -> None:
    with running_daemon(model="simulated") as daemon:

        async def use(client: httpx.AsyncClient) -> None:
            body = {"prompt": "x", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            with daemon.control() as control:
                await until(lambda: used(control) > 2)  # more than the prompt's block
            daemon.kill()
            response = await asking
            assert response.status_code == 200
            last = events(response)[-1]
            assert (last["error"]["code"], last["error"]["type"]) == (
                "E_SESSION_LOST",
                "server_error",
            )

        run(daemon, use)


def test_a_daemon_that_drains_is_503_and_its_streams_end_well() -> None:
    with running_daemon(model="simulated") as daemon:

        async def use(client: httpx.AsyncClient) -> None:
            body = {"prompt": "x", "max_tokens": 100_000, "ignore_eos": True}
            running = asyncio.create_task(client.post("/v1/completions", json=body))
            with daemon.control() as control:
                await until(lambda: used(control) > 0)
                control.shutdown(drain=True)
            refused = await client.post("/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "E_DRAINING")
            assert int(refused.headers["retry-after"]) >= 1
            running.cancel()
            await asyncio.wait([running])

        run(daemon, use)
        assert daemon.wait() == 0


def test_a_daemon_that_was_restarted_is_found_again(tmp_path: Path) -> None:
    with running_daemon(model="simulated", load=False) as first:
        link = tmp_path / "run"
        link.symlink_to(first.socket_dir)

        async def use(client: httpx.AsyncClient) -> None:
            assert (await client.get("/v1/models")).status_code == 200
            first.kill()
            first.wait()
            away = await client.get("/v1/models")
            assert away.status_code == 503
            with running_daemon(model="simulated", load=False) as second:
                link.unlink()
                link.symlink_to(second.socket_dir)
                assert (await client.get("/v1/models")).status_code == 200

        with_gateway(f"unix://{link}/pagedd.sock", use)


def test_a_client_that_hangs_up_while_its_prompt_is_computed_is_cancelled(tmp_path: Path) -> None:
    """Over a real socket: 4,000 tokens of 2 ms are computed in 8 s, in chunks."""
    with (
        running_daemon(model="simulated", simulated_token_us=2000) as daemon,
        running_gateway(daemon) as gateway,
        daemon.control() as control,
    ):

        async def main(body: dict[str, Any]) -> None:
            async with httpx.AsyncClient(base_url=gateway.address, timeout=60) as client:
                asking = asyncio.create_task(client.post("/v1/completions", json=body))
                await until(lambda: used(control) > 0)
                asking.cancel()
                await asyncio.wait([asking])
            await until(lambda: used(control) == 0)
            assert control.stats()["tokens"]["generated"] == 0

        for stream in (False, True):
            body = {"prompt": f"{stream:04}" + "x" * 4000, "stream": stream, "max_tokens": 2000}
            asyncio.run(asyncio.wait_for(main(body), 60))


def test_a_gateway_on_a_unix_socket_serves_its_owner_alone(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    path = daemon.folder / "http.sock"
    with running_gateway(daemon, "--uds", str(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost"
        ) as client:
            assert client.get("/v1/models").status_code == 200
        second = daemon.command("gateway", "--uds", str(path))
        assert second.returncode == 69
        assert "listens" in second.stderr
    assert not path.exists()


def test_a_gateway_answers_to_the_address_it_listens_at(daemon: RunningDaemon) -> None:
    with running_gateway(daemon, "--host", "127.0.0.2", "--allow-host", "box.example") as gateway:
        assert httpx.get(f"{gateway.address}/v1/models").status_code == 200
        for name, status in (("box.example", 200), ("other.example", 403)):
            response = httpx.get(f"{gateway.address}/v1/models", headers={"host": name})
            assert response.status_code == status
    taken = daemon.command("gateway", "--host", "nowhere.example")
    assert (taken.returncode, "no address" in taken.stderr) == (69, True)


def test_a_gateway_listens_at_no_address_of_the_network_without_keys(
    daemon: RunningDaemon,
) -> None:
    done = daemon.command("gateway", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 69
    assert "apps key add" in done.stderr


def test_who_waits_for_a_model_to_load_is_told_to_ask_again_and_nobody_else_is() -> None:
    state = "ready"
    with tempfile.TemporaryDirectory(prefix="pagedd-") as folder, FakeDaemon(Path(folder)) as fake:
        told: queue.Queue[str] = queue.Queue()

        def ping(peer: Peer, request: Request) -> None:
            peer.result(request, pid=1, uptime_s=1.0, state=state, steps=5)
            told.put(state)

        fake.on("ping", ping)
        fake.on("generate", lambda peer, request: None)  # says nothing, as while a model loads

        async def use(client: httpx.AsyncClient) -> None:
            nonlocal state
            body = {"model": "fake", "prompt": "x"}
            for stream in (True, False):
                state = "ready"
                asking = asyncio.create_task(
                    client.post("/v1/completions", json={**body, "stream": stream})
                )
                for _ in range(3):
                    await asyncio.to_thread(told.get, timeout=30)
                assert not asking.done()
                state = "loading"
                response = await asking
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "loading"
                assert int(response.headers["retry-after"]) >= 1
                await asyncio.to_thread(fake.expect, "cancel")

        with_gateway(fake.host, use, load_wait_s=0.05)
