"""Sizes, channels and file names of images: one form of each size."""

import pytest

from maskgit_pl.checks import (
    as_image_size,
    check_channels,
    check_image_size,
    height_width,
    image_file_name,
    is_image_file_name,
    pixels_text,
    plain_size,
)


@pytest.mark.parametrize(("given", "size"), [(8, 8), ([8, 8], 8), ((8, 8), 8), ([8, 16], (8, 16)), ((16, 8), (16, 8))])
def test_a_size_has_one_form_which_files_keep(given, size):
    assert check_image_size("size", given, "[1, 64]") == as_image_size(given) == size
    assert as_image_size(plain_size(size)) == size
    assert height_width(given) == height_width(size)


@pytest.mark.parametrize("given", [0, True, 65, [8], [8, 8, 8], [8, 0], [8.0, 8], [True, 8], "8", None, {}, [[8], 8]])
def test_anything_else_is_no_size(given):
    with pytest.raises(ValueError, match=r"^size must be an integer in \[1, 64\]"):
        check_image_size("size", given, "[1, 64]")


def test_messages_show_the_width_first():
    assert (pixels_text(8), pixels_text((24, 40))) == ("8 x 8", "40 x 24")


def test_names_of_generated_images_are_known_again():
    names = [image_file_name(label, seed) for label, seed in ((None, 0), (3, 7), (12345, 2**32 - 1))]
    assert names[:2] == ["no-class-seed-000000.png", "class-0003-seed-000007.png"]
    assert all(map(is_image_file_name, names))
    for name in ("class-3-seed-000007.png", "class-0003-seed-000007.jpg", "x-class-0003-seed-000007.png", "photo.png"):
        assert not is_image_file_name(name)


@pytest.mark.parametrize("channels", [0, 2, 4, True, 3.0, "3", None])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(ValueError, match=r"channels must be one of 1 \(grey\), 3 \(RGB\), got"):
        check_channels("channels", channels)
