"""What one may ask of the daemon without being an app."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagedd._core import result_of
from pagedd._paths import CONTROL_SOCKET, resolve_host
from pagedd._pump import Pump
from pagedd._unanswered import unanswered, was_closed
from pagedd._verbs import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from typing_extensions import Self


class Control:
    """The control verbs: what one may ask without being an app. Never loads or wakes a model.

    Raises:
        DaemonNotRunning: Nothing listens on the socket.
        AccessDenied: The daemon does not admit this user.
        RequestTimeout: No answer within ``timeout`` seconds; every method has one.
    """

    def __init__(self, *, host: str | None = None, timeout: float = DEFAULT_TIMEOUT_S) -> None:
        data = resolve_host(host)
        self._timeout = timeout
        self._pump = Pump(None, data.parent / CONTROL_SOCKET)

    def ping(self, *, timeout: float | None = None) -> dict[str, Any]:
        """``pid, uptime_s, state, steps``; steps that stand still under load: a stuck engine."""
        return self._ask("ping", {}, timeout, control=True)

    def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """What the daemon does now; docs/protocol.md, section 8, has the fields."""
        return self._ask("status", {}, timeout, control=True)

    def stats(self, *, blocks: bool = False, timeout: float | None = None) -> dict[str, Any]:
        """Counters since the daemon started; with ``blocks`` also what each block of the pool is
        doing (docs/protocol.md, section 8)."""
        return self._ask("stats", {"blocks": True} if blocks else {}, timeout, control=True)

    def cancel_requests(
        self,
        *,
        app: str | None = None,
        target: str | None = None,
        timeout: float | None = None,
    ) -> bool:
        """Cancel requests of this user's apps: of one app or (None) of all, one request or all.

        Returns:
            Whether there was any.
        """
        fields = {"app": app, "all": True if app is None else None, "target": target}
        return bool(self._ask("cancel", fields, timeout, control=True)["cancelled"])

    def apps(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """Apps that have settings or are connected; each as `app` has it."""
        return list(self._ask("apps.list", {}, timeout, control=True)["apps"])

    def app(self, name: str, *, timeout: float | None = None) -> dict[str, Any]:
        """``app, known, settings, connected``: what holds for an app, and who is connected as it.

        ``known`` is whether it has settings of its own; ``settings`` are those of unknown apps
        else.
        """
        return self._ask("apps.show", {"app": name}, timeout, control=True)

    def set_app(
        self,
        name: str,
        settings: Mapping[str, str | float | None],
        *,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Change settings of an app, in ``config.toml`` and at once; None takes one away.

        Returns:
            As `app`.

        Raises:
            RequestError: ``E_CONFIG``: a setting is wrong, or the file; every mistake is named.
                ``E_FORBIDDEN``: the caller is not the daemon's own user.
        """
        fields = {"app": name, "settings": dict(settings)}
        return self._ask("apps.set", fields, timeout, control=True)

    def cache(self, *, timeout: float | None = None) -> dict[int, int] | None:
        """Tokens that are kept on disk from one run of the daemon to the next, by user: of the
        asking one, or, for who administers the daemon, of all. None while no model is loaded.

        Raises:
            RequestError: ``E_CONFIG``: nothing is kept.
        """
        users = self._ask("cache.show", {}, timeout, control=True)["users"]
        return None if users is None else {row["uid"]: row["tokens"] for row in users}

    def clear_cache(self, *, timeout: float | None = None) -> None:
        """Have nobody find what is kept of the asking user, from now on. It is erased when a model
        is next loaded.

        Raises:
            RequestError: ``E_CONFIG``: nothing is kept.
        """
        self._ask("cache.clear", {}, timeout, control=True)

    def metrics(self, *, timeout: float | None = None) -> str:
        """The daemon's figures in Prometheus' text format."""
        return str(self._ask("metrics", {}, timeout, control=True)["text"])

    def reload(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Have the daemon read its configuration file again.

        Returns:
            ``applied``, ``next_load`` and ``restart``: the settings that changed, by when their
            change holds.

        Raises:
            RequestError: ``E_CONFIG``: the file is wrong, and nothing has changed. ``E_FORBIDDEN``:
                the caller is not the daemon's own user.
        """
        return self._ask("reload", {}, timeout, control=True)

    def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Ask the daemon to exit, with ``drain`` once its streams have ended. Does not wait."""
        self._ask("shutdown", {"drain": drain}, timeout, control=True)

    def close(self) -> None:
        """Give the sockets back. Calls that wait in other threads fail. May be called twice."""
        self._pump.close(was_closed())

    def _ask(
        self,
        verb: str,
        fields: Mapping[str, Any],
        timeout: float | None,
        *,
        control: bool = False,
        cancels: bool = False,
    ) -> dict[str, Any]:
        """One request with one result; with ``cancels`` the daemon hears that nobody waits."""
        seconds = self._timeout if timeout is None else timeout
        call = self._pump.start(verb, fields, control=control)
        if not self._pump.wait(call, seconds):
            if cancels:
                self._pump.cancel(call, abandon=True)
            else:
                self._pump.forget(call)
            raise unanswered(call, seconds)
        return result_of(call.take())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
