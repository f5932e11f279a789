import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from maskgit_pl.evaluation.generation import (
    Task,
    edit,
    generate_accepted,
    hide_pixels,
    make_hidden_mask,
    num_candidates,
)
from maskgit_pl.networks.feature_networks import ClassifierSizes, FrozenClassifier, create_classifier
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.pipeline.bulk import BulkOptions, generate_many
from tests.conftest import CLASSES

OPTIONS = BulkOptions(num_images=6, batch_size=3, seed=5)


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)  # 8 px, 4 x 4 tokens


@pytest.fixture(scope="module")
def acceptance() -> Acceptance:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_classifier(ClassifierSizes(1, 8, 3, width=4))
    return Acceptance(0.25, FrozenClassifier(network, CLASSES))


def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_file_holds_the_best_candidates_with_their_seeds(pipe, acceptance, tmp_path):
    result = generate_accepted(pipe, tmp_path / "best.npz", OPTIONS, acceptance)
    assert (result.made, result.missing_parts) == (24, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["best.npz"]
    assert num_candidates(acceptance, 6, 3) == 24
    generate_many(pipe, tmp_path / "all.npz", replace(OPTIONS, num_images=24))
    best, everything = read(tmp_path / "best.npz"), read(tmp_path / "all.npz")
    assert best["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    rows = best["seeds"] - 5
    assert (best["arr_0"] == everything["arr_0"][rows]).all()
    with zipfile.ZipFile(tmp_path / "best.npz") as archive:
        plan = json.loads(archive.comment)
    assert (plan["accept_rate"], plan["classifier"], plan["count"]) == (0.25, acceptance.digest, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 7}, "num_images must be a multiple of 3, the number of classes, with accept_rate, got 7"),
        ({"classes": [0, None]}, "classes must not be None with accept_rate"),
    ],
)
def test_refuses_before_anything_is_generated(pipe, acceptance, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate_accepted(pipe, tmp_path / "best.npz", replace(OPTIONS, **changes), acceptance)
    assert not list(tmp_path.iterdir())


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
