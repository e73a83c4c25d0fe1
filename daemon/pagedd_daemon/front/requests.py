"""What a client may ask: one frozen model per verb of docs/protocol.md, section 4.

Models are made by `pagedd_daemon.front.wire` alone, from maps whose ``null`` fields are already
left out. They are strict (no coercion but int to float) and know every limit of section 7: the
`Limits` to apply come as validation context.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationInfo,
    model_validator,
)

from pagedd_daemon.front.fields import (
    MAX_COUNT,
    AppName,
    GrammarText,
    KeepAlive,
    LogitBias,
    Messages,
    Name,
    RequestId,
    Samples,
    SomeMessages,
    SomeTokens,
    Stops,
    StopTokenIds,
    TemplateArgs,
    Text,
    Tokens,
    Tools,
)
from pagedd_daemon.front.methods import Logprobs, Methods, check
from pagedd_daemon.front.refusals import at_most, wrong

_GRAMMARS = ("json_schema", "regex", "grammar")


class Request(BaseModel):
    """What every request has."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        # "model" is a field of the protocol; nothing of ours starts with "model_".
        protected_namespaces=(),
    )

    verb: ClassVar[str]

    id: RequestId


class Hello(Request):
    """Opens a connection."""

    verb = "hello"

    app: AppName
    priority: Annotated[str, Field(pattern=r"^(interactive|normal|background)$")] = "normal"
    client: Annotated[str, Field(max_length=64)] = ""


class Generation(Methods, Request):
    """What all verbs that generate share."""

    model: Name | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 256
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    ignore_eos: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.8
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 40
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    typical_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-10, le=10)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-10, le=10)] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    stop: Stops = Field(default_factory=list)
    stop_token_ids: StopTokenIds = Field(default_factory=list)
    logprobs: Logprobs | None = None
    json_schema: GrammarText | None = None
    regex: GrammarText | None = None
    grammar: GrammarText | None = None
    keep_alive: KeepAlive | None = None
    """Seconds, ``inf`` for ever, None: the daemon's."""
    deadline_ms: Annotated[int, Field(ge=1, le=2**53)] | None = None
    after: Annotated[int, Field(ge=-1)] = -1

    @model_validator(mode="after")
    def _one_grammar(self) -> Generation:
        given = [name for name in _GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise wrong("at most one of json_schema, regex and grammar may be given", given[1])
        if given and (self.ignore_eos or self.min_tokens):
            field = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise wrong("contradicts a grammar, which says where the text ends", field)
        check(self)
        return self

    def constraint(self) -> tuple[str, str]:
        """Kind and text of the grammar that the output has to match; both empty: none."""
        for name in _GRAMMARS:
            text = getattr(self, name)
            if text is not None:
                return name, text
        return "", ""

    def sampling(self) -> dict[str, Any]:
        """Fields of `pagedd_daemon.params.SamplingParams`.

        Draws a seed where the client gave none, so call it once per request.
        """
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": secrets.randbits(63) if self.seed is None else self.seed,
            "logit_bias": dict(self.logit_bias),
            "logprobs": self._asked_logprobs(),
        }

    def _asked_logprobs(self) -> int:
        if self.logprobs is None:
            return 0 if self.chooses else -1  # the best are found by them
        return self.logprobs

    def stopping(self) -> dict[str, Any]:
        """Fields of `pagedd_daemon.params.StopParams`."""
        return {
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "stop_token_ids": tuple(self.stop_token_ids),
        }


class Generate(Generation):
    """Continues a text or token ids."""

    verb = "generate"

    prompt: Text | None = None
    tokens: SomeTokens | None = None
    n: Samples = 1
    echo: bool = False
    prompt_logprobs: Logprobs | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Generate:
        if (self.prompt is None) == (self.tokens is None):
            raise wrong("exactly one of prompt and tokens must be given", "prompt")
        return self

    def told_of_prompt(self) -> int:
        """As `pagedd_daemon.messages.Submit.prompt_logprobs`."""
        if self.prompt_logprobs is not None:
            return self.prompt_logprobs
        return self.logprobs if self.echo and self.logprobs is not None else -1


class Chat(Generation):
    """Answers a conversation the client keeps."""

    verb = "chat"

    messages: SomeMessages
    tools: Tools = Field(default_factory=list)
    template_args: TemplateArgs = Field(default_factory=dict)
    n: Samples = 1


class SessionOpen(Request):
    """Opens a conversation the daemon keeps."""

    verb = "session.open"

    system: str | None = None
    tools: Tools = Field(default_factory=list)
    template_args: TemplateArgs = Field(default_factory=dict)
    messages: Messages = Field(default_factory=list)
    ttl: Annotated[KeepAlive, Field(gt=0)] | None = None
    """Seconds without a use after which it ends, ``inf`` for never, None: the daemon's."""


class SessionSay(Generation):
    """The next turn of a session; always one sample."""

    verb = "session.say"

    n: ClassVar[int] = 1

    session: Name
    content: str
    role: Annotated[str, Field(min_length=1, max_length=64)] = "user"
    commit: bool = True
    """The reply counts as soon as it has ended well, and not only once it is committed."""


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
