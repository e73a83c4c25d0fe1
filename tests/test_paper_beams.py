"""Recorded beam searches and their replay on the pager."""

from __future__ import annotations

import json

import pytest

from benchmarks.paper.beams import BEAMS, Recording, Replay, beam_saving, recordings
from benchmarks.paper.record_beams import SEARCHES, WIDTHS


@pytest.mark.parametrize("shape", SEARCHES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_committed_recordings_are_whole(shape: str, width: int) -> None:
    count, steps = SEARCHES[shape]
    searches = recordings(shape, width)
    assert len(searches) == count
    for search in searches:
        assert len(search.parents) == steps
        assert all(len(parents) == width for parents in search.parents)
        assert all(0 <= parent < width for parents in search.parents for parent in parents)
        assert set(search.parents[0]) == {0}


def test_the_recordings_stay_small() -> None:
    assert BEAMS.stat().st_size < 1 << 20
    assert json.loads(BEAMS.read_text(encoding="utf-8"))["model"].startswith("SmolLM2-135M")


def test_a_recording_goes_on_with_its_second_half() -> None:
    search = Recording(1, ((0,), (1,), (2,), (3,)))
    assert [step[0] for step in search.steps(9)] == [0, 1, 2, 3, 2, 3, 2, 3, 2]


def test_beams_that_never_part_from_the_first_share_all_but_the_last_block() -> None:
    replay = Replay()
    replay.run(64, 17, Recording(2, ((0, 0),) * 400))
    # Both always continue beam 0: looks at steps 4, 8, 12 and 16 find all blocks shared.
    assert replay.saved.value == pytest.approx(0.5)
    assert replay.pager.stats().gpu.used == 0


def test_beams_that_go_their_own_ways_share_only_the_prompt() -> None:
    replay = Replay()
    replay.run(64, 17, Recording(2, ((0, 0), *[(0, 1)] * 400)))
    # 4 shared blocks, and one of its own for each: (4 + 2) of 10 entries.
    assert replay.saved.value == pytest.approx(1 - 6 / 10)
    replay.pager.validate()


def test_wider_beams_save_more() -> None:
    pairs = [(100, 120), (40, 60)]
    saved = [beam_saving("alpaca", width, pairs) for width in (2, 6)]
    assert 0.2 < saved[0] < 0.5
    assert saved[0] < saved[1] < 5 / 6
