"""The front's side of the helper processes: tokenising and chat templates, awaited.

What it asks of them is here; which process does it, `pagedd_daemon.front.helper_workers` decides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedd_daemon.front.detokenizer import PieceTable, unpack_ids
from pagedd_daemon.front.helper_process import HelperDiedError, HelperError
from pagedd_daemon.front.helper_workers import HelperWorkers
from pagedd_daemon.helper.protocol import SIMULATED, SIMULATED_IDS, HelperLimits

__all__ = ["ChatPrompt", "HelperError", "HelperLimits", "HelperPool", "ModelText"]


@dataclass(frozen=True, slots=True, eq=False)
class ModelText:
    """What the front needs of a model's vocabulary."""

    source: str
    """Absolute path, ``simulated`` or ``simulated-ids``."""
    digest: bytes
    """32 bytes, of the file."""
    vocab_size: int
    bos: int
    """-1: none."""
    eos: int
    """-1: none."""
    eog: tuple[int, ...]
    """Ids that end a generation."""
    add_bos: bool
    """The model wants its start token in front of a prompt."""
    has_tokenizer: bool
    has_chat_template: bool
    table: PieceTable | None
    """None without a tokeniser."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation."""

    tokens: bytes
    """Packed ids: of the whole text, or of the new part where nothing was rewritten."""
    text: str
    """The whole text."""
    rewritten: bool
    """The text does not begin with the known text, so ``tokens`` are those of all of it."""


class HelperPool:
    """Helper processes behind awaitable calls. All calls from one event loop."""

    def __init__(self, workers: int = 1, limits: HelperLimits | None = None) -> None:
        """A pool; `start` starts it.

        Args:
            workers: Requests it should serve at the same time; one process more is kept ready.
            limits: Of time and memory.
        """
        self._limits = limits or HelperLimits()
        self._workers = HelperWorkers(workers, self._limits)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the helpers that run."""
        return self._workers.pids

    async def start(self) -> None:
        """Start the processes and wait for the first to answer.

        Raises:
            HelperError: None does (``E_HELPER``).
        """
        await self._workers.start()

    async def close(self) -> None:
        """End all processes. Requests that run fail. Idempotent."""
        await self._workers.close()

    async def open(self, source: str | Path) -> ModelText:
        """Check a model file and load its vocabulary, in every process.

        Args:
            source: A file, ``simulated`` or ``simulated-ids``.

        Raises:
            HelperError: ``E_MODEL`` if the file is refused, ``E_HELPER`` if it takes too long.
        """
        name = _absolute(str(source))
        try:
            raw = await self._workers.open(name)
        except HelperDiedError as error:
            raise HelperError(
                "E_MODEL",
                f"{name}: its vocabulary could not be read ({error})",
                {"path": name},
            ) from error
        table = None
        if raw["has_tokenizer"]:
            table = PieceTable.from_wire(
                raw["lengths"], raw["pieces"], space_prefix=raw["space_prefix"]
            )
        return ModelText(
            source=name,
            digest=raw["digest"],
            vocab_size=raw["vocab_size"],
            bos=raw["bos"],
            eos=raw["eos"],
            eog=tuple(unpack_ids(raw["eog"])),
            add_bos=raw["add_bos"],
            has_tokenizer=raw["has_tokenizer"],
            has_chat_template=raw["has_chat_template"],
            table=table,
        )

    async def tokenize(
        self, model: ModelText, text: str, *, special: bool = False, bos: bool = True
    ) -> bytes:
        """Packed ids of a text.

        Args:
            model: From `open`.
            text: Any text.
            special: Spellings of special tokens stand for these tokens.
            bos: Put the model's start token in front, where it wants one.

        Raises:
            HelperError: ``E_NO_TOKENIZER``, ``E_HELPER``, or ``E_MODEL`` if the file has changed.
        """
        ids = await self._request(model, ["tokenize", model.source, text, special, bos])
        assert isinstance(ids, bytes)
        return ids

    async def chat(
        self,
        model: ModelText,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        template_args: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        bos: bool = True,
        known_text: str | None = None,
    ) -> ChatPrompt:
        """Render a conversation with the model's template; see `pagedd_daemon.helper.chat`.

        Args:
            model: From `open`.
            messages: As the client sent them.
            tools: As the client sent them.
            template_args: As the client sent them.
            add_generation_prompt: Begin the model's turn.
            bos: Put the model's start token in front, where it wants one.
            known_text: See `continue_chat`.

        Raises:
            HelperError: ``E_TEMPLATE``, ``E_NO_TOKENIZER``, ``E_HELPER`` or ``E_MODEL``.
        """
        request = [
            "chat",
            model.source,
            list(messages),
            list(tools) if tools else None,
            template_args,
            add_generation_prompt,
            bos,
            known_text,
        ]
        ids, text, rewritten = await self._request(model, request)
        return ChatPrompt(ids, text, rewritten)

    async def continue_chat(
        self,
        model: ModelText,
        messages: Sequence[Any],
        known_text: str,
        *,
        tools: Sequence[Any] | None = None,
        template_args: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        bos: bool = True,
    ) -> ChatPrompt:
        """The next turn of a conversation whose token ids are kept.

        Args:
            model: From `open`.
            messages: The whole conversation.
            known_text: The text of the ids that are kept: that of the last prompt, and the reply.
            tools: As for `chat`.
            template_args: As for `chat`.
            add_generation_prompt: As for `chat`.
            bos: As for `chat`; only where everything is tokenised again.

        Returns:
            The ids that come after the kept ones, or, where ``rewritten``, all ids.

        Raises:
            HelperError: As `chat`.
        """
        return await self.chat(
            model,
            messages,
            tools=tools,
            template_args=template_args,
            add_generation_prompt=add_generation_prompt,
            bos=bos,
            known_text=known_text,
        )

    async def try_grammar(self, model: ModelText, kind: str, text: str) -> None:
        """Compile a grammar and its first mask, to see that it can be done.

        Args:
            model: From `open`.
            kind: One of `pagedd_daemon.grammars.KINDS`.
            text: The grammar.

        Raises:
            HelperError: ``E_GRAMMAR``: it is invalid, or takes too much time or memory.
                ``E_NO_TOKENIZER``, ``E_HELPER`` or ``E_MODEL``.
        """
        if not model.has_tokenizer:
            raise HelperError("E_NO_TOKENIZER", "the model has no tokeniser: send token ids")
        request, limit = ["grammar", model.source, kind, text], self._limits.grammar_s
        try:
            await self._workers.ask(model.source, model.digest, request, limit)
        except HelperDiedError as error:
            why = f"compiling the grammar took too much: {error}"
            raise HelperError("E_GRAMMAR", why) from error
        except HelperError as error:
            if error.code != "E_HELPER" or "seconds" not in error.details:
                raise
            why = f"compiling the grammar took more than {limit:g} s"
            raise HelperError("E_GRAMMAR", why, error.details) from error

    # ------------------------------------------------------------------------------ one request

    async def _request(self, model: ModelText, request: list[Any]) -> Any:
        if not model.has_tokenizer:
            raise HelperError("E_NO_TOKENIZER", "the model has no tokeniser: send token ids")
        try:
            return await self._workers.ask(model.source, model.digest, request)
        except HelperDiedError as error:
            raise HelperError("E_HELPER", f"tokenising or rendering failed: {error}") from error


def _absolute(source: str) -> str:
    return source if source in (SIMULATED, SIMULATED_IDS) else os.path.abspath(source)
