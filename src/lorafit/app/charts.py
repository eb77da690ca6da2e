"""Pictures for the report as SVG text: curves, bars, a heat map. Colours come from the page's style sheet alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 900, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 40
MOST_POINTS = 600

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve: what it is called in the legend, its points, and its class in the style sheet."""

    name: str
    points: Points
    style: str
    dots: bool = False


def curves(lines: Sequence[Line], x_label: str, y_label: str, form: str = "g") -> str:
    """Curves over one pair of axes; too many points are thinned to the means of neighbours."""
    lines = [Line(line.name, thinned(line.points), line.style, line.dots) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across, up = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, up, min(xs), max(xs), min(ys), max(ys), form), _labels(x_label, y_label)]
    for line in lines:
        places = [(across(x), up(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.dots or len(places) == 1:
            named = zip(places, line.points, strict=True)
            parts += [
                f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{at[0]:g}: {at[1]:{form}}</title>'
                "</circle>"
                for (x, y), at in named
            ]
    return _svg(WIDTH, HEIGHT, "".join(parts) + _legend(lines), f"{y_label} over {x_label}")


def bars(edges: Sequence[int], groups: Mapping[str, Sequence[int]], x_label: str, y_label: str) -> str:
    """How many there are up to each edge, a bar beside the other for each group."""
    most = max(count for counts in groups.values() for count in counts)
    up = _axis(0, most, HEIGHT - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / len(edges)
    across = _axis(0, edges[-1], LEFT, WIDTH - RIGHT)
    parts = [_grid(across, up, 0, edges[-1], 0, most, "g"), _labels(x_label, y_label)]
    for number, counts in enumerate(groups.values()):
        width = slot * 0.84 / len(groups)
        for i, count in enumerate(counts):
            x, y = LEFT + i * slot + slot * 0.08 + number * width, up(count)
            low = edges[i - 1] + 1 if i else 0
            parts.append(
                f'<rect class="bar{number}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{low} to {edges[i]} tokens: {count}</title></rect>'
            )
    lines = [Line(name, (), f"bar{number}") for number, name in enumerate(groups)]
    return _svg(WIDTH, HEIGHT, "".join(parts) + _legend(lines), f"{y_label} by {x_label}")


def heat(
    values: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    form: Callable[[float], str],
    title: str,
) -> str:
    """A cell for each (row, column), the stronger the larger; its number stands in it where there is room."""
    left, cell_height = 12 + 7.4 * max(map(len, rows)), 26
    cell = max(14.0, min(64.0, (WIDTH - left) / len(columns)))
    low, high = min(values.values()), max(values.values())
    wide = cell >= 7.4 * max(len(form(value)) for value in values.values())
    every = math.ceil(7.4 * max(map(len, columns)) / cell)
    parts = []
    for (row, column), value in values.items():
        x, y = left + columns.index(column) * cell, 24 + rows.index(row) * cell_height
        strength = 0.06 + 0.84 * ((value - low) / (high - low) if high > low else 0.5)
        parts.append(
            f'<rect class="cell" x="{x:.1f}" y="{y}" width="{cell - 2:.1f}" height="{cell_height - 2}" '
            f'fill-opacity="{strength:.3f}"><title>{escape(row)}, block {escape(column)}: {form(value)}</title></rect>'
        )
        if wide:
            parts.append(f'<text class="in" x="{x + cell / 2 - 1:.1f}" y="{y + 17}">{form(value)}</text>')
    for number, row in enumerate(rows):
        parts.append(f'<text class="row" x="{left - 8:.1f}" y="{24 + number * cell_height + 17}">{escape(row)}</text>')
    for number, column in enumerate(columns):
        if number % every == 0:
            x = left + number * cell + cell / 2
            parts.append(f'<text class="in" x="{x:.1f}" y="16">{escape(column)}</text>')
    width = math.ceil(left + len(columns) * cell)
    return _svg(width, 30 + len(rows) * cell_height, "".join(parts), title)


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / most) if points else 1
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * ((value - low) / span if high > low else 0.5)


def _grid(
    across: Callable[[float], float],
    up: Callable[[float], float],
    left: float,
    right: float,
    low: float,
    high: float,
    form: str,
) -> str:
    parts = []
    for value in ticks(low, high):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="row" x="{LEFT - 8}" y="{y + 4:.1f}">{value:{form}}</text>')
    for value in ticks(left, right, 8):
        parts.append(f'<text class="in" x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 18}">{value:g}</text>')
    return "".join(parts)


def _labels(x_label: str, y_label: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text class="in" x="{middle}" y="{HEIGHT - 4}">{escape(x_label)}</text>'
        f'<text class="start" x="0" y="14">{escape(y_label)}</text>'
    )


def _legend(lines: Sequence[Line]) -> str:
    parts, x = [], WIDTH - RIGHT
    for line in reversed(lines):
        x -= int(7.2 * len(line.name)) + 26
        parts.append(f'<rect class="key {line.style}" x="{x}" y="5" width="14" height="10"/>')
        parts.append(f'<text class="start" x="{x + 18}" y="14">{escape(line.name)}</text>')
    return "".join(parts) if len(lines) > 1 else ""


def _svg(width: int, height: int, inside: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(title)}">{inside}</svg>'
    )
