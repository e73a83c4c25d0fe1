"""Line plots and stacked bars as plain SVG, so that figures need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#0b62a4", "#c8501e", "#3d8b37", "#7a4fa3", "#666666")
_WIDTH, _HEIGHT = 780, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 214, 34, 48
_LEGEND_STEP = 17

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows. ``high`` cuts off what lies beyond."""

    label: str
    low: float
    high: float
    log2: bool = False

    def share(self, value: float) -> float:
        """Where ``value`` lies: 0 at ``low``, 1 at ``high``."""
        if self.log2:
            low, high = math.log2(self.low), math.log2(self.high)
            return (math.log2(value) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values, about five; powers of two on a logarithmic axis."""
        if self.log2:
            first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
            return [2.0**i for i in range(first, last + 1)]
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
        count = math.floor((self.high - self.low) / step + 1e-9)
        return [self.low + i * step for i in range(count + 1)]


@dataclass(slots=True)
class _Canvas:
    """SVG elements in the order they are drawn."""

    title: str
    elements: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "#dddddd") -> None:
        self.elements.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> None:
        self.elements.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.elements.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )

    def legend(self, names: Sequence[str]) -> None:
        x = _WIDTH - _RIGHT + 14
        for i, name in enumerate(names):
            y = _TOP + 12 + i * _LEGEND_STEP
            self.box(x, y - 8, 14, 8, COLOURS[i % len(COLOURS)])
            self.text(x + 20, y, name, "start")

    def document(self) -> str:
        """The whole SVG, with a white ground so that it reads on a dark page too."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
                f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">',
                f"<title>{escape(self.title)}</title>",
                f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
                f'<text x="{_LEFT}" y="20" font-size="14">{escape(self.title)}</text>',
                *self.elements,
                "</svg>",
                "",
            ]
        )


def _number(value: float) -> str:
    return f"{value:g}"


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _TOP - _BOTTOM)


def _vertical(canvas: _Canvas, axis: Axis) -> None:
    for tick in axis.ticks():
        y = _y(axis, tick)
        canvas.line(_LEFT, y, _WIDTH - _RIGHT, y)
        canvas.text(_LEFT - 6, y + 4, _number(tick), "end")
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f' transform="rotate(-90 16 {middle:.1f})"'
    canvas.text(16, middle, axis.label, extra=turned)


def _cut(points: Points, high: float) -> list[tuple[float, float]]:
    """Points up to ``high``; the line to the first one beyond ends where it crosses."""
    kept: list[tuple[float, float]] = []
    for x, y in points:
        if y > high:
            if kept:
                x0, y0 = kept[-1]
                kept.append((x0 + (x - x0) * (high - y0) / (y - y0), high))
            break
        kept.append((x, y))
    return kept


def lines(title: str, x: Axis, y: Axis, curves: Mapping[str, Points]) -> str:
    """A plot with one line per curve, each cut where it leaves the plot at the top."""
    canvas = _Canvas(title)
    _vertical(canvas, y)
    for tick in x.ticks():
        canvas.line(_x(x, tick), _HEIGHT - _BOTTOM, _x(x, tick), _HEIGHT - _BOTTOM + 4, "#333333")
        canvas.text(_x(x, tick), _HEIGHT - _BOTTOM + 18, _number(tick))
    canvas.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x.label)
    for i, points in enumerate(curves.values()):
        kept = [(_x(x, a), _y(y, b)) for a, b in _cut(points, y.high)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in kept)
        colour = COLOURS[i % len(COLOURS)]
        canvas.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        canvas.elements += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in kept
        ]
    canvas.legend(list(curves))
    return canvas.document()


def stacked(title: str, y: Axis, bars: Mapping[str, Mapping[str, float]]) -> str:
    """One bar per entry, made of the same parts from the bottom up."""
    canvas = _Canvas(title)
    _vertical(canvas, y)
    room = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    for number, (name, parts) in enumerate(bars.items()):
        left = _LEFT + number * room + room * 0.15
        base = y.low
        for i, value in enumerate(parts.values()):
            top, bottom = _y(y, base + value), _y(y, base)
            canvas.box(left, top, room * 0.7, bottom - top, COLOURS[i % len(COLOURS)])
            if value > (y.high - y.low) / 20:
                inside = ' fill="white"'
                canvas.text(
                    left + room * 0.35, (top + bottom) / 2 + 4, f"{value:.1f}", extra=inside
                )
            base += value
        canvas.text(left + room * 0.35, _HEIGHT - _BOTTOM + 18, name)
    canvas.legend(list(next(iter(bars.values()))))
    return canvas.document()
