"""Bodies of OpenAI's requests. Fields that a local model has no use for are taken and ignored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from pagedd import GenerateOptions
from pagedd_http.chatting import Conversation
from pagedd_http.errors import ApiError
from pagedd_http.tools import Function

TO_THE_END = 2**31 - 1
"""``max_tokens`` of a chat that names none: up to the model's context, where the daemon cuts it."""

LENIENT = {"x-guidance": {"whitespace_flexible": False, "lenient": True}}
"""Put into a schema that is not ``strict``: what cannot be enforced of it is left out."""

COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that names none, by the API reference."""


class OpenAIBody(BaseModel):
    """Base of all bodies: wrong types are refused, unknown fields ignored."""

    model_config = ConfigDict(
        extra="ignore", strict=True, protected_namespaces=(), allow_inf_nan=False
    )


class StreamOptions(OpenAIBody):
    """``stream_options``."""

    include_usage: bool = False


class Generation(OpenAIBody):
    """What both kinds of completion share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # What other local servers take beside OpenAI's own.
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    keep_alive: float | str | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> GenerateOptions:
        """As the daemon's protocol has them; what was left out has the daemon's default.

        Raises:
            ApiError: A token id in ``logit_bias`` is none.
        """
        options: dict[str, Any] = {
            "model": self.model,
            "n": self.n,
            "stop": self.stop,
            "temperature": self.temperature,
            # 0 leaves the likeliest token only, as any tiny value does; the daemon takes no 0.
            "top_p": max(self.top_p, 1e-6) if self.top_p is not None else None,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "keep_alive": self.keep_alive,
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            # Clients draw seeds of any sign; the daemon's are not negative.
            "seed": None if self.seed is None else self.seed % 2**63,
            "logit_bias": _token_ids(self.logit_bias) if self.logit_bias else None,
        }
        return _given(options)


class CompletionBody(Generation):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]] = "<|endoftext|>"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several.

        Raises:
            ApiError: There is none, or a field that no model here can do.
        """
        if self.suffix:
            raise ApiError(400, "suffix: the model cannot fill in the middle", param="suffix")
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not prompt or not all(prompt):
            raise ApiError(400, "prompt: it is empty", param="prompt")
        return list(prompt)

    def completion_options(self) -> GenerateOptions:
        """`options` and the fields of completions."""
        options = self.options()
        options["max_tokens"] = self.max_tokens or COMPLETION_TOKENS
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
        if self.best_of is not None:
            options["best_of"] = self.best_of
        if self.echo:
            options["echo"] = True
        return options


class JsonSchema(OpenAIBody):
    """``response_format.json_schema``."""

    name: str = "response"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(OpenAIBody):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class FunctionSpec(OpenAIBody):
    """A function the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def plain(self) -> Function:
        """Without OpenAI's wrapping."""
        return Function(self.name, self.description or "", self.parameters or {})


class Tool(OpenAIBody):
    """One of ``tools``."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(OpenAIBody):
    """The function of a named ``tool_choice``."""

    name: str


class NamedTool(OpenAIBody):
    """``tool_choice`` that names a function."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def conversation(self) -> Conversation:
        """What the model is to answer.

        Raises:
            ApiError: A message, a schema or the choice of a tool is wrong.
        """
        options = self.options()
        options["max_tokens"] = self.max_completion_tokens or self.max_tokens or TO_THE_END
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        schema = self._schema()
        if schema is not None:
            options["json_schema"] = schema
        functions = tuple(tool.function.plain() for tool in self.tools or ())
        required = self.tool_choice == "required"
        if self.tool_choice == "none":
            functions = ()
        elif isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            functions = tuple(f for f in functions if f.name == name)
            required = True
            if not functions:
                raise ApiError(400, f"tool_choice: no tool is called {name!r}", param="tool_choice")
        if required and not functions:
            raise ApiError(400, "tool_choice: there are no tools", param="tool_choice")
        return Conversation(
            messages=messages_of(self.messages),
            options=options,
            functions=functions,
            required=required,
            parallel=self.parallel_tool_calls is not False,
            template_args=self.chat_template_kwargs or {},
        )

    def _schema(self) -> Mapping[str, Any] | None:
        """The schema the text has to match."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "object"}
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            param = "response_format.json_schema"
            raise ApiError(400, f"{param}: it has no schema", param=param)
        schema = wanted.json_schema.schema_
        return schema if wanted.json_schema.strict else {**schema, **LENIENT}


class TextFormat(OpenAIBody):
    """``text.format`` of a response: a ``response_format`` whose schema is not nested."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(OpenAIBody):
    """``text`` of a response."""

    format: TextFormat = Field(default_factory=TextFormat)


class ResponsesBody(OpenAIBody):
    """``POST /v1/responses``."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    tools: list[dict[str, Any]] | None = None
    previous_response_id: str | None = None

    def conversation(self) -> Conversation:
        """What the model is to answer.

        Raises:
            ApiError: It needs what is not there, or an input is none.
        """
        if self.previous_response_id:
            what = "previous_response_id: responses are not stored, send the whole input"
            raise ApiError(400, what, code="unsupported", param="previous_response_id")
        if self.tools:
            what = "tools: /v1/chat/completions has them"
            raise ApiError(400, what, code="unsupported", param="tools")
        items = (
            [{"role": "user", "content": self.input}]
            if isinstance(self.input, str)
            else [_input(item, f"input.{at}") for at, item in enumerate(self.input)]
        )
        if self.instructions:
            items = [{"role": "system", "content": self.instructions}, *items]
        chat = ChatBody(
            model=self.model,
            messages=items,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            response_format=self._response_format(),
        )
        return chat.conversation()

    def format_told(self) -> dict[str, Any]:
        """The format as a response repeats it."""
        return (self.text or TextOptions()).format.model_dump(by_alias=True, exclude_none=True)

    def _response_format(self) -> ResponseFormat | None:
        if self.text is None:
            return None
        wanted = self.text.format
        nested = JsonSchema.model_validate({"schema": wanted.schema_, "strict": wanted.strict})
        return ResponseFormat(type=wanted.type, json_schema=nested)


def _input(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    if item.get("type", "message") != "message":
        kind = item["type"]
        raise ApiError(
            400, f"{where}: {kind!r} is no message", code="unsupported_content", param=where
        )
    return {key: item[key] for key in ("role", "content") if key in item}


def messages_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as chat templates know it.

    Text parts become text, ``developer`` becomes ``system``, and the arguments of earlier tool
    calls, which OpenAI sends as text, become the objects that templates expect.

    Raises:
        ApiError: A message has no role, or holds what a text model cannot read.
    """
    return [_message(message, f"messages.{at}") for at, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ApiError(400, f"{where}.role: it is missing", param=f"{where}.role")
    plain = {key: value for key, value in message.items() if value is not None}
    plain["role"] = "system" if role == "developer" else role
    plain["content"] = _text(message.get("content"), f"{where}.content")
    calls = message.get("tool_calls")
    if calls:
        plain["tool_calls"] = [_call(call, f"{where}.tool_calls") for call in _list(calls, where)]
    return plain


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in _list(content, where):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if kind not in ("text", "refusal", "input_text", "output_text"):
            raise ApiError(
                400,
                f"{where}: the model reads text only, not {kind!r}",
                code="unsupported_content",
                param=where,
            )
        if not isinstance(text, str):
            raise ApiError(400, f"{where}: a text part without text", param=where)
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: a call without its function", param=where)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        # What is no JSON a model once wrote so, and should see again.
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ApiError(400, f"{where}: it is neither text nor a list", param=where)
    return value


def _token_ids(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise ApiError(
            400, f"logit_bias: its keys are token ids: {error}", param="logit_bias"
        ) from error


def _given(options: Mapping[str, Any]) -> GenerateOptions:
    given = {name: value for name, value in options.items() if value is not None}
    return cast(GenerateOptions, given)
