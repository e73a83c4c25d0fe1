"""Matchers of constrained samples: compiled on a thread of their own, applied before a draw."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.front.detokenizer import unpack_ids
from pagedd_daemon.grammars import GrammarError, compile_grammar, make_tokenizer
from pagedd_daemon.messages import Configure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from pagedd_daemon.engine.work import Request

_PATIENCE_S = 0.001
"""That steps wait for a new grammar, once: most are compiled in 0.2 ms, and who misses a step waits
for all of it."""
_KEPT = 64
"""Compiled grammars that are kept: an app sends the same few again and again."""


class Matcher:
    """Where one sample stands in its grammar."""

    __slots__ = ("_matcher", "_words")

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        """Takes ``matcher`` over."""
        self._matcher = matcher
        self._words = np.zeros(-(-vocab_size // 32), np.int32)

    def mask(self, row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A copy of logits, shape ``(vocab,)``, with -inf for what may not follow.

        A copy since nearly all of a row changes; the caller needs the model's own for the others
        that draw from it. All of it is -inf where the grammar has met a limit (`error`).
        """
        bits = np.unpackbits(self.words().view(np.uint8), count=row.size, bitorder="little")
        return np.where(bits.view(np.bool_), row, np.float32(-np.inf))

    def words(self) -> npt.NDArray[np.int32]:
        """What may follow, a bit for each token: ``(ceil(vocab / 32),)``, lowest bit first, until
        the next call. Nothing may where the grammar has met a limit (`error`)."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            self._words.fill(0)
        return self._words

    def accept(self, token: int) -> None:
        """``token`` was drawn under `mask` and is kept."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why it cannot go on; empty while it can."""
        return self._matcher.get_error().split("<state>")[0].strip()[:300]

    def copy(self) -> Matcher:
        """Another one at the same place."""
        return Matcher(self._matcher.deep_copy(), len(self._words) * 32)


class Grammars:
    """Compiles the grammars of requests that wait for it, in order of arrival.

    The thread lets go of the interpreter lock while llguidance works, so steps go on.
    """

    def __init__(self, configure: Configure, capabilities: Capabilities) -> None:
        """Nothing is built before the first grammar."""
        self._configure = configure
        self._caps = capabilities
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: list[tuple[Request, Future[Matcher]]] = []
        self._fresh: list[Future[Matcher]] = []
        """Of these, those that no step has waited for."""

    def add(self, request: Request, kind: str, text: str) -> None:
        """Compile for ``request``; `compiled` hands it out again."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammars")
        future = self._thread.submit(self._compile, kind, text)
        self._waiting.append((request, future))
        self._fresh.append(future)

    def compiled(self) -> Iterator[tuple[Request, Matcher | GrammarError]]:
        """Requests whose grammar is compiled, or cannot be."""
        if not self._waiting:
            return
        if self._fresh:
            wait(self._fresh, _PATIENCE_S)
            self._fresh.clear()
        ready = [(r, f) for r, f in self._waiting if f.done()]
        self._waiting = [(r, f) for r, f in self._waiting if not f.done()]
        for request, future in ready:
            error = future.exception()
            if error is None:
                yield request, future.result()
            elif isinstance(error, GrammarError):
                yield request, error
            else:
                raise error

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _compile(self, kind: str, text: str) -> Matcher:
        caps = self._caps
        if self._tokenizer is None:
            lengths = unpack_ids(self._configure.piece_lengths)
            if not lengths:
                raise GrammarError("the model has no tokeniser")
            self._tokenizer = make_tokenizer(
                lengths, self._configure.pieces, caps.vocab_size, sorted(caps.eog_tokens)
            )
        made = self._kept.pop((kind, text), None)
        if made is None:
            made = compile_grammar(self._tokenizer, kind, text)
        self._kept[kind, text] = made
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return Matcher(made.deep_copy(), caps.vocab_size)
