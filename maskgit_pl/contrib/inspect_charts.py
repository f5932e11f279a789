"""The HTML of an inspection page, with charts as inline SVG: no scripts, no network, for light and dark screens.

Text is escaped, and each chart has a description.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence

from maskgit_pl.errors import printable

__all__ = ["bar_chart", "embed_png", "format_html", "line_chart", "make_section", "quote"]

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px; max-width: 1180px }
body { overflow-wrap: anywhere }
h1 { font-size: 1.35em } h2 { font-size: 1.15em; border-bottom: 1px solid #8886; padding-bottom: 4px }
section > div { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0; max-width: 100% } figure.chart { width: 360px }
figcaption { font-weight: 600; margin: 4px 0 } img { max-width: 100%; height: auto; image-rendering: pixelated }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: currentColor } .grid { stroke: #8885 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 13px }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 4px }
.problem { border-left: 4px solid #d97706; padding: 2px 10px; margin: 8px 0 }
.healthy { border-left: 4px solid #2e9e6b; padding: 2px 10px; margin: 8px 0 }
"""
# The browser loads nothing and runs nothing, even if a text were not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 8, 10, 24
_MAX_POINTS = 400  # of a line: more than the chart has pixels
_COLOURS = ("#3b82c4", "#d97706", "#2e9e6b", "#b0569d", "#8a8a2e", "#c2504d")  # readable on white and on black
_LOG_FROM = 50  # ratio of the largest to the smallest value of a logarithmic axis


def quote(text: object) -> str:
    """Returns text as HTML that shows it on one line, without markup."""
    return html.escape(printable(text))


def line_chart(title: str, lines: Mapping[str, Mapping[int, float]], *, x_label: str = "step") -> str:
    """Draws values over steps. The vertical axis is logarithmic if positive values span more than a factor of 50.

    Args:
        title: Title of the chart.
        lines: Values by line and step. Non-finite values are left out.
        x_label: Name of the horizontal axis.

    Returns:
        A ``figure`` element; an empty string if there is no finite value.
    """
    points = {name: _thin({x: y for x, y in line.items() if math.isfinite(y)}) for name, line in lines.items()}
    points = {name: line for name, line in points.items() if line}
    if not points:
        return ""
    values = [y for line in points.values() for _, y in line]
    steps = [x for line in points.values() for x, _ in line]
    is_log = min(values) > 0 and max(values) > _LOG_FROM * min(values)
    scale_x, scale_y = _Scale(min(steps), max(steps)), _Scale(min(values), max(values), is_log=is_log)
    parts = [_axes(scale_x, scale_y, x_label)]
    legend = []
    for number, (name, line) in enumerate(points.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = " ".join(f"{_x(scale_x.place(x)):.1f},{_y(scale_y.place(y)):.1f}" for x, y in line)
        if len(line) == 1:
            x, y = places.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        shown = f"{quote(name)} <b>{line[-1][1]:.4g}</b>"
        legend.append(f'<span><i style="background:{colour}"></i>{shown}</span>')
    said = "; ".join(f"{printable(name)}: {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in points.items())
    return _figure(title, f"{title} over {x_label}s {min(steps)} to {max(steps)}. {said}", parts, legend)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, unit: str) -> str:
    """Draws horizontal bars with their names and values.

    Args:
        title: Title of the chart.
        bars: Name and value >= 0 of each bar, from top to bottom.
        unit: Unit of the values.

    Returns:
        A ``figure`` element; an empty string without bars.
    """
    if not bars:
        return ""
    largest = max(value for _, value in bars) or 1.0
    height, parts = 18 * len(bars) + 8, []
    for number, (name, value) in enumerate(bars):
        y, width = 4 + 18 * number, 190 * value / largest
        parts.append(
            f'<text x="112" y="{y + 11}" text-anchor="end">{quote(printable(name, limit=18))}</text>'
            f'<rect x="118" y="{y}" width="{width:.1f}" height="14" fill="{_COLOURS[0]}"/>'
            f'<text x="{122 + width:.1f}" y="{y + 11}">{value:.4g}</text>'
        )
    said = "; ".join(f"{printable(name)}: {value:.4g} {unit}" for name, value in bars)
    return _figure(f"{title} ({unit})", f"{title}. {said}", parts, [], height=height)


class _Scale:
    """A linear or logarithmic axis from ``low`` to ``high``."""

    def __init__(self, low: float, high: float, *, is_log: bool = False) -> None:
        self.low, self.high, self.is_log = low, high, is_log

    def place(self, value: float) -> float:
        """Returns the place of a value on the axis, 0 at ``low`` and 1 at ``high``."""
        low, high, value = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Returns the values that are written at the axis: both ends and the middle."""
        if self.high == self.low:
            return [self.low]
        middle = math.sqrt(self.low * self.high) if self.is_log else (self.low + self.high) / 2
        return [self.low, middle, self.high]


def _x(place: float) -> float:
    return _LEFT + place * (_WIDTH - _LEFT - _RIGHT)


def _y(place: float) -> float:
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale_x: _Scale, scale_y: _Scale, x_label: str) -> str:
    parts = []
    for value in scale_y.ticks():
        y = _y(scale_y.place(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value, anchor in zip((scale_x.low, scale_x.high), ("start", "end"), strict=True):
        x = _x(0 if anchor == "start" else 1)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{value:.0f}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{quote(x_label)}</text>')
    return "".join(parts)


def _thin(line: Mapping[int, float]) -> list[tuple[int, float]]:
    """Returns the points of a line by step, at most 400 evenly chosen ones with the first and the last."""
    points = sorted(line.items())
    if len(points) <= _MAX_POINTS:
        return points
    return [points[number * (len(points) - 1) // (_MAX_POINTS - 1)] for number in range(_MAX_POINTS)]


def _figure(title: str, description: str, parts: Sequence[str], legend: Sequence[str], *, height: int = _HEIGHT) -> str:
    label = html.escape(printable(description, limit=2000))
    return (
        f'<figure class="chart"><figcaption>{quote(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{label}">{"".join(parts)}</svg><div class="legend">{"".join(legend)}</div></figure>'
    )


def format_html(title: str, sections: Sequence[str]) -> str:
    """Returns a complete HTML document.

    Args:
        title: Title, as plain text.
        sections: Contents, as HTML; see ``make_section``.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{quote(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{quote(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def make_section(title: str, parts: Sequence[str], *, notes: Sequence[str] = ()) -> str:
    """Returns a section; an empty string if it has neither parts nor notes.

    Args:
        title: Title, as plain text.
        parts: Figures and paragraphs, as HTML.
        notes: Sentences below the title, as plain text.
    """
    shown = [part for part in parts if part]
    if not shown and not notes:
        return ""
    text = "".join(f"<p>{quote(note)}</p>" for note in notes)
    return f"<section><h2>{quote(title)}</h2>{text}<div>{''.join(shown)}</div></section>\n"


def embed_png(title: str, png: bytes, *, description: str) -> str:
    """Returns a figure with a PNG file inside of the page.

    Args:
        title: Title above the picture.
        png: The file; it must come from an own encoder, not from the run.
        description: Text for those who do not see the picture.
    """
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<figure><figcaption>{quote(title)}</figcaption>"
        f'<img alt="{quote(description)}" src="data:image/png;base64,{data}"></figure>'
    )
