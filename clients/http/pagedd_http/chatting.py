"""Conversations with tools and schemas, whichever interface they come from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

from pagedd import (
    AsyncClient,
    AsyncStream,
    Completion,
    GenerateOptions,
    InvalidRequest,
    Sample,
    TokenLogprob,
)
from pagedd_http.tools import (
    FALLBACK,
    PROBE_TOOLS,
    Call,
    Form,
    Function,
    Reader,
    grammar,
    probes,
    read_form,
    spelled_out,
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model is to answer."""

    messages: Sequence[Mapping[str, Any]]
    """As chat templates know them; arguments of earlier calls are objects."""
    options: GenerateOptions
    functions: tuple[Function, ...] = ()
    """Those the model may call."""
    required: bool = False
    """It has to call one."""
    parallel: bool = True
    """It may call several at once."""
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one sample."""

    index: int
    text: str
    calls: tuple[Call, ...] = ()
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Forms:
    """How the templates of models write calls, found out once for each model."""

    def __init__(self) -> None:
        self._known: dict[str, Form] = {}

    async def of(self, client: AsyncClient, model: str | None) -> Form:
        """The form of a model; None: of the loaded one.

        Raises:
            PageddError: The daemon cannot say.
        """
        asked, answered, called = probes()
        first = await client.render(asked, tools=PROBE_TOOLS, model=model)
        form = self._known.get(first.model)
        if form is None:
            try:
                rest = [
                    (await client.render(one, tools=PROBE_TOOLS, model=first.model)).text
                    for one in (answered, called)
                ]
                form = read_form(first.text, *rest)
            except InvalidRequest:
                form = FALLBACK  # a template may refuse what it does not know
            self._known[first.model] = form
        return form


class Reply:
    """The model's next message, piece by piece. Use it in ``async with``."""

    def __init__(self, stream: AsyncStream, form: Form | None) -> None:
        self._stream = stream
        self._form = form
        self._readers: dict[int, Reader] = {}
        self._called: set[int] = set()

    @property
    def model(self) -> str:
        """Which answers; known from the first piece on."""
        return self._stream.model or ""

    @property
    def prompt_tokens(self) -> int | None:
        """Length of the prompt; known from the first piece on."""
        return self._stream.prompt_tokens

    @property
    def result(self) -> Completion:
        """The whole, once it is over. Texts have calls in them as the model wrote them."""
        return self._stream.result

    def called(self, sample: Sample) -> bool:
        """Whether this sample has calls of functions."""
        return sample.index in self._called

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for chunk in self._stream:
            text, calls = chunk.text, list[Call]()
            if self._form is not None:
                reader = self._readers.setdefault(chunk.index, Reader(self._form))
                text, calls = reader.feed(text)
                if calls:
                    self._called.add(chunk.index)
            yield Piece(chunk.index, text, tuple(calls), chunk.tokens, chunk.logprobs or ())
        for index, reader in self._readers.items():
            rest = reader.finish()
            if rest:
                yield Piece(index, rest)

    async def __aenter__(self) -> Reply:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()


async def answer(client: AsyncClient, forms: Forms, conversation: Conversation) -> Reply:
    """Have the model answer.

    Raises:
        PageddError: The daemon cannot.
    """
    options = dict(conversation.options)
    functions = conversation.functions
    form, messages, tools = await _read(client, forms, conversation)
    if form is not None:
        schema = options.pop("json_schema", None)
        options["grammar"] = grammar(
            form,
            functions,
            required=conversation.required,
            parallel=conversation.parallel,
            answer=schema if isinstance(schema, Mapping) else None,
        )
    stream = client.chat(
        messages,
        tools=tools,
        template_args=conversation.template_args or None,
        **cast(GenerateOptions, options),
    )
    return Reply(stream, form)


async def count(client: AsyncClient, forms: Forms, conversation: Conversation) -> int:
    """How many tokens the model would read of it.

    Raises:
        PageddError: The daemon cannot say.
    """
    _, messages, tools = await _read(client, forms, conversation)
    rendered = await client.render(
        messages,
        tools=tools,
        template_args=conversation.template_args or None,
        model=conversation.options.get("model"),
    )
    return len(rendered.tokens)


async def _read(
    client: AsyncClient, forms: Forms, conversation: Conversation
) -> tuple[Form | None, Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """How calls are written, if there may be any, and messages and tools for the template."""
    functions = conversation.functions
    if not functions:
        return None, conversation.messages, None
    form = await forms.of(client, conversation.options.get("model"))
    if form.own:
        return form, conversation.messages, [function.described() for function in functions]
    return form, spelled_out(conversation.messages, functions), None
