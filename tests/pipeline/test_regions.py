import io
import re

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
    parse_box,
    pixel_region,
    seam,
    seam_radius,
    token_mask,
    windows,
)
from tests.hostile_images import REFUSED, SPECIAL, write_refused


def mask_of(*rows: str) -> torch.Tensor:
    """A mask as a picture: # is True."""
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


def pixels(channels: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


# From pixels to tokens


def test_a_token_is_masked_when_any_of_its_pixels_is() -> None:
    mask = mask_of(
        "......",
        ".....#",
        "......",
        "......",
        "..##..",
        ".#....",
    )
    assert torch.equal(token_mask(mask, factor=2), mask_of("..#", "...", "##."))
    assert torch.equal(token_mask(mask, factor=3), mask_of(".#", "##"))


def test_the_last_tokens_may_cover_more_than_the_image() -> None:
    mask = mask_of(".....", ".....", "....#")
    assert torch.equal(token_mask(mask, factor=2), mask_of("...", "..#"))
    region = pixel_region(token_mask(mask, factor=2), factor=2, height=3, width=5)
    assert torch.equal(region, mask)


def test_dilation_goes_to_all_sides_and_ends_at_the_border() -> None:
    middle = mask_of(".....", ".....", "..#..", ".....", ".....")
    assert torch.equal(token_mask(middle, factor=1, dilation=1), mask_of(".....", ".###.", ".###.", ".###.", "....."))
    for dilation in (2, 65536):
        assert bool(token_mask(middle, factor=1, dilation=dilation).all())
    corner = mask_of("#....", ".....", ".....")
    assert torch.equal(token_mask(corner, factor=1, dilation=1), mask_of("##...", "##...", "....."))
    assert torch.equal(token_mask(corner, factor=1, dilation=0), corner)


def test_an_edit_begins_at_the_released_step_and_a_generation_at_the_first() -> None:
    part, everything = mask_of("#."), mask_of("##")
    assert [first_step(part, num_steps=steps) for steps in (1, 4, 5, 6, 8, 12, 16)] == [0, 0, 0, 1, 1, 2, 2]
    assert first_step(everything, num_steps=12) == 0


# Boxes


def test_a_box_is_left_top_right_bottom_without_the_last_ones() -> None:
    assert torch.equal(box_mask((1, 0, 3, 2), height=3, width=4), mask_of(".##.", ".##.", "...."))
    assert box_mask((0, 0, 4, 3), height=3, width=4).all()
    assert torch.equal(box_mask(np.array([1, 0, 3, 2]), height=3, width=4), box_mask((1, 0, 3, 2), height=3, width=4))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 5, 3), "must lie in the image, with 0 <= left < right <= 4 and 0 <= top < bottom <= 3, got 0,0,5,3"),
        ((0, 0, 4, 4), "must lie in the image"),
        ((-1, 0, 4, 3), "must lie in the image"),
        ((0, -1, 4, 3), "must lie in the image"),
        ((2, 0, 2, 3), "left < right"),
        ((0, 2, 4, 1), "top < bottom"),
        ((0, 0, 4), "must have four integers left,top,right,bottom, got"),
        ((0, 0, 4.5, 3), "must have four integers"),
        ((0, 0, True, 3), "must have four integers"),
    ],
)
def test_a_box_that_is_none_is_refused(box, message) -> None:
    with pytest.raises(ValueError, match=message):
        box_mask(box, height=3, width=4)


# Putting the result back


def test_a_hard_edge_takes_every_pixel_from_the_one_or_the_other() -> None:
    original, edited = pixels(3, 9, 7), pixels(3, 9, 7, seed=1)
    region = box_mask((2, 1, 5, 6), height=9, width=7)
    made = composite(original, edited, seam(region, radius=0))
    assert made.dtype == torch.uint8
    assert torch.equal(made[:, ~region], original[:, ~region])
    assert torch.equal(made[:, region], edited[:, region])


def test_a_soft_seam_falls_from_the_region_outwards() -> None:
    region = box_mask((0, 0, 32, 64), height=64, width=64)
    weight = seam(region, radius=4)
    row = weight[20]
    assert (row.diff() <= 0).all()
    assert (row[0], row[-1]) == (1, 0)  # far from the seam nothing is mixed
    assert 0.4 < row[31] < 0.6  # half of each at the seam
    assert 0.80 < row[27] < 0.90  # a standard deviation inside: 0.84 of a Gaussian
    assert torch.allclose(weight, row.expand(64, -1))  # nothing is lost at the border


def test_the_released_blur() -> None:
    assert [seam_radius(size) for size in (512, 256, 28, 16, 8)] == [31, 15, 0.75, 0, 0]


# What a user gives


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


def test_alpha_lies_over_white_and_exif_is_followed(tmp_path) -> None:
    see_through = Image.new("RGBA", (3, 2), (200, 0, 0, 0))
    assert (image_pixels(see_through, channels=3) == 255).all()
    assert (image_pixels(np.array(see_through), channels=1) == 255).all()
    turned = Image.new("L", (3, 2), 9)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert image_pixels(tmp_path / "turned.png", channels=1).shape == (1, 3, 2)
    with Image.open(tmp_path / "turned.png") as picture:
        assert image_pixels(picture, channels=1).shape == (1, 3, 2)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4, 5), dtype=np.uint8),
        np.zeros((4,), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        torch.zeros(5, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    ],
    ids=["float", "5 channels last", "1 axis", "empty", "5 channels", "batch"],
)
def test_arrays_that_are_no_image_are_refused(image) -> None:
    with pytest.raises(ValueError, match="image 7 must be uint8"):
        image_pixels(image, channels=3, name="image 7")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pil_images_whose_values_pil_would_clip_are_refused(mode: str) -> None:
    picture = Image.new(mode, (4, 4), 1)  # white, if 1 is white
    with pytest.raises(ValueError, match=f"image 7 must have 8 bits per channel, .* mode {mode}; scale its values"):
        image_pixels(picture, channels=3, name="image 7")
    with pytest.raises(ValueError, match=f"mask must have 8 bits per channel, .* mode {mode}; scale its values"):
        mask_pixels(picture)


def test_files_that_are_no_image_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file"):
        image_pixels(tmp_path / "nowhere.png", channels=3)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png must be a JPEG, PNG or WebP file"):
        image_pixels(tmp_path / "text.png", channels=3)


@pytest.mark.parametrize("read", [image_pixels, mask_pixels])
@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
def test_what_has_no_end_is_refused_before_it_is_read(make, read, tmp_path) -> None:
    options = {"channels": 3} if read is image_pixels else {}
    with pytest.raises(ValueError, match=f"image .*{make.__name__}.png {SPECIAL[make]}"):
        read(make(tmp_path), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_no_hostile_image_is_opened(name, tmp_path) -> None:
    path = write_refused(tmp_path, name)
    for read in (lambda: image_pixels(path, channels=1), lambda: mask_pixels(path)):
        with pytest.raises(ValueError, match=re.escape(name) + ".*" + re.escape(REFUSED[name][2])):
            read()


def test_pictures_of_pil_that_are_too_large_or_damaged_are_refused(tmp_path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(ValueError, match=r"image \(mask\) cannot be decoded: image file is truncated"):
        mask_pixels(Image.open(io.BytesIO(data[:-20])))
    with pytest.raises(ValueError, match=r"image \(image 2\) must have at most 64000000 pixels, got 8001 x 8000"):
        image_pixels(Image.new("1", (8001, 8000)), channels=3, name="image 2")


def test_every_form_of_a_mask_is_the_same_mask(tmp_path) -> None:
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


@pytest.mark.parametrize("mask", [torch.ones(2, 2), np.ones((2, 2), dtype=np.uint8), torch.ones(1, 2, 2) > 0])
def test_arrays_that_are_no_mask_are_refused(mask) -> None:
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) bool.*mask >= 128"):
        mask_pixels(mask)


def test_an_image_of_the_models_size_is_taken_as_it_is() -> None:
    image, mask = pixels(3, 8, 8), box_mask((1, 1, 3, 3), height=8, width=8)
    for fit in (False, True):
        made, its_mask = fit_to_model(image, mask, image_size=8, fit=fit)
        assert torch.equal(made, image)
        assert torch.equal(its_mask, mask)


def test_image_and_mask_are_cut_and_resized_alike() -> None:
    image = torch.zeros(1, 8, 20, dtype=torch.uint8)
    mask = box_mask((8, 2, 12, 4), height=8, width=20)
    image[0, mask] = 255
    made, its_mask = fit_to_model(image, mask, image_size=4, fit=True)
    assert made.shape == (1, 4, 4)
    assert torch.equal(its_mask, mask_of("....", ".##.", "....", "...."))
    assert (made[0][its_mask] > 150).all()
    larger, its_mask = fit_to_model(image, mask, image_size=16, fit=True)
    assert torch.equal(its_mask, box_mask((4, 4, 12, 8), height=16, width=16))
    assert (larger[0][its_mask] > 100).all()


def test_a_thin_mask_is_not_lost_when_it_shrinks() -> None:
    mask = box_mask((33, 0, 34, 64), height=64, width=64)
    assert torch.equal(fit_to_model(pixels(1, 64, 64), mask, image_size=4, fit=True)[1], mask_of(*["..#."] * 4))


def test_sizes_that_do_not_fit_are_refused() -> None:
    image = pixels(3, 6, 8)
    with pytest.raises(
        ValueError, match=r"image must have the 8 x 8 pixels of the model, got 8 x 6; fit=True \(--fit\)"
    ):
        fit_to_model(image, box_mask((0, 0, 1, 1), height=6, width=8), image_size=8, fit=False)
    with pytest.raises(ValueError, match=r"mask of image 3 must have 8 x 6 pixels like the image, got 6 x 8"):
        fit_to_model(image, box_mask((0, 0, 1, 1), height=8, width=6), image_size=8, fit=True, name="image 3")


def test_a_mask_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        fit_to_model(pixels(1, 8, 8), torch.zeros(8, 8, dtype=torch.bool), image_size=8, fit=False)
    with pytest.raises(ValueError, match="lies outside the central part"):
        fit_to_model(pixels(1, 8, 20), box_mask((0, 0, 4, 8), height=8, width=20), image_size=8, fit=True)


# A canvas and its windows


def filled_by(unknown: torch.Tensor, *, size: tuple[int, int], overlap: float) -> list[tuple[int, int, int]]:
    """Returns (top, left, unknown tokens) of each window, after checks: inside the canvas, and no token twice."""
    left, found = unknown.clone(), []
    for window in windows(unknown, size=size, overlap=overlap):
        part = left[window.index[1:]]
        assert part.shape == size
        assert torch.equal(part, window.unknown)
        found.append((window.top, window.left, int(part.sum())))
        part.fill_(False)
    assert not left.any()
    return found


def test_windows_of_an_empty_canvas_slide_by_what_does_not_overlap():
    assert filled_by(torch.ones(4, 14, dtype=torch.bool), size=(4, 4), overlap=0.5) == [
        (0, 0, 16),
        (0, 2, 8),
        (0, 4, 8),
        (0, 6, 8),
        (0, 8, 8),
        (0, 10, 8),
    ]
    assert filled_by(torch.ones(4, 7, dtype=torch.bool), size=(4, 4), overlap=0.25) == [(0, 0, 16), (0, 3, 12)]


def test_windows_on_all_sides_begin_where_most_is_known():
    unknown = torch.ones(8, 8, dtype=torch.bool)
    unknown[2:6, 2:6] = False
    found = filled_by(unknown, size=(4, 4), overlap=0.5)
    assert [count for _, _, count in found[:4]] == [8] * 4
    assert all(count <= 8 for _, _, count in found)  # no window sees less than half of itself
    assert sum(count for _, _, count in found) == 48


@pytest.mark.parametrize("overlap", [0.01, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (7, 11), (5, 5)])
def test_windows_fill_any_canvas(shape, overlap):
    filled_by(torch.ones(shape, dtype=torch.bool), size=(4, 4), overlap=overlap)
    corner = torch.ones(shape, dtype=torch.bool)
    corner[:2, :1] = False
    filled_by(corner, size=(4, 4), overlap=overlap)


def test_margins_lay_an_image_on_its_canvas():
    added = Margins(left=2, right=0, up=0, down=1)
    image = torch.arange(1, 7).reshape(1, 2, 3)
    padded = added.pad(image, size=1)
    assert padded.shape == (1, 3, 5)
    assert torch.equal(padded[0] == 0, added.outside(2, 3))
    assert torch.equal(padded[:, :2, 2:], image)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("10%,20%,60%,80%", [2, 2, 12, 10]),  # of 20 x 12 pixels; outwards to whole pixels
        ("0%, 0%, 50%, 100%", [0, 0, 10, 12]),
        ("12.5%,0,50%,7", [2, 0, 10, 7]),
        ("99.9%,0,100%,1", [19, 0, 20, 1]),
        ("1,2,3,4", [1, 2, 3, 4]),
        ("-1,0,120%,4", [-1, 0, 24, 4]),  # which the check of boxes refuses
    ],
)
def test_a_box_is_in_pixels_or_in_percent_of_the_image(text: str, box: list[int]) -> None:
    assert parse_box(text, height=12, width=20) == box
