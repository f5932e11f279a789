"""Making a token store from images: its rows, shared work of processes, and unreadable images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data import InOrder, ShuffledStream, TokenizingConfig, describe_store, tokenize
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.loader import TokenBatches
from maskgit_pl.data.token_store import open_store
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.processes import no_bars
from tests.data.conftest import contents
from tests.data_folders import open_data, save_data, save_wide_images, top_row, wide_image

NUM_TRAIN, NUM_VAL = 23, 11
VIEWS = ("crops", "flip")


def make(folder: Path, store: Path, *, encode=top_row, ranks=(0, 1), bars=no_bars, **options) -> bool:
    """Makes a store; ``options`` are those of ``describe_store`` and of ``TokenizingConfig``."""
    views = {name: options.pop(name) for name in VIEWS if name in options}
    description = describe_store(folder, grid=(2, 2), codebook_size=256, tokenizer="me", image_size=4, **views)
    config = TokenizingConfig(**{"batch_size": 4, "part_size": 6, "unreadable_budget": 0.0, **options})
    return tokenize(folder, store, description, encode=encode, in_channels=1, config=config, ranks=ranks, bars=bars)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_wide_images(tmp_path_factory.mktemp("data"), {"train": NUM_TRAIN, "val": NUM_VAL})


@pytest.fixture(scope="module")
def views(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("views")
    assert make(folder, path, crops=3, flip=True)
    return path


def test_views_are_crops_each_followed_by_its_mirror_image(folder, views):
    stored = np.load(views / "train-tokens.npy").reshape(NUM_TRAIN, 3, 2, 4).astype(np.int64)
    lefts = (stored[:, :, 0, 0] - 7 * np.arange(NUM_TRAIN)[:, None]) % 256
    assert (lefts[:, 0] == 2).all()  # the centre of 9 columns
    assert set(lefts[:, 1:].ravel()) == set(range(6))
    assert (lefts[:, 1] != lefts[:, 2]).any()
    columns = lefts[..., None] + np.arange(4) + 7 * np.arange(NUM_TRAIN)[:, None, None]
    assert np.array_equal(stored[:, :, 0], columns % 256)
    assert np.array_equal(stored[:, :, 1], stored[:, :, 0, ::-1])
    assert np.load(views / "val-tokens.npy").shape == (NUM_VAL, 4)


@pytest.mark.slow
def test_neither_ranks_nor_workers_nor_interruptions_change_a_byte(folder, views, tmp_path):
    ranks = [make(folder, tmp_path / "ranks", crops=3, flip=True, ranks=(r, 3)) for r in (1, 2, 0)]
    assert ranks == [False, False, True]
    assert make(folder, tmp_path / "workers", crops=3, flip=True, num_workers=2)
    interrupted, calls = tmp_path / "interrupted", iter(range(1000))

    def failing(images):
        if next(calls) % 6 == 5:
            raise KeyboardInterrupt
        return top_row(images)

    stops = 0
    while not (interrupted / "store.json").exists():
        try:
            make(folder, interrupted, encode=failing, crops=3, flip=True)
        except KeyboardInterrupt:
            stops += 1
    assert stops > 5
    for name in ("ranks", "workers", "interrupted"):
        assert contents(tmp_path / name) == contents(views)
        assert not list((tmp_path / name).glob(".*"))


def test_an_epoch_shows_one_view_by_seed_sample_and_epoch_alone(folder, views):
    reader = open_store(views, data=None)["train"]
    stored = np.load(views / "train-tokens.npy").reshape(NUM_TRAIN, 6, 4)

    def views_of(order_seed: int, seed: int) -> dict[tuple[int, int], int]:
        batches = TokenBatches(reader, ShuffledStream(NUM_TRAIN, order_seed), seed=seed)
        batch = batches.__getitems__(range(20 * NUM_TRAIN))
        keys = zip(batch.index.tolist(), batch.epoch.tolist(), strict=True)
        return {
            key: int((stored[key[0]] == row).all(-1).argmax())
            for key, row in zip(keys, batch.content.numpy(), strict=True)
        }

    first = views_of(0, 0)
    assert first == views_of(9, 0)  # another order, the same views
    assert first != views_of(0, 1)
    # The probability of one view in all epochs is below 1e-6.
    assert all(len({first[sample, epoch] for epoch in range(20)}) > 1 for sample in range(NUM_TRAIN))
    counts = np.bincount(list(first.values()), minlength=6)
    assert counts.min() > 20  # of 460; equal crops count for the first of them


def test_unreadable_images_are_replaced_as_in_training_with_their_labels(tmp_path):
    train = [(b"" if n in (4, 5, 22) else encode_png(wide_image(n)), n % 3) for n in range(NUM_TRAIN)]
    data = save_data(tmp_path / "data", {"train": train, "val": train[:3]})
    with pytest.raises(DataBudgetError, match="unreadable"):
        make(data, tmp_path / "strict")
    assert make(data, tmp_path / "store", unreadable_budget=0.5)
    modules = [
        open_data(data, unreadable_budget=0.5, **source)
        for source in ({}, {"source": "tokens", "token_store": str(tmp_path / "store")})
    ]
    images, tokens = (module.batches("train", InOrder(NUM_TRAIN)).__getitems__(range(NUM_TRAIN)) for module in modules)
    assert torch.equal(top_row(images.content), tokens.content)
    assert torch.equal(images.labels, tokens.labels)
    assert tokens.labels[[4, 5, 22]].tolist() == [6 % 3, 6 % 3, 0]
