"""Bodies of Ollama's requests. Fields and options that mean nothing here are taken and ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from pagedd import GenerateOptions
from pagedd_http.chatting import Conversation
from pagedd_http.errors import ApiError
from pagedd_http.openai.bodies import LENIENT, Tool

TO_THE_END = 2**31 - 1
"""``max_tokens`` where ``num_predict`` sets no bound: the daemon cuts it at the model's context."""


class OllamaBody(BaseModel):
    """Base of all bodies: wrong types are refused, unknown fields ignored."""

    model_config = ConfigDict(
        extra="ignore", strict=True, protected_namespaces=(), allow_inf_nan=False
    )


class Options(OllamaBody):
    """``options``. The shape of contexts and batches (``num_ctx``, ``num_batch``, ``num_gpu``, …)
    is the daemon's affair, so that two apps with different wishes share one model."""

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


class Named(OllamaBody):
    """A body that names a model; some clients still call the field ``name``."""

    model: str = ""
    name: str = ""

    @property
    def wanted(self) -> str:
        """The model.

        Raises:
            ApiError: None is named.
        """
        wanted = self.model or self.name
        if not wanted:
            raise ApiError(400, "model is required", param="model")
        return wanted


class Work(Named):
    """What generate and chat share."""

    stream: bool | None = None
    """None is true."""
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def template_args(self) -> dict[str, Any]:
        """Variables of the chat template that thinking models read."""
        return {} if self.think is None else {"enable_thinking": bool(self.think)}

    def generate_options(self) -> GenerateOptions:
        """As the daemon's protocol has them; what was left out has the daemon's default."""
        asked = self.options or Options()
        bound = asked.num_predict
        options: dict[str, Any] = {
            "model": self.wanted,
            "max_tokens": bound if bound is not None and bound > 0 else TO_THE_END,
            "temperature": asked.temperature,
            "top_k": asked.top_k,
            # 0 leaves the likeliest token only, as any tiny value does; the daemon takes no 0.
            "top_p": max(asked.top_p, 1e-6) if asked.top_p is not None else None,
            "min_p": asked.min_p,
            "typical_p": asked.typical_p,
            "repetition_penalty": asked.repeat_penalty,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "seed": asked.seed if asked.seed is not None and asked.seed >= 0 else None,
            "stop": asked.stop,
            "json_schema": self._schema(),
            "keep_alive": self.keep_alive,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return cast(GenerateOptions, given)

    def _schema(self) -> Mapping[str, Any] | None:
        """The schema the text has to match."""
        if self.format == "json":
            return {"type": "object"}
        return {**self.format, **LENIENT} if isinstance(self.format, dict) else None


class GenerateBody(Work):
    """``POST /api/generate``."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    template: str | None = None
    suffix: str | None = None
    images: list[str] | None = None
    context: list[int] | None = None

    def check(self) -> None:
        """Refuse what would otherwise be dropped without a word.

        Raises:
            ApiError: A field that cannot be done here.
        """
        for given, field, why in (
            (self.suffix, "suffix", "the model cannot fill in the middle"),
            (self.template, "template", "templates come with the model, never with a request"),
            (self.images, "images", "the model reads text only"),
            (self.context, "context", "replies have none here: use /api/chat, whose KV is kept"),
        ):
            if given:
                raise ApiError(400, f"{field}: {why}", code="unsupported", param=field)

    def conversation(self) -> Conversation:
        """The prompt as the conversation that the model's template makes of it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}]
        return Conversation(messages, self.generate_options(), template_args=self.template_args)


class CalledFunction(OllamaBody):
    """The function of a `ToolCall`."""

    name: str
    arguments: dict[str, Any] = {}


class ToolCall(OllamaBody):
    """A call that the model made earlier."""

    function: CalledFunction


class Message(OllamaBody):
    """One of ``messages``."""

    role: Annotated[str, Field(min_length=1)]
    content: str = ""
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None


class ChatBody(Work):
    """``POST /api/chat``."""

    messages: list[Message] = []
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None

    def conversation(self) -> Conversation:
        """What the model is to answer.

        Raises:
            ApiError: A message holds what a text model cannot read.
        """
        return Conversation(
            [_plain(message, f"messages.{at}") for at, message in enumerate(self.messages)],
            self.generate_options(),
            functions=tuple(tool.function.plain() for tool in self.tools or ()),
            template_args=self.template_args,
        )


def _plain(message: Message, where: str) -> dict[str, Any]:
    if message.images:
        what = f"{where}.images: the model reads text only"
        raise ApiError(400, what, code="unsupported", param=f"{where}.images")
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_name:
        plain["name"] = message.tool_name
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", "function": call.function.model_dump()}
            for call in message.tool_calls
        ]
    return plain
