"""A model whose images do not fill their last tokens: 7 pixels in 4 tokens of 2 pixels each way."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.evaluation import generation
from tests.conftest import save_tiny_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pretrained(tmp_path_factory.mktemp("odd") / "pretrained", image_size=7)


@pytest.fixture(scope="module")
def pipe(folder):
    return MaskGIT.from_pretrained(folder)


def test_images_have_the_size_of_the_model_and_canvases_whole_tokens(pipe):
    tokens = torch.arange(16)[None]
    cut, whole = pipe.tokenizer.decode(tokens), pipe.tokenizer.decode(tokens, grid=(4, 4))
    assert cut.shape == (1, 1, 7, 7)
    assert whole.shape == (1, 1, 8, 8)
    assert torch.equal(whole[..., :7, :7], cut)
    assert pipe.generate([0], output_type="pt").shape == (1, 1, 7, 7)


def test_a_panorama_is_as_large_as_asked_for(pipe):
    assert pipe.outline.least_canvas == (8, 8)
    for height, width in ((8, 8), (8, 12), (10, 8)):
        made = pipe.panorama([0], width, height=height, output_type="pt")
        assert made.shape == (1, 1, height, width)
    assert pipe.panorama([0], 10, output_type="pt").shape == (1, 1, 8, 10)  # by default whole tokens
    with pytest.raises(ValueError, match=r"width must be a multiple of 2 pixels, the size of a token, got 7; use 8$"):
        pipe.panorama([0], 7)


def test_an_image_may_become_as_large_as_the_grid_of_the_model(pipe):
    image = torch.arange(48, dtype=torch.uint8).reshape(1, 8, 6)
    for right in (2, 4):
        made = pipe.outpaint(image, right=right, classes=[0], blend=0, output_type="pt")
        assert made.shape == (1, 1, 8, 6 + right)
        assert torch.equal(made[0, ..., :6], image)


@pytest.mark.parametrize("task", ["outpaint-right", "inpaint-centre"])
def test_the_tasks_of_table_2_can_be_measured(pipe, task):
    images = torch.randint(256, (2, 1, 7, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = generation.edit(task, pipe, images, torch.tensor([0, 1]), seed=3)
    assert made.shape == images.shape
    hidden = generation.hide_pixels(task, pipe.tokenizer, images)
    alone = pipe.inpaint(hidden[1], generation.make_hidden_mask(task, pipe.tokenizer), classes=[1], seed=4,
                         output_type="pt")  # fmt: skip
    assert torch.equal(made[1], alone[0])  # image i has the seed of the first one plus i


@pytest.mark.slow
def test_commands_show_how_images_and_canvases_were_decoded(folder, tmp_path):
    Image.fromarray(np.full((7, 7), 90, np.uint8)).save(tmp_path / "own.png")
    Image.fromarray(np.full((8, 6), 90, np.uint8)).save(tmp_path / "photo.png")
    for command, size, words in (
        ("sample", (7, 7), ["--classes", "0", "--per-class", "1"]),
        ("inpaint", (7, 7), [tmp_path / "own.png", "--box", "0,0,3,3", "--variants", "1"]),
        ("outpaint", (8, 8), [tmp_path / "photo.png", "--right", "2", "--variants", "1"]),
        ("panorama", (8, 8), ["--classes", "0", "--width", "8"]),
    ):
        out = [
            "--out",
            tmp_path / f"{command}.png",
            "--gif",
            tmp_path / f"{command}.gif",
            "--images",
            tmp_path / command,
        ]
        assert main([command, *map(str, (folder, *words, *out)), "--device", "cpu"]) == 0
        (file,) = (tmp_path / command).iterdir()
        with Image.open(file) as picture:
            assert picture.size == size
