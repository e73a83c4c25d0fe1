"""What the simulated model says to a prompt, computed alone and in one piece.

A reply depends on prompt, sampling, the sample's number and nothing else: not on who else was
served, on paging, on engines that died. So one plain run is what every simulated one must give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pagedd_daemon.backends.base import Draw, Run, Step
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import BeamParams, SamplingParams, StopParams
from tests.support.beam_search import Found, search
from tests.support.sim.grammar import matcher
from tests.support.simulated import EOG, VOCAB, plain_logprobs, simulated

Frozen = tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a sample is at its end."""

    tokens: tuple[int, ...]
    ended: bool
    """By an end-of-generation token or a stop id behind these, and not because no more were
    asked for."""
    logprobs: tuple[float, ...] = ()
    """Of its tokens, where ``sampling`` asks for them."""

    @property
    def score(self) -> float:
        """By which the best of several are found."""
        return sum(self.logprobs) / len(self.tokens) if self.tokens else -math.inf


class Oracle:
    """Plain runs, remembered: many requests of many worlds ask the same."""

    def __init__(self) -> None:
        self._backend = simulated(blocks=130, ram_pages=1, verify=False)
        self._table = np.arange(130, dtype=np.int32)
        self._known: dict[object, Reply] = {}
        self._searched: dict[object, list[Found]] = {}
        self._logprobs = plain_logprobs()

    def reply(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        stop: StopParams,
        index: int,
        most: int,
        regex: str = "",
    ) -> Reply:
        """The first ``most`` tokens of a sample, or fewer where it ends before."""
        stopping = (stop.min_tokens, stop.ignore_eos, stop.stop_token_ids)
        key = prompt, _frozen(sampling), stopping, index, regex
        known = self._known.get(key, Reply((), False))
        if not known.ended and len(known.tokens) < most:
            known = self._known[key] = self._run(prompt, known, sampling, stop, index, most, regex)
        if len(known.tokens) > most:
            return Reply(known.tokens[:most], False, known.logprobs[:most])
        return known

    def beams(self, prompt: tuple[int, ...], params: BeamParams, most: int) -> list[Found]:
        """The best texts of a search, best first."""
        key = prompt, params, most
        if key not in self._searched:
            stop = StopParams(max_tokens=most)
            self._searched[key] = search(self._logprobs, list(prompt), params, stop, (EOG,))
        return self._searched[key]

    def _run(
        self,
        prompt: tuple[int, ...],
        known: Reply,
        sampling: SamplingParams,
        stop: StopParams,
        index: int,
        most: int,
        regex: str,
    ) -> Reply:
        said, likely = list(known.tokens), list(known.logprobs)
        grammar = matcher(regex) if regex else None
        if grammar is not None:
            for token in said:
                grammar.accept(token)
        sampler = Sampler(
            sampling,
            stop,
            index=index,
            prompt=np.array(prompt, np.int32),
            vocab_size=VOCAB,
            eog_tokens=frozenset((EOG,)),
            matcher=grammar,
            resumed=np.array(said, np.int32),
        )
        text = np.array([*prompt, *said], np.int32)
        start = 0
        while True:
            step = Step(1, [Run(1, start, text, self._table, [Draw(1, sampler)])])
            ((_, one),) = self._backend.collect(self._backend.launch(step)).drawn
            if one.token == EOG or one.token in stop.stop_token_ids:
                return Reply(tuple(said), True, tuple(likely))
            said.append(one.token)
            likely.append(one.logprob or 0.0)
            sampler.accept(one.token)
            if sampler.complete or len(said) >= most:
                # Whether it would end here is drawn only where one more was asked for.
                return Reply(tuple(said), sampler.complete, tuple(likely))
            start += len(text)
            text = np.array([one.token], np.int32)


def _frozen(sampling: SamplingParams) -> Frozen:
    fields = ((name, getattr(sampling, name)) for name in sampling.__slots__)
    return tuple((n, tuple(v.items()) if isinstance(v, dict) else v) for n, v in fields)
