"""Numbers by epoch → the geometry of a line chart, which the pages' template draws as SVG."""

import math
from collections.abc import Callable, Sequence
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 48, 404, 16, 204  # of the plot, in the 420 × 240 units of the template's view box
TICKS = 5
SMALLEST_SPAN = 1e-300  # below it the step between ticks would underflow to 0
MOST_EPOCHS = 10  # labelled on the x axis

Point = tuple[float, float]


def chart(title: str, lines: Sequence[tuple[str, int, list[Point]]]) -> dict[str, Any] | None:
    """Return what the template's macro `chart` draws: labels of the axes and lines, with places in its view box.

    lines: each (name, its colour's index, points (epoch, value)). None where no line has a point.
    """
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    xs = [x for *_, points in lines for x, _ in points]
    ys = [y for *_, points in lines for _, y in points]
    marks = ticks(min(ys), max(ys), TICKS)
    place = _placer(min(xs), max(xs), marks[0], marks[-1])
    epochs = sorted({int(x) for x in xs})
    labelled_epochs = epochs[:: math.ceil(len(epochs) / MOST_EPOCHS)]
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    return {
        "title": title,
        "y": [(place(xs[0], y)[1], f"{y:.{digits}f}") for y in marks],
        "x": [(place(x, marks[0])[0], x) for x in labelled_epochs],
        "lines": [
            {
                "name": name,
                "colour": colour,
                "last": points[-1][1],
                "points": [(*place(x, y), f"epoch {x:g}: {y:.4f}") for x, y in points],
            }
            for name, colour, points in lines
        ],
    }


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers, evenly spaced, that enclose low and high."""
    span = high - low
    if span < SMALLEST_SPAN:
        span = abs(high) * 0.1
    if span < SMALLEST_SPAN:
        span = 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    fitting = [factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude * count >= span]
    step = fitting[0] if fitting else 10 * magnitude
    bottom, top = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(bottom, max(top, bottom + 1) + 1)]


def _placer(left: float, right: float, low: float, high: float) -> Callable[[float, float], Point]:
    """A function from values to places in the plot, rounded to a tenth of a unit of the view box."""

    def place(x: float, y: float) -> Point:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low)
        return round(LEFT + (RIGHT - LEFT) * across, 1), round(BOTTOM - (BOTTOM - TOP) * up, 1)

    return place
