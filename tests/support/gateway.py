"""The gateway: in the test's own process, and as the process that people start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from pagedd_http import Settings, create_app
from tests.support.daemon import RunningDaemon

ANSWER_S = 60.0

Use = Callable[[httpx.AsyncClient], Awaitable[None]]


def with_gateway(host: str, use: Use, **settings: Any) -> None:
    """Run a test with a client of a gateway in this process, and no longer than `ANSWER_S`.

    Args:
        host: The daemon's.
        use: The test.
        settings: Of the gateway.
    """

    async def main() -> None:
        app = create_app(Settings(daemon=host, **settings))
        async with app.router.lifespan_context(app), client_of(app) as client:
            await use(client)

    asyncio.run(asyncio.wait_for(main(), ANSWER_S))


def run(daemon: RunningDaemon, use: Use, **settings: Any) -> None:
    """`with_gateway` of a daemon that runs."""
    with_gateway(daemon.host, use, **settings)


async def ask(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    """One request of OpenAI's interface."""
    return await client.post(f"/v1/{path}", json=body)


async def got(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    """Its answer, which must be one."""
    response = await ask(client, path, **body)
    assert response.status_code == 200, response.text
    return response.json()


async def streamed(client: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    """The documents of its stream, which must end well."""
    response = await ask(client, path, stream=True, **body)
    assert response.status_code == 200, response.text
    found = events(response)
    assert found[-1] == "[DONE]"
    return found[:-1]


def client_of(app: Any) -> httpx.AsyncClient:
    """A client of an application in this process; it hears a reply once that is whole."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=ANSWER_S)


def events(response: httpx.Response) -> list[Any]:
    """The documents of a stream of server-sent events; its end mark as it is."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    found: list[Any] = []
    for block in response.text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
    return found


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway that listens."""

    process: subprocess.Popen[str]
    address: str
    """``http://127.0.0.1:PORT`` or ``unix:///PATH``."""


@contextlib.contextmanager
def running_gateway(daemon: RunningDaemon, *options: str) -> Iterator[RunningGateway]:
    """``pagedd gateway``, stopped by SIGTERM at the end, which it must survive with status 0."""
    where = () if "--uds" in options else ("--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "pagedd", "gateway", *where, *options],
        env=daemon.env,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert "listening at " in line, line + process.stderr.read()
        rest: list[str] = []
        reader = threading.Thread(target=lambda: rest.extend(process.stderr or ()), daemon=True)
        reader.start()
        yield RunningGateway(process, line.split("listening at ")[1].strip())
        process.terminate()
        assert process.wait(ANSWER_S) == 0, "".join(rest)
        reader.join(ANSWER_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()
