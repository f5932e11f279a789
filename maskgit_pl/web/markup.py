"""The HTML of the page: the pictures of a decoding step with their legends, plots, tables of counts and lines of code.

Pictures are inside the HTML as data, so that the page loads no file; they have a text for screen readers. All text is
escaped.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from maskgit_pl.errors import printable
from maskgit_pl.pipeline.display import confidence_panel, number_windows, token_panel, undrawn_tokens
from maskgit_pl.pipeline.grids import enlarge, panel_scale, to_pil, viridis

if TYPE_CHECKING:
    from PIL import Image

    from maskgit_pl.pipeline.display import Recording

__all__ = [
    "Frame",
    "counts_table",
    "draw_frame",
    "figure",
    "figures",
    "frame_figures",
    "legend",
    "message",
    "plot",
    "schedule_heading",
    "strip",
]

_SIZE = 320  # pixels of the longer edge of a panel
_WIDE = 2  # width / height from which a picture takes the whole width of the page
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


@dataclass(frozen=True)
class Frame:
    """The pictures of one decoding step.

    Args:
        title: Class, seed and settings of the decoding.
        caption: Number of the step, and counts of its tokens.
        tokens: The image with masked tokens in grey, and new ones in a frame.
        confidence: Confidence of each token, from dark (0) to bright (1).
        image: The image of all tokens of the step.
        legend: Entries of the legend of the tokens, among ``masked``, ``new``, ``remasked`` and ``requested``.
        is_wide: True for pictures that take the whole width of the page.
        has_undrawn: True if tokens have no confidence, because they are given or not drawn yet.
    """

    title: str
    caption: str
    tokens: Image.Image
    confidence: Image.Image
    image: Image.Image
    legend: tuple[str, ...]
    is_wide: bool
    has_undrawn: bool


def draw_frame(recording: Recording, number: int) -> Frame:
    """Draws a step of the first image of a recording.

    Args:
        recording: At least one step.
        number: Number of the step, counted from 1. One out of range gives the nearest step.
    """
    place = min(max(1, number), len(recording.steps)) - 1
    step, image, token_size = recording.steps[place], recording.images_at(place)[0], recording.token_pixels
    undrawn = undrawn_tokens(step, recording.steps[0])[0]
    legend = ["masked", "new"]
    if bool((step.still_masked & ~step.was_masked).any()):
        legend.append("remasked")
    if recording.requested is not None:
        legend.append("requested")
    is_wide = image.shape[-1] >= _WIDE * image.shape[-2]
    return Frame(
        recording.title,
        _describe(recording, place),
        token_panel(step, 0, image, token_size, size=_SIZE, requested=recording.requested),
        confidence_panel(step.confidence[0], image, token_size, undrawn=undrawn, size=_SIZE),
        enlarge(image, panel_scale(image, _SIZE)) if is_wide else to_pil(image),
        tuple(legend),
        is_wide,
        bool(undrawn.any()),
    )


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
        "</figcaption>", f"</figcaption>{_color_bar()}{legend(['undrawn'] * frame.has_undrawn)}"
    )
    image = figure(frame.image, alt=f"Image of all tokens. {caption}", caption="image of all tokens", kind=kind)
    return f'{message(caption)}<p class="settings">{_text(frame.title)}</p>{figures([tokens, confidence, image])}'


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


def legend(names: Sequence[str]) -> str:
    """Returns the legend of a picture of tokens: ``names`` are keys of its entries, none for no legend."""
    if not names:
        return ""
    entries = "".join(f'<li><span class="{name}" aria-hidden="true"></span>{_LEGEND[name]}</li>' for name in names)
    return f'<ul class="legend">{entries}</ul>'


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


def _describe(recording: Recording, place: int) -> str:
    """Returns the number of a step and the counts of its tokens."""
    step, window = recording.steps[place], number_windows(recording.steps[: place + 1])[-1]
    still, was = int(step.still_masked[0].sum()), int(step.was_masked[0].sum())
    decided = f"{step.still_masked.shape[1] - still} of {step.still_masked.shape[1]} tokens decided"
    where = f"Window {window}, step" if window > 1 else "Step"
    return f"{where} {step.step + 1} of {recording.decoding.num_steps}: {decided}, {was - still} in this step"


def _color_bar() -> str:
    """Returns the color bar of the confidence: viridis from 0 to 1."""
    stops = ", ".join(f"rgb{color}" for color in viridis([stop / (_STOPS - 1) for stop in range(_STOPS)]))
    bar = f'<div style="background: linear-gradient(to right, {stops})"></div>'
    label = "Color bar of the confidence, from dark (0) to bright (1)"
    ends = "<p><span>0</span><span>0.5</span><span>1</span></p>"
    return f'<div class="bar" role="img" aria-label="{label}">{bar}{ends}</div>'


def _text(text: str) -> str:
    return escape(printable(text, limit=None), quote=True)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
