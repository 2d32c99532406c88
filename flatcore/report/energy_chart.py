"""Local-energy curves as SVG, in the colours of the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from flatcore.measures.result import Measure
from flatcore.report.figures import nice_ticks

_WIDTH, _HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44


def energy_chart(curves: Sequence[tuple[str, Measure, int]]) -> str:
    """(name, local energy, series) each: the curve over sigma with a band of one standard error, as one <svg>."""
    points = [
        (name, *(m.details[key].tolist() for key in ("sigma", "curve", "curve_stderr")), series)
        for name, m, series in curves
    ]
    right: float = max(max(sigma) for _, sigma, _, _, _ in points)
    top: float = max(v + e for _, _, value, error, _ in points for v, e in zip(value, error, strict=True))
    low: float = min(
        0.0, min(v - e for _, _, value, error, _ in points for v, e in zip(value, error, strict=True))
    )
    top = top if top > low else low + 1.0

    def x(sigma: float) -> float:
        return _LEFT + sigma / right * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (top - low) * (_HEIGHT - _BOTTOM - _TOP)

    def outline(pairs: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in pairs)

    base, parts = _HEIGHT - _BOTTOM, []
    for tick in nice_ticks(low, top, 5):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}">{_text(tick)}</text>')
    for tick in nice_ticks(0.0, right):
        parts.append(
            f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{base}" y2="{base + 5}"/>'
        )
        parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="{base + 20}">{_text(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text class="label middle" x="{_WIDTH / 2}" y="{_HEIGHT - 6}">noise σ, relative to each weight</text>'
    )
    for _, sigma, value, error, series in points:
        zero = [(0.0, 0.0)]
        upper = zero + [(s, v + e) for s, v, e in zip(sigma, value, error, strict=True)]
        lower = zero + [(s, v - e) for s, v, e in zip(sigma, value, error, strict=True)]
        parts.append(f'<polygon class="band s{series}" points="{outline([*upper, *lower[::-1]])}"/>')
        line = outline([*zero, *zip(sigma, value, strict=True)])
        parts.append(f'<polyline class="line s{series}" points="{line}"/>')
    label = "Local energy of " + " and ".join(name for name, *_ in points) + " over the noise"
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")
