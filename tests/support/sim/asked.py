"""One request as its client sees it: what came, and whether that is what had to come."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from pagedd_daemon.front.detokenizer import unpack_ids
from pagedd_daemon.params import SamplingParams, StopParams
from tests.support.sim.chosen import best_of, close, searched
from tests.support.sim.oracle import Oracle
from tests.support.sim.transport import AT_THE_DOOR

_ENDS = ("done", "error", "result")
_HIDDEN = ("tokens", "session")
"""Fields that are long, or another at each time a seed is told."""


class BrokenPromiseError(AssertionError):
    """The daemon did something that it must not do."""


def promise(kept: bool, *what: object) -> None:
    """Raise unless a promise is kept."""
    if not kept:
        raise BrokenPromiseError(" ".join(map(str, what)))


@dataclass(slots=True)
class Sample:
    """A continuation, as far as it came."""

    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class Asked:
    """A request and its events."""

    def __init__(self, fields: dict[str, Any], prompt: tuple[int, ...] | None = None) -> None:
        """``prompt``: what the model must read, of a request that generates."""
        self.fields = fields
        self.id: str = fields["id"]
        self.prompt = prompt
        self.samples = [Sample() for _ in range(fields.get("n", 1))]
        self.told = Sample()
        """Its own prompt, where it wants to hear of it."""
        self.scores = 0
        """Tokens of the prompt whose log-probabilities came."""
        self.model: str | None = None
        self.seed = 0
        self.last = -1
        """``seq`` of the last event."""
        self.sent = 0
        """How often it was sent."""
        self.other = 0
        """How often another request was sent under its id."""
        self.cancelled = False
        """Its client has taken it back."""
        self.end: dict[str, Any] | None = None
        self.over = asyncio.Event()

    def __str__(self) -> str:
        shown = {name: value for name, value in self.fields.items() if name not in _HIDDEN}
        return f"{shown} (prompt {len(self.prompt or ())}, last {self.last}, sent {self.sent})"

    @property
    def code(self) -> str | None:
        """Of the error that it ended with."""
        return None if self.end is None else self.end.get("code")

    @property
    def reasons(self) -> list[str]:
        """Why its samples ended; empty if it failed."""
        finish = [] if self.end is None else self.end.get("finish", [])
        return [one["reason"] for one in finish]

    def hear(self, event: dict[str, Any]) -> bool:
        """Take an event; False if one before it is missing."""
        seq, kind = event["seq"], event["type"]
        if kind == "error" and seq == 0 and self._answers_resend(event):
            return True
        if seq <= self.last:
            return True  # of a resend, which was not needed
        if seq > self.last + 1:
            return False
        promise(self.end is None, self.id, "goes on after its end:", event)
        self.last = seq
        if kind in _ENDS:
            self.end = event
        if kind == "accepted":
            self.model, self.seed = event["model"], event["seed"]
            promise(self.prompt is not None, self.id, "was accepted, and does not generate")
            expected = len(self.prompt or ())
            promise(event["prompt_tokens"] == expected, self.id, "has", expected, "tokens:", event)
        elif kind == "chunk":
            self._chunk(event)
        elif kind == "prompt":
            promise(event["start"] == len(self.told.tokens), self, "skips a part of its prompt")
            self.told.tokens += unpack_ids(event["tokens"])
            self.told.text.append(event["text"])
            self.scores += len(event.get("logprobs", ()))
        elif kind == "done":
            self._done(event)
        if self.end is not None:
            self.over.set()
        return True

    def _answers_resend(self, event: dict[str, Any]) -> bool:
        code = event["code"]
        if code == "E_DUPLICATE" and self.other:
            self.other -= 1
            return True
        # What the service says to it, it says again to every resend, and that is its end.
        if code == "E_SLOW" and self.sent > 1 and event["message"] == AT_THE_DOOR:
            self.sent -= 1
            return True
        return False

    def _chunk(self, event: dict[str, Any]) -> None:
        promise(self.model is not None, self.id, "speaks before it is accepted")
        sample = self.samples[event["index"]]
        ids = unpack_ids(event["tokens"])
        sample.tokens += ids
        sample.text.append(event["text"])
        asked = self.fields.get("logprobs")
        told = event.get("logprobs")
        promise((told is None) == (asked is None), self.id, "has logprobs", told)
        promise(told is None or len(told) == len(ids), self.id, "has logprobs of other tokens")

    def _done(self, event: dict[str, Any]) -> None:
        finish = event["finish"]
        promise([one["index"] for one in finish] == list(range(len(self.samples))), finish)
        for sample, one in zip(self.samples, finish, strict=True):
            sample.text.append(one["text"])

    # ------------------------------------------------------------------------------------- checks

    def check(self, oracle: Oracle) -> None:
        """Whether what came is what the model says to the prompt, and ended when it had to."""
        if self.prompt is None or self.model is None:
            return
        sampling, stop = self._params()
        if self.reasons and "cancelled" not in self.reasons:
            self._check_told()
            if self._chosen():
                self._check_chosen(oracle, sampling, stop)
        if self._chosen():
            return
        finish = (self.end or {}).get("finish") or [None] * len(self.samples)
        for index, (sample, end) in enumerate(zip(self.samples, finish, strict=True)):
            self._check(oracle, sampling, stop, index, sample, end)
        usage = (self.end or {}).get("usage")
        if usage is not None and self.reasons:
            said = sum(len(sample.tokens) for sample in self.samples)
            # The first tokens of a stop string may have gone out before it was one.
            cut = sum(_longest(end["stop"]) for end in finish if end and end.get("stop"))
            counted = usage["generated_tokens"]
            promise(said - cut <= counted <= said, self.id, "said", said, "tokens:", usage)
            promise(usage["prompt_tokens"] == len(self.prompt), self.id, "asked:", usage)

    def _chosen(self) -> bool:
        fields = self.fields
        return "beam_width" in fields or fields.get("best_of", 0) > len(self.samples)

    def _check_told(self) -> None:
        """Whether it has heard all of its prompt, if it wanted to."""
        fields, prompt = self.fields, self.prompt or ()
        scored = fields.get("prompt_logprobs") is not None
        if fields.get("echo") or scored:
            promise(tuple(self.told.tokens) == prompt, self, "heard", self.told.tokens)
            text = bytes(prompt).decode() if fields.get("echo") else ""
            promise("".join(self.told.text) == text, self, "heard", self.told.text)
        if scored:
            promise(self.scores == len(prompt), self, "has", self.scores, "scores")

    def _check_chosen(self, oracle: Oracle, sampling: SamplingParams, stop: StopParams) -> None:
        """Whether the best of several are its reply."""
        assert self.prompt is not None
        assert self.end is not None
        said = [tuple(sample.tokens) for sample in self.samples]
        finish = self.end["finish"]
        if "context" in self.reasons:
            return  # the pool was too small for all of them together
        if "beam_width" in self.fields:
            expected, scores = searched(oracle, self.prompt, self.fields)
            told = [one["score"] for one in finish]
            promise(close(told, scores), self, "has scores", told, "and not", scores)
        else:
            drawn, wanted = self.fields["best_of"], len(said)
            expected = best_of(oracle, self.prompt, sampling, stop, drawn, wanted)
        promise(said == expected, self, "said", said, "and not", expected)

    def _check(
        self,
        oracle: Oracle,
        sampling: SamplingParams,
        stop: StopParams,
        index: int,
        sample: Sample,
        end: dict[str, Any] | None,
    ) -> None:
        assert self.prompt is not None
        said = tuple(sample.tokens)
        promise(len(said) <= stop.max_tokens, self.id, index, "says too much:", len(said))
        reason = None if end is None else end["reason"]
        by_string = end is not None and end.get("stop") is not None
        more = reason == "stop" and not by_string
        regex = self.fields.get("regex", "")
        plain = oracle.reply(self.prompt, sampling, stop, index, len(said) + more, regex)
        promise(plain.tokens == said, self.id, index, "said", said, "and not", plain.tokens)
        if more:
            promise(plain.ended, self.id, index, "stopped where the model goes on", said)
        elif reason == "length":
            promise(len(said) == stop.max_tokens, self.id, "has", len(said), "tokens")
        elif reason == "cancelled":
            promise(self.cancelled, self.id, "was cancelled by nobody")
        if reason is not None:
            self._check_text(sample, end or {})

    def _check_text(self, sample: Sample, end: dict[str, Any]) -> None:
        told, stop = "".join(sample.text), end.get("stop")
        whole = bytes(sample.tokens).decode("utf-8", "replace")
        if stop is None:
            promise(told == whole, self.id, "said", repr(told), "and not", repr(whole))
            promise(not any(s in whole for s in self._stops()), self.id, "missed a stop string")
        else:
            promise(stop in self.fields["stop"], self.id, "stopped at", stop)
            promise(whole.startswith(told), self.id, "said", repr(told), "of", repr(whole))

    def _stops(self) -> list[str]:
        return [] if self.fields.get("min_tokens") else self.fields.get("stop", [])

    def _params(self) -> tuple[SamplingParams, StopParams]:
        fields = self.fields
        sampling = SamplingParams(
            temperature=fields.get("temperature", 0.8),
            top_k=fields.get("top_k", 40),
            top_p=fields.get("top_p", 0.95),
            repetition_penalty=fields.get("repetition_penalty", 1.0),
            frequency_penalty=fields.get("frequency_penalty", 0.0),
            seed=self.seed,
        )
        stop = StopParams(
            max_tokens=fields.get("max_tokens", 256),
            min_tokens=fields.get("min_tokens", 0),
            ignore_eos=fields.get("ignore_eos", False),
            stop_token_ids=tuple(fields.get("stop_token_ids", ())),
        )
        return sampling, stop


def _longest(stop: str) -> int:
    """Tokens of a stop string that may be known before its last."""
    return len(stop.encode()) - 1
