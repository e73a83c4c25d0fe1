"""What a client may ask: one frozen model per verb of docs/protocol.md, section 4.

Models are made by `pagedd_daemon.front.wire` alone, from maps whose ``null`` fields are already
left out. They are strict (no coercion but int to float) and know every limit of section 7: the
`Limits` to apply come as validation context. Those that generate are in
`pagedd_daemon.front.generation`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    FailFast,
    Field,
    ValidationInfo,
    model_validator,
)

from pagedd_daemon.front.fields import (
    AppName,
    KeepAlive,
    Messages,
    Name,
    RequestId,
    SomeMessages,
    SomeTokens,
    TemplateArgs,
    Text,
    Tokens,
    Tools,
)
from pagedd_daemon.front.generation import Chat, Generate, Generation, Request, SessionSay
from pagedd_daemon.front.refusals import at_most, wrong

__all__ = [
    "AppsList",
    "AppsSet",
    "AppsShow",
    "Bye",
    "CacheClear",
    "CacheShow",
    "Cancel",
    "Chat",
    "ControlRequest",
    "DataRequest",
    "Detokenize",
    "Embed",
    "Generate",
    "Generation",
    "Hello",
    "Load",
    "Metrics",
    "Models",
    "Ping",
    "Reload",
    "Render",
    "Request",
    "SessionClose",
    "SessionCommit",
    "SessionFork",
    "SessionOpen",
    "SessionPin",
    "SessionRequest",
    "SessionSay",
    "Shutdown",
    "Stats",
    "Status",
    "Tokenize",
    "Unload",
]


class Hello(Request):
    """Opens a connection."""

    verb = "hello"

    app: AppName
    priority: Annotated[str, Field(pattern=r"^(interactive|normal|background)$")] = "normal"
    client: Annotated[str, Field(max_length=64)] = ""


class SessionOpen(Request):
    """Opens a conversation the daemon keeps."""

    verb = "session.open"

    system: str | None = None
    tools: Tools = Field(default_factory=list)
    template_args: TemplateArgs = Field(default_factory=dict)
    messages: Messages = Field(default_factory=list)
    ttl: Annotated[KeepAlive, Field(gt=0)] | None = None
    """Seconds without a use after which it ends, ``inf`` for never, None: the daemon's."""


class SessionFork(Request):
    """A second session with the same history."""

    verb = "session.fork"

    session: Name


class SessionCommit(Request):
    """Lets the last reply count that does not yet: it was cut short, or said not to."""

    verb = "session.commit"

    session: Name


class SessionPin(Request):
    """Whether the session's KV stays while nobody speaks; null asks how it is."""

    verb = "session.pin"

    session: Name
    pinned: bool | None = None


class SessionClose(Request):
    """Ends a session."""

    verb = "session.close"

    session: Name


class Tokenize(Request):
    """Text to token ids."""

    verb = "tokenize"

    model: Name | None = None
    text: str
    special: bool = False
    bos: bool = True


def _inputs(value: list[Any], info: ValidationInfo) -> list[Any]:
    if not value:
        raise wrong("is empty")
    at_most("embed_inputs", len(value), info)
    return value


class Embed(Request):
    """Texts to vectors."""

    verb = "embed"

    model: Name | None = None
    texts: Annotated[list[Text], FailFast(), AfterValidator(_inputs)] = Field(default_factory=list)
    tokens: Annotated[list[SomeTokens], FailFast(), AfterValidator(_inputs)] = Field(
        default_factory=list
    )
    normalize: bool = True
    keep_alive: KeepAlive | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Embed:
        if bool(self.texts) == bool(self.tokens):
            raise wrong("exactly one of texts and tokens must be given", "texts")
        return self


class Detokenize(Request):
    """Token ids to text."""

    verb = "detokenize"

    model: Name | None = None
    tokens: Tokens
    pieces: bool = False
    """Say the bytes of each token, too."""


class Render(Request):
    """A conversation as the model would read it, without generating."""

    verb = "render"

    model: Name | None = None
    messages: SomeMessages
    tools: Tools = Field(default_factory=list)
    template_args: TemplateArgs = Field(default_factory=dict)


class Models(Request):
    """Lists the models."""

    verb = "models"


class Load(Request):
    """Loads a model."""

    verb = "load"

    model: Name | None = None
    keep_alive: KeepAlive | None = None


class Unload(Request):
    """Unloads the model."""

    verb = "unload"


class Bye(Request):
    """Ends the connection."""

    verb = "bye"


class Cancel(Request):
    """Ends requests: one by the connection's token, or those of an app, or all of the user."""

    verb = "cancel"

    token: Annotated[bytes, Field(min_length=16, max_length=16)] | None = None
    target: RequestId | None = None
    app: AppName | None = None
    all: bool = False

    @model_validator(mode="after")
    def _one_scope(self) -> Cancel:
        if (self.token is not None) + (self.app is not None) + self.all != 1:
            raise wrong("exactly one of token, app and all must be given", "token")
        if self.token is not None and self.target is None:
            raise wrong("must be given with token", "target")
        return self


class Status(Request):
    """How the daemon is."""

    verb = "status"


class Stats(Request):
    """Counters since start."""

    verb = "stats"

    blocks: bool = False


class Ping(Request):
    """Whether the daemon makes progress."""

    verb = "ping"


class Metrics(Request):
    """Figures in Prometheus' text format."""

    verb = "metrics"


class AppsList(Request):
    """Which apps have settings, or are connected."""

    verb = "apps.list"


class AppsShow(Request):
    """The settings of one app."""

    verb = "apps.show"

    app: AppName


class AppsSet(Request):
    """Changes settings of one app; null takes one away."""

    verb = "apps.set"

    app: AppName
    settings: Annotated[
        dict[str, str | int | float | bool | None], Field(min_length=1, max_length=64)
    ]


class CacheShow(Request):
    """How much of each user is kept on disk from one run to the next."""

    verb = "cache.show"


class CacheClear(Request):
    """Has everybody forget what is kept there of the asking user."""

    verb = "cache.clear"


class Reload(Request):
    """Reads the configuration file again."""

    verb = "reload"


class Shutdown(Request):
    """Ends the daemon."""

    verb = "shutdown"

    drain: bool = True


SessionRequest = SessionOpen | SessionFork | SessionCommit | SessionPin | SessionClose
"""Those that are answered at once."""

DataRequest = (
    Generate
    | Chat
    | SessionOpen
    | SessionSay
    | SessionFork
    | SessionCommit
    | SessionPin
    | SessionClose
    | Embed
    | Tokenize
    | Detokenize
    | Render
    | Models
    | Load
    | Unload
)
"""What the service answers on the data socket; the transport itself answers `Hello` and `Bye`."""

ControlRequest = (
    Cancel
    | Status
    | Stats
    | Metrics
    | Ping
    | AppsList
    | AppsShow
    | AppsSet
    | CacheShow
    | CacheClear
    | Reload
    | Shutdown
)
