"""Pictures of objects in notebooks: a sheet of images, the animation of a decoding, the curve of a schedule."""

from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image

from maskgit_pl import MaskGIT
from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.pipeline.display import ImageList, Recording, describe_settings
from tests.pipeline.decoding_steps import STEPS, random_images


@pytest.fixture(scope="module")
def pipe() -> MaskGIT:
    return MaskGIT.from_pretrained("fashion-mnist-demo")


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def test_generated_images_are_a_list_that_shows_a_sheet_of_their_pixels(pipe):
    images = pipe.generate(["Bag"] * 9, num_steps=2, seed=0)
    assert isinstance(images, list)
    sheet = opened(images._repr_png_())
    assert (sheet.width // 84, sheet.height // 84) == (8, 2)  # 8 in a row, each enlarged three times
    first = sheet.crop((8, 8, 8 + 84, 8 + 84)).convert("L").resize((28, 28), Image.Resampling.NEAREST)
    assert first.tobytes() == images[0].tobytes()


def test_edited_images_are_such_a_list_too(pipe):
    (image,) = pipe.generate(["Sneaker"], num_steps=2)
    assert pipe.edit_class(image, (0, 4, 28, 16), "Bag", num_steps=2, variants=2)._repr_png_()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_a_sheet_has_images_of_every_mode(mode):
    assert opened(ImageList([Image.new(mode, (8, 6))] * 2)._repr_png_()).mode == "RGB"


def test_a_list_that_is_no_sheet_shows_itself_as_a_list():
    assert ImageList()._repr_png_() is None
    assert ImageList([Image.new("L", (8, 8)), Image.new("L", (9, 8))])._repr_png_() is None


def test_a_recording_has_the_steps_and_the_images_of_generate(pipe, tmp_path):
    made = pipe.record(["Bag", 7], num_steps=4, seed=3)
    assert repr(made) == "Recording(4 steps of Bag, Sneaker)"
    expected = pipe.generate(["Bag", 7], num_steps=4, seed=3)
    assert [image.tobytes() for image in made.images] == [image.tobytes() for image in expected]
    shown = made._repr_mimebundle_()
    assert shown["text/plain"] == repr(made)
    assert opened(b64decode(shown["image/gif"])).n_frames == 4
    made.save(tmp_path / "strip.png")
    with pytest.raises(
        ValueError, match=r"path must end with \.gif \(animation\) or \.png \(filmstrip\), got 'x\.jpg'"
    ):
        made.save("x.jpg")


def test_a_recording_without_steps_and_a_step_that_it_does_not_have_are_refused(pipe, tmp_path):
    made = pipe.record([0], num_steps=2)
    assert made.images_at(1).shape == made.images_at(0).shape
    for number in (-1, 2, 0.0):
        with pytest.raises(ValueError, match=r"number must be an integer in \[0, 2\), got"):
            made.images_at(number)
    empty = replace(made, steps=[])
    for use in (lambda: empty.images, lambda: empty.save(tmp_path / "x.gif"), empty._repr_mimebundle_):
        with pytest.raises(ValueError, match="a recording must have at least one decoding step, got none"):
            use()


def recording(steps: list[DecodingStep], decoded: list[int]) -> Recording:
    """Returns a recording of two images that notes how many images it decodes."""

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(len(tokens))
        return random_images(len(tokens))

    return Recording(steps, decode, (4, 4), DecodingConfig(num_steps=len(steps)), ["Bag", "Coat"], [3, 4])


@pytest.mark.parametrize(
    ("size", "grid", "pixels"), [((28, 28), (4, 4), 7), ((28, 56), (4, 7), 8), ((3, 2), (3, 2), 1)]
)
def test_a_recording_finds_tokens_that_give_its_grid(size, grid, pixels):
    images = torch.zeros(1, 1, *size, dtype=torch.uint8)
    made = Recording(STEPS, lambda tokens: images, grid, DecodingConfig(num_steps=2), ["Bag"], [3])
    assert made.token_pixels == pixels
    assert replace(made, token_size=8).token_pixels == 8


def test_a_recording_becomes_an_animation_and_a_filmstrip_and_decodes_each_step_once(tmp_path):
    decoded: list[int] = []
    made = recording(STEPS, decoded)
    made.save(tmp_path / "new" / "decoding.gif")
    made.save(tmp_path / "strip.png")
    assert decoded == [2, 2]
    with Image.open(tmp_path / "new" / "decoding.gif") as animation:
        assert animation.n_frames == 2
        assert animation.info["duration"] == 600
    with Image.open(tmp_path / "strip.png") as page:
        assert page.width > 2 * 168
    assert made.title == "Bag, seed 3: 2 steps, token selector confidence"


def test_recordings_with_the_same_steps_share_their_images_and_those_with_others_do_not(tmp_path):
    decoded: list[int] = []
    first = recording(STEPS[:1], decoded)
    shown = first.images_at(0)
    longer = replace(first, steps=STEPS)
    assert longer.images_at(0) is shown
    assert decoded == [2]
    others = replace(first, steps=[replace(STEPS[0], tokens=STEPS[0].tokens + 1)])
    assert others.images_at(0) is not shown
    assert decoded == [2, 2]


def test_of_many_steps_a_filmstrip_shows_and_decodes_twelve(tmp_path):
    decoded: list[int] = []
    recording([replace(STEPS[0], step=number) for number in range(30)], decoded).save(tmp_path / "strip.png")
    assert len(decoded) == 12
    with Image.open(tmp_path / "strip.png") as page:
        assert 12 * 168 < page.width < 13 * 172 + 100


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "8 steps, token selector confidence"),
        ({"num_steps": 1, "token_selector": "halton"}, "1 step, token selector halton"),
        (
            {"token_selector": {"name": "remdm", "strategy": "loop", "eta": 0.30}},
            "8 steps, token selector remdm (strategy loop, eta 0.3)",
        ),
        ({"num_steps": 49, "token_selector": None}, "49 steps, one token each, in raster order"),
    ],
)
def test_settings_are_said_in_a_line(settings, said):
    assert describe_settings(DecodingConfig(**settings)) == said


def test_no_class_is_named_in_a_recording(pipe):
    assert pipe.record([None], num_steps=2).captions == ["no class"]


def test_a_pipeline_names_its_model(pipe):
    assert repr(pipe).startswith("MaskGIT(fashion-mnist-demo: 10 classes")
