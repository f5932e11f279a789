"""Images, masks and boxes of an edit, the tokens that they cover, and the windows of a canvas."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.pipeline.regions import (
    Margins,
    box_mask,
    composite,
    first_step,
    fit_to_model,
    image_pixels,
    mask_pixels,
    pixel_region,
    seam,
    seam_radius,
    token_mask,
    windows,
)


def mask_of(*rows: str) -> torch.Tensor:
    """Returns a mask from a drawing: # is True."""
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


def pixels(channels: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def test_a_token_is_masked_when_any_of_its_pixels_is() -> None:
    mask = mask_of("......", ".....#", "......", "......", "..##..", ".#....")
    assert torch.equal(token_mask(mask, factor=2), mask_of("..#", "...", "##."))
    assert torch.equal(token_mask(mask, factor=3), mask_of(".#", "##"))
    corner = mask_of(".....", ".....", "....#")  # the last tokens cover more than the image
    assert torch.equal(token_mask(corner, factor=2), mask_of("...", "..#"))
    assert torch.equal(pixel_region(token_mask(corner, factor=2), factor=2, height=3, width=5), corner)


def test_dilation_grows_on_all_sides_and_ends_at_the_border() -> None:
    middle = mask_of(".....", ".....", "..#..", ".....", ".....")
    assert torch.equal(token_mask(middle, factor=1, dilation=1), mask_of(".....", ".###.", ".###.", ".###.", "....."))
    assert bool(token_mask(middle, factor=1, dilation=2).all())
    corner = mask_of("#....", ".....", ".....")
    assert torch.equal(token_mask(corner, factor=1, dilation=1), mask_of("##...", "##...", "....."))


def test_an_edit_skips_the_steps_that_the_released_code_skips() -> None:
    part, everything = mask_of("#."), mask_of("##")
    assert [first_step(part, num_steps=steps) for steps in (1, 4, 5, 6, 8, 12, 16)] == [0, 0, 0, 1, 1, 2, 2]
    assert first_step(everything, num_steps=12) == 0


def test_right_and_bottom_of_a_box_are_exclusive() -> None:
    assert torch.equal(box_mask((1, 0, 3, 2), height=3, width=4), mask_of(".##.", ".##.", "...."))
    assert torch.equal(box_mask(np.array([1, 0, 3, 2]), height=3, width=4), box_mask((1, 0, 3, 2), height=3, width=4))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 5, 3), "in the image, with 0 <= left < right <= 4 and 0 <= top < bottom <= 3, got '0,0,5,3'"),
        ((-1, 0, 4, 3), "in the image"),
        ((0, 2, 4, 1), "top < bottom"),
        ((0, 0, 3), "box must be left,top,right,bottom"),
    ],
)
def test_a_box_outside_the_image_or_of_another_form_is_refused(box, message) -> None:
    with pytest.raises(ValueError, match=message):
        box_mask(box, height=3, width=4)


def test_a_hard_edge_mixes_no_pixel() -> None:
    original, edited = pixels(3, 9, 7), pixels(3, 9, 7, seed=1)
    region = box_mask((2, 1, 5, 6), height=9, width=7)
    pasted = composite(original, edited, seam(region, radius=0))
    assert pasted.dtype == torch.uint8
    assert torch.equal(pasted[:, ~region], original[:, ~region])
    assert torch.equal(pasted[:, region], edited[:, region])


def test_a_soft_seam_falls_from_the_region_outwards() -> None:
    region = box_mask((0, 0, 32, 64), height=64, width=64)
    weight = seam(region, radius=4)
    row = weight[20]
    assert (row.diff() <= 0).all()
    assert (row[0], row[-1]) == (1, 0)  # far from the seam nothing is mixed
    assert 0.4 < row[31] < 0.6  # half of each at the seam
    assert 0.80 < row[27] < 0.90  # a standard deviation inside: 0.84 of a Gaussian
    assert torch.allclose(weight, row.expand(64, -1))  # nothing is lost at the border
    # The blur of the released code:
    assert [seam_radius(size) for size in (512, 256, 28, 16, 8)] == [31, 15, 0.75, 0, 0]


def read_image(image) -> torch.Tensor:
    return image_pixels(image, channels=3, name="image 7")


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path) -> None:
    colour = pixels(3, 5, 7)
    array = colour.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.save(tmp_path / "image.png")
    for given in (colour, array, picture, tmp_path / "image.png", str(tmp_path / "image.png")):
        assert torch.equal(image_pixels(given, channels=3), colour)
    grey = torch.from_numpy(np.array(picture.convert("L")))
    assert torch.equal(image_pixels(colour, channels=1)[0], grey)
    for given in (grey, grey.numpy(), grey[None], grey.numpy()[..., None], Image.fromarray(grey.numpy())):
        assert torch.equal(image_pixels(given, channels=3), grey.expand(3, -1, -1))


def test_alpha_is_composited_over_white_and_exif_is_followed(tmp_path) -> None:
    transparent = Image.new("RGBA", (3, 2), (200, 0, 0, 0))
    assert (image_pixels(transparent, channels=3) == 255).all()
    assert (image_pixels(np.array(transparent), channels=1) == 255).all()
    turned = Image.new("L", (3, 2), 9)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert image_pixels(tmp_path / "turned.png", channels=1).shape == (1, 3, 2)
    with Image.open(tmp_path / "turned.png") as picture:
        assert image_pixels(picture, channels=1).shape == (1, 3, 2)


@pytest.mark.parametrize(
    ("read", "given", "message"),
    [
        *(
            (read_image, array, "image 7 must be uint8")
            for array in (
                np.zeros((4, 4, 3), dtype=np.float32),
                np.zeros((4, 4, 5), dtype=np.uint8),
                torch.zeros(5, 4, 4, dtype=torch.uint8),
            )
        ),
        *(
            (read, Image.new(mode, (4, 4), 1), f"must have 8 bits per channel, .* mode {mode}; scale its values")
            for read in (read_image, mask_pixels)
            for mode in ("F", "I")  # white, if 1 is white: PIL would clip the values
        ),
        *(
            (mask_pixels, mask, r"mask must be \(H, W\) bool.*mask >= 128")
            for mask in (torch.ones(2, 2), np.ones((2, 2), dtype=np.uint8), torch.ones(1, 2, 2) > 0)
        ),
    ],
)
def test_arrays_and_pictures_of_another_form_are_refused(read, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(given)


def test_files_that_are_not_images_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        image_pixels(tmp_path / "nowhere.png", channels=3)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png must be a JPEG, PNG or WebP file"):
        image_pixels(tmp_path / "text.png", channels=3)


def test_pil_images_that_are_too_large_or_damaged_are_refused(tmp_path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(ValueError, match=r"image \(mask\) cannot be decoded: image file is truncated"):
        mask_pixels(Image.open(io.BytesIO(data[:-20])))
    with pytest.raises(ValueError, match=r"image \(image 2\) must have at most 64000000 pixels, got 8001 x 8000"):
        image_pixels(Image.new("1", (8001, 8000)), channels=3, name="image 2")


def test_every_form_of_a_mask_gives_the_same_pixels(tmp_path) -> None:
    mask = mask_of("#..", ".##")
    grey = Image.fromarray(np.where(mask.numpy(), 128, 127).astype(np.uint8))
    grey.save(tmp_path / "mask.png")
    one_bit = Image.fromarray(mask.numpy())
    assert one_bit.mode == "1"
    for given in (mask, mask.numpy(), grey, one_bit, one_bit.convert("RGB"), tmp_path / "mask.png"):
        assert torch.equal(mask_pixels(given), mask)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_of_a_mask_are_kept(tmp_path, mode) -> None:
    colours = [(255, 255, 255, 255), (255, 255, 255, 127), (255, 255, 255, 128), (255, 255, 255, 0), (0, 0, 0, 0)]
    colours.append((0, 0, 0, 255))
    picture = Image.new("P" if mode == "P" else "RGBA", (6, 1))
    picture.putdata(range(6) if mode == "P" else colours)
    if mode == "P":
        picture.putpalette([number for colour in colours for number in colour[:3]])
        picture.info["transparency"] = bytes(colour[3] for colour in colours)
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "mask.png")
    for given in (picture, tmp_path / "mask.png"):
        assert torch.equal(mask_pixels(given), mask_of("#.#..."))


def test_image_and_mask_are_cropped_and_resized_alike() -> None:
    image = torch.zeros(1, 8, 20, dtype=torch.uint8)
    mask = box_mask((8, 2, 12, 4), height=8, width=20)
    image[0, mask] = 255
    smaller, its_mask = fit_to_model(image, mask, image_size=4, fit=True)
    assert smaller.shape == (1, 4, 4)
    assert torch.equal(its_mask, mask_of("....", ".##.", "....", "...."))
    assert (smaller[0][its_mask] > 150).all()
    larger, its_mask = fit_to_model(image, mask, image_size=16, fit=True)
    assert torch.equal(its_mask, box_mask((4, 4, 12, 8), height=16, width=16))
    assert (larger[0][its_mask] > 100).all()


def test_a_thin_mask_is_not_lost_when_it_shrinks() -> None:
    mask = box_mask((33, 0, 34, 64), height=64, width=64)
    assert torch.equal(fit_to_model(pixels(1, 64, 64), mask, image_size=4, fit=True)[1], mask_of(*["..#."] * 4))


@pytest.mark.parametrize(
    ("box", "height", "width", "fit", "message"),
    [
        ((0, 0, 1, 1), 6, 8, False, r"image 3 must have the 8 x 8 pixels of the model, got 8 x 6; fit=True \(--fit\)"),
        ((0, 0, 1, 1), 8, 6, True, "mask of image 3 must have 8 x 6 pixels like the image, got 6 x 8"),
        (None, 6, 8, True, "mask of image 3 must not be empty"),
        ((0, 0, 1, 6), 6, 8, True, "mask of image 3 must not be empty in the central part"),
    ],
)
def test_sizes_and_masks_that_do_not_fit_are_refused(box, height, width, fit, message) -> None:
    mask = torch.zeros(height, width, dtype=torch.bool) if box is None else box_mask(box, height=height, width=width)
    with pytest.raises(ValueError, match=message):
        fit_to_model(pixels(3, 6, 8), mask, image_size=8, fit=fit, name="image 3")


def test_margins_are_clipped_to_a_height_and_a_width():
    assert Margins(left=9, right=3, up=9, down=1).at_most(2, 4) == Margins(left=4, right=3, up=2, down=1)


def filled_by(unknown: torch.Tensor, *, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Returns (top, left, unknown tokens) of each window, after checks: inside the canvas, and no token twice."""
    left, counts = unknown.clone(), []
    for window in windows(unknown, size=size):
        part = left[window.index[1:]]
        assert part.shape == size
        assert torch.equal(part, window.unknown)
        counts.append((window.top, window.left, int(part.sum())))
        part.fill_(False)
    assert not left.any()
    return counts


def test_windows_of_an_empty_canvas_advance_by_half_a_window():
    half = filled_by(torch.ones(4, 14, dtype=torch.bool), size=(4, 4))
    assert half == [(0, 0, 16), *((0, left, 8) for left in range(2, 12, 2))]


def test_windows_on_all_sides_begin_where_most_is_known():
    unknown = torch.ones(8, 8, dtype=torch.bool)
    unknown[2:6, 2:6] = False
    counts = [count for _, _, count in filled_by(unknown, size=(4, 4))]
    assert counts[:4] == [8] * 4
    assert max(counts) == 8  # half of each window is known
    assert sum(counts) == 48


@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (7, 11), (5, 5)])
def test_windows_fill_any_canvas(shape):
    filled_by(torch.ones(shape, dtype=torch.bool), size=(4, 4))
    corner = torch.ones(shape, dtype=torch.bool)
    corner[:2, :1] = False
    filled_by(corner, size=(4, 4))
