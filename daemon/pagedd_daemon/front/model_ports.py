"""What the model lifecycle needs from outside: time, the text side of models, and engines."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pagedd_daemon.front.detokenizer import PieceTable
from pagedd_daemon.front.engine_link import Engine, EngineListener
from pagedd_daemon.front.errors import RETRYABLE, WireError
from pagedd_daemon.messages import Configure


def wire_error(code: str, message: str, details: Mapping[str, Any]) -> WireError:
    """An error that another of our processes found, for the client."""
    if code not in RETRYABLE:
        code, message = "E_INTERNAL", f"{code}: {message}"
    return WireError(code, message, details=details)


class Timer(Protocol):
    """A call that may still be cancelled."""

    def cancel(self) -> None:
        """Do not call."""
        ...


class Clock(Protocol):
    """Monotonic time and timers; an event loop is one."""

    def time(self) -> float:
        """Seconds."""
        ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call ``callback`` in ``delay`` seconds."""
        ...


class Entry(Protocol):
    """A model by name, loaded or not."""

    @property
    def name(self) -> str:
        """Unique among models."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names."""
        ...

    def as_map(self) -> dict[str, Any]:
        """As ``models`` of docs/protocol.md lists it, but for ``loaded``."""
        ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model's chat template writes it."""

    ids: array[int]
    text: str
    rewritten: bool = False
    """The text does not begin with what was known of it: ``ids`` are those of the whole text."""


class Text(Protocol):
    """The text side of a loaded model. Failures of its methods are `WireError`."""

    @property
    def pieces(self) -> PieceTable | None:
        """Bytes of each token; None where the model has no tokeniser."""
        ...

    async def tokenize(self, text: str, special: bool, bos: bool) -> array[int]:
        """Token ids of a text."""
        ...

    async def try_grammar(self, kind: str, text: str) -> None:
        """Compile a grammar, on trial. Raises ``E_GRAMMAR`` where that fails or takes too much."""
        ...

    async def chat(self, conversation: Conversation, known: str | None = None) -> Rendered:
        """Token ids of a conversation up to where the reply begins.

        With ``known``, the text whose ids the caller has, only ids of what follows it come back,
        unless the template rewrote it.
        """
        ...


class Source(Protocol):
    """Where models, their vocabularies and their engines come from."""

    async def resolve(self, name: str) -> Entry:
        """The model of that name.

        Raises:
            WireError: ``E_MODEL``.
        """
        ...

    async def list(self) -> Sequence[Entry]:
        """Every model there is."""
        ...

    async def open_text(self, entry: Entry) -> Text:
        """Load its vocabulary.

        Raises:
            WireError: It has none that can be read.
        """
        ...

    def configure(self, entry: Entry, text: Text) -> Configure:
        """What its engine is told."""
        ...

    async def spawn(self, listener: EngineListener) -> Engine:
        """Start an engine process. It finds what the one before it left in the RAM tier.

        Raises:
            OSError: It cannot be started.
        """
        ...

    def fall_back(self) -> bool:
        """Engines of this kind die: have the next ones compute in another way. False where there is
        none, or the user wants no other."""
        ...

    def forget(self) -> None:
        """The model is no longer wanted: give the memory of its RAM tier back."""
        ...


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    args: Mapping[str, Any]
