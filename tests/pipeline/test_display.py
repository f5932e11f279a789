"""Pictures of objects in notebooks: a sheet of images, the animation of a decoding, the curve of a schedule."""

from base64 import b64decode
from dataclasses import dataclass
from io import BytesIO

import pytest
import torch
from PIL import Image

from maskgit_pl import MaskGIT, mask_schedules
from maskgit_pl.pipeline.display import ImageList
from maskgit_pl.schedules import MaskSchedule


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


def test_no_class_is_named_in_a_recording(pipe):
    assert pipe.record([None], num_steps=2).captions == ["no class"]


def test_a_pipeline_names_its_model(pipe):
    assert repr(pipe).startswith("MaskGIT(fashion-mnist-demo: 10 classes")


def test_a_schedule_draws_its_curve():
    @dataclass(frozen=True)
    class Mine(MaskSchedule):
        def __call__(self, progress: torch.Tensor, num_tokens: int) -> torch.Tensor:
            return 1 - progress

    pictures = [schedule._repr_png_() for schedule in (mask_schedules.build("cosine"), Mine())]
    assert opened(pictures[0]).size == opened(pictures[1]).size
    assert pictures[0] != pictures[1]
