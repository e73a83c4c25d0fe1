"""Bodies of Anthropic's requests. Fields a local model has no use for are taken and ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from pagedd import GenerateOptions
from pagedd_http.chatting import Conversation
from pagedd_http.errors import ApiError
from pagedd_http.tools import Function


class AnthropicBody(BaseModel):
    """Base of all bodies: wrong types are refused, unknown fields ignored."""

    model_config = ConfigDict(
        extra="ignore", strict=True, protected_namespaces=(), allow_inf_nan=False
    )


class Message(AnthropicBody):
    """One of ``messages``."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Tool(AnthropicBody):
    """One of ``tools``; those that Anthropic's own servers run have another type."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(AnthropicBody):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountBody(AnthropicBody):
    """``POST /v1/messages/count_tokens``, and what `MessagesBody` shares with it."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None

    def conversation(self) -> Conversation:
        """What the model is to answer.

        Raises:
            ApiError: It holds what a text model cannot read, or the choice of a tool is wrong.
        """
        choice = self.tool_choice or ToolChoice(type="auto")
        tools = [] if choice.type == "none" else self.tools or []
        if choice.type == "tool":
            tools = [tool for tool in tools if tool.name == choice.name]
        required = choice.type in ("any", "tool")
        if required and not tools:
            raise ApiError(400, "tool_choice: there is no such tool", param="tool_choice")
        return Conversation(
            self._messages(),
            self.options(),
            functions=tuple(
                Function(tool.name, tool.description or "", tool.input_schema) for tool in tools
            ),
            required=required,
            parallel=not choice.disable_parallel_tool_use,
        )

    def options(self) -> GenerateOptions:
        """As the daemon's protocol has them; what was left out has the daemon's default."""
        return {"model": self.model}

    def _messages(self) -> list[dict[str, Any]]:
        """As chat templates know them: calls and their results as messages of their own."""
        plain: list[dict[str, Any]] = []
        if self.system:
            plain.append({"role": "system", "content": _text(self.system, "system")})
        for at, message in enumerate(self.messages):
            plain += _plain(message, f"messages.{at}.content")
        return plain


class MessagesBody(CountBody):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None

    def options(self) -> GenerateOptions:
        """See `CountBody`."""
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            # 0 leaves the likeliest token only, as any tiny value does; the daemon takes no 0.
            "top_p": max(self.top_p, 1e-6) if self.top_p is not None else None,
            "top_k": self.top_k,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return cast(GenerateOptions, given)


def _plain(message: Message, where: str) -> list[dict[str, Any]]:
    """A message as the one or several that templates know."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    plain: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        kind = block.get("type")
        if kind == "tool_use":
            name, arguments = block.get("name"), block.get("input")
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise ApiError(400, f"{where}: a tool_use without name or input", param=where)
            function = {"name": name, "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            answer = _text(block.get("content") or "", where)
            identity = {"tool_call_id": block.get("tool_use_id")}
            plain.append({"role": "tool", "content": answer, **identity})
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(_text([block], where))
    if texts or calls:
        own: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
        plain.append({**own, "tool_calls": calls} if calls else own)
    if not plain:
        raise ApiError(400, f"{where}: it is empty", param=where)
    return plain


def _text(content: Any, where: str) -> str:
    """Text, or the text of blocks.

    Raises:
        ApiError: A block is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: it is neither text nor a list of blocks", param=where)
    texts = []
    for block in content:
        held: Mapping[str, Any] = block if isinstance(block, dict) else {}
        if held.get("type") != "text":
            what = f"{where}: the model reads text only, not {held.get('type')!r}"
            raise ApiError(400, what, code="unsupported_content", param=where)
        if not isinstance(held.get("text"), str):
            raise ApiError(400, f"{where}: a text block without text", param=where)
        texts.append(held["text"])
    return "".join(texts)
