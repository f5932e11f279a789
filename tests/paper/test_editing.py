from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from maskgit_pl.pipeline import MaskGIT
from paper.editing import Task, edit, hide_pixels, make_hidden_mask


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)  # 8 px, 4 x 4 tokens


TASKS = get_args(Task)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(("edge", "right", "centre"), [(6, 4, 2), (8, 4, 4), (14, 8, 6), (28, 14, 12), (32, 16, 16)])
def test_the_hidden_part_is_the_right_half_or_the_centre_in_whole_tokens(
    pipe: MaskGIT, edge: int, right: int, centre: int
) -> None:
    half, middle = (make_hidden_mask(task, replace(pipe.tokenizer, image_size=edge)) for task in TASKS)
    assert half[0].tolist() == [False] * (edge - right) + [True] * right
    first = (edge - centre) // 2
    assert int(middle.sum()) == centre**2
    assert middle[first : first + centre, first : first + centre].all()


@pytest.mark.parametrize("task", TASKS)
def test_the_hidden_part_does_not_influence_the_result(pipe: MaskGIT, images: torch.Tensor, task: Task) -> None:
    hidden = make_hidden_mask(task, pipe.tokenizer)
    others = torch.where(hidden, 255 - images, images)
    assert torch.equal(edit(task, pipe, images, LABELS), edit(task, pipe, others, LABELS))
    assert torch.equal(hide_pixels(task, pipe.tokenizer, images), hide_pixels(task, pipe.tokenizer, others))


@pytest.mark.parametrize("task", TASKS)
def test_every_image_is_edited_for_its_class_with_its_own_seed(pipe: MaskGIT, images: torch.Tensor, task: Task) -> None:
    done: list[int] = []
    together = edit(task, pipe, images, LABELS, seed=3, batch_size=2, on_images=done.append)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    assert sum(done) == 5
    alone = edit(task, pipe, images[3:4], LABELS[3:4], seed=6)
    assert (together[3].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(together, edit(task, pipe, images, LABELS.roll(1), seed=3))
