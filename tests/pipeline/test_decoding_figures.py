""""""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.pipeline.decoding_figures import (
    StepRecorder,
    confidence_panel,
    decoding_filmstrip,
    decoding_frames,
    number_windows,
    select_steps,
    token_panel,
)
from maskgit_pl.pipeline.grids import NEW, REMASKED, REQUESTED, save_gif
from tests.pipeline.decoding_steps import STEPS, random_images, step

GREY = (176, 176, 176)


def shares(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    return float((np.asarray(picture) == colour).all(-1).mean())


def shown(steps: list[DecodingStep], images: list[torch.Tensor], **options: object) -> dict[str, Any]:
    """Returns the arguments of both figures."""
    return {"steps": steps, "images": images, "token_size": 7, "windows": number_windows(steps), "title": "", **options}


def test_frames_grey_out_masked_tokens_and_mark_those_kept_at_the_step() -> None:
    images = [torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)] * 2  # nothing grey but the masked cells
    first, last = decoding_frames(**shown(STEPS, images), num_steps=2, captions=["a", "b"])
    assert first.size == last.size
    panels = 2 * 2 * 168**2 / (first.width * first.height)
    # Half of the upper panels, less cell borders; and the square of the legend.
    square = 14**2 / (first.width * first.height)
    assert shares(first, GREY) == pytest.approx(panels / 4, rel=0.12)
    assert shares(last, GREY) == pytest.approx(square, rel=0.05)  # a pixel of the text may be as grey
    assert shares(last, NEW) == pytest.approx(shares(first, NEW), rel=0.01)


def test_the_animation_has_a_frame_a_step(tmp_path) -> None:
    frames = decoding_frames(**shown(STEPS, [random_images(2, 3)] * 2), num_steps=2)
    save_gif(frames, tmp_path / "decoding.gif")
    with Image.open(tmp_path / "decoding.gif") as animation:
        assert animation.n_frames == 2
        assert animation.size == frames[0].size
    page = decoding_filmstrip(**shown(STEPS, [random_images(2, 3)] * 2), row=1)
    assert page.width > 2 * 168
    assert page.height > 4 * 168


def corrected() -> DecodingStep:
    """A step that keeps tokens 0 to 2, leaves 3 masked and masks 4 and 5 again; tokens from 6 on are given."""
    was, still = torch.zeros(1, 16, dtype=torch.bool), torch.zeros(1, 16, dtype=torch.bool)
    was[0, :4], still[0, 3:6] = True, True
    confidence = torch.linspace(0, 0.5, 16)[None]
    confidence[0, 3] = 0.4  # the highest that was drawn
    confidence[0, 6:] = 1.0
    return DecodingStep(0, torch.zeros(1, 16, dtype=torch.int64), was, still, torch.zeros(1, 16), confidence)


def test_a_filmstrip_shows_the_mask_the_confidence_and_what_is_masked_again() -> None:
    step = corrected()
    picture = decoding_filmstrip(**shown([step], [random_images(1)]))
    page = np.asarray(picture)
    left = 8 + 8 + math.ceil(ImageFont.load_default(14).getlength("confidence"))
    top = 22 + 8 + 14 + 8  # below the head line

    def centre(panel: int, token: int) -> tuple[int, ...]:
        return tuple(page[top + panel * 172 + token // 4 * 42 + 21, left + token % 4 * 42 + 21])

    def frame(token: int) -> tuple[int, ...]:
        return tuple(page[top + 2 * 172 + token // 4 * 42, left + token % 4 * 42])

    assert [centre(0, token) == GREY for token in range(16)] == step.was_masked[0].tolist()
    assert [centre(2, token) == GREY for token in range(16)] == step.still_masked[0].tolist()
    assert centre(1, 0) == (68, 1, 84)  # viridis from its dark end
    assert centre(1, 3) == (253, 231, 37)  # to its bright one
    assert centre(1, 6) == centre(1, 15) == (255, 255, 255)  # given tokens have no confidence
    assert [frame(token) for token in (0, 4)] == [NEW, REMASKED]


def test_a_filmstrip_has_a_legend_of_what_occurs_in_it() -> None:
    again = np.asarray(decoding_filmstrip(**shown([corrected()], [random_images(1)])))
    plain = np.asarray(decoding_filmstrip(**shown(STEPS, [random_images(2)] * 2)))
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[:14] = True
    edit = np.asarray(decoding_filmstrip(**shown(STEPS, [random_images(2)] * 2, requested=mask)))

    def has(page: np.ndarray, color: tuple[int, int, int]) -> bool:
        return bool((page[-110:] == color).all(-1).any())

    assert [has(page, REMASKED) for page in (again, plain, edit)] == [True, False, False]
    assert [has(page, REQUESTED) for page in (again, plain, edit)] == [False, False, True]
    assert all(has(page, color) for page in (again, plain, edit) for color in (GREY, NEW, (68, 1, 84), (253, 231, 37)))
    assert (edit[:-110] == REQUESTED).all(-1).any()  # and the outline itself


def test_the_outline_of_an_edit_is_the_edge_of_its_pixels() -> None:
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[4:10, 6:20] = True
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    done = replace(STEPS[1], was_masked=torch.zeros(2, 16, dtype=torch.bool))
    page = (np.asarray(token_panel(done, 0, white, 7, requested=mask)) == REQUESTED).all(-1)
    rows, columns = page.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4 * 6, 10 * 6 - 1, 6 * 6, 20 * 6 - 1)
    assert not page[4 * 6 + 2 : 10 * 6 - 2, 6 * 6 + 2 : 20 * 6 - 2].any()


def test_the_last_tokens_of_an_image_that_they_do_not_fill_are_cut_off() -> None:
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    masked = (torch.arange(16) == 5).expand(2, -1)
    step = replace(STEPS[0], was_masked=masked, still_masked=masked)
    confidence = torch.tensor([0.0, 1.0] * 8)
    for size in (7, 8):
        rows, columns = (np.asarray(token_panel(step, 0, white, size)) == GREY).all(-1).nonzero()
        # Between the borders of the second token of the second row.
        assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (6 * size + 1, 12 * size - 2)
        panel = confidence_panel(confidence, white, size, undrawn=torch.zeros(16, dtype=torch.bool))
        first = np.asarray(panel)[3]
        assert panel.size == (168, 168)
        assert ((first[1:] != first[:-1]).any(-1).nonzero()[0] + 1).tolist() == [6 * size, 12 * size, 18 * size]


def test_a_wide_canvas_has_a_row_for_each_step_of_its_windows() -> None:
    steps = STEPS * 3
    assert number_windows(steps) == [1, 1, 2, 2, 3, 3]
    images = [torch.zeros(2, 1, 28, 112, dtype=torch.uint8)] * 6
    page = decoding_filmstrip(**shown(steps, images, token_size=14))
    assert 4 * 3 * 112 < page.width < 5 * 3 * 112
    assert 6 * 3 * 28 < page.height < 6 * 3 * 28 + 120


def test_of_many_steps_some_are_shown_the_first_and_the_last_among_them() -> None:
    for kind, most in (("animation", 64), ("filmstrip", 12)):
        numbers = select_steps(256, kind)
        assert len(numbers) == len(set(numbers)) == most
        assert (numbers[0], numbers[-1]) == (0, 255)
        assert numbers == sorted(numbers)
        assert select_steps(2, kind) == [0, 1]


ALL = list(range(16))


def test_the_first_images_of_the_first_batch_are_recorded_to_the_end() -> None:
    record = StepRecorder(max_images=2)
    for each in (step(0, ALL, ALL[:8], 3), step(1, ALL[:8], [], 3), step(0, ALL, [], 3), step(0, ALL, [], 1)):
        record(each)
    assert [(each.step, len(each.tokens)) for each in record.steps] == [(0, 2), (1, 2)]


def test_a_batch_of_another_size_is_not_mixed_in() -> None:
    record = StepRecorder()
    for each in (step(0, ALL, ALL[:8], 3), step(0, ALL, ALL[:8], 1), step(1, ALL[:8], [], 3)):
        record(each)
    assert [len(each.tokens) for each in record.steps] == [3, 3]
