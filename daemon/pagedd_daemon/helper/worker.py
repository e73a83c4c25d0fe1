"""The helper's loop: one request, one answer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
from llguidance import LLTokenizer

from pagedd_daemon.front.detokenizer import pack_ids
from pagedd_daemon.grammars import GrammarError, compile_grammar, make_tokenizer
from pagedd_daemon.helper.chat import ChatTokenizer
from pagedd_daemon.helper.confine import Budget, confine, watch_lifeline
from pagedd_daemon.helper.protocol import OPENED, SIMULATED, SIMULATED_IDS, HelperLimits
from pagedd_daemon.helper.templates import TemplateRefusedError
from pagedd_daemon.helper.vocabulary import open_vocabulary
from pagedd_daemon.link import FrameReader, frame, values
from pagedd_daemon.models.errors import ModelError
from pagedd_daemon.models.model import ModelHeader, read_model_header

SIMULATED_IDS_VOCABULARY = 1024
_Described = tuple[str, str, dict[str, Any]]
_NO_TOKENIZER = frozenset({None, "no_vocab", "none"})


class NoTokenizerError(Exception):
    """The model has no tokeniser; ``E_NO_TOKENIZER`` on the wire."""


class Worker:
    """Serves requests; holds the vocabularies of the models that were opened."""

    def __init__(self, limits: HelperLimits) -> None:
        self._budget = Budget(limits)
        self._models: dict[str, ChatTokenizer | None] = {}
        self._tokenizers: dict[str, LLTokenizer] = {}
        """For grammars, once there was one."""
        self._operations: dict[str, Callable[..., Any]] = {
            "ping": lambda: None,
            "open": self._open,
            "close": self._close,
            "tokenize": self._tokenize,
            "chat": self._chat,
            "grammar": self._grammar,
        }

    def serve(self, link: socket.socket) -> None:
        """Answer until the other end closes."""
        reader = FrameReader()
        while data := link.recv(2**18):
            for body in reader.feed(data):
                link.sendall(frame(self._answer(body)))

    def _answer(self, body: bytes) -> bytes:
        self._budget.begin()
        try:
            operation, *arguments = values(body)
            result = self._operations[operation](*arguments)
            return bytes(msgpack.packb(["ok", self._budget.spent(), result]))
        except MemoryError:
            error_of: _Described = ("E_HELPER", "tokenising or rendering ran out of memory", {})
            retire = True  # whatever could not be allocated left other things half made
        except (TemplateRefusedError, GrammarError, NoTokenizerError, ModelError) as error:
            error_of = _described(error)
            retire = self._budget.spent()
        return bytes(msgpack.packb(["err", retire, *error_of]))

    def _open(self, source: str) -> dict[str, Any]:
        self._close(source)
        if source == SIMULATED_IDS:
            return self._opened_without_tokenizer(source, None, SIMULATED_IDS_VOCABULARY)
        header = None
        if source != SIMULATED:
            header = read_model_header(Path(source))
            if header.tokenizer in _NO_TOKENIZER:
                return self._opened_without_tokenizer(source, header, header.vocab_size or 0)
            self._budget.allow_model(header.header_bytes)
        vocabulary = open_vocabulary(source, header)
        self._models[source] = ChatTokenizer(vocabulary)
        opened = (
            header.digest if header else _simulated_digest(source),
            vocabulary.size,
            vocabulary.bos,
            vocabulary.eos,
            pack_ids(vocabulary.eog),
            vocabulary.add_bos,
            True,
            vocabulary.template is not None,
            vocabulary.space_prefix,
            pack_ids(vocabulary.piece_lengths),
            vocabulary.pieces,
        )
        return dict(zip(OPENED, opened, strict=True))

    def _opened_without_tokenizer(
        self, source: str, header: ModelHeader | None, vocab_size: int
    ) -> dict[str, Any]:
        self._models[source] = None
        digest = header.digest if header else _simulated_digest(source)
        opened = (digest, vocab_size, -1, -1, b"", False, False, False, False, b"", b"")
        return dict(zip(OPENED, opened, strict=True))

    def _close(self, source: str) -> None:
        self._tokenizers.pop(source, None)
        model = self._models.pop(source, None)
        if model is not None:
            model.vocabulary.close()

    def _model(self, source: str) -> ChatTokenizer:
        model = self._models[source]
        if model is None:
            raise NoTokenizerError("the model has no tokeniser: send token ids")
        return model

    def _tokenize(self, source: str, text: str, special: bool, bos: bool) -> bytes:
        return pack_ids(self._model(source).tokenize(text, special=special, bos=bos))

    def _grammar(self, source: str, kind: str, text: str) -> None:
        vocabulary = self._model(source).vocabulary
        tokenizer = self._tokenizers.get(source)
        if tokenizer is None:
            tokenizer = self._tokenizers[source] = make_tokenizer(
                vocabulary.piece_lengths, vocabulary.pieces, vocabulary.size, vocabulary.eog
            )
        compile_grammar(tokenizer, kind, text)

    def _chat(
        self,
        source: str,
        messages: list[Any],
        tools: list[Any] | None,
        args: dict[str, Any] | None,
        generation: bool,
        bos: bool,
        known: str | None,
    ) -> tuple[bytes, str, bool]:
        ids, text, rewritten = self._model(source).chat(
            messages, tools, args, generation=generation, bos=bos, known=known
        )
        return pack_ids(ids), text, rewritten


def _described(error: Exception) -> _Described:
    if isinstance(error, ModelError):
        return error.code, error.message, error.details
    codes = {TemplateRefusedError: "E_TEMPLATE", GrammarError: "E_GRAMMAR"}
    code = codes.get(type(error), "E_NO_TOKENIZER")
    return code, str(error), {}


def _simulated_digest(source: str) -> bytes:
    return source.encode().ljust(32, b"\0")


def run(fd: int, limits: HelperLimits) -> None:
    """Serve the front over the inherited socket ``fd`` until it closes."""
    link = socket.socket(fileno=fd)
    link.set_inheritable(False)
    confine(limits)
    watch_lifeline(link)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the front is gone
        Worker(limits).serve(link)
