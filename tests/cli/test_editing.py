"""The commands inpaint, edit, outpaint and panorama."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.grids import REQUESTED
from tests.cli.commands import call_command, pixels, refused


def call(*words: object) -> int:
    return call_command("edit", *words, "--device", "cpu")


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def tiles(page: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the original and the masked image of a sheet, each enlarged from 8 to 88 pixels."""
    bottom = page.shape[0] - 22 - 8  # the legend and the margin
    original, masked = (page[bottom - 88 : bottom, left : left + 88] for left in (8, 8 + 88 + 4))
    return original, masked


def corners(masked: np.ndarray) -> list[tuple[int, int]]:
    """Returns the first row and column of the outline, and those after its last, in pixels of the image."""
    outline = np.argwhere((masked == REQUESTED).all(-1))
    return [tuple((outline.min(0) // 11).tolist()), tuple(((outline.max(0) + 1) // 11).tolist())]


def test_writes_one_picture_and_single_files(tiny_pretrained: Path, image: Path, tmp_path: Path, capsys) -> None:
    out, images = tmp_path / "edited.png", tmp_path / "images"
    code = call(
        tiny_pretrained, image, "--box", "0,0,4,2", "--class", "T-shirt", "--variants", 3, "--num-steps", 6,
        "--seed", 7, "--no-blend", "--out", out, "--images", images,
    )  # fmt: skip
    assert code == 0
    names = sorted(path.name for path in images.iterdir())
    assert names == [f"class-0001-seed-{seed:06d}.png" for seed in (7, 8, 9)]
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.edit_class(
        pixels().numpy(), (0, 0, 4, 2), 1, variants=3, seed=7, num_steps=6, blend=0, output_type="np"
    )
    assert (np.stack([read(images / name) for name in names]) == expected[..., 0]).all()
    assert "3 variants of class T-shirt, 6 of 16 tokens generated" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width == 8 + 5 * 88 + 4 * 4 + 8  # original, masked, three variants; 8 px shown as 88


def test_the_picture_shows_the_region_grey_and_the_mask_outlined(
    tiny_pretrained: Path, image: Path, tmp_path: Path
) -> None:
    call(tiny_pretrained, image, "--box", "0,0,4,3", "--class", 1, "--variants", 1, "--out", tmp_path / "edited.png")
    original, masked = tiles(read(tmp_path / "edited.png"))
    grey = np.repeat(pixels().numpy()[..., None], 3, axis=-1)
    assert (original[5::11, 5::11] == grey).all()  # a sample of each pixel
    region = np.zeros((8, 8), dtype=bool)
    region[:6, :6] = True
    assert (masked[5::11, 5::11][region] == 176).all()
    assert (masked[5::11, 5::11][~region] == grey[~region]).all()
    assert corners(masked) == [(0, 0), (3, 4)]


def test_a_mask_picture_stands_for_a_box(tiny_pretrained: Path, image: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[0:2, 0:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for way, words in (("box", ["--box", "0,0,4,2"]), ("mask", ["--mask", tmp_path / "mask.png"])):
        files = ("--images", tmp_path / way, "--out", tmp_path / f"{way}-sheet.png")
        call(tiny_pretrained, image, *words, "--class", 2, *files)
    for one in (tmp_path / "box").iterdir():
        assert (read(one) == read(tmp_path / "mask" / one.name)).all()
    assert len(list((tmp_path / "box").iterdir())) == 4  # the default


def test_a_box_is_that_of_the_image_before_it_is_fitted(tiny_pretrained: Path, tmp_path: Path) -> None:
    Image.fromarray(pixels(40, 80).numpy()).save(tmp_path / "photo.png")
    for name, box in (("pixels", "30,10,50,30"), ("percent", "37.5%,25%,62.5%,75%")):
        words = ["--box", box, "--fit", "--class", "1", "--variants", 1, "--images", tmp_path / name]
        assert call(tiny_pretrained, tmp_path / "photo.png", *words, "--out", tmp_path / f"{name}.png") == 0
    page = read(tmp_path / "pixels.png")
    assert (page == read(tmp_path / "percent.png")).all()
    # Of the middle 40 x 40 pixels, from 10,10 to 30,30 of 8 x 8.
    assert corners(tiles(page)[1]) == [(2, 2), (6, 6)]


def read_pictures(folder: Path) -> np.ndarray:
    return np.stack([read(path) for path in sorted(folder.iterdir())])


def test_inpaint_needs_no_class(tiny_pretrained: Path, image: Path, tmp_path: Path, capsys) -> None:
    words = ["--box", "0,0,4,2", "--variants", 2, "--dilation", 0, "--no-blend", "--out", tmp_path / "out.png"]
    assert call_command("inpaint", tiny_pretrained, image, *words, "--images", tmp_path / "none") == 0
    assert "2 variants of no class, 2 of 16 tokens generated" in capsys.readouterr().out
    names = [path.name for path in sorted((tmp_path / "none").iterdir())]
    assert names == ["no-class-seed-000000.png", "no-class-seed-000001.png"]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :4] = True
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.inpaint(pixels().numpy(), mask, classes=[None, None], blend=0, dilation=0, output_type="np")
    assert (read_pictures(tmp_path / "none") == expected[..., 0]).all()


@pytest.mark.slow
def test_outpaint_writes_what_the_pipeline_makes_and_how_it_was_decoded(
    tiny_pretrained: Path, image: Path, tmp_path: Path, capsys
) -> None:
    code = call_command(
        "outpaint", tiny_pretrained, image, "--all", 4, "--left", 6, "--class", "Trouser", "--variants", 2,
        "--no-blend", "--num-steps", 3, "--out", tmp_path / "out.png", "--images", tmp_path / "single",
        "--gif", tmp_path / "out.gif",
        "--filmstrip", tmp_path / "strip.png",
    )  # fmt: skip
    assert code == 0
    assert "2 variants of class Trouser, 18 x 16 pixels" in capsys.readouterr().out
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.outpaint(
        pixels().numpy(), left=6, right=4, up=4, down=4, classes=[2, 2], num_steps=3, blend=0, output_type="np"
    )
    made = read_pictures(tmp_path / "single")
    assert (made == expected[..., 0]).all()
    assert (made[:, 4:12, 6:14] == pixels().numpy()).all()
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames % 3 == 0  # three steps of each window
        assert animation.n_frames > 3
    assert (tmp_path / "strip.png").is_file()
    assert (tmp_path / "out.png").is_file()


def test_a_side_of_0_pixels_stays_0_beside_all(tiny_pretrained: Path, image: Path, tmp_path: Path, capsys) -> None:
    words = ["--right", 4, "--left", 0, "--all", 2, "--variants", 1, "--num-steps", 2, "--out", tmp_path / "out.png"]
    assert call_command("outpaint", tiny_pretrained, image, *words) == 0
    assert "1 variant of no class, 12 x 12 pixels" in capsys.readouterr().out


@pytest.mark.slow
def test_panorama_writes_what_the_pipeline_makes(tiny_pretrained: Path, tmp_path: Path, capsys) -> None:
    code = call_command(
        "panorama", tiny_pretrained, "--classes", "T-shirt,2", "--width", 20, "--overlap", 0.25, "--seed", 3,
        "--out", tmp_path / "out.png", "--images", tmp_path / "single", "--gif", tmp_path / "out.gif",
    )  # fmt: skip
    assert code == 0
    assert "2 images of 20 x 8 pixels" in capsys.readouterr().out
    expected = MaskGIT.from_pretrained(tiny_pretrained).panorama([1, 2], 20, overlap=0.25, seed=3, output_type="np")
    assert (read_pictures(tmp_path / "single") == expected[..., 0]).all()
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames > 4


def test_strength_writes_what_the_pipeline_makes(tiny_pretrained: Path, image: Path, tmp_path: Path, capsys) -> None:
    code = call(
        tiny_pretrained, image, "--strength", 0.5, "--class", 1, "--variants", 2, "--seed", 3, "--num-steps", 6,
        "--out", tmp_path / "out.png", "--images", tmp_path / "single", "--gif", tmp_path / "out.gif",
        "--filmstrip", tmp_path / "strip.png",
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / "strip.png").is_file()
    assert "2 variants of class T-shirt, 8 of 16 tokens generated" in capsys.readouterr().out
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.edit(pixels().numpy(), strength=0.5, classes=[1, 1], seed=3, num_steps=6, output_type="np")
    assert (read_pictures(tmp_path / "single") == expected[..., 0]).all()
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames == 5  # of 6 steps the first is left out


BOX = "edit RUN IMAGE --class 1"
HUGE = "4000000000000"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (BOX, "one of --box and --mask and --strength must be given, got neither"),
        (f"{BOX} --strength 1.5", "--strength must be a number in (0, 1], got 1.5"),
        (f"{BOX} --strength 0.5 --box 0,0,4,2", "--box must not be given with --strength"),
        (f"{BOX} --strength 0.5 --dilation 1", "--dilation must not be given with --strength"),
        (f"{BOX} --strength 0.5 --no-blend", "--no-blend must not be given with --strength"),
        (f"{BOX} --box 0,0,1,1 --mask m.png", "--box must not be given with --mask; choose one of the two"),
        (f"{BOX} --box 0,0,1", "10%,20%,60%,80%, got 0,0,1"),
        (f"{BOX} --box 0,0,9,2", "--box must lie in the image"),
        (f"{BOX} --box 0,0,4,2 --variants 0", "--variants must be an integer in [1, 10000], got 0"),
        (f"{BOX} --box 0,0,4,2 --dilation -1", "--dilation must be an integer in [0, 65536], got -1"),
        (f"{BOX} --mask BLACK", "must not be empty"),
        ("edit RUN IMAGE --box 0,0,4,2", "the following arguments are required: --class"),
        ("edit RUN IMAGE --class Trousers --box 0,0,4,2", "unknown class 'Trousers': did you mean 'Trouser'"),
        ("edit RUN TEXT --class 1 --box 0,0,4,2", "text.png must be a JPEG, PNG or WebP"),
        ("inpaint RUN IMAGE", "one of --box and --mask must be given, got neither"),
        ("outpaint RUN IMAGE", "one of --left, --right, --up, --down and --all must be > 0 pixels, got none"),
        (f"outpaint RUN IMAGE --right {HUGE}", f"--right must be an integer in [0, 64000000], got {HUGE}"),
        ("outpaint RUN IMAGE --all 16000", "width must be smaller, because a canvas has at most 64000000"),
        ("panorama RUN --width 20 --classes Trousers", "unknown class 'Trousers': did you mean 'Trouser'"),
    ],
)
def test_bad_input_is_answered_in_one_line(words, message, maskgit, tiny_pretrained, image, tmp_path) -> None:
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("not an image")
    places = {"RUN": tiny_pretrained, "IMAGE": image}
    given = [places.get(word, tmp_path / f"{word.lower()}.png" if word.isupper() else word) for word in words.split()]
    refused(maskgit(*given, "--out", tmp_path / "out.png"), message)
    assert not (tmp_path / "out.png").exists()
