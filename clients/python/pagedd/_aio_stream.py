"""The chunks of one request, awaited as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING

from pagedd._core import Call
from pagedd._errors import PageddError
from pagedd._hub import Hub
from pagedd._stream_state import StreamState
from pagedd._types import Chunk, Completion
from pagedd._unanswered import stalled

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncStream(StreamState):
    """`Stream` for asyncio: iterate with ``async for``, or await `wait` or `text`."""

    def __init__(self, hub: Hub, call: Call, timeout: float) -> None:
        super().__init__(call, timeout)
        self._hub = hub

    async def wait(self) -> Completion:
        """Read to the end."""
        async for _ in self:
            pass
        return self.result

    async def text(self) -> str:
        """Read to the end; the text of the first sample."""
        return (await self.wait()).text

    def cancel(self) -> None:
        """Ask the daemon to end it; reading goes on to the end, reason ``cancelled``."""
        self._hub.cancel(self._call, abandon=False)

    def close(self) -> None:
        """Cancel it if it is not over, and read no more of it."""
        if self._call.wanted:
            self._hub.cancel(self._call, abandon=True)
        if self._assembly.completion is None and self._error is None:
            self._error = PageddError("the stream was closed before its end")

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._assembly.completion is not None:
                raise StopAsyncIteration
            try:
                if not self._call.events:
                    await self._await_event()
                self._chunks.extend(self._assembly.take(self._call.take()))
            except PageddError as error:
                self._error = error
                raise
        return self._chunks.popleft()

    async def _await_event(self) -> None:
        half = self._timeout / 2
        if await self._hub.wait(self._call, half):
            return
        self._hub.again(self._call)  # as in Stream
        if not await self._hub.wait(self._call, half):
            self._hub.cancel(self._call, abandon=True)
            raise stalled(self._call, self._timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._call.wanted:
            self._hub.orphan(self._call)
