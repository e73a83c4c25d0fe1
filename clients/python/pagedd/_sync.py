"""The synchronous client and its sessions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagedd import _verbs
from pagedd._control import Control
from pagedd._errors import PageddError
from pagedd._paths import CONTROL_SOCKET, resolve_host
from pagedd._pump import Pump
from pagedd._stream import Stream
from pagedd._types import (
    Completion,
    Embeddings,
    RenderedChat,
    ServerInfo,
    SessionKV,
    SessionSummary,
)
from pagedd._unanswered import was_closed
from pagedd._verbs import DEFAULT_TIMEOUT_S, GenerateOptions
from pagedd._version import CLIENT

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

BYE_S = 1.0
"""How long `Client.close` waits for the daemon to have cancelled what was still running."""


class Client(Control):
    """A connection of one app to the daemon; `pagedd.connect` makes it.

    Thread-safe: threads may share a client, and several streams may be open at once, read in any
    order; one stream or session is for one thread at a time. While any thread reads, the events of
    all streams are taken in and wait in memory for their readers. After `os.fork` the child must
    connect anew.

    Every method takes ``timeout`` in seconds (default: the one given to `pagedd.connect`) and
    raises `RequestTimeout` after it; for a stream it is the longest wait for the next event, and at
    least 10 minutes where nothing comes before the end and no timeout is given with the call.
    Answers of the daemon that are errors are raised as `RequestError`.
    """

    def __init__(
        self,
        app: str,
        priority: str = "normal",
        *,
        host: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        data = resolve_host(host)
        self._timeout = timeout
        self._pump = Pump(data, data.parent / CONTROL_SOCKET)
        hello = {"app": app, "priority": priority, "client": CLIENT}
        try:
            self.server: ServerInfo = self._pump.core.opened(self._ask("hello", hello, timeout))
        except BaseException:
            self._pump.close(was_closed())
            raise

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Continue a text or token ids."""
        return self._stream("generate", _verbs.generate(prompt, options), timeout)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """`generate` to its end."""
        with self.generate(prompt, timeout=timeout, **options) as stream:
            return stream.wait()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """The model's next message after ``messages`` (``{"role": …, "content": …}``).

        ``tools`` and ``template_args`` are given to the model's chat template.
        """
        fields = _verbs.chat(messages, tools, template_args, options)
        return self._stream("chat", fields, timeout)

    def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        ttl: float | str | None = None,
        *,
        timeout: float | None = None,
    ) -> Session:
        """Open a conversation that the daemon keeps.

        Args:
            system: The system message.
            tools: Given to the model's chat template, like ``template_args``.
            template_args: Variables of the template.
            messages: A history to start with.
            ttl: Seconds, or a duration like ``"2h"``, without a use after which it ends;
                negative: never. A day by default.
            timeout: Seconds.
        """
        fields = _verbs.session_open(system, tools, template_args, messages, ttl)
        return Session(self, str(self._ask("session.open", fields, timeout)["session"]))

    def embed(
        self,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        model: str | None = None,
        normalize: bool = True,
        keep_alive: float | str | None = None,
        timeout: float | None = None,
    ) -> Embeddings:
        """Vectors of texts or token ids: the mean of the model's last hidden states.

        Args:
            inputs: A text, or texts, or lists of token ids.
            model: Whose vectors; None: those of the loaded one.
            normalize: Give them length 1.
            keep_alive: As for a generation.
            timeout: Seconds.

        Raises:
            InvalidRequest: ``E_NO_EMBEDDING`` where the backend computes none, ``E_FIELD``.
            PromptTooLong: A text is longer than the context.
        """
        fields = _verbs.embed(inputs, model, normalize, keep_alive)
        return _verbs.embeddings(self._ask("embed", fields, timeout, cancels=True))

    def tokenize(
        self,
        text: str,
        *,
        model: str | None = None,
        special: bool = False,
        bos: bool = True,
        timeout: float | None = None,
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: What to tokenise.
            model: Whose tokens; None: those of the loaded one.
            special: Read text like ``<|im_end|>`` as the special token and not as plain text.
            bos: Add the model's start token where the model wants one.
            timeout: Seconds.
        """
        fields = {"model": model, "text": text, "special": special, "bos": bos}
        return list(_verbs.unpack_tokens(self._ask("tokenize", fields, timeout)["tokens"]))

    def detokenize(
        self, tokens: Sequence[int], *, model: str | None = None, timeout: float | None = None
    ) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        fields = {"model": model, "tokens": _verbs.pack_tokens(tokens)}
        return str(self._ask("detokenize", fields, timeout)["text"])

    def pieces(
        self, tokens: Sequence[int], *, model: str | None = None, timeout: float | None = None
    ) -> list[bytes]:
        """The bytes each token stands for; they may be part of a character."""
        fields = {"model": model, "tokens": _verbs.pack_tokens(tokens), "pieces": True}
        return list(self._ask("detokenize", fields, timeout)["pieces"])

    def render(
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
        return _verbs.rendered(self._ask("render", fields, timeout))

    def models(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """The models the daemon finds, loaded or not."""
        return list(self._ask("models", {}, timeout)["models"])

    def load(
        self,
        model: str | None = None,
        keep_alive: float | str | None = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Load a model (None: the configured one); returns when it would serve."""
        fields = {"model": model, "keep_alive": keep_alive}
        return dict(self._ask("load", fields, timeout)["model"])

    def unload(self, *, timeout: float | None = None) -> str | None:
        """Unload the model once its streams have ended; returns its name or None."""
        name = self._ask("unload", {}, timeout)["unloaded"]
        return None if name is None else str(name)

    def cancel(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Cancel a request of this client (`Stream.request_id`); False if it is over already."""
        fields = {"token": self._pump.core.token, "target": request_id}
        return bool(self._ask("cancel", fields, timeout, control=True)["cancelled"])

    def close(self) -> None:
        """End the connection: the daemon cancels its requests and closes its sessions."""
        if self._pump.usable:
            # Gone or stuck, there is nobody to take leave of.
            with contextlib.suppress(PageddError):
                self._ask("bye", {}, min(BYE_S, self._timeout))
        super().close()

    def _stream(self, verb: str, fields: Mapping[str, Any], timeout: float | None) -> Stream:
        seconds = _verbs.patience_s(fields, timeout, self._timeout)
        return Stream(self._pump, self._pump.start(verb, fields), seconds)


class Session:
    """A conversation whose token ids the daemon keeps; `Client.session` opens it.

    A reply is never tokenised again, so its KV is found at the next turn. The session ends with
    its client.
    """

    def __init__(self, client: Client, name: str) -> None:
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
    ) -> Stream:
        """Add a message and stream the model's reply; ``n`` is not possible here.

        One turn at a time. A turn that is cancelled or fails leaves the session as it was, and so
        does one that is not to be committed; `commit` lets the reply count after all.
        """
        fields = _verbs.session_say(self.id, content, role, options, commit=commit)
        return self._client._stream("session.say", fields, timeout)

    def commit(self, *, timeout: float | None = None) -> None:
        """Let the last reply count after all, with the very token ids it has: of a turn that was
        cancelled or failed, as far as it came, or of one said with ``commit=False``.

        Raises:
            NothingToCommit: There is none, or it counts already.
        """
        self._client._ask("session.commit", {"session": self.id}, timeout)

    def pin(self, pinned: bool = True, *, timeout: float | None = None) -> SessionKV:
        """Keep the session's KV in RAM at least while nobody speaks, or (False) no longer.

        It is kept for as long as the model is loaded, and computed again where that is needed. A
        turn that brings all pinned sessions above their limit is kept like any other's: ask `kv`.

        Raises:
            InvalidRequest: ``E_LIMIT``: pinned sessions may not hold that much.
        """
        return self._pin(pinned, timeout)

    def kv(self, *, timeout: float | None = None) -> SessionKV:
        """Whether it is pinned, and how long it is."""
        return self._pin(None, timeout)

    def _pin(self, pinned: bool | None, timeout: float | None) -> SessionKV:
        fields = {"session": self.id, "pinned": pinned}
        result = self._client._ask("session.pin", fields, timeout)
        return SessionKV(result["pinned"], result["tokens"], result["max_tokens"])

    def fork(self, *, timeout: float | None = None) -> Session:
        """A second session with the same history, which shares its KV."""
        result = self._client._ask("session.fork", {"session": self.id}, timeout)
        return Session(self._client, str(result["session"]))

    def close(self, *, timeout: float | None = None) -> SessionSummary:
        """End the session."""
        result = self._client._ask("session.close", {"session": self.id}, timeout)
        return SessionSummary(int(result["turns"]), int(result["rewrites"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except PageddError:
            if kind is None:
                raise
