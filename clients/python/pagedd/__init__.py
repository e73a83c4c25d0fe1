"""Talk to the pagedd daemon: several apps, one model, nobody's work lost.

::

    import pagedd

    with pagedd.connect(app="my-editor", priority="interactive") as llm:
        for chunk in llm.generate("def fib(n):", max_tokens=64):
            print(chunk.text, end="")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagedd._control import Control
from pagedd._errors import (
    AccessDenied,
    Busy,
    ConnectionFailed,
    DaemonNotRunning,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    HelperFailed,
    InternalError,
    InvalidRequest,
    ModelError,
    NothingToCommit,
    PageddError,
    Poison,
    PromptTooLong,
    ProtocolViolation,
    RequestError,
    RequestTimeout,
    SessionExpired,
    SessionLost,
    UnknownSession,
)
from pagedd._stream import Stream
from pagedd._sync import Client, Session
from pagedd._types import (
    Chunk,
    Completion,
    Embeddings,
    Prompt,
    RenderedChat,
    Sample,
    ServerInfo,
    SessionKV,
    SessionSummary,
    Timings,
    TokenLogprob,
    Usage,
)
from pagedd._verbs import DEFAULT_TIMEOUT_S, GenerateOptions
from pagedd._version import __version__

if TYPE_CHECKING:
    from pagedd._aio import AsyncClient, AsyncSession
    from pagedd._aio_stream import AsyncStream

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "Busy",
    "Chunk",
    "Client",
    "Completion",
    "ConnectionFailed",
    "Control",
    "DaemonNotRunning",
    "DeadlineExceeded",
    "Draining",
    "Embeddings",
    "EngineFailed",
    "GenerateOptions",
    "HelperFailed",
    "InternalError",
    "InvalidRequest",
    "ModelError",
    "NothingToCommit",
    "PageddError",
    "Poison",
    "Prompt",
    "PromptTooLong",
    "ProtocolViolation",
    "RenderedChat",
    "RequestError",
    "RequestTimeout",
    "Sample",
    "ServerInfo",
    "Session",
    "SessionExpired",
    "SessionKV",
    "SessionLost",
    "SessionSummary",
    "Stream",
    "Timings",
    "TokenLogprob",
    "UnknownSession",
    "Usage",
    "__version__",
    "aconnect",
    "connect",
    "control",
]

_ASYNC = frozenset({"AsyncClient", "AsyncSession", "AsyncStream"})


def connect(
    app: str = "python",
    priority: str = "normal",
    *,
    host: str | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> Client:
    """Connect an app to the daemon.

    Args:
        app: What the person sees in ``pagedd ps``: 1 to 64 of ``A-Z a-z 0-9 . _ -``.
        priority: ``interactive``, ``normal`` or ``background``: what the app asks for.
        host: ``unix:///path/to/pagedd.sock``; None: ``PAGEDD_HOST``, or the default socket.
        timeout: Seconds; the deadline of every call that does not bring its own.

    Raises:
        DaemonNotRunning: Nothing listens on the socket.
        AccessDenied: The daemon does not admit this user.
        RequestTimeout: The daemon did not answer in time.
    """
    return Client(app, priority, host=host, timeout=timeout)


def aconnect(
    app: str = "python",
    priority: str = "normal",
    *,
    host: str | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
) -> AsyncClient:
    """`connect` for asyncio: ``async with pagedd.aconnect(…) as llm``, or ``await`` it."""
    from pagedd._aio import AsyncClient

    return AsyncClient(app, priority, host=host, timeout=timeout)


def control(*, host: str | None = None, timeout: float = DEFAULT_TIMEOUT_S) -> Control:
    """Ask the daemon for its status and the like without being an app. Arguments as `connect`."""
    return Control(host=host, timeout=timeout)


def __getattr__(name: str) -> Any:
    # asyncio takes as long to import as everything else here together.
    if name in _ASYNC:
        from pagedd import _aio

        return getattr(_aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
