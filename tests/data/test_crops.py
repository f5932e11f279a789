"""Crops and resizing: the shape of the result and the place of the crop."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.data.images import crop_to_shape, fit_image

SIZES = [8, (8, 16), (24, 40), (7, 3), (1, 9)]


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_that_fits_is_untouched(size, channels):
    image = torch.randint(0, 256, (channels, *size), dtype=torch.uint8)
    assert torch.equal(fit_image(image, image_size=size, crop=(0.9, 0.9)), image)


def test_a_crop_cuts_the_part_that_was_asked_for():
    image = torch.arange(4 * 10, dtype=torch.uint8).reshape(1, 4, 10)
    assert torch.equal(fit_image(image, image_size=4, crop=None), image[:, :, 3:7])
    assert torch.equal(fit_image(image, image_size=4, crop=(0.5, 0.0)), image[:, :, :4])
    assert torch.equal(fit_image(image, image_size=4, crop=(0.5, 1 - 2**-24)), image[:, :, 6:])
    assert torch.equal(fit_image(image, image_size=(4, 8), crop=None), image[:, :, 1:9])
    assert torch.equal(fit_image(image, image_size=(2, 10), crop=(1 - 2**-24, 0.0)), image[:, 2:])


@pytest.mark.parametrize("shape", [(40, 60), (5, 9), (1, 300), (300, 1), (24, 40)])
@pytest.mark.parametrize("size", SIZES)
def test_the_crop_is_the_largest_part_of_the_shape(shape, size):
    part = crop_to_shape(torch.zeros(1, *shape), image_size=size)
    rows, columns = (size, size) if isinstance(size, int) else size
    (height, width), (high, wide) = shape, part.shape[-2:]
    assert (high, wide) == (height, max(1, wide)) or (high, wide) == (max(1, high), width)
    # Within half a pixel of the ratio, unless the side would vanish.
    assert min(abs(high - wide * rows / columns), abs(wide - high * columns / rows)) <= 0.5 or 1 in (high, wide)


@pytest.mark.parametrize("shape", [(40, 60), (5, 9)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_sizes_are_resized(shape, size, channels):
    image = torch.full((channels, *shape), 77, dtype=torch.uint8)
    resized = fit_image(image, image_size=size, crop=None)
    assert resized.shape == (channels, *((size, size) if isinstance(size, int) else size))
    assert resized.unique().tolist() == [77]


def test_resampling_of_a_part_that_is_not_square_is_pil_s_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels[:, 9:81]).resize((30, 25), Image.Resampling.BICUBIC), dtype=int)
    made = fit_image(torch.from_numpy(pixels).permute(2, 0, 1), image_size=(25, 30), crop=None)
    assert np.abs(made.permute(1, 2, 0).numpy() - expected).max() <= 1
