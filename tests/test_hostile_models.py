"""Short form of ``make chaos ONLY=mutants``: models that are nearly right, checked and loaded."""

from __future__ import annotations

import random

from benchmarks.chaos.mutants import examine, loads


def test_damaged_models_are_refused_or_loaded_as_they_are_and_kill_nobody() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    outcome = examine(seed, 160)
    assert outcome.wrong == []
    assert outcome.deaths == []
    assert outcome.refused > 80
    assert sum(outcome.passed.values()) > 20


def test_a_daemon_that_was_told_to_load_damaged_models_computes_a_good_one() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    _, _, alive = loads(seed, 3)
    assert alive
