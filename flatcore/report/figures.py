"""Spectral densities as SVG. Colours are classes of the page's style sheet, so a figure follows its light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from flatcore.density import Density

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44
_POINTS = 601


@dataclass(frozen=True)
class Curve:
    """One density to draw. `series` chooses the colour, `marks` are eigenvalues to tick on the axis."""

    name: str
    density: Density
    series: int
    marks: tuple[float, ...] = ()


def density_chart(curves: Sequence[Curve]) -> str:
    """log10 of the smoothed densities with bands of one standard error, all smoothed alike, as one <svg> element.

    A Gaussian of 1/200 of the common range smooths them. The dashed line is the peak that a single eigenvalue would
    have, the axis ends at a tenth of it: below, the picture has nothing to tell.
    """
    low = min(curve.density.range[0] for curve in curves)
    high = max(curve.density.range[1] for curve in curves)
    width = (high - low) / 200 or 1e-3 * (abs(high) or 1.0)
    low, high = low - 5 * width, high + 5 * width
    grid = np.linspace(low, high, _POINTS)
    drawn = [(curve, *curve.density.pdf(grid, width)) for curve in curves]
    bell = 1 / (width * math.sqrt(2 * math.pi))
    one = bell / max(curve.density.dimension for curve in curves)
    floor = 0.1 * one
    # No smoothed density exceeds the bell's own peak.
    ceiling = min(
        1.6 * max(float(np.nanmax(value + np.nan_to_num(stderr))) for _, value, stderr in drawn), 1.6 * bell
    )
    frame = _Frame(low, high, math.log10(floor), math.log10(max(ceiling, 10 * floor)))

    parts = [frame.axes(), frame.level(one, "one eigenvalue")]
    for curve, value, stderr in drawn:
        if np.isfinite(stderr).all():
            parts.append(frame.band(grid, value - stderr, value + stderr, curve.series))
    for curve, value, _ in drawn:
        parts.append(frame.line(grid, value, curve.series))
        parts.append(frame.ticks(curve.marks, curve.series))
    label = "Spectral density of " + " and ".join(curve.name for curve in curves) + ", logarithmic"
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        + "".join(parts)
        + "</svg>"
    )


class _Frame:
    """From data to the picture's coordinates, linear across and log10 upwards."""

    def __init__(self, low: float, high: float, bottom: float, top: float) -> None:
        self.low, self.high, self.bottom, self.top = low, high, bottom, top

    def x(self, value: float) -> float:
        return _LEFT + (value - self.low) / (self.high - self.low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        level = math.log10(value) if value > 0 else -math.inf
        share = (min(max(level, self.bottom), self.top) - self.bottom) / (self.top - self.bottom)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def axes(self) -> str:
        base, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        decades = range(math.ceil(self.bottom), math.floor(self.top) + 1)
        stride = max(1, math.ceil(len(decades) / 6))
        for decade in decades[::stride]:
            y = self.y(10.0**decade)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick end" x="{_LEFT - 8}" y="{y + 4:.1f}">10'
                f'<tspan dy="-5" class="power">{str(decade).replace("-", "−")}</tspan></text>'
            )
        for value in nice_ticks(self.low, self.high):
            x, text = self.x(value), f"{value:.6g}".replace("-", "−")
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>')
            parts.append(f'<text class="tick middle" x="{x:.1f}" y="{base + 20}">{text}</text>')
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
        parts.append(
            f'<text class="label middle" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}">eigenvalue λ of H</text>'
        )
        middle = (_TOP + base) / 2
        parts.append(
            f'<text class="label middle" transform="translate(13 {middle}) rotate(-90)">density</text>'
        )
        return "".join(parts)

    def level(self, value: float, text: str) -> str:
        y, right = self.y(value), _WIDTH - _RIGHT
        return (
            f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{right}" y="{y - 5:.1f}">{text}</text>'
        )

    def line(self, grid: np.ndarray, value: np.ndarray, series: int) -> str:
        return f'<polyline class="line s{series}" points="{self._points(grid, value)}"/>'

    def band(self, grid: np.ndarray, lower: np.ndarray, upper: np.ndarray, series: int) -> str:
        outline = f"{self._points(grid, upper)} {self._points(grid[::-1], lower[::-1])}"
        return f'<polygon class="band s{series}" points="{outline}"/>'

    def ticks(self, values: Sequence[float], series: int) -> str:
        base = _HEIGHT - _BOTTOM
        lines = (
            f'<line class="mark s{series}" x1="{x:.1f}" x2="{x:.1f}" y1="{base - 10}" y2="{base}"/>'
            for x in map(self.x, values)
            if _LEFT <= x <= _WIDTH - _RIGHT
        )
        return "".join(lines)

    def _points(self, grid: np.ndarray, value: np.ndarray) -> str:
        return " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(grid, value, strict=True))


def nice_ticks(low: float, high: float, about: int = 7) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], roughly `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
