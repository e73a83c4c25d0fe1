"""The chunks of one request, read as they come."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from pagedd._core import Call
from pagedd._errors import PageddError
from pagedd._pump import Pump
from pagedd._stream_state import StreamState
from pagedd._types import Chunk, Completion
from pagedd._unanswered import stalled

if TYPE_CHECKING:
    from typing_extensions import Self


class Stream(StreamState):
    """The chunks of one request, as they come; made by `Client.generate` and its like.

    Iterate over it, or call `wait` or `text`. Leaving it early as a context manager, or dropping
    it, cancels the request.
    """

    def __init__(self, pump: Pump, call: Call, timeout: float) -> None:
        super().__init__(call, timeout)
        self._pump = pump

    def wait(self) -> Completion:
        """Read to the end."""
        for _ in self:
            pass
        return self.result

    def text(self) -> str:
        """Read to the end; the text of the first sample."""
        return self.wait().text

    def cancel(self) -> None:
        """Ask the daemon to end it. Does not wait: reading goes on, and the stream ends with
        reason ``cancelled`` unless it was over before."""
        self._pump.cancel(self._call, abandon=False)

    def close(self) -> None:
        """Cancel it if it is not over, and read no more of it."""
        if self._call.wanted:
            self._pump.cancel(self._call, abandon=True)
        if self._assembly.completion is None and self._error is None:
            self._error = PageddError("the stream was closed before its end")

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._assembly.completion is not None:
                raise StopIteration
            try:
                if not self._call.events:
                    self._await_event()
                self._chunks.extend(self._assembly.take(self._call.take()))
            except PageddError as error:
                self._error = error
                raise
        return self._chunks.popleft()

    def _await_event(self) -> None:
        half = self._timeout / 2
        if self._pump.wait(self._call, half):
            return
        # A lost last event leaves no gap behind that would show it: ask once. (One that only
        # takes long is not disturbed.)
        self._pump.again(self._call)
        if not self._pump.wait(self._call, half):
            self._pump.cancel(self._call, abandon=True)
            raise stalled(self._call, self._timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._call.wanted:
            self._pump.orphan(self._call)
