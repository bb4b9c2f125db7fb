"""SVG drawings of a migration plan; colours are the page's own."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH = 640
_FILLS = ("var(--a)", "var(--b)", "#7a9e4b", "#9468b5", "#c0504d", "#4aa3a3", "#b8a13a", "#8a8f98", "#d48fb1")


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def _line(x0: float, y0: float, x1: float, y1: float, stroke: str, more: str = "") -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{stroke}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>'


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """One line a row: name, value, low and high of its interval; a dashed line at 1."""
    finite = [v for _, *values in rows for v in values if math.isfinite(v)]
    low, high = min(0.9, *finite) * 0.97, min(max(1.1, *finite) * 1.03, 3.0)
    left, right, step = 210.0, WIDTH - 60.0, 30.0

    def x(value: float) -> float:
        value = min(max(value, low), high)
        return left + (right - left) * math.log(value / low) / math.log(high / low)

    height = 58 + step * len(rows)
    parts = [_line(x(1), 8, x(1), height - 44, "var(--soft)", ' stroke-dasharray="4 3"')]
    for tick in (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0):
        if low <= tick <= high:
            parts.append(_text(x(tick), height - 26, f"{tick:g}×", "middle", soft=True))
    parts.append(_text((left + right) / 2, height - 6, "speedup, 90% interval (logarithmic)", "middle", soft=True))
    for index, (name, value, lo, hi) in enumerate(rows):
        y = 22 + step * index
        parts.append(_text(left - 12, y + 4, name, "end"))
        parts.append(f'<line x1="{x(lo):.1f}" x2="{x(hi):.1f}" y1="{y}" y2="{y}" stroke="var(--a)" stroke-width="3"/>')
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="5" fill="var(--b)"/>')
        shown = f"{value:.2f}×" if math.isfinite(value) else "∞"
        parts.append(_text(right + 8, y + 4, shown))
    return _svg(height, parts, label)


def stacks(
    bars: Mapping[str, Mapping[str, float]], unit: str, label: str, limit: tuple[str, float] | None = None
) -> str:
    """Stacked bars with one legend; `limit` draws a line with its name."""
    kinds = list(dict.fromkeys(kind for parts in bars.values() for kind in parts))
    total = max([sum(parts.values()) for parts in bars.values()] + ([limit[1]] if limit else []))
    left, right = 110.0, WIDTH - 90.0
    scale = (right - left) / total if total else 1.0
    parts = []
    for index, (name, values) in enumerate(bars.items()):
        y, x = 12 + 40 * index, left
        parts.append(_text(left - 10, y + 18, name, "end"))
        for kind, value in values.items():
            width = value * scale
            fill = _FILLS[kinds.index(kind) % len(_FILLS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0):.1f}" height="26" fill="{fill}">'
                f"<title>{html.escape(kind)}: {value:.4g} {unit}</title></rect>"
            )
            x += width
        parts.append(_text(x + 6, y + 18, f"{sum(values.values()):.4g} {unit}"))
    bottom = 12 + 40 * len(bars)
    if limit:
        at = left + limit[1] * scale
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{bottom}" stroke="var(--bad)" stroke-dasharray="5 3"/>'
        )
        parts.append(_text(at, bottom + 10, limit[0], "end", soft=True))
        bottom += 14
    for index, kind in enumerate(kinds):
        x, y = left + 180 * (index % 3), bottom + 14 + 18 * (index // 3)
        parts.append(f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{_FILLS[index % len(_FILLS)]}"/>')
        parts.append(_text(x + 15, y, kind, soft=True))
    return _svg(bottom + 24 + 18 * ((len(kinds) - 1) // 3), parts, label)


def scatter(
    points: Sequence[tuple[float, float, float, float]], target: tuple[float, float, float, float], label: str
) -> str:
    """Measured speedups (N, value, low, high) against model size, and the estimate at the target's."""
    everything = [*points, target]
    xs = [math.log10(p[0]) for p in everything]
    values = [v for p in everything for v in p[1:] if math.isfinite(v)]
    x0, x1 = min(xs) - 0.15, max(xs) + 0.15
    y0, y1 = min(0.9, *values) - 0.03, min(max(1.1, *values) + 0.05, 2.2)
    left, right, top, bottom = 78.0, WIDTH - 20.0, 12.0, 250.0

    def position(n: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * (math.log10(n) - x0) / (x1 - x0)
        return x, bottom - (bottom - top) * (min(max(value, y0), y1) - y0) / (y1 - y0)

    parts = []
    for step in range(math.ceil(y0 * 10), math.floor(y1 * 10) + 1):
        _, y = position(10**x0, step / 10)
        dash = ' stroke-dasharray="4 3"' if step == 10 else ' opacity="0.35"'
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--soft)"{dash}/>')
        parts.append(_text(left - 8, y + 4, f"{step / 10:.1f}×", "end", soft=True))
    for n, name in (
        (1e8, "100M"),
        (3e8, "300M"),
        (1e9, "1B"),
        (3e9, "3B"),
        (1e10, "10B"),
        (3e10, "30B"),
        (1e11, "100B"),
        (1e12, "1T"),
    ):
        if x0 <= math.log10(n) <= x1:
            parts.append(_text(position(n, y0)[0], bottom + 18, name, "middle", soft=True))
    for index, (n, value, low, high) in enumerate(everything):
        fill = "var(--b)" if index == len(points) else "var(--a)"
        x, y = position(n, value)
        parts.append(_line(x, position(n, low)[1], x, position(n, high)[1], fill, ' stroke-width="2"'))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}"/>')
    middle = (top + bottom) / 2
    parts.append(_text((left + right) / 2, bottom + 38, "parameters without embeddings", "middle", soft=True))
    parts.append(
        f'<text x="16" y="{middle:.0f}" text-anchor="middle" class="soft" transform="rotate(-90 16 {middle:.0f})">'
        "token speedup</text>"
    )
    return _svg(bottom + 48, parts, label)
