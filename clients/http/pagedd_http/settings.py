"""What a gateway is told when it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_PORT = 11500

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names under which a page of this machine, and no other, reaches a gateway on loopback."""


@dataclass(frozen=True, slots=True)
class App:
    """Whom a request is served for: the daemon schedules and accounts by this."""

    name: str
    priority: str = "normal"


def _no_app(key: str) -> App | None:
    return None


@dataclass(frozen=True, slots=True)
class Settings:
    """How a gateway serves."""

    daemon: str | None = None
    """``unix:///…`` of the daemon; None: ``PAGEDD_HOST`` or the default socket."""
    host_names: frozenset[str] = LOOPBACK_NAMES
    """Names that ``Host`` may have, without port. Any other is refused: a page that resolves its
    own name to 127.0.0.1 (DNS rebinding) still says its own name here."""
    key_of: Callable[[str], App | None] = _no_app
    """The app an API key stands for, None for a key that is unknown or revoked."""
    key_prefix: str = "pagedd-"
    """What our keys begin with. Other things that clients send as one count as none: most have to
    send something."""
    key_required: bool = False
    """A request without a key is refused."""
    app_header: str = "x-pagedd-app"
    """Header in which a client without a key names its app."""
    priority_header: str = "x-pagedd-priority"
    """Header in which a client says what it asks for; the app's settings cap it."""
    app: App = App("http")
    """Whom requests are for that say nothing, and whose process is not known."""
    body_bytes: int = 8 << 20
    """A longer body is refused; the daemon's own frames are as long at most."""
    timeout_s: float = 600.0
    """The longest wait for the daemon's next word on a request: a long prompt may queue for
    minutes, and a client that loses patience hangs up."""
    load_wait_s: float = 20.0
    """A request that has waited this long while a model loads is answered with 503: some clients
    give up after 30 s, and without being told to ask again."""
