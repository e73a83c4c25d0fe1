"""The asyncio client: the same core as the synchronous one, and the same methods."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagedd import _verbs
from pagedd._aio_stream import AsyncStream
from pagedd._core import result_of
from pagedd._errors import ConnectionFailed, PageddError
from pagedd._hub import Hub
from pagedd._paths import CONTROL_SOCKET, resolve_host
from pagedd._sync import BYE_S
from pagedd._types import (
    Completion,
    Embeddings,
    RenderedChat,
    ServerInfo,
    SessionKV,
    SessionSummary,
)
from pagedd._unanswered import unanswered, was_closed
from pagedd._verbs import DEFAULT_TIMEOUT_S, GenerateOptions
from pagedd._version import CLIENT

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncClient:
    """`Client` for asyncio; `pagedd.aconnect` makes it. Belongs to the loop it was opened in.

    Tasks may share it and several streams may be open at once; a stream is for one task at a time.
    Cancelling a task that waits does no harm to the client; a stream it reads inside
    ``async with`` is cancelled in the daemon too. Methods, deadlines and errors are `Client`'s.
    """

    server: ServerInfo
    """What the daemon said at the opening."""

    def __init__(
        self,
        app: str,
        priority: str = "normal",
        *,
        host: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._hello = {"app": app, "priority": priority, "client": CLIENT}
        self._path = resolve_host(host)
        self._timeout = timeout
        self._opened: Hub | None = None

    async def open(self) -> Self:
        """Connect; awaiting the client or ``async with`` does this.

        Raises:
            DaemonNotRunning: Nothing listens on the socket.
            AccessDenied: The daemon does not admit this user.
            RequestTimeout: The daemon did not answer in time.
        """
        if self._opened is None:
            self._opened = Hub(self._path, self._path.parent / CONTROL_SOCKET)
            try:
                self.server = self._opened.core.opened(await self._ask("hello", self._hello, None))
            except BaseException:
                self._opened.close(was_closed())
                raise
        return self

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Continue a text or token ids."""
        return self._stream("generate", _verbs.generate(prompt, options), timeout)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """`generate` to its end."""
        async with self.generate(prompt, timeout=timeout, **options) as stream:
            return await stream.wait()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """The model's next message after ``messages``."""
        fields = _verbs.chat(messages, tools, template_args, options)
        return self._stream("chat", fields, timeout)

    async def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        ttl: float | str | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncSession:
        """Open a conversation that the daemon keeps."""
        fields = _verbs.session_open(system, tools, template_args, messages, ttl)
        return AsyncSession(
            self, str((await self._ask("session.open", fields, timeout))["session"])
        )

    async def embed(
        self,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        model: str | None = None,
        normalize: bool = True,
        keep_alive: float | str | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Vectors of texts; arguments as `Client.embed`."""
        fields = _verbs.embed(inputs, model, normalize, keep_alive)
        return _verbs.embeddings(await self._ask("embed", fields, timeout, cancels=True))

    async def tokenize(
        self,
        text: str,
        *,
        model: str | None = None,
        special: bool = False,
        bos: bool = True,
        timeout: float | None = None,
    ) -> list[int]:
        """Token ids of a text; arguments as `Client.tokenize`."""
        fields = {"model": model, "text": text, "special": special, "bos": bos}
        return list(_verbs.unpack_tokens((await self._ask("tokenize", fields, timeout))["tokens"]))

    async def detokenize(
        self, tokens: Sequence[int], *, model: str | None = None, timeout: float | None = None
    ) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        fields = {"model": model, "tokens": _verbs.pack_tokens(tokens)}
        return str((await self._ask("detokenize", fields, timeout))["text"])

    async def pieces(
        self, tokens: Sequence[int], *, model: str | None = None, timeout: float | None = None
    ) -> list[bytes]:
        """The bytes each token stands for; they may be part of a character."""
        fields = {"model": model, "tokens": _verbs.pack_tokens(tokens), "pieces": True}
        return list((await self._ask("detokenize", fields, timeout))["pieces"])

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> RenderedChat:
        """What the model would read for these arguments of `chat`; nothing is generated."""
        options = {} if model is None else {"model": model}
        fields = _verbs.chat(messages, tools, template_args, options)
        return _verbs.rendered(await self._ask("render", fields, timeout))

    async def models(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The models the daemon finds, loaded or not."""
        return list((await self._ask("models", {}, timeout))["models"])

    async def load(
        self,
        model: str | None = None,
        keep_alive: float | str | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Load a model (None: the configured one); returns when it would serve."""
        fields = {"model": model, "keep_alive": keep_alive}
        return dict((await self._ask("load", fields, timeout))["model"])

    async def unload(self, *, timeout: float | None = None) -> str | None:
        """Unload the model once its streams have ended; returns its name or None."""
        name = (await self._ask("unload", {}, timeout))["unloaded"]
        return None if name is None else str(name)

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Cancel a request of this client; False if it is over already."""
        fields = {"token": self._hub.core.token, "target": request_id}
        return bool((await self._ask("cancel", fields, timeout, control=True))["cancelled"])

    async def ping(self, *, timeout: float | None = None) -> dict[str, Any]:
        """``pid, uptime_s, state, steps``."""
        return await self._ask("ping", {}, timeout, control=True)

    async def status(self, *, timeout: float | None = None) -> dict[str, Any]:
        """What the daemon does now; never loads or wakes a model."""
        return await self._ask("status", {}, timeout, control=True)

    async def stats(self, *, blocks: bool = False, timeout: float | None = None) -> dict[str, Any]:
        """Counters since the daemon started; with ``blocks`` also what each block of the pool is
        doing (docs/protocol.md, section 8)."""
        return await self._ask("stats", {"blocks": True} if blocks else {}, timeout, control=True)

    async def apps(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """Apps that have settings or are connected; each as `app` has it."""
        return list((await self._ask("apps.list", {}, timeout, control=True))["apps"])

    async def app(self, name: str, *, timeout: float | None = None) -> dict[str, Any]:
        """``app, known, settings, connected``: what holds for an app."""
        return await self._ask("apps.show", {"app": name}, timeout, control=True)

    async def set_app(
        self,
        name: str,
        settings: Mapping[str, str | float | None],
        *,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Change settings of an app; see `pagedd.Control.set_app`."""
        fields = {"app": name, "settings": dict(settings)}
        return await self._ask("apps.set", fields, timeout, control=True)

    async def cache(self, *, timeout: float | None = None) -> dict[int, int] | None:
        """Tokens that are kept on disk from one run of the daemon to the next, by user: of the
        asking one, or, for who administers the daemon, of all. None while no model is loaded.

        Raises:
            RequestError: ``E_CONFIG``: nothing is kept.
        """
        users = (await self._ask("cache.show", {}, timeout, control=True))["users"]
        return None if users is None else {row["uid"]: row["tokens"] for row in users}

    async def clear_cache(self, *, timeout: float | None = None) -> None:
        """Have nobody find what is kept of the asking user, from now on. It is erased when a model
        is next loaded.

        Raises:
            RequestError: ``E_CONFIG``: nothing is kept.
        """
        await self._ask("cache.clear", {}, timeout, control=True)

    async def metrics(self, *, timeout: float | None = None) -> str:
        """The daemon's figures in Prometheus' text format."""
        return str((await self._ask("metrics", {}, timeout, control=True))["text"])

    async def reload(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Have the configuration file read again; see `pagedd.Control.reload`."""
        return await self._ask("reload", {}, timeout, control=True)

    async def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Ask the daemon to exit, with ``drain`` once its streams have ended."""
        await self._ask("shutdown", {"drain": drain}, timeout, control=True)

    @property
    def usable(self) -> bool:
        """Whether the connection stands; once it is lost, a new client is needed."""
        return self._opened is not None and self._opened.usable

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited."""
        return self._opened is not None and self._opened.core.busy

    async def close(self) -> None:
        """End the connection: the daemon cancels its requests and closes its sessions."""
        if self._opened is None:
            return
        try:
            if self._opened.usable:
                # Gone or stuck, there is nobody to take leave of.
                with contextlib.suppress(PageddError):
                    await self._ask("bye", {}, min(BYE_S, self._timeout))
        finally:
            self._opened.close(was_closed())

    @property
    def _hub(self) -> Hub:
        if self._opened is None:
            raise ConnectionFailed(
                "the client is not connected: await it, or use it in 'async with'", retryable=False
            )
        return self._opened

    async def _ask(
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
        call = self._hub.start(verb, fields, control=control)
        try:
            if not await self._hub.wait(call, seconds):
                raise unanswered(call, seconds)
        except BaseException:
            if cancels:
                self._hub.cancel(call, abandon=True)
            else:
                self._hub.forget(call)
            raise
        return result_of(call.take())

    def _stream(self, verb: str, fields: Mapping[str, Any], timeout: float | None) -> AsyncStream:
        seconds = _verbs.patience_s(fields, timeout, self._timeout)
        return AsyncStream(self._hub, self._hub.start(verb, fields), seconds)

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncSession:
    """`Session` for asyncio; `AsyncClient.session` opens it."""

    def __init__(self, client: AsyncClient, name: str) -> None:
        self._client = client
        self.id = name

    def say(
        self,
        content: str,
        role: str = "user",
        *,
        commit: bool = True,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Add a message and stream the model's reply; one turn at a time."""
        fields = _verbs.session_say(self.id, content, role, options, commit=commit)
        return self._client._stream("session.say", fields, timeout)

    async def commit(self, *, timeout: float | None = None) -> None:
        """See `Session.commit`."""
        await self._client._ask("session.commit", {"session": self.id}, timeout)

    async def pin(self, pinned: bool = True, *, timeout: float | None = None) -> SessionKV:
        """See `Session.pin`."""
        return await self._pin(pinned, timeout)

    async def kv(self, *, timeout: float | None = None) -> SessionKV:
        """Whether it is pinned, and how long it is."""
        return await self._pin(None, timeout)

    async def _pin(self, pinned: bool | None, timeout: float | None) -> SessionKV:
        fields = {"session": self.id, "pinned": pinned}
        result = await self._client._ask("session.pin", fields, timeout)
        return SessionKV(result["pinned"], result["tokens"], result["max_tokens"])

    async def fork(self, *, timeout: float | None = None) -> AsyncSession:
        """A second session with the same history, which shares its KV."""
        result = await self._client._ask("session.fork", {"session": self.id}, timeout)
        return AsyncSession(self._client, str(result["session"]))

    async def close(self, *, timeout: float | None = None) -> SessionSummary:
        """End the session."""
        result = await self._client._ask("session.close", {"session": self.id}, timeout)
        return SessionSummary(int(result["turns"]), int(result["rewrites"]))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except PageddError:
            if kind is None:
                raise
