import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl import pretrained
from maskgit_pl.decoding import DecodingStep
from maskgit_pl.imaging import (
    decoding_filmstrip,
    decoding_frames,
    image_grid,
    reconstruction_grid,
    save_gif,
    save_png,
    shown_steps,
)
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pretrained import PretrainedTokenizer, images_at_once
from maskgit_pl.training.image_callbacks import ReconstructionPictures, SamplePictures
from maskgit_pl.training.logs import RunLogger

GREY = (176, 176, 176)


def random_images(count: int, channels: int = 1, size: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def shares(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    return float((np.asarray(picture) == colour).all(-1).mean())


def step(number: int, was: list[int], still: list[int], count: int = 2) -> DecodingStep:
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, was], masks[1, still] = True, True
    tokens = torch.zeros(count, 16, dtype=torch.int64)
    was_masked, still_masked = (mask.expand(count, 16) for mask in masks)
    return DecodingStep(number, tokens, was_masked, still_masked, torch.zeros(count, 16), torch.ones(count, 16))


STEPS = [step(0, list(range(16)), list(range(8))), step(1, list(range(8)), [])]


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_stands_enlarged_at_its_place(channels: int) -> None:
    images = random_images(5, channels)
    picture = np.asarray(image_grid(images, columns=3))
    assert picture.shape == (8 + 2 * 84 + 4 + 8, 8 + 3 * 84 + 2 * 4 + 8, 3)
    for number, image in enumerate(images):
        top, left = 8 + number // 3 * 88, 8 + number % 3 * 88
        shown = picture[top : top + 84 : 3, left : left + 84 : 3]
        assert (shown == image.permute(1, 2, 0).expand(28, 28, 3).numpy()).all()


def test_large_images_keep_their_size_and_captions_make_room() -> None:
    images = random_images(2, size=96)
    plain = image_grid(images, columns=2)
    captioned = image_grid(images, columns=2, row_captions=["Ankle boot"], column_captions=["a", "b" * 80])
    assert plain.width == 8 + 96 + 4 + 96 + 8
    assert captioned.width > plain.width + 50
    assert captioned.height > plain.height


@pytest.mark.parametrize(
    ("images", "columns", "captions", "message"),
    [
        (random_images(0), 1, [], "n >= 1"),
        (random_images(1).float(), 1, [], "uint8"),
        (random_images(1), 0, [], "columns: at least 1"),
        (random_images(2), 2, ["a", "b"], "row_captions: at most 1"),
    ],
)
def test_refuses_what_cannot_be_laid_out(images: torch.Tensor, columns: int, captions: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(images, columns=columns, row_captions=captions)


def test_reconstructions_stand_below_their_originals() -> None:
    originals, reconstructions = random_images(4, size=84), 255 - random_images(4, size=84)
    picture = np.asarray(reconstruction_grid(originals, reconstructions, columns=2))
    above, below = picture[8 : 8 + 84], picture[8 + 88 : 8 + 88 + 84]
    assert (above[:, -92:-8] == 255 - below[:, -92:-8]).all()
    assert picture.shape[0] == 8 + 4 * 84 + 3 * 4 + 8


def test_a_failed_write_leaves_the_old_picture_and_no_other_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "deep" / "picture.png"
    picture = image_grid(random_images(1), columns=1)
    save_png(picture, path)
    before = path.read_bytes()

    def fail(self, partial, **options):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(picture, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_frames_grey_out_masked_tokens_and_mark_those_kept_at_the_step() -> None:
    images = [torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)] * 2  # nothing grey but the masked cells
    first, last = decoding_frames(STEPS, images, grid=(4, 4), captions=["a", "b"])
    assert first.size == last.size
    panels = 2 * 2 * 168**2 / (first.width * first.height)
    assert shares(first, GREY) == pytest.approx(panels / 4, rel=0.12)  # half of the upper panels, less cell borders
    assert shares(last, GREY) == 0
    assert shares(last, (230, 90, 20)) == pytest.approx(shares(first, (230, 90, 20)), rel=0.01)


def test_the_animation_has_a_frame_a_step(tmp_path) -> None:
    frames = decoding_frames(STEPS, [random_images(2, 3)] * 2, grid=(4, 4))
    save_gif(frames, tmp_path / "decoding.gif")
    with Image.open(tmp_path / "decoding.gif") as animation:
        assert animation.n_frames == 2
        assert animation.size == frames[0].size
    page = decoding_filmstrip(STEPS, [random_images(2, 3)] * 2, grid=(4, 4), row=1)
    assert page.width > 2 * 168
    assert page.height > 4 * 168


def test_a_filmstrip_shows_the_mask_the_confidence_and_what_is_masked_again() -> None:
    was, still = torch.zeros(1, 16, dtype=torch.bool), torch.zeros(1, 16, dtype=torch.bool)
    was[0, :4], still[0, 3:6] = True, True  # tokens 0 to 2 are kept, 3 stays masked, 4 and 5 are masked again
    confidence = torch.linspace(0, 0.5, 16)[None]
    confidence[0, 3] = 0.4  # the highest that was drawn; the brighter ones were given
    step = DecodingStep(0, torch.zeros(1, 16, dtype=torch.int64), was, still, torch.zeros(1, 16), confidence)
    page = np.asarray(decoding_filmstrip([step], [random_images(1)], grid=(4, 4)))
    left, top = page.shape[1] - 8 - 168, 8 + 14 + 8

    def centre(panel: int, token: int) -> tuple[int, ...]:
        return tuple(page[top + panel * 172 + token // 4 * 42 + 21, left + token % 4 * 42 + 21])

    def frame(token: int) -> tuple[int, ...]:
        return tuple(page[top + 2 * 172 + token // 4 * 42, left + token % 4 * 42])

    assert [centre(0, token) == GREY for token in range(16)] == was[0].tolist()
    assert [centre(2, token) == GREY for token in range(16)] == still[0].tolist()
    assert centre(1, 0) == (68, 1, 84)  # viridis from its dark end
    assert centre(1, 3) == centre(1, 15) == (253, 231, 37)  # to its bright one
    assert [frame(token) for token in (0, 4)] == [(230, 90, 20), (40, 110, 220)]


def test_of_many_steps_a_filmstrip_shows_twelve_the_first_and_the_last_among_them() -> None:
    many = [dataclasses.replace(STEPS[0], step=number) for number in range(30)]
    page = decoding_filmstrip(many, [random_images(2)] * 30, grid=(4, 4))
    assert 12 * 168 < page.width < 13 * 172 + 100


def test_of_many_steps_some_are_shown_the_first_and_the_last_among_them() -> None:
    many = [dataclasses.replace(STEPS[0], step=number) for number in range(256)]
    for kind, most in (("animation", 64), ("filmstrip", 12)):
        shown = [step.step for step in shown_steps(many, kind)]
        assert len(shown) == len(set(shown)) == most
        assert (shown[0], shown[-1]) == (0, 255)
        assert shown == sorted(shown)
        assert shown_steps(STEPS, kind) == STEPS


def tiny_tokenizer() -> PretrainedTokenizer:
    config = VQGANConfig(1, channels=8, multipliers=(1, 1, 1), blocks_per_level=1, groups=2, num_codes=8, code_width=4)
    return PretrainedTokenizer(VQGAN(config).eval(), 14, "f" * 64)


def test_decoded_images_are_cut_to_the_image_size_and_clipped() -> None:
    tokenizer = tiny_tokenizer()  # 14 px need a grid of 4 x 4, which covers 16 px
    tokens = torch.arange(16).remainder(8).expand(3, 16)
    images = tokenizer.decode(tokens)
    assert images.shape == (3, 1, 14, 14)
    with torch.no_grad():
        exact = tokenizer.network.decode(tokens, (4, 4))[..., :14, :14].clamp(0, 1) * 255
    assert (images - exact).abs().max() <= 0.5


class FakeModel:
    """Decodes to its labels; counts runs that went to the end."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.asked: list[tuple[list[int], list[int]]] = []

    def reconstructions(self):
        return random_images(20), random_images(20)

    def sample(self, labels, seeds):
        yield step(0, list(range(16)), [0], len(labels))
        yield step(1, [0], [], len(labels))
        self.asked.append((list(labels), list(seeds)))


def trainer(tmp_path, *, rank: int = 0, sanity: bool = False) -> SimpleNamespace:
    loggers = [RunLogger(tmp_path, name="logs")] if rank == 0 else []
    return SimpleNamespace(sanity_checking=sanity, is_global_zero=rank == 0, global_step=7, loggers=loggers)


def test_callbacks_write_their_pictures_and_tensorboard_events(tmp_path) -> None:
    there = trainer(tmp_path)
    ReconstructionPictures(tmp_path).on_validation_end(there, FakeModel())
    SamplePictures(tmp_path, class_names=["a", "b"]).on_validation_end(there, FakeModel())
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.height == 8 + 4 * 84 + 3 * 4 + 8  # 16 pairs, 8 a row
    assert (tmp_path / "samples.png").is_file()
    there.loggers[0].experiment.flush()
    events = b"".join(file.read_bytes() for file in tmp_path.rglob("events.out*"))
    assert b"reconstructions" in events
    assert b"samples" in events


def test_every_rank_samples_the_same_but_rank_0_alone_writes(tmp_path) -> None:
    callback = SamplePictures(tmp_path, class_names=[str(number) for number in range(25)], images_per_class=99, seed=5)
    model = FakeModel()
    callback.on_validation_end(trainer(tmp_path, rank=1), model)
    ReconstructionPictures(tmp_path).on_validation_end(trainer(tmp_path, rank=1), model)
    ((labels, seeds),) = model.asked
    assert sorted(set(labels)) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert seeds == list(range(5, 85))
    assert list(tmp_path.glob("*.png")) == []


def test_nothing_is_drawn_in_the_sanity_check(tmp_path) -> None:
    model = FakeModel()
    for callback in (ReconstructionPictures(tmp_path), SamplePictures(tmp_path, class_names=["a"])):
        callback.on_validation_end(trainer(tmp_path, sanity=True), model)
    assert model.asked == []
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize(("size", "count"), [((256, 256), 16), ((512, 512), 4), ((28, 28), 1337), ((4096, 4096), 1)])
def test_the_pixels_that_are_decoded_at_once_are_bounded(size, count):
    assert images_at_once(*size) == count


def test_decoding_in_parts_gives_the_same_pictures(monkeypatch):
    config = VQGANConfig(1, channels=8, multipliers=(1, 1), blocks_per_level=1, groups=2, num_codes=16, code_width=4)
    tokenizer = PretrainedTokenizer(VQGAN(config).eval(), 8, "")
    tokens = torch.randint(0, 16, (7, 16), generator=torch.Generator().manual_seed(0))
    whole, parts, decode = tokenizer.decode(tokens), [], tokenizer.network.decode
    monkeypatch.setattr(pretrained, "_MOST_PIXELS", 3 * 8 * 8)
    monkeypatch.setattr(tokenizer.network, "decode", lambda part, grid: parts.append(len(part)) or decode(part, grid))
    made = tokenizer.decode(tokens)
    assert parts == [3, 3, 1]
    assert (made.int() - whole.int()).abs().max() <= 1  # rounding to bytes
    assert tokenizer.decode(tokens[:, :8], grid=(2, 4)).shape == (7, 1, 4, 8)
    assert parts[3:] == [6, 1]
