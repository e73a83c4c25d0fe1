"""The gateway's page and what it looks at, as HTTP has them."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Iterator
from typing import cast

import httpx
import pytest

import pagedd
from kvpager import CellState
from pagedd_http import App
from pagedd_http.page import document, figures
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import with_gateway


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated", kv_tokens=4096) as running:
        yield running


# ------------------------------------------------------------------------------------------- page


def test_the_page_is_one_file_under_a_policy_that_names_its_own_script_and_no_other(
    daemon: RunningDaemon,
) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.get("/")
        assert answer.headers["content-type"].startswith("text/html")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
        # Nothing in it is fetched from elsewhere, and no attribute holds style or script.
        assert not re.search(r"""(?:src|href)=["'](?!#|data:)|@import|url\(""", answer.text)
        assert not re.search(r"<[a-z][^>]*\s(?:style|on[a-z]+)=", answer.text)

    with_gateway(daemon.host, use)


def test_the_page_itself_needs_no_key_and_what_it_looks_at_does(daemon: RunningDaemon) -> None:
    def key_of(key: str) -> App | None:
        return App("mine") if key == "pagedd-right" else None

    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/pagedd/state")).status_code == 401
        told = await client.get("/pagedd/state", headers={"authorization": "Bearer pagedd-right"})
        assert told.status_code == 200

    with_gateway(daemon.host, use, key_of=key_of, key_required=True)


def test_of_a_daemon_that_others_share_the_page_shows_what_is_told() -> None:
    class Shared:
        async def stats(self, *, blocks: bool = False, timeout: float) -> dict[str, object]:
            if blocks:
                raise pagedd.RequestError("not yours", code="E_FORBIDDEN")
            return {"steps": 7}

    told = asyncio.run(figures(cast(pagedd.AsyncClient, Shared())))
    assert told == {"steps": 7, "blocks": {}}


def test_the_state_has_status_figures_and_every_block(daemon: RunningDaemon) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        told = await client.get("/pagedd/state")
        assert told.headers["cache-control"] == "no-store"
        seen = told.json()
        assert seen["status"]["state"] == "ready"
        assert "generated" in seen["stats"]["tokens"]
        tier, shown = seen["status"]["kv"]["gpu"], seen["blocks"]["gpu"]
        cells = base64.b64decode(shown["cells"])
        assert (shown["every"], len(cells)) == (1, tier["blocks_total"])
        assert sum(cell & 7 == CellState.FREE for cell in cells) == tier["free"]

    with_gateway(daemon.host, use)


def test_looking_wakes_no_model() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for path in ("/", "/pagedd/state", "/v1/models", "/openapi.json"):
            assert (await client.get(path)).status_code == 200, path
        seen = (await client.get("/pagedd/state")).json()
        assert (seen["status"]["state"], seen["status"]["models"]) == ("asleep", [])
        assert seen["blocks"] == {}

    with running_daemon(model="simulated") as asleep:
        with asleep.connect() as client:
            client.unload()
        with_gateway(asleep.host, use)


def test_a_state_without_a_daemon_is_503() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        told = await client.get("/pagedd/state")
        assert told.status_code == 503
        assert "retry-after" in told.headers
        assert (await client.get("/")).status_code == 200

    with_gateway("unix:///nowhere/pagedd.sock", use)


def test_the_page_names_no_element_twice() -> None:
    html, _ = document()
    ids = re.findall(rb'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(rb'\$\("([^"]+)"\)', html)) <= set(ids)
