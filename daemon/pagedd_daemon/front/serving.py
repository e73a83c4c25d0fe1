"""Which model serves a request, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagedd_daemon.front.access import Access
from pagedd_daemon.front.background import Background
from pagedd_daemon.front.calls import Call
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.model_ports import Entry, Source
from pagedd_daemon.front.models import Lease, Model, Models
from pagedd_daemon.models.registry import looks_like_path


class Serving:
    """Holds models for requests that name them."""

    def __init__(
        self,
        models: Models,
        source: Source,
        access: Access,
        background: Background,
        fail: Callable[[Call, WireError], None],
    ) -> None:
        """``fail`` ends a request with an error."""
        self._models = models
        self._source = source
        self._access = access
        self._background = background
        self._fail = fail

    def hold(
        self,
        call: Call,
        name: str | None,
        use: Callable[[Model], None],
        keep_alive_s: float | None = None,
    ) -> None:
        """Call ``use`` when the model serves; the request holds it until it is over.

        Raises:
            WireError: ``E_NO_MODEL``.
        """
        uid = call.connection.uid
        if self._access.view(uid) is not None:
            keep_alive_s = None  # how long it stays is felt by all
        call.lease = Lease(
            lambda model: self._background.guard(call, lambda: use(model)),
            lambda error: self._fail(call, error),
            keep_alive_s,
        )
        entry = self._models.known(name)
        if entry is not None:
            self._models.acquire(call.lease, entry)
        else:
            assert name is not None
            if looks_like_path(name):
                # What is there, and whether it harms, would be its own user's question to ask.
                self._access.require(uid, "have a file loaded by its path")
            self._background.later(call, self._find_model(call, name))

    async def _find_model(self, call: Call, name: str) -> None:
        entry = await self._source.resolve(name)
        if not call.over:
            assert call.lease is not None
            self._models.acquire(call.lease, entry)

    async def listed(self) -> list[dict[str, Any]]:
        """Every model there is, as the protocol has them."""
        entries = await self._source.list()
        current = self._models.current
        loaded = current.entry.name if current else None
        listed = [described(entry, entry.name == loaded) for entry in entries]
        if current and not any(entry.name == loaded for entry in entries):
            listed.append(described(current.entry, True))  # named by its path, or simulated
        return listed


def described(entry: Entry, loaded: bool) -> dict[str, Any]:
    """A model as the protocol has it."""
    return {**entry.as_map(), "loaded": loaded}
