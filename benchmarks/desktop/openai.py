"""A client of any server that speaks OpenAI's HTTP API: what the desktop mix asks of one, no more.

Plain HTTP/1.1 and server-sent events over asyncio; a request that is dropped closes its connection,
which is how such servers are told of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from benchmarks.desktop.endpoint import AskError, Usage


class OpenAI:
    """One app's connection to a server, and its conversation."""

    def __init__(
        self, url: str, model: str | None = "default", headers: Mapping[str, str] | None = None
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = parts.path.rstrip("/")
        self._model = model
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._messages: list[dict[str, str]] = []

    async def close(self) -> None:
        """Nothing stays open between requests."""

    async def complete(self, text: str, tokens: int) -> AsyncIterator[int | Usage]:
        """Continue ``text``; see `benchmarks.desktop.endpoint.Endpoint`."""
        async for said in self._stream("/v1/completions", {"prompt": text}, tokens):
            yield said if isinstance(said, Usage) else 1

    async def talk(self, text: str, tokens: int) -> AsyncIterator[int | Usage]:
        """The next turn of the app's conversation; see `benchmarks.desktop.endpoint.Endpoint`."""
        messages = [*self._messages, {"role": "user", "content": text}]
        reply: list[str] = []
        async for said in self._stream("/v1/chat/completions", {"messages": messages}, tokens):
            if isinstance(said, str):
                reply.append(said)
            yield said if isinstance(said, Usage) else 1
        self._messages = [*messages, {"role": "assistant", "content": "".join(reply)}]

    async def _stream(
        self, path: str, fields: dict[str, Any], tokens: int
    ) -> AsyncIterator[str | Usage]:
        """The text of each event, then the usage."""
        body = {
            **fields,
            "model": self._model,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        reason = ""
        usage: dict[str, Any] = {}
        async for event in self._events(path, body):
            if "error" in event:
                raise AskError(str(event["error"].get("message", event["error"])))
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                said = choice.get("text") or choice.get("delta", {}).get("content") or ""
                if said:
                    yield said
        generated = int(usage.get("completion_tokens", 0))
        if reason != "length" or generated < tokens:
            raise AskError(f"cut off after {generated} of {tokens} tokens ({reason or 'no end'})")
        details = usage.get("prompt_tokens_details") or {}
        cached = int(details.get("cached_tokens", 0))
        yield Usage(int(usage.get("prompt_tokens", 0)), cached, generated)

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            data = json.dumps(body).encode()
            head = (
                f"POST {self._path}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
                f"Accept: text/event-stream\r\n{self._headers}Connection: close\r\n\r\n"
            )
            writer.write(head.encode() + data)
            await writer.drain()
            async for line in _lines(reader):
                if line.startswith("data:") and (told := line[5:].strip()) != "[DONE]":
                    yield json.loads(told)
                elif line.startswith("error:"):
                    yield {"error": json.loads(line[6:])}
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise AskError(f"{type(error).__name__}: {error}") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of a response's body (RFC 9112: whole, or in chunks).

    Raises:
        AskError: The server answered with another status than 200.
    """
    status = (await reader.readline()).decode("latin-1")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    if status.split(" ")[1:2] != ["200"]:
        raise AskError(f"{status.strip()}: {(await reader.read(2000)).decode(errors='replace')}")
    if headers.get("transfer-encoding") != "chunked":
        async for plain in reader:
            yield plain.decode().rstrip("\r\n")
        return
    rest = b""
    while size := int(await reader.readline() or b"0", 16):
        rest += await reader.readexactly(size)
        await reader.readline()
        *whole, rest = rest.split(b"\n")
        for complete in whole:
            yield complete.decode().rstrip("\r")
