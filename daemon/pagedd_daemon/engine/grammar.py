"""Matchers of constrained samples: compiled on threads of their own, applied before a draw."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor

from pagedd_daemon.backends.base import Capabilities
from pagedd_daemon.front.detokenizer import unpack_ids
from pagedd_daemon.grammars import GrammarError, compile_grammar, make_tokenizer
from pagedd_daemon.messages import Configure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from pagedd_daemon.engine.work import Request

_PATIENCE_S = 0.002
"""That steps wait for a new grammar, once: most are compiled in 0.2 ms, some in 2, and who misses a
step waits for all of it."""
_LEAST_TOGETHER = 4
"""Masks from which on threads compute them: handing them out takes 50 µs."""
_MOST_THREADS = 4
"""That compile: at batch 32 of short texts, each with a grammar of its own, three or four come with
each step, and one after the other they take longer than `_PATIENCE_S`."""
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
        self.write(self._words)
        return self._words

    def write(self, words: npt.NDArray[np.int32]) -> None:
        """The same, into ``words``, which is contiguous."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            words.fill(0)

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


def write_words(matchers: Sequence[Matcher], words: npt.NDArray[np.int32]) -> None:
    """`Matcher.words` of each of ``matchers``, a row each, several at a time.

    Most take 10 µs and one in a hundred 800 (a vocabulary of 128,256): one after the other, 32 of
    them are half of what the host has to do for a step.

    Args:
        matchers: No two of them the same.
        words: ``(len(matchers), ceil(vocab / 32))``, contiguous.
    """
    if len(matchers) < _LEAST_TOGETHER:
        for matcher, row in zip(matchers, words, strict=True):
            matcher.write(row)
        return
    rows = [(matcher._matcher, at) for at, matcher in enumerate(matchers)]
    _executor().unsafe_compute_mask_ptr(rows, words.ctypes.data, words[0].nbytes, len(words))
    for matcher, row in zip(matchers, words, strict=True):
        if matcher._matcher.is_error():
            row.fill(0)


@functools.cache
def _executor() -> LLExecutor:
    """llguidance's threads, made when they are first needed."""
    return LLExecutor()


class Grammars:
    """Compiles the grammars of requests that wait for it, begun in order of arrival.

    The threads let go of the interpreter lock while llguidance works, so steps go on.
    """

    def __init__(self, configure: Configure, capabilities: Capabilities) -> None:
        """Nothing is built before the first grammar."""
        self._configure = configure
        self._caps = capabilities
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        """Over the two above, which the threads share."""
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: list[tuple[Request, Future[Matcher]]] = []
        self._fresh: list[Future[Matcher]] = []
        """Of these, those that no step has waited for."""

    def add(self, request: Request, kind: str, text: str) -> None:
        """Compile for ``request``; `compiled` hands it out again."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_threads(), "grammars")
        future = self._threads.submit(self._compile, kind, text)
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
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _compile(self, kind: str, text: str) -> Matcher:
        with self._lock:
            tokenizer = self._tokenizer = self._tokenizer or self._make_tokenizer()
            made = self._kept.pop((kind, text), None)
            if made is not None:
                self._kept[kind, text] = made
        if made is None:
            made = compile_grammar(tokenizer, kind, text)
            with self._lock:
                self._kept[kind, text] = made
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return Matcher(made.deep_copy(), self._caps.vocab_size)

    def _make_tokenizer(self) -> LLTokenizer:
        caps = self._caps
        lengths = unpack_ids(self._configure.piece_lengths)
        if not lengths:
            raise GrammarError("the model has no tokeniser")
        return make_tokenizer(
            lengths, self._configure.pieces, caps.vocab_size, sorted(caps.eog_tokens)
        )


def _threads() -> int:
    """Threads that compile: on few cores one, since what computes needs them more."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 4))
