import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.imaging import decoding_filmstrip, decoding_frames, save_gif, select_steps
from tests.imaging.decoding_steps import STEPS, random_images

GREY = (176, 176, 176)


def shares(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    return float((np.asarray(picture) == colour).all(-1).mean())


def test_frames_grey_out_masked_tokens_and_mark_those_kept_at_the_step() -> None:
    images = [torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)] * 2  # nothing grey but the masked cells
    first, last = decoding_frames(STEPS, images, grid=(4, 4), captions=["a", "b"])
    assert first.size == last.size
    panels = 2 * 2 * 168**2 / (first.width * first.height)
    assert shares(first, GREY) == pytest.approx(panels / 4, rel=0.12)  # half of the upper panels, less cell borders
    assert shares(last, GREY) == 0
    assert shares(last, (230, 90, 20)) == pytest.approx(shares(first, (230, 90, 20)), rel=0.01)


def test_the_animation_has_a_frame_a_step(tmp_path) -> None:
    frames = decoding_frames(STEPS, [random_images(2, 3)] * 2, grid=(4, 4))
    save_gif(frames, tmp_path / "decoding.gif")
    with Image.open(tmp_path / "decoding.gif") as animation:
        assert animation.n_frames == 2
        assert animation.size == frames[0].size
    page = decoding_filmstrip(STEPS, [random_images(2, 3)] * 2, grid=(4, 4), row=1)
    assert page.width > 2 * 168
    assert page.height > 4 * 168


def test_a_filmstrip_shows_the_mask_the_confidence_and_what_is_masked_again() -> None:
    was, still = torch.zeros(1, 16, dtype=torch.bool), torch.zeros(1, 16, dtype=torch.bool)
    was[0, :4], still[0, 3:6] = True, True  # tokens 0 to 2 are kept, 3 stays masked, 4 and 5 are masked again
    confidence = torch.linspace(0, 0.5, 16)[None]
    confidence[0, 3] = 0.4  # the highest that was drawn; the brighter ones were given
    step = DecodingStep(0, torch.zeros(1, 16, dtype=torch.int64), was, still, torch.zeros(1, 16), confidence)
    page = np.asarray(decoding_filmstrip([step], [random_images(1)], grid=(4, 4)))
    left, top = page.shape[1] - 8 - 168, 8 + 14 + 8

    def centre(panel: int, token: int) -> tuple[int, ...]:
        return tuple(page[top + panel * 172 + token // 4 * 42 + 21, left + token % 4 * 42 + 21])

    def frame(token: int) -> tuple[int, ...]:
        return tuple(page[top + 2 * 172 + token // 4 * 42, left + token % 4 * 42])

    assert [centre(0, token) == GREY for token in range(16)] == was[0].tolist()
    assert [centre(2, token) == GREY for token in range(16)] == still[0].tolist()
    assert centre(1, 0) == (68, 1, 84)  # viridis from its dark end
    assert centre(1, 3) == centre(1, 15) == (253, 231, 37)  # to its bright one
    assert [frame(token) for token in (0, 4)] == [(230, 90, 20), (40, 110, 220)]


def test_of_many_steps_a_filmstrip_shows_twelve_the_first_and_the_last_among_them() -> None:
    many = [dataclasses.replace(STEPS[0], step=number) for number in range(30)]
    page = decoding_filmstrip(many, [random_images(2)] * 30, grid=(4, 4))
    assert 12 * 168 < page.width < 13 * 172 + 100


def test_of_many_steps_some_are_shown_the_first_and_the_last_among_them() -> None:
    many = [dataclasses.replace(STEPS[0], step=number) for number in range(256)]
    for kind, most in (("animation", 64), ("filmstrip", 12)):
        shown = [step.step for step in select_steps(many, kind)]
        assert len(shown) == len(set(shown)) == most
        assert (shown[0], shown[-1]) == (0, 255)
        assert shown == sorted(shown)
        assert select_steps(STEPS, kind) == STEPS
