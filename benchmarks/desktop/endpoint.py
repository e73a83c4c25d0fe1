"""What an app of the desktop mix needs of a server, and the daemon seen that way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import pagedd

WAIT_S = 600.0
"""An event that takes longer is a failure of the measurement."""


class AskError(Exception):
    """A request failed, or ended before its length."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request that ended well."""

    prompt: int
    cached: int
    generated: int


class Endpoint(Protocol):
    """One app's way to a server.

    Both iterate over the number of tokens in each piece as it comes, then the `Usage`; leaving off
    cancels the request. Either raises `AskError` where the reply is not as long as it was to be.
    """

    def complete(self, text: str, tokens: int) -> AsyncIterator[int | Usage]:
        """Continue a text by ``tokens`` tokens."""

    def talk(self, text: str, tokens: int) -> AsyncIterator[int | Usage]:
        """The next turn of the app's one conversation."""

    async def close(self) -> None:
        """Disconnect."""


class Pagedd:
    """The daemon, through its own client."""

    def __init__(self, client: pagedd.AsyncClient) -> None:
        self._client = client
        self._session: pagedd.AsyncSession | None = None

    @classmethod
    async def connect(cls, host: str, app: str, klass: str) -> Pagedd:
        """A connection under the name of ``app``, which asks for the class ``klass``."""
        return cls(await pagedd.aconnect(app, klass, host=host, timeout=WAIT_S))

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()

    async def complete(self, text: str, tokens: int) -> AsyncIterator[int | Usage]:
        """See `Endpoint`."""
        stream = self._client.generate(text, max_tokens=tokens, temperature=0, ignore_eos=True)
        async for said in _read(stream, tokens):
            yield said

    async def talk(self, text: str, tokens: int) -> AsyncIterator[int | Usage]:
        """See `Endpoint`."""
        if self._session is None:
            self._session = await self._client.session()
        stream = self._session.say(text, max_tokens=tokens, temperature=0, ignore_eos=True)
        async for said in _read(stream, tokens):
            yield said


async def _read(stream: pagedd.AsyncStream, tokens: int) -> AsyncIterator[int | Usage]:
    try:
        async with stream:
            async for chunk in stream:
                if chunk.tokens:
                    yield len(chunk.tokens)
    except pagedd.PageddError as error:
        raise AskError(f"{error.code}: {error}") from error
    result = stream.result
    if len(result.samples[0].tokens) < tokens:
        generated = len(result.samples[0].tokens)
        raise AskError(f"cut off after {generated} of {tokens} ({result.samples[0].reason})")
    usage = result.usage
    yield Usage(usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens)
