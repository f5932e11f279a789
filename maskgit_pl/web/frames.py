"""The pictures of a decoding step, as the page shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskgit_pl.pipeline.decoding_figures import confidence_panel, number_windows, token_panel, undrawn_tokens
from maskgit_pl.pipeline.grids import enlarge, panel_scale
from maskgit_pl.pipeline.imaging_pixels import to_pil

if TYPE_CHECKING:
    from PIL import Image

    from maskgit_pl.pipeline.display import Recording

__all__ = ["Frame", "draw_frame"]

_SIZE = 320  # pixels of the longer edge of a panel
_WIDE = 2  # width / height from which a picture takes the whole width of the page


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


def _describe(recording: Recording, place: int) -> str:
    """Returns the number of a step and the counts of its tokens."""
    step, window = recording.steps[place], number_windows(recording.steps[: place + 1])[-1]
    still, was = int(step.still_masked[0].sum()), int(step.was_masked[0].sum())
    decided = f"{step.still_masked.shape[1] - still} of {step.still_masked.shape[1]} tokens decided"
    where = f"Window {window}, step" if window > 1 else "Step"
    return f"{where} {step.step + 1} of {recording.decoding.num_steps}: {decided}, {was - still} in this step"
