"""How long the next step may take, by who waits for its end.

A step is as long as what is put into it, and whoever asks meanwhile waits for its end. So what is
put in beside the most important work is bounded in time, and more tightly while there is a person
who may ask again at any moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvpager.types import PriorityClass

DECODE_TARGET_S = 0.120
"""A step in which somebody as important decodes should not take longer: eight tokens a second,
about reading speed. On two cores and a 135M model that is a chunk of some 40 prompt tokens."""
PREFILL_TARGET_S = 0.250
"""A step in which nobody as important decodes: the longest a cancel or a newcomer has to wait."""
ATTENTIVE_TARGET_S = 0.060
"""A step while a person may ask: half of the inter-token target, since the question that comes next
waits for its end and has to be computed after it."""
WHOLE_TARGET_S = 0.300
"""A step that answers a person's short question at once, whoever reads meanwhile: in pieces, with
the tokens of others beside each, it waits for half as long again."""
_ASIDE_S = 0.030
"""What decodes of lower classes may take of a step that computes a prompt of a higher one."""
PERSON_S = 30.0
"""How long after its last work an interactive app counts as one that may ask again."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What one step may take, in seconds."""

    decode_s: float
    """Its decodes, but for those of ``spared``."""
    step_s: float
    """All of it."""
    whole_s: float
    """All of it, where that gets a short prompt computed whole, or half of it, whose turn it is."""
    spared: PriorityClass | None = None
    """Decodes of this class and above are not left out for a prompt."""
    attentive: bool = False
    """A person may ask at any moment, and no prompt that is to be computed is a person's."""


def pace(
    prompts: PriorityClass | None, decodes: PriorityClass | None, *, person: bool, alone: bool
) -> Pace:
    """The pace of a step.

    Args:
        prompts: The most important class of which a prompt waits to be computed.
        decodes: The most important class of which somebody decodes.
        person: Whether an interactive app waits, or may ask at any moment, beside the one whose
            prompt is computed first.
        alone: Whether one app has the machine to itself: then no stream is left out, since nobody
            would gain by it.
    """
    equals = prompts is not None and decodes is not None and decodes <= prompts
    most = DECODE_TARGET_S if equals else PREFILL_TARGET_S
    step = ATTENTIVE_TARGET_S if person and not alone else most
    if alone:
        return Pace(math.inf, step, step)
    if prompts is PriorityClass.INTERACTIVE:
        return Pace(_ASIDE_S, step, WHOLE_TARGET_S, spared=prompts)
    decode = ATTENTIVE_TARGET_S if person else DECODE_TARGET_S
    if prompts is None or decodes is None:
        return Pace(decode, step, step, attentive=person)
    if person:
        # Equals are left out by turn: a person does not wait for 64 samples to take a step.
        return Pace(decode, step, step, attentive=True)
    return Pace(_ASIDE_S, step, step, spared=prompts)
