"""Drawing a token from logits, in NumPy, the same for every backend that has logits on the CPU.

Speed is the point of this file: a plain NumPy nucleus sampler costs 1.5 ms per sequence and step,
nearly all of it for sorting a vocabulary of which a few dozen tokens matter. Here only the tokens
that come into question are sorted (`pagedd_daemon.engine.candidates`).

Ties are broken by the lowest id everywhere. Sums are float64.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from kvpager.types import Tokens
from pagedd_daemon.engine.candidates import (
    NEVER,
    Floats,
    Ids,
    Row,
    at_least,
    prefix,
    top_k,
    typical,
)
from pagedd_daemon.engine.penalties import Penalties
from pagedd_daemon.params import SamplingParams, StopParams

if TYPE_CHECKING:
    from pagedd_daemon.engine.grammar import Matcher

_MASK64 = (1 << 64) - 1
_FEW = 256
"""Candidates up to which plain Python is faster than NumPy."""
_FIRST_REACH = 6.0
"""Logits below the largest: of a typical language model a few dozen tokens lie this close."""


@dataclass(slots=True)
class Drawn:
    """A token that was drawn, and what was asked to be known about it.

    Not frozen: that would treble the time to make one.
    """

    token: int
    """-1: the logits of this row are not numbers, or nothing in it may be drawn. Nothing else of
    the step is touched by it; the request it belongs to must end."""
    logprob: float | None = None
    """Natural log of its probability under the model's own distribution."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ids with their log-probabilities, best first."""


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): 64 bits to 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Sampler:
    """How the next token of one sample is drawn: its parameters and what it has generated so far.

    Drawing does not change it: `accept` does, once the scheduler keeps a token. The random number
    of a draw depends only on the seed, the sample's index and how many tokens were accepted, so
    batching, preemption and failover never change it.
    """

    __slots__ = (
        "_bias_ids",
        "_bias_values",
        "_eog_mask",
        "_eog_set",
        "_few",
        "_greedy",
        "_key",
        "_matcher",
        "_penalties",
        "_plain",
        "_reach",
        "_stop_mask",
        "_stop_set",
        "generated",
        "params",
        "stop",
        "vocab_size",
    )

    def __init__(
        self,
        params: SamplingParams,
        stop: StopParams,
        *,
        index: int,
        prompt: Tokens,
        vocab_size: int,
        eog_tokens: frozenset[int],
        matcher: Matcher | None = None,
        resumed: Tokens | tuple[()] = (),
    ) -> None:
        """A sampler that has generated nothing yet, or what another one has.

        Args:
            params: How to draw.
            stop: Which tokens may not be drawn yet.
            index: Number of the sample in its request, part of the key of its random numbers.
            prompt: Token ids, int32, shape ``(n,)``; only the repetition penalty looks at them.
            vocab_size: Logits per row.
            eog_tokens: The model's end-of-generation ids.
            matcher: Where its text stands in the grammar it must match, behind ``resumed``; taken
                over.
            resumed: What was generated before, int32, shape ``(n,)``: it goes on as the sampler
                would that has drawn these.
        """
        self.params = params
        self.stop = stop
        self.vocab_size = vocab_size
        self.generated = len(resumed)
        self._matcher = matcher
        self._key = _mix(_mix(params.seed & _MASK64) ^ index)
        self._reach = _FIRST_REACH
        bias = sorted((i, b) for i, b in params.logit_bias.items() if 0 <= i < vocab_size)
        self._bias_ids = np.array([i for i, _ in bias], np.int64)
        self._bias_values = np.array([b for _, b in bias], np.float64)
        eog = {t for t in eog_tokens if 0 <= t < vocab_size}
        stops = eog | {t for t in stop.stop_token_ids if 0 <= t < vocab_size}
        self._eog_set = frozenset(eog if stop.ignore_eos else ())
        self._stop_set = frozenset(stops if stop.min_tokens > 0 else ())
        self._eog_mask = np.array(sorted(self._eog_set), np.int64)
        self._stop_mask = np.array(sorted(self._stop_set), np.int64)
        self._penalties = Penalties.of(params, prompt)
        if self._penalties is not None:
            for token in resumed:
                self._penalties.add(int(token))
        self._plain = not bias and self._penalties is None and matcher is None
        self._greedy = params.temperature <= 0.0 and self._plain
        self._few = (
            self._plain
            and params.temperature > 0.0
            and params.typical_p >= 1.0
            and 0 < params.top_k <= _FEW
            and params.top_k < vocab_size
            and params.logprobs < 0
        )

    def accept(self, token: int) -> None:
        """``token`` is kept as the next one of this sample."""
        self.generated += 1
        if self._matcher is not None:
            self._matcher.accept(token)
        if self._penalties is not None:
            self._penalties.add(token)

    def after(self, token: int) -> Sampler:
        """This sampler as it will be once ``token`` is accepted; this one stays as it is."""
        assert self._matcher is None, "constrained draws wait for their token"
        other = copy.copy(self)
        if self._penalties is not None:
            other._penalties = self._penalties.copy()
        other.accept(token)
        return other

    def rewind(self, generated: int) -> None:
        """Forget the accepted tokens beyond the first ``generated``."""
        assert 0 <= generated <= self.generated
        assert self._matcher is None or generated == self.generated
        if self._penalties is not None and generated < self.generated:
            self._penalties.rewind(generated)
        self.generated = generated

    def fork(self, index: int) -> Sampler:
        """Another sample of the same request, with the same text so far and draws of its own."""
        other = copy.copy(self)
        other._key = _mix(_mix(self.params.seed & _MASK64) ^ index)
        if self._matcher is not None:
            other._matcher = self._matcher.copy()
        if self._penalties is not None:
            other._penalties = self._penalties.copy()
        return other

    def uniform(self, ahead: int = 0) -> float:
        """The random number of the next draw, in [0, 1), or of the ``ahead``-th one after it."""
        return (_mix(self._key ^ (self.generated + ahead)) >> 11) * 2.0**-53

    def masked(self, ahead: int = 0) -> Ids:
        """Ids that may not be drawn then."""
        early = self.generated + ahead < self.stop.min_tokens
        return self._stop_mask if early else self._eog_mask

    @property
    def matcher(self) -> Matcher | None:
        """Where it stands in its grammar; None: its text is free."""
        return self._matcher

    @property
    def complete(self) -> bool:
        """Whether its grammar lets nothing follow."""
        return self._matcher is not None and self._matcher.complete

    @property
    def penalised(self) -> bool:
        """Whether what was seen so far changes its logits."""
        return self._penalties is not None

    def seen(self) -> tuple[Ids, Ids]:
        """What penalties look at: distinct ids of the prompt (none where they do not count), and
        every token that was accepted."""
        assert self._penalties is not None
        return self._penalties.prompt, np.array(self._penalties.tokens, np.int64)

    def bias(self) -> tuple[Ids, Floats]:
        """Ids whose logits are raised, ascending, and by how much."""
        return self._bias_ids, self._bias_values

    def excluded(self) -> frozenset[int]:
        """`masked` for the next draw, as a set."""
        return self._stop_set if self.generated < self.stop.min_tokens else self._eog_set

    @property
    def takes_few(self) -> bool:
        """Whether it draws one of a small top k, and nothing else is to do but to leave out what
        may not be drawn."""
        return self._few

    def takes_best(self, token: int) -> bool:
        """Whether it draws the largest logit, whose id is ``token``, and nothing else is to do."""
        if not self._greedy or self.params.logprobs >= 0:
            return False
        return token not in self.excluded()

    def adjust(self, row: Row) -> list[tuple[Ids, Row]]:
        """Apply bias, penalties and masks to ``row`` in place.

        Returns:
            What was there before, for `_restore`. Only a few logits change, while a copy of the row
            would cost as much as the rest of a draw.
        """
        before: list[tuple[Ids, Row]] = []
        if self._bias_ids.size:
            old = row[self._bias_ids]
            before.append((self._bias_ids, old))
            row[self._bias_ids] = old + self._bias_values
        if self._penalties is not None and (lowered := self._penalties.apply(row)) is not None:
            before.append(lowered)
        masked = self.masked()
        if masked.size:
            before.append((masked, row[masked]))
            row[masked] = NEVER
        return before


def _restore(row: Row, before: list[tuple[Ids, Row]]) -> None:
    for ids, values in reversed(before):
        row[ids] = values


def draw(logits: npt.NDArray[np.float32], rows: Sequence[tuple[int, Sampler]]) -> list[Drawn]:
    """One token for each of ``rows``.

    Args:
        logits: float32, shape ``(rows, vocab)``, writable; as it was when this returns.
        rows: Row of ``logits`` and sampler of each draw; several draws may use one row. What the
            samplers will draw is not changed.

    Returns:
        One `Drawn` per entry of ``rows``, in order.
    """
    best: list[int] = []
    drawn: list[Drawn | None] = []
    for at, sampler in rows:
        if sampler._greedy and not best:
            best = logits.argmax(axis=1).tolist()
        if best and sampler.takes_best(best[at]):
            # argmax takes a NaN for the largest, so one look finds any.
            drawn.append(Drawn(best[at] if math.isfinite(logits[at, best[at]]) else -1))
        elif sampler.takes_few:
            row = logits[at]
            peak = float(row.max())
            drawn.append(Drawn(_sample_few(row, peak, sampler) if math.isfinite(peak) else -1))
        else:
            drawn.append(None)
    if None not in drawn:
        return cast("list[Drawn]", drawn)
    # A tiny temperature overflows the quotient to -inf, whose exp is the 0 that is meant.
    with np.errstate(over="ignore"):
        return [
            one if one is not None else _draw_row(logits[at], sampler)
            for one, (at, sampler) in zip(drawn, rows, strict=True)
        ]


def _draw_row(row: Row, sampler: Sampler) -> Drawn:
    before = sampler.adjust(row)
    matcher = sampler.matcher
    token = _sample(row if matcher is None else matcher.mask(row), sampler)
    _restore(row, before)
    if token < 0 or sampler.params.logprobs < 0:
        return Drawn(token)
    return with_logprobs(row, token, sampler.params.logprobs)


def with_logprobs(raw: Row, token: int, count: int) -> Drawn:
    """A token with its log-probability, and the ``count`` most likely ones, by the logits ``raw``;
    -1 where these are not numbers."""
    peak = float(raw.max())
    if not math.isfinite(peak):
        return Drawn(-1)
    norm = peak + math.log(float(np.exp(raw.astype(np.float64) - peak).sum()))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids, values, _ = top_k(raw, peak, count, _FIRST_REACH)
        top = tuple(zip(ids.tolist(), (values - norm).tolist(), strict=True))
    return Drawn(token, float(raw[token]) - norm, top)


def _sample(row: Row, sampler: Sampler) -> int:
    """Top-k, typical-p, top-p, min-p, temperature, draw: llama.cpp's order, always keeping one."""
    peak = float(row.max())
    if not math.isfinite(peak):
        return -1
    p = sampler.params
    if p.temperature <= 0.0:
        return int(row.argmax())
    if 0 < p.top_k <= _FEW and p.typical_p >= 1.0 and p.top_k < row.size:
        return _sample_few(row, peak, sampler)
    if 0 < p.top_k < row.size:
        ids, values, sampler._reach = top_k(row, peak, p.top_k, sampler._reach)
        if p.typical_p < 1.0:
            ids, values = typical(ids, values, p.typical_p)
        if p.top_p < 1.0 and ids.size > 1:
            mass = np.exp(values - values[0]).cumsum()
            values = values[: int(mass.searchsorted(p.top_p * mass[-1])) + 1]
    elif p.typical_p < 1.0:
        ids, values = typical(*at_least(row, -math.inf), p.typical_p)
        if p.top_p < 1.0:
            mass = np.exp(values - values[0]).cumsum()
            values = values[: int(mass.searchsorted(p.top_p * mass[-1])) + 1]
    elif p.top_p < 1.0:
        ids, values, sampler._reach = prefix(row, peak, 1.0, p.top_p, sampler._reach)
    elif p.min_p > 0.0:
        ids, values = at_least(row, peak + math.log(p.min_p))
    else:
        # The draw itself is a prefix: the smallest one that holds the random share of the mass.
        ids, _, sampler._reach = prefix(row, peak, p.temperature, sampler.uniform(), sampler._reach)
        return int(ids[-1])
    if p.min_p > 0.0:
        floor = values[0] + math.log(p.min_p)
        values = values[: max(1, int((values >= floor).sum()))]
    if values.size == 1:
        return int(ids[0])
    mass = np.exp((values - values[0]) / p.temperature).cumsum()
    return int(ids[mass.searchsorted(sampler.uniform() * mass[-1])])


def _sample_few(row: Row, peak: float, sampler: Sampler) -> int:
    """`_sample` where top-k leaves at most `_FEW` tokens: the same sums, without arrays.

    In the engine every call of NumPy begins with cold caches, since a step has just read all of the
    weights: eight calls on 40 values cost 100 µs there, these loops 25. So ids that may not be
    drawn are left out here, too, rather than masked in the row.
    """
    p = sampler.params
    excluded = sampler.excluded()
    wanted = min(p.top_k + len(excluded), row.size)
    nearest, values, sampler._reach = top_k(row, peak, wanted, sampler._reach)
    ids, logits = nearest.tolist(), values.tolist()
    if not excluded.isdisjoint(ids):
        logits = [x for token, x in zip(ids, logits, strict=True) if token not in excluded]
        ids = [token for token in ids if token not in excluded]
        if not ids:
            return -1
    del logits[p.top_k :]
    first = logits[0]
    if p.top_p < 1.0:
        mass = list(accumulate(math.exp(value - first) for value in logits))
        del logits[bisect_left(mass, p.top_p * mass[-1]) + 1 :]
    if p.min_p > 0.0:
        floor = first + math.log(p.min_p)
        logits = [value for value in logits if value >= floor] or [first]
    mass = list(accumulate(math.exp((value - first) / p.temperature) for value in logits))
    return int(ids[bisect_left(mass, sampler.uniform() * mass[-1])])
