"""The gateway's page in a browser."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect

from pagedd_http import App, Settings, create_app
from tests.support.browser import PHONE, WAIT_MS, Visit, chromium, visit
from tests.support.daemon import RunningDaemon, running_daemon
from tests.support.gateway import running_gateway

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "gateway.png"
WRITE_PICTURE = "PAGEDD_WRITE_PICTURE"
"""Environment variable that has the test write the documentation's picture."""
KEY = "pagedd-right"

expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def daemon() -> Iterator[RunningDaemon]:
    with running_daemon(model="simulated", kv_tokens=8192) as running:
        yield running


@pytest.fixture(scope="module")
def address(daemon: RunningDaemon) -> Iterator[str]:
    with running_gateway(daemon) as gateway:
        yield gateway.address


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with visit(browser, address) as seen:
        yield seen.page


class Load:
    """An app that asks for long texts, each prompt three times, until it is over."""

    def __init__(self, daemon: RunningDaemon, app: str, priority: str, streams: int) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(daemon, app, priority, streams))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self, daemon: RunningDaemon, app: str, priority: str, streams: int) -> None:
        with daemon.connect(app, priority) as client:
            while not self._over.is_set():
                texts = [
                    f"{app}, question {at // 3}: " + "and so on " * 30 for at in range(streams)
                ]
                for stream in [client.generate(text, max_tokens=200) for text in texts]:
                    with stream:
                        for _ in stream:
                            if self._over.is_set():
                                break


def ready(page: Page) -> None:
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("canvas[data-tier=gpu]")).to_be_visible()


def pixels(page: Page) -> str:
    return str(page.evaluate("document.querySelector('canvas[data-tier=gpu]').toDataURL()"))


def replied(page: Page) -> None:
    """Until the last reply is whole."""
    expect(page.locator("#log li[aria-busy]")).to_have_count(0)
    expect(page.locator("#log li").last.locator("small")).to_contain_text("first token after")


# ------------------------------------------------------------------------------------------ loading


def test_it_loads_without_a_complaint_and_asks_nobody_but_the_gateway(
    browser: Browser, address: str
) -> None:
    with visit(browser, address) as seen:
        ready(seen.page)
        expect(seen.page.locator("#facts")).to_contain_text("simulated")
        expect(seen.page.locator("#apps")).to_contain_text("http")
        with seen.page.expect_request(lambda request: request.url.endswith("/pagedd/state")):
            pass  # it looks again by itself


def test_what_somebody_slips_in_neither_runs_nor_reaches_anybody(
    browser: Browser, address: str
) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        refused = page.evaluate(
            """async () => {
                const refused = [];
                addEventListener("securitypolicyviolation",
                    event => refused.push(event.effectiveDirective));
                const tries = [
                    () => document.body.setAttribute("onclick", "window.slipped = 1"),
                    () => document.body.append(Object.assign(document.createElement("script"),
                        {textContent: "window.slipped = 1"})),
                    () => { document.body.innerHTML += "<p>slipped</p>"; },
                    () => fetch("http://127.0.0.2:9/"),
                ];
                for (const one of tries) { try { await one(); } catch { /* refused at once */ } }
                document.body.click();
                await new Promise(done => setTimeout(done));
                return refused;
            }"""
        )
        assert {"require-trusted-types-for", "connect-src"} <= set(refused)
        assert page.evaluate("window.slipped ?? null") is None


def test_light_and_dark_follow_the_system(page: Page) -> None:
    ready(page)
    shades = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shades[scheme] = page.evaluate(
            "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"
        )
    assert max(shades["dark"]) < 64 < 192 < min(shades["light"])


def test_it_fits_a_phone(browser: Browser, address: str) -> None:
    with visit(browser, address, PHONE) as seen:
        ready(seen.page)
        wide, room = seen.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= room == PHONE["width"]
        for name in ("#say", "#send", "canvas[data-tier=gpu]"):
            box = seen.page.locator(name).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= room


def test_nothing_moves_for_those_who_asked_for_that(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    moving = "document.getAnimations().filter(one => one.playState === 'running').length"
    page.evaluate("document.getElementById('state').dataset.state = 'loading'")
    assert page.evaluate(moving) == 0


# --------------------------------------------------------------------------------------- the pool


def test_the_pool_moves_under_load(daemon: RunningDaemon, page: Page) -> None:
    ready(page)
    canvas, before = page.locator("canvas[data-tier=gpu]"), pixels(page)
    with Load(daemon, "editor", "interactive", 3), Load(daemon, "batch", "background", 6):
        for words in ("interactive", "background", "shared"):
            expect(canvas).to_have_attribute("aria-label", re.compile(words))
        expect(page.locator("#apps")).to_contain_text("editor")
        expect(page.locator("#rate")).to_have_text(re.compile(r"[1-9]"))
        assert pixels(page) != before
    expect(canvas).to_have_attribute("aria-label", re.compile("^((?!interactive).)*$"))


# --------------------------------------------------------------------------------------- the chat


def test_a_chat_streams(page: Page) -> None:
    ready(page)
    page.evaluate(
        "window.pieces = 0; new MutationObserver(all => { window.pieces += all.length; })"
        ".observe(document.getElementById('log'), {characterData: true, subtree: true})"
    )
    page.fill("#say", "hello")
    page.click("#send")
    replied(page)
    assert len(page.locator("#log li p").nth(1).inner_text()) > 8
    assert page.evaluate("window.pieces") > 1
    expect(page.locator("#log li").last.locator("small")).to_contain_text("tokens")


def test_what_is_said_is_text_and_never_markup(page: Page) -> None:
    ready(page)
    page.fill("#say", "<img src=x id=slipped> <b>bold</b>")
    page.keyboard.press("Enter")
    replied(page)
    assert page.locator("#log #slipped, #log p b").count() == 0
    expect(page.locator("#log li p").first).to_have_text("<img src=x id=slipped> <b>bold</b>")


def test_the_keyboard_reaches_the_chat_and_sends(page: Page) -> None:
    ready(page)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.type("from the keyboard")
    page.keyboard.press("Enter")
    replied(page)
    expect(page.locator("#log li p").first).to_have_text("from the keyboard")
    page.keyboard.press("Tab")
    expect(page.locator("#model")).to_be_focused()


def test_escape_stops_a_reply(browser: Browser, address: str) -> None:
    with visit(browser, address) as seen:
        page = seen.page
        ready(page)
        # A reply that does not end by itself.
        page.route("**/v1/chat/completions", lambda route: None)
        page.fill("#say", "go on for ever")
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#stop")).to_be_hidden()
        expect(page.locator("#log li").last).to_contain_text("stopped")
        page.unroute_all(behavior="ignoreErrors")


# ----------------------------------------------------------------------------- keys, and no daemon


@pytest.fixture
def serve() -> Iterator[Callable[[Settings], str]]:
    """Serves a gateway with settings of its own from a thread of this process."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(settings: Settings) -> str:
        config = uvicorn.Config(create_app(settings), port=0, log_level="error", lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def refusals_told(seen: Visit) -> None:
    """Browsers write every refused request on the console."""
    told = [one for one in seen.complaints if "Failed to load resource" in one]
    seen.complaints[:] = [one for one in seen.complaints if one not in told]


def test_where_keys_are_set_it_asks_for_one(
    browser: Browser, daemon: RunningDaemon, serve: Callable[[Settings], str]
) -> None:
    def key_of(key: str) -> App | None:
        return App("mine") if key == KEY else None

    with visit(
        browser, serve(Settings(daemon=daemon.host, key_of=key_of, key_required=True))
    ) as seen:
        page = seen.page
        expect(page.locator("#ask")).to_be_visible()
        expect(page.locator("#state")).to_have_text("locked")
        page.fill("#key", "pagedd-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#ask-wrong")).to_be_visible()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        ready(page)
        expect(page.locator("#apps")).to_contain_text("mine")
        refusals_told(seen)


def test_a_daemon_that_is_away_is_said_and_found_again(
    browser: Browser, daemon: RunningDaemon, serve: Callable[[Settings], str], tmp_path: Path
) -> None:
    path = tmp_path / "d"
    with visit(browser, serve(Settings(daemon=f"unix://{path}/pagedd.sock"))) as seen:
        expect(seen.page.locator("#state")).to_have_text("away")
        expect(seen.page.locator("#notes")).not_to_be_empty()
        path.symlink_to(daemon.socket_dir)
        ready(seen.page)
        refusals_told(seen)


# ------------------------------------------------------------------------------------- the picture


def test_the_picture_of_the_documentation_can_be_taken(
    browser: Browser,
    daemon: RunningDaemon,
    address: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.png"
    with contextlib.ExitStack() as stack:
        if os.environ.get(WRITE_PICTURE):
            path, model = PICTURE, str(request.getfixturevalue("smollm2_path"))
            daemon = stack.enter_context(running_daemon(model, kv_tokens=8192))
            address = stack.enter_context(running_gateway(daemon)).address
        page = stack.enter_context(visit(browser, address)).page
        ready(page)
        stack.enter_context(Load(daemon, "editor", "interactive", 2))
        stack.enter_context(Load(daemon, "summaries", "background", 4))
        page.fill("#say", "Why does a computer have caches?")
        page.click("#send")
        expect(page.locator("#log li p").nth(1)).to_have_text(re.compile(r"\S+"))
        for app in ("editor", "summaries"):
            expect(page.locator("#apps")).to_contain_text(app)
        if path == PICTURE:  # some time for the curves, and for the reply
            page.wait_for_timeout(20_000)
        picture = page.screenshot(path=path)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 400_000
