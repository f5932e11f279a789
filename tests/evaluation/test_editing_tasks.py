from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from maskgit_pl.evaluation.generation import Task, edit, hide_pixels, make_hidden_mask
from maskgit_pl.pipeline import MaskGIT

TASKS = get_args(Task)


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)  # 8 px, 4 x 4 tokens


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 0, 1])


def test_the_hidden_part_is_the_right_half_or_half_of_each_edge(pipe: MaskGIT) -> None:
    right, centre = (make_hidden_mask(task, pipe.tokenizer) for task in TASKS)
    assert right[0].tolist() == [False] * 4 + [True] * 4
    assert centre.sum() == 16
    assert centre[2:6, 2:6].all()


@pytest.mark.parametrize("edge", [6, 14, 28, 32])
def test_grids_that_have_no_half_are_rounded(pipe: MaskGIT, edge: int) -> None:
    grid = replace(pipe.tokenizer, image_size=edge).grid
    factor = edge // grid[0]
    right, middle = (make_hidden_mask(task, replace(pipe.tokenizer, image_size=edge)) for task in TASKS)
    assert int(right[0].sum()) >= edge / 2
    assert int(middle.any(0).sum()) <= edge / 2
    for dimension in (0, 1):
        assert torch.equal(middle, middle.flip(dimension))
    assert int(right[0].sum()) % factor == int(middle.any(0).sum()) % factor == 0


def test_images_may_cover_a_part_of_their_last_tokens(pipe: MaskGIT, images: torch.Tensor) -> None:
    tokenizer = replace(pipe.tokenizer, image_size=(7, 8))  # 4 x 4 tokens too
    for task in TASKS:
        assert hide_pixels(task, tokenizer, images[..., :7, :]).shape == (5, 1, 7, 8)


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
