"""Work for requests, at once or in the background: whatever goes wrong in it ends its request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from pagedd_daemon.front.calls import Call
from pagedd_daemon.front.errors import WireError

log = logging.getLogger("pagedd.service")


class Background:
    """See the module. Every call is the event loop's."""

    def __init__(self, fail: Callable[[Call, WireError], None]) -> None:
        """``fail`` ends a request with an error."""
        self._fail = fail
        self.tasks: set[asyncio.Task[None]] = set()
        """What is under way."""

    async def stop(self) -> None:
        """Give up what is under way."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def guard(self, call: Call, work: Callable[[], None]) -> None:
        """Do a piece of work; what goes wrong in it ends the request."""
        try:
            work()
        except WireError as error:
            self._fail(call, error)
        except Exception:
            log.exception("request %s of connection %d", call.id, call.connection.number)
            self._fail(call, WireError("E_INTERNAL", "a defect of the daemon; its log has more"))

    def later(self, call: Call, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` in the background; what goes wrong in it ends the request."""

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            if not task.cancelled():
                self.guard(call, task.result)

        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(done)
