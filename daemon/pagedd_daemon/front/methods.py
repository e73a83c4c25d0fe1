"""Ways of decoding beside plain samples, and which of them go together.

`requests` has the fields in its models; `wire` translates what is refused here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from pagedd_daemon.front.refusals import at_most, wrong


def _best_of(value: int, info: ValidationInfo) -> int:
    at_most("best_of", value, info)
    return value


def _beam_width(value: int, info: ValidationInfo) -> int:
    at_most("beam_width", value, info)
    return value


def _logprobs(value: int, info: ValidationInfo) -> int:
    at_most("logprobs", value, info)
    return value


Logprobs = Annotated[int, Field(ge=0), AfterValidator(_logprobs)]

_SEARCH_ONLY = ("length_penalty", "early_stopping")
_OFF: dict[str, Any] = {
    "temperature": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "stop": [],
    "json_schema": None,
    "regex": None,
    "grammar": None,
    "best_of": None,
}
"""What a search does not go together with, each with the value that asks for nothing: beams are
compared by the model's own distribution, and the engine, which compares them, knows no text."""


class Methods(BaseModel):
    """Fields of all verbs that generate."""

    best_of: Annotated[int, Field(ge=1), AfterValidator(_best_of)] | None = None
    beam_width: Annotated[int, Field(ge=1), AfterValidator(_beam_width)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    early_stopping: bool | Literal["never"] = False
    stream: bool | None = None
    """None: where there is something to stream before the end."""

    @property
    def wanted(self) -> int:
        """Texts of the reply."""
        n: int = getattr(self, "n", 1)
        return n

    @property
    def drawn(self) -> int:
        """Samples that the engine is asked for."""
        return self.wanted if self.best_of is None else self.best_of

    @property
    def chooses(self) -> bool:
        """Whether the reply is the best of more samples."""
        return self.drawn > self.wanted

    @property
    def sequences(self) -> int:
        """How many run at the same time for it, at most."""
        return max(self.drawn, self.beam_width or 1)

    @property
    def holds(self) -> bool:
        """Whether nothing is said of its texts before the end."""
        return self.stream is False or self.beam_width is not None or self.chooses

    def searching(self) -> dict[str, Any]:
        """Fields of `pagedd_daemon.params.BeamParams`; empty: it does not search."""
        if self.beam_width is None:
            return {}
        return {
            "width": self.beam_width,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
        }


def check(request: Methods) -> None:
    """Whether a request's ways of decoding go together.

    Raises:
        PydanticCustomError: They do not; becomes ``E_FIELD``.
    """
    given = request.model_fields_set
    n, width, best_of = request.wanted, request.beam_width, request.best_of
    if width is None:
        for name in _SEARCH_ONLY:
            if name in given:
                raise wrong("goes with beam_width, which is not given", name)
    else:
        if n > width:
            raise wrong(f"{n} texts of {width} beams", "n", n=n, beam_width=width)
        for name, off in _OFF.items():
            if name in given and getattr(request, name) != off:
                raise wrong("does not go together with beam_width", name, beam_width=width)
        if request.stream:
            reason = f"{width} beams have no text before the search ends: nothing can be streamed"
            raise wrong(reason, "stream", beam_width=width)
    if best_of is not None and best_of < n:
        raise wrong(f"{n} of the best {best_of}", "n", n=n, best_of=best_of)
    if best_of is not None and best_of > n and request.stream:
        reason = f"which {n} of {best_of} samples are the best is known when all have ended"
        raise wrong(reason, "stream", n=n, best_of=best_of)
