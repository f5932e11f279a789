"""Pictures of a decoding, and of objects in notebooks."""

from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.pipeline.display import ImageList, Recording, describe_settings, select_steps
from tests.pipeline.conftest import STEPS, random_images


def test_a_notebook_shows_images_as_a_sheet_of_their_pixels(demo):
    images = demo.generate(["Bag"] * 9, num_steps=2, seed=0)
    sheet = Image.open(BytesIO(images._repr_png_()))
    assert (sheet.width // 84, sheet.height // 84) == (8, 2)  # 8 in a row, each enlarged three times
    first = sheet.crop((8, 8, 8 + 84, 8 + 84)).convert("L").resize((28, 28), Image.Resampling.NEAREST)
    assert first.tobytes() == images[0].tobytes()
    for mode in ("LA", "RGB", "RGBA"):
        assert Image.open(BytesIO(ImageList([Image.new(mode, (8, 6))] * 2)._repr_png_())).mode == "RGB"
    assert ImageList([Image.new("L", (8, 8)), Image.new("L", (9, 8))])._repr_png_() is None


def test_a_recording_has_the_steps_and_the_images_of_generate(demo):
    record = demo.record(["Bag", None], num_steps=4, seed=3)
    expected = demo.generate(["Bag", None], num_steps=4, seed=3)
    assert [image.tobytes() for image in record.images] == [image.tobytes() for image in expected]
    bundle = record._repr_mimebundle_()
    assert Image.open(BytesIO(b64decode(bundle["image/gif"]))).n_frames == 4
    with pytest.raises(ValueError, match=r"path must end with \.gif .* or \.png .*, got 'x\.jpg'"):
        record.save("x.jpg")


def tokenizer_of(decode: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns a tokenizer of 7 px tokens that decodes by a function."""
    return SimpleNamespace(decode=lambda tokens, grid: decode(tokens), token_size=7)


def recording(steps: list[DecodingStep], decoded: list[int]) -> Recording:
    """Returns a recording of two images that counts the images it decodes."""

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(len(tokens))
        return random_images(len(tokens))

    return Recording(steps, tokenizer_of(decode), DecodingConfig(num_steps=len(steps)), ["Bag", "Coat"], [3, 4])


def test_animation_and_filmstrip_decode_each_step_once(tmp_path):
    decoded: list[int] = []
    record = recording(STEPS, decoded)
    record.save(tmp_path / "new" / "decoding.gif")
    record.save(tmp_path / "strip.png")
    assert decoded == [2, 2]
    with Image.open(tmp_path / "new" / "decoding.gif") as animation:
        assert (animation.n_frames, animation.info["duration"]) == (2, 600)
    with Image.open(tmp_path / "strip.png") as page:
        assert page.width > 2 * 168


def test_a_filmstrip_of_many_steps_decodes_and_shows_twelve(tmp_path):
    decoded: list[int] = []
    recording([replace(STEPS[0], step=number) for number in range(30)], decoded).save(tmp_path / "strip.png")
    assert len(decoded) == 12
    with Image.open(tmp_path / "strip.png") as page:
        assert 12 * 168 < page.width < 13 * 172 + 100
    for most in (64, 12):
        numbers = select_steps(256, most)
        assert len(set(numbers)) == most
        assert (numbers[0], numbers[-1]) == (0, 255)
        assert numbers == sorted(numbers)
        assert select_steps(2, most) == [0, 1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_steps": 1, "token_selector": "halton"}, "1 step, token selector halton"),
        (
            {"token_selector": {"name": "remdm", "eta": 0.30}},
            "8 steps, token selector remdm (eta 0.3)",
        ),
    ],
)
def test_settings_are_described_in_one_line(settings, text):
    assert describe_settings(DecodingConfig(**settings)) == text
