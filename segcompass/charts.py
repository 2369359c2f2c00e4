"""Charts as inline SVG for the pages of `report_page`, in the page's colours, in the light and in the dark.

A chart is text without scripts or links. Knows nothing about what is drawn: `criteria_page` and `training_curves` do.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from segcompass.modeling_segcompass.palette import css_colour, slot_colour
from segcompass.modeling_segcompass.report_page import text

WIDTH = 360
LINES, BOTTOM, TOP = 190, 22, 8  # height of a chart of lines and its margins
LETTER = 6.6  # width of one at 12 pixels
SLIM = 10  # height of a bar


class Interval(NamedTuple):
    """A measured value with its interval."""

    value: float
    low: float
    high: float


def interval_bars(
    name: str,
    measured: Interval,
    control: Interval | None = None,
    wanted: float | None = None,
    logarithmic: bool = False,
) -> str:
    """A value as a bar with its interval, its control below it, and a dashed line at what is wanted.

    Args:
        name: what is measured, for those who cannot see the chart.
        measured: the value.
        control: the same of a control, or None.
        wanted: where the line stands, or None.
        logarithmic: for ratios: the axis runs from 0.1 to the power of ten above all values; else from 0 to 1, or to
            the greatest value.

    Returns:
        SVG.
    """
    drawn = [measured, *([control] if control else [])]
    greatest = max(1.0, wanted or 0.0, *(interval.high for interval in drawn))
    least = 0.1 if logarithmic else 0.0
    greatest = 10.0 ** math.ceil(math.log10(greatest)) if logarithmic else greatest

    def across(value: float) -> float:
        value = min(max(value, least), greatest)
        share = math.log(value / least) / math.log(greatest / least) if logarithmic else value / greatest
        return 6 + share * (WIDTH - 12)

    parts = []
    for number, interval in enumerate(drawn):
        top, colour = 8 + 20 * number, ("accent", "control")[number]
        middle = top + SLIM / 2
        start, end = across(least), across(interval.value)
        parts.append(
            f'<rect x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{SLIM}" rx="2" fill="var(--{colour})"/>'
        )
        low, high = across(interval.low), across(interval.high)
        parts.append(
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {top - 1}v{SLIM + 2}M{high:.1f} {top - 1}v{SLIM + 2}" '
            'stroke="var(--ink)" stroke-width="1.5" fill="none"/>'
        )
    floor = 8 + 20 * len(drawn)
    if wanted is not None:
        x = across(wanted)
        parts.append(
            f'<path d="M{x:.1f} 2V{floor}" stroke="var(--ink)" stroke-width="1.5" stroke-dasharray="4 3" fill="none"/>'
        )
    marks = [10.0**n for n in range(-1, round(math.log10(greatest)) + 1)] if logarithmic else [0, 0.5, 1]
    parts.append(f'<path d="M6 {floor}H{WIDTH - 6}" stroke="var(--line)"/>')
    for mark in (mark for mark in marks if mark <= greatest):
        anchor = "start" if mark == marks[0] else "end" if across(mark) > WIDTH - 12 else "middle"
        label = f'<text class="soft" x="{across(mark):.1f}" y="{floor + 15}" text-anchor="{anchor}">{mark:g}</text>'
        parts.append(label)
    return _svg(name, floor + 20, parts)


def line_chart(name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over steps, the n-th in the colour of slot n.

    Args:
        name: what is drawn, for those who cannot see the chart.
        lines: who -> (step, value) pairs in order; steps and values finite, at least one pair in all.

    Returns:
        SVG.
    """
    points = [point for line in lines.values() for point in line]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    digits = _digits(_step(low, high))
    marks = {value: f"{value:.{digits}f}" if digits < 6 else f"{value:.1e}" for value in ticks(low, high)}
    left = 12 + LETTER * max(map(len, marks.values()))

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (step - first) / max(last - first, 1e-9) * (WIDTH - left - 8)
        return x, TOP + (high - value) / (high - low) * (LINES - TOP - BOTTOM)

    parts = []
    for value, mark in marks.items():
        y = place(first, value)[1]
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{WIDTH - 8}" stroke="var(--line)"/>')
        parts.append(f'<text class="soft" x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{mark}</text>')
    for step in dict.fromkeys((first, last)):
        anchor = "start" if step == first else "end"
        x = place(step, low)[0]
        parts.append(f'<text class="soft" x="{x:.1f}" y="{LINES - 4}" text-anchor="{anchor}">{step:g}</text>')
    for number, line in enumerate(lines.values()):
        colour = css_colour(slot_colour(number))
        corners = [place(step, value) for step, value in line]
        if len(corners) == 1:
            parts.append(f'<circle cx="{corners[0][0]:.1f}" cy="{corners[0][1]:.1f}" r="3" fill="{colour}"/>')
        elif corners:
            way = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            parts.append(f'<polyline points="{way}" stroke="{colour}" stroke-width="1.8" fill="none"/>')
    return _svg(name, LINES, parts)


def ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers within a range.

    Args:
        low: its lower end.
        high: its upper end, above `low`.

    Returns:
        The numbers, rising.

    Example:
        >>> ticks(0.13, 0.92)
        [0.2, 0.4, 0.6, 0.8]
    """
    step = _step(low, high)
    return [round(n * step, _digits(step)) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _step(low: float, high: float) -> float:
    """2, 1, 0.5, 0.2 or 0.1 of a power of ten, the largest that parts the range often enough."""
    power = 10.0 ** math.floor(math.log10(high - low))
    return next(part * power for part in (2, 1, 0.5, 0.2, 0.1) if (high - low) / (part * power) >= 2.5)


def _digits(step: float) -> int:
    """How many decimals the multiples of a step have."""
    return max(0, -math.floor(math.log10(step)))


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    view = f'role="img" aria-label="{text(name)}" viewBox="0 0 {WIDTH} {height:g}"'
    return f"<svg {view}>{''.join(parts)}</svg>"
