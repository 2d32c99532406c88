"""Numbers as people read them: an error bar decides the digits."""

from __future__ import annotations

import math


def plain(value: float, digits: int = 4) -> str:
    """`digits` significant digits; a power of ten only where zeros would hide the number."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        return f"{value:.{max(digits - 1 - exponent, 0)}f}"
    return f"{value:.{digits - 1}e}"


def with_error(value: float, stderr: float) -> str:
    """value ± stderr: two significant digits of the error and the value to the same place, five digits at most."""
    if not (math.isfinite(stderr) and math.isfinite(value)):
        return f"{plain(value)} (no error bar)"
    if stderr == 0:
        return f"{plain(value)} (exact)"
    if stderr < 1e-4 * abs(value):
        return f"{plain(value, 5)} ± {stderr:.0e}"
    exponent = max(math.floor(math.log10(abs(value))), math.floor(math.log10(stderr))) if value else 0
    shift = 0 if -4 <= exponent < 6 else exponent
    places = max(1 - math.floor(math.log10(stderr)) + shift, 0)
    scale = 10.0**shift
    power = f" × 10^{shift}" if shift else ""
    both = f"{value / scale:.{places}f} ± {stderr / scale:.{places}f}"
    return f"({both}){power}" if power else both


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def count(value: int) -> str:
    return f"{value:,}".replace(",", " ")
