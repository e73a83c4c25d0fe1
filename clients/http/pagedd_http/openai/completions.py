"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagedd import AsyncStream, Chunk, Prompt, TokenLogprob
from pagedd_http.answers import DONE, EventStream, body_of, sse, unless_gone
from pagedd_http.gateway import client_of, gateway_of
from pagedd_http.openai.bodies import CompletionBody
from pagedd_http.openai.logprobs import Logprobs
from pagedd_http.openai.replies import FINISH, Head, error_event, timings_of, usage_of


async def complete(request: Request) -> Response:
    """Continue a text, or several."""
    body = await body_of(request, CompletionBody)
    prompts, options = body.prompts(), body.completion_options()
    client = await client_of(request)
    logprobs = Logprobs(gateway_of(request).pieces, client)
    reply = _Reply(body, [client.generate(prompt, **options) for prompt in prompts], logprobs)
    if body.stream:
        return EventStream(reply.events(), "text/event-stream", error_event)
    return JSONResponse(await unless_gone(request, reply.whole()))


class _Reply:
    """The streams of one request, one for each prompt."""

    def __init__(
        self, body: CompletionBody, streams: Sequence[AsyncStream], logprobs: Logprobs
    ) -> None:
        self._body = body
        self._streams = streams
        self._logprobs = logprobs
        self._samples = body.n or 1
        self._offsets: dict[int, int] = {}
        """Characters that were sent of a choice; its prompt is once something was."""

    async def whole(self) -> dict[str, Any]:
        """The reply at once."""
        with self._closing():
            done = [await stream.wait() for stream in self._streams]
        choices = []
        for at, completion in enumerate(done):
            for sample in completion.samples:
                choice = await self._choice(
                    at, sample.index, sample.text, sample.tokens, sample.logprobs, sample.reason
                )
                choices.append(choice)
        head = Head("text_completion", done[0].model, "cmpl")
        usage = usage_of([completion.usage for completion in done])
        return head.object(choices, usage=usage, timings=timings_of(done[0]))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply piece by piece."""
        more: dict[str, Any] = {"usage": None} if self._body.wants_usage else {}
        head: Head | None = None
        with self._closing():
            async with contextlib.aclosing(merged(self._streams)) as chunks:
                async for at, chunk in chunks:
                    model = self._streams[at].model or ""
                    head = head or Head("text_completion", model, "cmpl")
                    choice = await self._choice(
                        at, chunk.index, chunk.text, chunk.tokens, chunk.logprobs, None
                    )
                    yield sse(head.object([choice], **more))
            done = [stream.result for stream in self._streams]
            head = head or Head("text_completion", done[0].model, "cmpl")
            for at, completion in enumerate(done):
                for sample in completion.samples:
                    choice = await self._choice(at, sample.index, "", (), (), sample.reason)
                    yield sse(head.object([choice], **more))
        if self._body.wants_usage:
            usage = usage_of([completion.usage for completion in done])
            yield sse(head.object([], usage=usage, timings=timings_of(done[0])))
        yield DONE

    async def _choice(
        self,
        at: int,
        sample: int,
        text: str,
        tokens: Sequence[int],
        entries: Sequence[TokenLogprob] | None,
        reason: str | None,
    ) -> dict[str, Any]:
        """What is new of one sample of one prompt, after the prompt itself if that is echoed."""
        index = at * self._samples + sample
        stream = self._streams[at]
        all_tokens, all_entries = list(tokens), list[TokenLogprob | None](entries or ())
        if index not in self._offsets and self._body.echo and stream.prompt is not None:
            prompt: Prompt = stream.prompt
            text = prompt.text + text
            all_tokens = [*prompt.tokens, *all_tokens]
            all_entries = [*(prompt.logprobs or ()), *all_entries]
        offset = self._offsets.setdefault(index, 0)
        told = None
        if self._body.logprobs is not None and all_entries:
            told, self._offsets[index] = await self._logprobs.of_completion(
                stream.model or "", all_tokens, all_entries, offset
            )
        reason = None if reason is None else FINISH[reason]
        return {"text": text, "index": index, "finish_reason": reason, "logprobs": told}

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            for stream in self._streams:
                stream.close()


async def merged(streams: Sequence[AsyncStream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Chunks of several streams as they come, each with the position of its stream.

    Raises:
        PageddError: One of them failed.
    """
    if len(streams) == 1:
        async for chunk in streams[0]:
            yield 0, chunk
        return
    waiting = {asyncio.ensure_future(anext(stream, None)): at for at, stream in enumerate(streams)}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                at = waiting.pop(task)
                found = task.result()
                if found is not None:
                    yield at, found
                    waiting[asyncio.ensure_future(anext(streams[at], None))] = at
    finally:
        for task in waiting:
            task.cancel()


routes = [Route("/v1/completions", complete, methods=["POST"])]
