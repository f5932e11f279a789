"""Batches of a map-style dataset: the same order and crops as those of shards, on any number of ranks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import FakeData

from maskgit_pl.data import Batch, IndexedDataModule, IndexedDataset, ShardData, ShardDataConfig
from maskgit_pl.data.images import encode_png
from tests.data_folders import OnRank, save_data, wide_image

COUNT = 23


class Images(Dataset):
    """A dataset of images in memory with their labels, as objects of type ``kind``."""

    def __init__(self, kind: str = "tensor") -> None:
        self.kind = kind

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[object, int]:
        pixels = wide_image(index)
        kinds = {
            "tensor": lambda: pixels,
            "plane": lambda: pixels[0],
            "array": lambda: pixels[0].numpy(),
            "array of channels": lambda: pixels.movedim(0, -1).numpy(),
            "picture": lambda: Image.fromarray(pixels[0].numpy()),
        }
        return kinds[self.kind](), index % 3


def data(
    kind: str = "tensor", *, crops: Sequence[str] = ("random_crop",), validation: bool = False, **options: int
) -> IndexedDataModule:
    samples = IndexedDataset(Images(kind), image_size=4, in_channels=1, augmentations=[*crops])
    held_out = replace(samples, augmentations=None) if validation else None
    return IndexedDataModule(samples, held_out, **{"global_batch": 8, "seed": 5, **options})


def same(left: Batch, right: Batch) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("crops", "num_workers"), [([], 0), (["random_crop"], 2)])
def test_the_batches_are_those_of_the_same_images_in_shards(tmp_path: Path, crops: list[str], num_workers: int) -> None:
    samples = [(encode_png(wide_image(number)), number % 3) for number in range(COUNT)]
    folder = save_data(tmp_path, {"train": samples, "val": samples})
    config = ShardDataConfig(
        str(folder),
        image_size=4,
        in_channels=1,
        augmentations=crops,
        global_batch=8,
        validation_batch=5,
        seed=5,
    )
    shards = ShardData(config)
    shards.setup()
    module = data(crops=crops, validation=True, validation_batch=5, num_workers=num_workers)
    for ours, theirs in (
        (module.train_dataloader(), shards.train_dataloader()),
        (module.val_dataloader(), shards.val_dataloader()),
    ):
        assert all(same(left, right) for left, right in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["plane", "array", "array of channels", "picture"])
def test_an_image_may_be_a_tensor_an_array_or_a_picture(kind: str) -> None:
    expected = next(iter(data().train_dataloader()))
    assert same(next(iter(data(kind).train_dataloader())), expected)


def test_a_data_set_of_torchvision_is_served_as_it_is() -> None:
    module = IndexedDataModule(IndexedDataset(FakeData(size=6, image_size=(3, 9, 8)), image_size=8), global_batch=4)
    batch = next(iter(module.train_dataloader()))
    assert (tuple(batch.content.shape), batch.content.dtype) == ((4, 3, 8, 8), torch.uint8)


def test_the_third_item_of_a_sample_is_its_vector() -> None:
    items = [(wide_image(number), 0, np.full(3, number, np.float16)) for number in range(6)]
    module = IndexedDataModule(IndexedDataset(Items(*items), image_size=4, in_channels=1), global_batch=3)
    for batch in module.train_dataloader():
        assert torch.equal(batch.vectors, batch.index[:, None].expand(3, 3).float())


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 2), (1, 8)])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(world_size: int, accumulation: int) -> None:
    whole = list(data().train_dataloader())[1]
    parts = []
    for rank in range(world_size):
        module = data()
        module.trainer = OnRank(rank, world_size, step=1, accumulation=accumulation)
        parts += [batch for batch, _ in zip(module.train_dataloader(), range(accumulation), strict=False)]
    order = torch.cat([part.position for part in parts]).argsort()
    together = Batch(*(torch.cat(column)[order] for column in zip(*(part[:7] for part in parts), strict=True)))
    assert same(together, whole)


class Recording(LightningModule):
    """A module that learns nothing and records the samples of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch.index.tolist())
        return self.weight * 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        raise AssertionError("there is nothing to validate on")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("of", [torch.as_tensor, lambda row: np.array(row, np.uint16)])
def test_without_an_image_size_items_are_tokens_of_any_grid(of) -> None:
    grids = np.arange(6 * 12).reshape(6, 2, 2, 3)
    tokens = Items(*((of(grid), number % 3) for number, grid in enumerate(grids)))
    for batch in IndexedDataModule(IndexedDataset(tokens, image_size=None), global_batch=3).train_dataloader():
        assert batch.content.dtype == torch.int64
        assert torch.equal(batch.content, torch.from_numpy(grids).flatten(1)[batch.index])  # in raster order
        assert torch.equal(batch.labels, batch.index % 3)
    with pytest.raises(
        TypeError, match=r"^sample 0: tokens must be integers, got float64; for images, give image_size"
    ):
        IndexedDataset(Items((np.zeros(12), 0)), image_size=None).__getitems__(range(1))


def plain_trainer(folder: Path, steps: int, **options: object) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    sizes = {"accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    return Trainer(default_root_dir=folder, **quiet, **sizes, **options)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*num_workers")
def test_a_plain_trainer_resumes_in_mid_epoch(tmp_path: Path) -> None:
    straight, stopped, resumed = Recording(), Recording(), Recording()
    plain_trainer(tmp_path, 7).fit(straight, datamodule=data())
    trainer = plain_trainer(tmp_path, 4)
    trainer.fit(stopped, datamodule=data())
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    plain_trainer(tmp_path, 7).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "four.ckpt")
    assert len(straight.seen) == 7
    assert stopped.seen + resumed.seen == straight.seen
    micro = Recording()
    plain_trainer(tmp_path, 7, accumulate_grad_batches=2).fit(micro, datamodule=data())
    assert [first + second for first, second in zip(micro.seen[::2], micro.seen[1::2], strict=True)] == straight.seen


PAIRS = TensorDataset(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data(seed=-1), "seed must be an integer"),
        (lambda: IndexedDataset(Images(), image_size=0), "image_size must be an integer"),
        (lambda: IndexedDataset(Images(), image_size=4, in_channels=5), "in_channels must be one of 1 .*, got 5"),
        (lambda: IndexedDataset(PAIRS, None, augmentations=["random_crop"]), r"augmentations must be None for tokens"),
        (lambda: IndexedDataModule(PAIRS), r"train .* got a TensorDataset; give IndexedDataset\("),
        (lambda: IndexedDataModule(IndexedDataset(PAIRS, 4), PAIRS), "validation must .* got a Tens"),
    ],
)
def test_arguments_out_of_range_are_refused_with_the_way_out(make, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


class Items(Dataset):
    """A dataset whose items are all given ones, in turn."""

    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


GREY = wide_image(0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (GREY, r"must be \(image, label\) or \(image, label, vector\), got a Tensor"),
        ((GREY, "cat"), "label must be an integer >= 0, the number of its class, got 'cat'"),
        ((np.zeros((3, 8, 9), np.uint8), 0), r"an array \(H, W\) or \(H, W, C\).*, the shape \(3, 8, 9\)"),
        ((torch.zeros(8, 9, 3, dtype=torch.uint8), 0), r"tensor must be uint8 of the shape \(H, W\) or \(C, H, W\)"),
        ((torch.rand(1, 8, 9), 0), r"convert floats in \[0, 1\] by \(255 \* x\)\.round\(\)"),
        ((Image.new("F", (9, 8)), 0), "must be a PIL image of integers"),
        (("a.png", 0), "must be a PIL image"),
        ((GREY, 0, np.zeros(3)), "either all items of the data set must have a vector or none"),
        ((GREY, 0, np.zeros((1, 3))), "the vector must be finite numbers of one dimension"),
        ((GREY, 0, [0.0, np.nan]), "the vector must be finite numbers of one dimension"),
    ],
)
def test_an_item_of_another_form_is_refused_by_its_number(item: object, message: str) -> None:
    samples = IndexedDataset(Items((GREY, 0), item), image_size=4, in_channels=1)
    with pytest.raises((TypeError, ValueError), match=f"^sample 1: .*{message}"):
        samples.__getitems__(range(2))
