"""Pictures of images in rows, and the files that hold them."""

import numpy as np
import pytest
from PIL import Image

from maskgit_pl import grids
from maskgit_pl.grids import add_title, class_captions, image_grid, reconstruction_grid, save_images
from tests.pipeline.conftest import random_images


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_each_image_enlarged_in_raster_order(channels: int) -> None:
    images = random_images(5, channels)
    picture = np.asarray(image_grid(images, columns=3))
    assert picture.shape == (8 + 2 * 84 + 4 + 8, 8 + 3 * 84 + 2 * 4 + 8, 3)
    for number, image in enumerate(images):
        top, left = 8 + number // 3 * 88, 8 + number % 3 * 88
        tile = picture[top : top + 84 : 3, left : left + 84 : 3]
        assert (tile == image.permute(1, 2, 0).expand(28, 28, 3).numpy()).all()


@pytest.mark.parametrize("name", ["é", "Ω", "Ж"])
def test_captions_and_titles_have_letters_beyond_ascii(name: str) -> None:
    def page(text: str) -> bytes:
        return image_grid(random_images(1), columns=1, row_captions=[text]).tobytes()

    missing = "\N{CJK UNIFIED IDEOGRAPH-4E2D}"  # drawn as a box
    assert len({page(name), page(missing), page("e")}) == 3
    titles = [add_title(image_grid(random_images(1), columns=1), text).tobytes() for text in (name, missing)]
    assert titles[0] != titles[1]


def test_a_class_without_letters_in_any_font_is_drawn_by_its_number(monkeypatch) -> None:
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    grids._font_file.cache_clear()
    assert class_captions(["é", "\N{CJK UNIFIED IDEOGRAPH-4E2D}", "bag"], [0, 1, 2, 3]) == [
        "é",
        "class 1",
        "bag",
        "no class",
    ]


def test_reconstructions_stand_below_their_originals() -> None:
    originals, reconstructions = random_images(16, size=84), 255 - random_images(16, size=84)
    picture = np.asarray(reconstruction_grid(originals, reconstructions))
    above, below = picture[8 : 8 + 84], picture[8 + 88 : 8 + 88 + 84]
    assert (above[:, -92:-8] == 255 - below[:, -92:-8]).all()
    assert picture.shape[0] == 8 + 4 * 84 + 3 * 4 + 8


def test_files_of_images_have_the_class_and_the_seed_in_their_names(tmp_path) -> None:
    images = random_images(2)
    save_images(images, [3, None], tmp_path / "single", seeds=[7, 8])
    files = sorted((tmp_path / "single").iterdir())
    assert [file.name for file in files] == ["class-0003-seed-000007.png", "no-class-seed-000008.png"]
    with Image.open(files[0]) as picture:
        assert (np.asarray(picture) == images[0, 0].numpy()).all()
