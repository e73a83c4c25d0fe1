"""Short form of ``make chaos ONLY=timing``, without its times: what an app is told of another's."""

from __future__ import annotations

import os
import random

import pytest

from benchmarks.chaos.timing import TOKENS, Times, probe


def test_the_area_is_the_share_of_pairs_in_which_the_guess_was_faster() -> None:
    assert Times([1.0, 2.0], [3.0, 4.0]).auc == 1.0
    assert Times([3.0, 4.0], [1.0, 2.0]).auc == 0.0
    assert Times([1.0, 1.0], [1.0, 1.0]).auc == 0.5
    assert Times([1.0, 3.0], [2.0, 2.0]).auc == 0.5
    dice = random.Random(1)
    guessed, fresh = ([float(dice.randrange(9)) for _ in range(40)] for _ in range(2))
    pairs = [(g < f) + (g == f) / 2 for g in guessed for f in fresh]
    assert Times(guessed, fresh).auc == sum(pairs) / len(pairs)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have processes of several users")
def test_a_user_is_told_of_nothing_that_the_same_app_of_another_user_asked() -> None:
    foreign, own = probe(random.SystemRandom().randrange(2**32), 5, users=True)
    assert foreign.told == 0
    assert own.told >= 5 * (TOKENS - 16)


def test_an_app_is_told_of_its_own_cached_prefixes_and_of_nobody_elses() -> None:
    foreign, own = probe(random.SystemRandom().randrange(2**32), 5)
    assert foreign.told == 0
    assert own.told >= 5 * (TOKENS - 16)
