"""Chromium without a window, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

WAIT_MS = 30_000
"""For whatever another process does."""
DESK = ViewportSize(width=1280, height=940)
PHONE = ViewportSize(width=375, height=812)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's own Chromium; skips where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    # Root's own sandbox is refused, and a container's /dev/shm may be too small for a page.
    options = ["--disable-dev-shm-usage", "--disable-background-networking"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield browser
        finally:
            browser.close()


@dataclass(frozen=True, slots=True)
class Visit:
    """A page that is open, and what must not happen on it."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings on its console, and exceptions of its script."""
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def visit(browser: Browser, address: str, size: ViewportSize = DESK) -> Iterator[Visit]:
    """A visit in a profile of its own; at its end nothing was complained about, and nobody but the
    gateway was asked for anything."""
    with browser.new_context(viewport=size) as context:
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        seen = Visit(page)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on(
            "console",
            lambda said: (
                seen.complaints.append(said.text) if said.type in ("error", "warning") else None
            ),
        )
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(address)
        yield seen
        assert seen.complaints == []
        strangers = {url for url in seen.requests if urlsplit(url).scheme != "data"}
        assert {urlsplit(url).netloc for url in strangers} == {urlsplit(address).netloc}
