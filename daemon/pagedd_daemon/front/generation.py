"""What a client may ask of the verbs that generate; see `pagedd_daemon.front.requests`."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from pagedd_daemon.front.fields import (
    MAX_COUNT,
    GrammarText,
    KeepAlive,
    LogitBias,
    Name,
    RequestId,
    Samples,
    SomeMessages,
    SomeTokens,
    Stops,
    StopTokenIds,
    TemplateArgs,
    Text,
    Tools,
)
from pagedd_daemon.front.methods import Logprobs, Methods, check
from pagedd_daemon.front.refusals import wrong

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


class SessionSay(Generation):
    """The next turn of a session; always one sample."""

    verb = "session.say"

    n: ClassVar[int] = 1

    session: Name
    content: str
    role: Annotated[str, Field(min_length=1, max_length=64)] = "user"
    commit: bool = True
    """The reply counts as soon as it has ended well, and not only once it is committed."""
