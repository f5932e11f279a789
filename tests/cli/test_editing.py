"""The commands inpaint, edit, outpaint and panorama; ``test_mistakes`` has their refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.cli.flags import record_steps
from maskgit_pl.grids import REQUESTED
from maskgit_pl.pipeline import MaskGIT
from tests.cli.conftest import Answer, pixels
from tests.pipeline.conftest import step


@pytest.fixture
def call(maskgit: Callable[..., Answer], tiny_pretrained: Path, image: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a command on the tiny model and the image, which writes to ``out.png``, and returns the output."""

    def run(command: str, *words: object, file: Path = image) -> str:
        files = () if command == "panorama" else (file,)
        answer = maskgit(command, tiny_pretrained, *files, *words, "--out", tmp_path / "out.png", "--device", "cpu")
        assert answer.code == 0, answer
        return answer.out

    return run


@pytest.fixture
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


def read(path: Path) -> np.ndarray:
    """Returns the pixels of a picture, or of all pictures of a folder in the order of their names."""
    if path.is_dir():
        return np.stack([read(file) for file in sorted(path.iterdir())])
    with Image.open(path) as picture:
        return np.asarray(picture)


def tiles(sheet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the original and the masked image of a sheet, each enlarged from 8 to 88 pixels."""
    bottom = sheet.shape[0] - 22 - 8  # the legend and the margin
    original, masked = (sheet[bottom - 88 : bottom, left : left + 88] for left in (8, 8 + 88 + 4))
    return original, masked


def corners(masked: np.ndarray) -> list[tuple[int, int]]:
    """Returns the first row and column of the outline, and those after its last, in pixels of the image."""
    outline = np.argwhere((masked == REQUESTED).all(-1))
    return [tuple((outline.min(0) // 11).tolist()), tuple(((outline.max(0) + 1) // 11).tolist())]


def test_edit_writes_one_picture_and_single_files(call, pipe, tmp_path: Path) -> None:
    images = tmp_path / "images"
    said = call(
        "edit", "--box", "0,0,4,2", "--class", "T-shirt", "--variants", 3, "--num-steps", 6, "--seed", 7, "--no-blend",
        "--images", images,
    )  # fmt: skip
    names = sorted(path.name for path in images.iterdir())
    assert names == [f"class-0001-seed-{seed:06d}.png" for seed in (7, 8, 9)]
    expected = pipe.inpaint(
        pixels().numpy(), (0, 0, 4, 2), classes=[1] * 3, seed=7, num_steps=6, blend=0, output_type="np"
    )
    assert (read(images) == expected[..., 0]).all()
    assert "3 variants of T-shirt, 6 of 16 tokens generated" in said
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 8 + 5 * 88 + 4 * 4 + 8  # original, masked, three variants; 8 px shown as 88


def test_the_picture_shows_the_region_grey_and_the_mask_outlined(call, tmp_path: Path) -> None:
    call("edit", "--box", "0,0,4,3", "--class", 1, "--variants", 1)
    original, masked = tiles(read(tmp_path / "out.png"))
    grey = np.repeat(pixels().numpy()[..., None], 3, axis=-1)
    assert (original[5::11, 5::11] == grey).all()  # a sample of each pixel
    region = np.zeros((8, 8), dtype=bool)
    region[:6, :6] = True
    assert (masked[5::11, 5::11][region] == 176).all()
    assert (masked[5::11, 5::11][~region] == grey[~region]).all()
    assert corners(masked) == [(0, 0), (3, 4)]


def test_a_box_is_that_of_the_image_before_it_is_fitted(call, tmp_path: Path) -> None:
    Image.fromarray(pixels(40, 80).numpy()).save(tmp_path / "photo.png")
    call("edit", "--box", "30,10,50,30", "--fit", "--class", 1, "--variants", 1, file=tmp_path / "photo.png")
    # Of the middle 40 x 40 pixels, from 10,10 to 30,30 of 8 x 8.
    assert corners(tiles(read(tmp_path / "out.png"))[1]) == [(2, 2), (6, 6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words", "expected", "text", "frames"),
    [
        (
            "outpaint", "--left 6 --right 4 --up 4 --down 4 --class Trouser --variants 2 --no-blend --num-steps 3",
            lambda pipe, image: pipe.outpaint(
                image, left=6, right=4, up=4, down=4, classes=[2, 2], num_steps=3, blend=0, output_type="np"
            ),
            "2 variants of Trouser, 18 x 16 pixels", range(6, 100, 3),  # three steps of each window
        ),
        (
            "panorama", "--classes T-shirt,2 --width 20 --seed 3",
            lambda pipe, _: pipe.panorama([1, 2], 20, seed=3, output_type="np"),
            "2 images of 20 x 8 pixels", range(5, 100),
        ),
        (
            "inpaint", "--box 0,0,4,2 --variants 2 --no-blend",
            lambda pipe, image: pipe.inpaint(image, (0, 0, 4, 2), classes=[None, None], blend=0, output_type="np"),
            "2 variants of no class, 6 of 16 tokens generated", range(2, 100),
        ),
        (
            "edit", "--strength 0.5 --class 1 --variants 2 --seed 3 --num-steps 6",
            lambda pipe, image: pipe.edit(
                image, strength=0.5, classes=[1, 1], seed=3, num_steps=6, output_type="np"
            ),
            "2 variants of T-shirt, 8 of 16 tokens generated", [5],  # of 6 steps the first is left out
        ),
    ],
    ids=["outpaint", "panorama", "inpaint", "strength"],
)  # fmt: skip
def test_a_command_writes_the_images_of_the_pipeline_and_their_decoding(
    call, pipe, tmp_path: Path, command, words, expected, text, frames
) -> None:
    files = ("--images", tmp_path / "images", "--gif", tmp_path / "out.gif", "--filmstrip", tmp_path / "strip.png")
    assert text in call(command, *words.split(), *files)
    images = expected(pipe, pixels().numpy())[..., 0]
    assert (read(tmp_path / "images") == images).all()
    assert command != "outpaint" or (images[:, 4:12, 6:14] == pixels().numpy()).all()
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames in frames
    assert (tmp_path / "strip.png").is_file()


def test_the_first_images_of_the_first_batch_are_recorded() -> None:
    every = list(range(16))
    with record_steps("a task", 10) as (after_step, recorded):
        for each in (step(0, every, every[:8], 5), step(1, every[:8], [], 5), step(0, every, [], 5)):
            after_step(each)
    assert [(each.step, len(each.tokens)) for each in recorded] == [(0, 4), (1, 4)]
