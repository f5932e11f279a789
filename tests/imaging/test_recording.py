import torch
from PIL import Image

from maskgit_pl.imaging import StepRecorder, save_animation, save_filmstrip
from tests.imaging.decoding_steps import STEPS, random_images, step

ALL = list(range(16))


def test_the_first_images_of_the_first_batch_are_recorded_to_the_end() -> None:
    record = StepRecorder(max_images=2)
    for each in (step(0, ALL, ALL[:8], 3), step(1, ALL[:8], [], 3), step(0, ALL, [], 3), step(0, ALL, [], 1)):
        record(each)
    assert [(each.step, len(each.tokens)) for each in record.steps] == [(0, 2), (1, 2)]


def test_a_batch_of_another_size_is_not_mixed_in() -> None:
    record = StepRecorder()
    for each in (step(0, ALL, ALL[:8], 3), step(0, ALL, ALL[:8], 1), step(1, ALL[:8], [], 3)):
        record(each)
    assert [len(each.tokens) for each in record.steps] == [3, 3]


def test_steps_become_an_animation_and_a_filmstrip(tmp_path) -> None:
    decoded: list[int] = []

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(len(tokens))
        return random_images(len(tokens))

    save_animation(STEPS, decode, tmp_path / "new" / "decoding.gif", grid=(4, 4), captions=["a", "b", "too many"])
    save_filmstrip(STEPS, decode, tmp_path / "strip.png", grid=(4, 4))
    assert decoded == [2, 2, 1, 1]
    with Image.open(tmp_path / "new" / "decoding.gif") as animation:
        assert animation.n_frames == 2
        assert animation.info["duration"] == 600
    with Image.open(tmp_path / "strip.png") as page:
        assert page.width > 2 * 168
