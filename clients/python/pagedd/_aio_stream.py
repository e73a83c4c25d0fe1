"""The chunks of one request, awaited as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING

from pagedd._core import Assembly, Call
from pagedd._errors import PageddError
from pagedd._hub import Hub
from pagedd._types import (
    Chunk,
    Completion,
    Prompt,
)
from pagedd._unanswered import stalled

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncStream:
    """`Stream` for asyncio: iterate with ``async for``, or await `wait` or `text`."""

    def __init__(self, hub: Hub, call: Call, timeout: float) -> None:
        self._hub = hub
        self._call = call
        self._timeout = timeout
        self._assembly = Assembly()
        self._chunks: deque[Chunk] = deque()
        self._error: PageddError | None = None

    @property
    def request_id(self) -> str:
        """Names the request for `AsyncClient.cancel`."""
        return self._call.id

    @property
    def prompt_tokens(self) -> int | None:
        """Length of the prompt; None until the daemon has accepted it."""
        return self._assembly.prompt_tokens

    @property
    def prompt(self) -> Prompt | None:
        """The prompt as the model got it, with ``echo`` or ``prompt_logprobs``: all of it from the
        first chunk on."""
        return self._assembly.prompt

    @property
    def model(self) -> str | None:
        """The model that serves it; None until the daemon has accepted the request."""
        return self._assembly.model

    @property
    def seed(self) -> int | None:
        """What the draws are keyed by; None until the daemon has accepted the request."""
        return self._assembly.seed

    @property
    def result(self) -> Completion:
        """The finished request.

        Raises:
            PageddError: The stream is not over, or why it failed.
        """
        return self._assembly.finished(self._error)

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
