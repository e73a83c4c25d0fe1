"""What the simulated model says to a prompt, computed alone and in one piece.

A reply depends on prompt, sampling, the sample's number and nothing else: not on who else was
served, on paging, on engines that died. So one plain run is what every simulated one must give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pagedd_daemon.backends.base import Draw, Run, Step
from pagedd_daemon.engine.sampler import Sampler
from pagedd_daemon.params import SamplingParams, StopParams
from tests.support.simulated import EOG, VOCAB, simulated

Frozen = tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a sample is at its end."""

    tokens: tuple[int, ...]
    ended: bool
    """By an end-of-generation token or a stop id behind these, and not because no more were
    asked for."""


class Oracle:
    """Plain runs, remembered: many requests of many worlds ask the same."""

    def __init__(self) -> None:
        self._backend = simulated(blocks=130, ram_pages=1, verify=False)
        self._table = np.arange(130, dtype=np.int32)
        self._known: dict[object, Reply] = {}

    def reply(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        stop: StopParams,
        index: int,
        most: int,
    ) -> Reply:
        """The first ``most`` tokens of a sample, or fewer where it ends before."""
        stopping = (stop.min_tokens, stop.ignore_eos, stop.stop_token_ids)
        key = prompt, _frozen(sampling), stopping, index
        known = self._known.get(key, Reply((), False))
        if not known.ended and len(known.tokens) < most:
            known = self._known[key] = self._run(prompt, known, sampling, stop, index, most)
        if len(known.tokens) > most:
            return Reply(known.tokens[:most], False)
        return known

    def _run(
        self,
        prompt: tuple[int, ...],
        known: Reply,
        sampling: SamplingParams,
        stop: StopParams,
        index: int,
        most: int,
    ) -> Reply:
        said = list(known.tokens)
        sampler = Sampler(
            replace(sampling, logprobs=-1),
            stop,
            index=index,
            prompt=np.array(prompt, np.int32),
            vocab_size=VOCAB,
            eog_tokens=frozenset((EOG,)),
            resumed=np.array(said, np.int32),
        )
        text = np.array([*prompt, *said], np.int32)
        start = 0
        while True:
            step = Step(1, [Run(1, start, text, self._table, [Draw(1, sampler)])])
            ((_, one),) = self._backend.collect(self._backend.launch(step)).drawn
            if one.token == EOG or one.token in stop.stop_token_ids:
                return Reply(tuple(said), True)
            said.append(one.token)
            if len(said) >= most:
                # Whether it would end here is drawn only where one more was asked for.
                return Reply(tuple(said), False)
            sampler.accept(one.token)
            start += len(text)
            text = np.array([one.token], np.int32)


def _frozen(sampling: SamplingParams) -> Frozen:
    fields = ((name, getattr(sampling, name)) for name in sampling.__slots__)
    return tuple((n, tuple(v.items()) if isinstance(v, dict) else v) for n, v in fields)
