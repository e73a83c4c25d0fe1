"""Short forms of ``make chaos ONLY=fuzz``: structure-aware messages, in process and over sockets.

A failing run names its seed: ``PAGEDD_SEED=N`` runs it again.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import Mapping
from typing import Any

import msgpack
import pytest

from benchmarks.chaos.fuzz import attack, attack_daemon
from benchmarks.chaos.messages import Messages
from pagedd_daemon.front import wire
from pagedd_daemon.front.errors import WireError

VERBS: Mapping[str, Any] = {**wire.DATA_VERBS, **wire.CONTROL_VERBS}


def seed() -> int:
    made = int(os.environ.get("PAGEDD_SEED", random.SystemRandom().randrange(2**32)))
    print(f"replay with PAGEDD_SEED={made}")
    return made


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_what_messages_are_made_from_is_valid_for_every_verb(verb: str) -> None:
    """So that a change of one thing is refused for that, and for nothing else."""
    messages = Messages(seed())
    parse = wire.parse_control if verb in wire.CONTROL_VERBS else wire.parse_data
    for _ in range(50):
        request = parse(wire.decode([msgpack.packb(messages.valid(verb))]))
        assert request.verb == verb


def test_a_seed_replays_and_messages_of_all_kinds_pass_and_are_refused() -> None:
    begin = seed()
    first, second = Messages(begin), Messages(begin)
    codes = set()
    for _ in range(5000):
        sent = first.next()
        assert sent == second.next()
        try:
            (wire.parse_control if sent.control else wire.parse_data)(wire.decode(sent.frames))
            codes.add("taken")
        except WireError as error:
            codes.add(error.code)
    assert codes >= {"taken", "E_MALFORMED", "E_VERSION", "E_VERB", "E_FIELD", "E_LIMIT"}


def test_eight_thousand_messages_leave_no_trace_in_the_front() -> None:
    """No exception, no error in the log; at the end nothing is live, and no block is held."""
    outcome = asyncio.run(attack(seed(), 8000))
    assert outcome.defects == []
    assert outcome.answers > 4000


def test_a_daemon_that_is_sent_four_thousand_of_them_serves_the_next_client() -> None:
    outcome = attack_daemon(seed(), 4000)
    assert outcome.defects == []
    assert outcome.alive
    assert outcome.answers > 1000


def test_one_wrong_element_of_a_long_list_is_told_and_the_others_are_not_looked_at() -> None:
    """All 16,384 complaints would hold the front for 15 ms: 32 KB of a client's."""
    wrong = {"v": 1, "verb": "generate", "id": "a", "prompt": "p", "stop_token_ids": ["x"] * 16384}
    with pytest.raises(WireError) as caught:
        wire.parse_data(wrong)
    assert caught.value.details == {"field": "stop_token_ids.0", "reason": "int_type"}
    cause = caught.value.__context__
    assert cause is not None
    assert len(cause.errors()) == 1  # type: ignore[attr-defined]
    tokens = struct.pack("<i", 1)
    assert wire.parse_data({**wrong, "prompt": None, "tokens": tokens, "stop_token_ids": [1]})
