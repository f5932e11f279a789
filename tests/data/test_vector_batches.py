"""Vectors of images in batches: from shards, from a token store, and from a map-style dataset; on any rank."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data import (
    IndexedDataModule,
    IndexedDataset,
    ShardData,
    ShardDataConfig,
    StreamConfig,
    TokenizingConfig,
    describe_store,
    tokenize,
)
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.samples import Sample
from tests.data.test_vectors import npy
from tests.data_folders import save_data, save_samples, top_row

NUM_TRAIN, NUM_VAL, DIM = 23, 11, 3


def image(number: int) -> torch.Tensor:
    """Returns (1, 4, 4) uint8, whose first pixel is the number."""
    return (number + torch.arange(16).reshape(1, 4, 4)).to(torch.uint8)


def vector(number: int) -> np.ndarray:
    """Returns (3,) float16, whose first value is the number."""
    return np.array([number, number / 8, -1], np.float16)


def sample(number: int) -> Sample:
    return Sample(encode_png(image(number)), "png", number % 3, f"{number}", npy(vector(number)))


def samples_with_damage(count: int, damaged: int) -> list[Sample]:
    """Returns samples, one of which has a whole header and damaged pixels."""
    samples = [sample(number) for number in range(count)]
    samples[damaged] = samples[damaged]._replace(data=samples[damaged].data[:-20] + bytes(20))
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": map(sample, range(NUM_TRAIN)), "val": map(sample, range(100, 100 + NUM_VAL))}
    return save_samples(tmp_path_factory.mktemp("data"), splits)


def make_store(folder: Path, store: Path, **options: float) -> bool:
    description = describe_store(folder, grid=(2, 2), codebook_size=256, tokenizer="me", image_size=4)
    config = TokenizingConfig(**{"batch_size": 4, "part_size": 6, **options})
    return tokenize(folder, store, description, encode=top_row, in_channels=1, config=config)


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    assert make_store(folder, path)
    return path


def data(folder: Path, **options: object) -> ShardData:
    defaults = {"image_size": 4, "in_channels": 1, "global_batch": 8, "max_batch_per_device": 8, "validation_batch": 4}
    module = ShardData(ShardDataConfig(str(folder), **{**defaults, "vectors": True, **options}))
    module.setup()
    return module


def rows(batches) -> dict[int, tuple[int, list[float]]]:
    """Maps positions to the first pixel or token and the vector of a sample."""
    return {
        int(position): (int(content.flatten()[0]), vector.tolist())
        for batch in batches
        for position, content, vector in zip(batch.position, batch.content, batch.vectors, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_each_sample_has_its_own_vector_in_both_sources(folder, store, loader: str, num_workers: int) -> None:
    found = [
        rows(getattr(data(folder, num_workers=num_workers, **source), loader)())
        for source in ({}, {"source": "tokens", "token_store": str(store)})
    ]
    assert found[0] == found[1]
    assert len(found[0]) >= NUM_VAL
    for number, read in found[0].values():
        assert read == vector(number).tolist()


class OnRank:
    """The part of a Trainer that the data module reads."""

    def __init__(self, rank: int, world_size: int, step: int) -> None:
        self.global_rank, self.world_size, self.global_step = rank, world_size, step


def read_steps(folder: Path, first: int, *, world_size: int = 1, **options: object) -> dict[int, tuple]:
    """Maps each position from a step to step 8 to all that a batch has of it, read by a run that begins there."""
    found = {}
    starts = [first, *range(first // 2 * 2 + 2, 8, 2)]  # an epoch has 2 steps
    for rank, step in itertools.product(range(world_size), starts):
        module = data(folder, global_batch=12, max_batch_per_device=2, unreadable_budget=0.5, **options)
        module.trainer = OnRank(rank, world_size, step)
        for batch in module.train_dataloader():
            *columns, vectors, _ = batch
            for row, position in enumerate(batch.position.tolist()):
                found[position] = tuple(column[row].numpy().tobytes() for column in (*columns, vectors))
    return found


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in shards of 9, 9 and 6 samples, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("uneven")
    save_samples(folder, dict.fromkeys(("train", "val"), samples_with_damage(24, 7)))
    make_store(folder, folder / "store", unreadable_budget=0.5)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on fewer cores
@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("source", ["images", "tokens"])
def test_a_resumed_run_reads_the_same_on_any_number_of_ranks_and_workers(uneven, source, world_size, num_workers):
    options = {"images": {"augmentations": ["random_resized_crop", "flip"]}, "tokens": {}}[source]
    options |= {"source": source, "token_store": str(uneven / "store"), "seed": 3}
    whole = read_steps(uneven, 0, **options)
    resumed = read_steps(uneven, 5, world_size=world_size, num_workers=num_workers, **options)
    assert resumed == {position: whole[position] for position in range(5 * 12, 8 * 12)}


@pytest.mark.parametrize("source", ["images", "tokens"])
def test_an_unreadable_image_is_replaced_together_with_its_vector(tmp_path: Path, source: str) -> None:
    folder, store = tmp_path / "data", tmp_path / "store"
    folder.mkdir()
    save_samples(folder, dict.fromkeys(("train", "val"), samples_with_damage(4, 2)))
    make_store(folder, store, unreadable_budget=0.5)
    options = {"validation_batch": 4, "unreadable_budget": 0.5, "source": source, "token_store": str(store)}
    (batch,) = data(folder, **options).val_dataloader()
    assert batch.replacement.tolist() == [-1, -1, 3, -1]
    assert batch.vectors[:, 0].tolist() == [0, 1, 3, 3]


def test_vectors_are_refused_by_name_where_there_are_none(folder, tmp_path: Path) -> None:
    plain = save_data(tmp_path, {split: [(encode_png(image(0)), 0)] * 2 for split in ("train", "val")})
    with pytest.raises(ValueError, match=r"data\.vectors must be false for .* whose samples have no vectors, got true"):
        data(plain)
    assert data(folder, vectors=False).vector_dim == 0
    assert data(folder).vector_dim == DIM
    with pytest.raises(ValueError, match=r"data\.vectors be false for data\.source: stream"):
        ShardDataConfig(str(folder), source="stream", stream=StreamConfig("x.tar", 1), vectors=True)


@pytest.mark.parametrize("is_set_up", [False, True])
def test_a_changed_array_is_refused_where_vectors_are_read_for_an_evaluation(folder, tmp_path, is_set_up) -> None:
    changed = shutil.copytree(folder, tmp_path / "data")
    array = np.load(changed / "val-vectors.npy")
    np.save(changed / "val-vectors.npy", array + 1)
    config = ShardDataConfig(str(changed), image_size=4, in_channels=1, global_batch=8)
    module = ShardData(config)
    if is_set_up:
        module.setup()  # without vectors, which a run may leave aside
        with pytest.raises(ValueError, match=r"val-vectors\.npy changed since they were indexed"):
            ShardData(replace(config, vectors=True)).setup()
    with pytest.raises(ValueError, match=r"val-vectors\.npy changed since they were indexed"):
        module.vector_pool("val")
    with pytest.raises(ValueError, match=r"val-vectors\.npy changed since they were indexed"):
        ShardData(replace(config, vectors=True)).val_dataloader()


def test_a_map_style_dataset_may_have_vectors() -> None:
    items = [(image(n), n % 3, vector(n)) for n in range(9)]
    module = IndexedDataModule(IndexedDataset(items, image_size=4, in_channels=1), global_batch=4)
    for number, read in rows(module.train_dataloader()).values():
        assert read == vector(number).tolist()
