"""Reading curves, drawing them, and the pager's own cost."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.paper import own_time
from benchmarks.paper.curves import rate_at
from benchmarks.paper.points import Point, Workers, run
from benchmarks.paper.svg import Axis, lines, stacked


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"rate": rate, "normalized_s": latency} for rate, latency in points]


def test_the_rate_at_a_level_lies_where_the_curve_first_crosses_it() -> None:
    points = curve((1.0, 0.05), (2.0, 0.1), (3.0, 0.4), (4.0, 0.3), (5.0, 2.0))
    assert rate_at(points, 0.2) == pytest.approx(2.5)
    assert rate_at(points, 0.1) == pytest.approx(2.0)


def test_a_level_that_is_never_crossed_has_no_rate() -> None:
    assert math.isnan(rate_at(curve((1.0, 0.05)), 0.2))
    assert math.isnan(rate_at(curve((1.0, 0.3)), 0.2))


def test_points_run_in_worker_processes_as_in_this_one() -> None:
    points = [Point("oracle", "alpaca", 60, rate=10.0), Point("max", "alpaca", 60, rate=5.0)]
    workers = Workers(2)
    assert workers.run([*points, points[0]]) == [run(p) for p in (*points, points[0])]
    assert set(workers.known) == set(points)


def test_plots_are_well_formed_and_cut_at_the_top() -> None:
    drawn = lines(
        "a < b",
        Axis("rate", 0, 4),
        Axis("latency", 0, 1),
        {"one & two": [(1, 0.5), (2, 0.75), (3, 9.0)]},
    )
    root = ElementTree.fromstring(drawn)
    [polyline] = root.iter("{http://www.w3.org/2000/svg}polyline")
    heights = [float(point.split(",")[1]) for point in polyline.attrib["points"].split()]
    assert len(heights) == 3
    assert min(heights) == heights[2] == pytest.approx(34.0)


def test_bars_are_as_high_as_their_parts() -> None:
    bars = {"x": {"used": 30.0, "wasted": 70.0}, "y": {"used": 100.0, "wasted": 0.0}}
    root = ElementTree.fromstring(stacked("memory", Axis("%", 0, 100), bars))
    boxes = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if "x" in r.attrib]
    heights = [float(box.attrib["height"]) for box in boxes[:4]]
    assert heights[0] + heights[1] == pytest.approx(heights[2], abs=0.2)
    assert heights[1] / heights[0] == pytest.approx(7 / 3, rel=0.01)


def test_axes_have_round_ticks() -> None:
    assert Axis("", 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis("", 1, 256, log2=True).ticks() == [2.0**i for i in range(9)]


def test_blocks_cost_no_python_objects() -> None:
    kept = own_time.bookkeeping(20_000)
    assert kept.bytes_per_block <= 120
    assert kept.objects_per_block <= 0.1


def test_a_long_prompt_is_found_whole() -> None:
    assert len(own_time.long_admission(5_000, 2)) == 2


def test_growth_is_a_slope() -> None:
    assert own_time.Growth({64: 1.0, 128: 2.0, 256: 4.0}).exponent == pytest.approx(1.0)
    assert own_time.Growth({64: 1.0, 128: 1.0, 256: 1.0}).exponent == pytest.approx(0.0)
