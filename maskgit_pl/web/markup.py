"""The HTML of pictures: figures with a text for screen readers, a color bar, tables of counts.

Pictures are inside the HTML as data, so that the page loads no file. All text is escaped.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from maskgit_pl.pipeline.grids import viridis
from maskgit_pl.text import printable

if TYPE_CHECKING:
    from PIL import Image

    from maskgit_pl.web.frames import Frame

__all__ = [
    "color_bar",
    "counts_table",
    "figure",
    "figures",
    "frame_figures",
    "legend",
    "message",
    "plot",
    "schedule_heading",
    "strip",
]

_LEGEND = {
    "masked": "masked",
    "again": "tokens that are generated",
    "new": "new",
    "remasked": "masked again",
    "requested": "requested pixels",
    "undrawn": "no confidence: given, or not drawn yet",
}
_STOPS = 11  # colors of the bar
_DRAWING = 300  # pixels from which a picture is shown smoothed


def figure(picture: Image.Image, *, alt: str, caption: str, kind: str = "panel") -> str:
    """Returns a picture with a caption.

    Args:
        picture: The picture.
        alt: Description for screen readers.
        caption: Text below the picture.
        kind: Class of the style sheet: ``panel``, ``wide`` or ``thumb``.
    """
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    # Small pictures are shown with visible pixels; drawings have thin lines, which need smoothing.
    style = "pixels" if max(picture.size) < _DRAWING else "smooth"
    image = f'<img class="{style}" src="{_data("image/png", stream.getvalue())}" alt="{_text(alt)}">'
    return f'<figure class="{kind}">{image}<figcaption>{_text(caption)}</figcaption></figure>'


def figures(parts: Iterable[str], *, title: str = "") -> str:
    """Returns figures side by side, with a title above them; they wrap where the page is narrow."""
    heading = message(title) if title else ""
    return f'{heading}<div class="figures">{"".join(parts)}</div>'


def frame_figures(frame: Frame, *, title: str = "") -> str:
    """Returns the pictures of a decoding step with its settings, its counts, a legend and a color bar.

    Args:
        frame: Pictures of the step.
        title: Text before the counts, such as the name of a setting.
    """
    caption, kind = f"{title}{frame.caption}", "wide" if frame.is_wide else "panel"
    tokens = figure(frame.tokens, alt=f"Tokens. {caption}", caption="tokens", kind=kind)
    tokens = tokens.replace("</figcaption>", f"</figcaption>{legend(frame.legend)}")
    confidence = figure(frame.confidence, alt=f"Confidence of each token. {caption}", caption="confidence", kind=kind)
    confidence = confidence.replace(
        "</figcaption>", f"</figcaption>{color_bar()}{legend(['undrawn'] * frame.has_undrawn)}"
    )
    image = figure(frame.image, alt=f"Image of all tokens. {caption}", caption="image of all tokens", kind=kind)
    return f'{message(caption)}<p class="settings">{_text(frame.title)}</p>{figures([tokens, confidence, image])}'


def legend(names: Sequence[str]) -> str:
    """Returns the legend of a picture of tokens: ``names`` are keys of its entries, none for no legend."""
    if not names:
        return ""
    entries = "".join(f'<li><span class="{name}" aria-hidden="true"></span>{_LEGEND[name]}</li>' for name in names)
    return f'<ul class="legend">{entries}</ul>'


def color_bar() -> str:
    """Returns the color bar of the confidence: viridis from 0 to 1."""
    stops = ", ".join(f"rgb{color}" for color in viridis([stop / (_STOPS - 1) for stop in range(_STOPS)]))
    bar = f'<div style="background: linear-gradient(to right, {stops})"></div>'
    label = "Color bar of the confidence, from dark (0) to bright (1)"
    ends = "<p><span>0</span><span>0.5</span><span>1</span></p>"
    return f'<div class="bar" role="img" aria-label="{label}">{bar}{ends}</div>'


def plot(picture: bytes, *, alt: str, caption: str = "", kind: str = "image/svg+xml") -> str:
    """Returns a plot in the format ``kind``, with a description for screen readers and a caption."""
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure class="plot"><img src="{_data(kind, picture)}" alt="{_text(alt)}">{below}</figure>'


def strip(parts: Iterable[str], *, label: str) -> str:
    """Returns figures in one row that scrolls sideways, by keyboard too."""
    return f'<div class="strip" role="region" tabindex="0" aria-label="{_text(label)}">{"".join(parts)}</div>'


def counts_table(counts: Mapping[str, Sequence[int]]) -> str:
    """Returns a table of the tokens that each mask schedule keeps at each step."""
    steps = max(map(len, counts.values()))
    head = "".join(f'<th scope="col">{step}</th>' for step in range(1, steps + 1))
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{count}</td>" for count in row)}</tr>'
        for name, row in counts.items()
    )
    caption = "<caption>Tokens kept at each step</caption>"
    table = f'<table class="counts">{caption}<thead><tr><th scope="col">step</th>{head}</tr></thead>{rows}</table>'
    return strip([table], label="Tokens kept at each step, for each mask schedule")


def schedule_heading(name: str, formula: str) -> str:
    """Returns the heading of a mask schedule: its name and its formula."""
    return f"<h3>{_text(name)} <small>{_text(formula)}</small></h3>"


def code(label: str, line: str) -> str:
    """Returns a line of code with a label; a click selects all of it."""
    text = f'<pre tabindex="0" role="textbox" aria-readonly="true" aria-label="{_text(label)}">{_text(line)}</pre>'
    return f'<div class="code"><p aria-hidden="true">{_text(label)}</p>{text}</div>'


def message(text: str) -> str:
    """Returns a line of text that screen readers announce."""
    return f'<p class="step" role="status">{_text(text)}</p>'


def _text(text: str) -> str:
    return escape(printable(text, limit=None), quote=True)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
