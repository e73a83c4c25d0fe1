"""What is known of a request whose chunks are read as they come, however they are waited for."""

from __future__ import annotations

from collections import deque

from pagedd._core import Assembly, Call
from pagedd._errors import PageddError
from pagedd._types import Chunk, Completion, Prompt


class StreamState:
    """What `pagedd.Stream` and `pagedd.AsyncStream` tell of their request."""

    def __init__(self, call: Call, timeout: float) -> None:
        self._call = call
        self._timeout = timeout
        self._assembly = Assembly()
        self._chunks: deque[Chunk] = deque()
        self._error: PageddError | None = None

    @property
    def request_id(self) -> str:
        """Names the request for ``cancel``."""
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
            PageddError: The stream is not over (read it to its end, or call `wait`), or why it
                failed.
        """
        return self._assembly.finished(self._error)
