import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from maskgit_pl.data import ShardData, ShardDataConfig, TokenizingConfig, describe_store, tokenize
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.samples import Sample
from tests.data_folders import OnRank, open_data, save_samples, save_wide_images, top_row, wide_image

NUM_TRAIN, NUM_VAL = 23, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wide_images(tmp_path_factory.mktemp("data"), {"train": NUM_TRAIN, "val": NUM_VAL})


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    description = describe_store(folder, grid=(2, 2), codebook_size=256, tokenizer="me", image_size=4)
    assert tokenize(folder, path, description, encode=top_row, in_channels=1)
    return path


def ids(loader) -> list[tuple[int, int, int]]:
    return [row for b in loader for row in zip(b.position.tolist(), b.epoch.tolist(), b.index.tolist(), strict=True)]


def test_images_labels_and_indices_belong_together(folder):
    batches = list(open_data(folder, num_workers=2).train_dataloader())
    assert [tuple(b.content.shape) for b in batches] == [(8, 1, 4, 4)] * 3
    for batch in batches:
        assert batch.content.dtype == torch.uint8
        for content, label, index in zip(batch.content, batch.labels, batch.index.tolist(), strict=True):
            assert torch.equal(content, wide_image(index)[:, :, 2:6])
            assert label == index % 3


def test_tokens_and_images_give_the_same_samples_in_the_same_order(folder, store):
    images = open_data(folder)
    tokens = open_data(folder, source="tokens", token_store=str(store))
    for left, right in zip(images.train_dataloader(), tokens.train_dataloader(), strict=True):
        assert right.content.dtype == torch.int64
        assert torch.equal(top_row(left.content), right.content)
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(left[1:], right[1:], strict=True))
    assert ids(images.val_dataloader()) == ids(tokens.val_dataloader())
    limited = open_data(folder, validation_samples=5).val_dataloader()
    assert [batch.index[batch.valid].tolist() for batch in limited] == [[0, 1, 2, 3], [4]]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in shards of 9, 9 and 6 samples, one of which has a whole header and damaged pixels, and their tokens."""
    folder = tmp_path_factory.mktemp("uneven")
    samples = [Sample(encode_png(wide_image(number)), "png", number % 3, f"{number}") for number in range(24)]
    samples[7] = samples[7]._replace(data=samples[7].data[:-20] + bytes(20))
    save_samples(folder, {"train": samples, "val": samples})
    description = describe_store(folder, grid=(2, 2), codebook_size=256, tokenizer="me", image_size=4)
    config = TokenizingConfig(batch_size=4, part_size=6, unreadable_budget=0.5)
    assert tokenize(folder, folder / "store", description, encode=top_row, in_channels=1, config=config)
    return folder


def read_steps(folder: Path, first: int, *, world_size: int = 1, **options: object) -> dict[int, tuple]:
    """Maps each position from a step to step 8 to all that a batch has of it, read by a run that begins there."""
    samples = {}
    starts = [first, *range(first // 2 * 2 + 2, 8, 2)]  # an epoch has 2 steps
    for rank, step in itertools.product(range(world_size), starts):
        sizes = {"global_batch": 12, "max_batch_per_device": 2, "unreadable_budget": 0.5}
        module = open_data(folder, **sizes, **options)
        module.trainer = OnRank(rank, world_size, step)
        for batch in module.train_dataloader():
            for row, position in enumerate(batch.position.tolist()):
                samples[position] = tuple(column[row].numpy().tobytes() for column in batch[:7])
    return samples


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("source", ["images", "tokens"])
def test_a_resumed_run_reads_the_same_on_any_number_of_ranks_and_workers(uneven, source, world_size, num_workers):
    options = {"images": {"augmentations": ["random_resized_crop", "flip"]}, "tokens": {}}[source]
    options |= {"source": source, "token_store": str(uneven / "store"), "seed": 3}
    whole = read_steps(uneven, 0, **options)
    resumed = read_steps(uneven, 5, world_size=world_size, num_workers=num_workers, **options)
    assert resumed == {position: whole[position] for position in range(5 * 12, 8 * 12)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_batch", 2**40), ("global_batch", 8.0), ("validation_batch", -1), ("validation_samples", 0),
        ("views", 0), ("num_workers", 10**6), ("seed", 2**32), ("image_size", 0), ("in_channels", 5),
        ("unreadable_budget", 2),
        ("source", "image"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_before_anything_is_read(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"^data\.{key} must .*, got {value!r}"):
        ShardData(ShardDataConfig(str(tmp_path), **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("samples", {"train": 23}), ("classes", ["0", "1", "2", "3"]), ("data", "other"), ("image_size", 8)],
)
def test_a_store_of_other_data_or_of_another_tokenizer_is_refused(folder, store, tmp_path, key, value):
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store" / "store.json"
    content = json.loads(path.read_text())
    content |= {
        key: value,
        "sha256": {f: h for f, h in content["sha256"].items() if key != "samples" or "val" not in f},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"its {key.replace('_', ' ')} must be .*maskgit tokenize"):
        open_data(folder, source="tokens", token_store=str(tmp_path / "store"))
    module = open_data(folder, source="tokens", token_store=str(store))
    tokenizer = {"fingerprint": "me", "grid": (2, 2), "codebook_size": 256}
    module.require_tokenizer(**tokenizer)
    for field, other in (("grid", (1, 4)), ("codebook_size", 512), ("fingerprint", "other")):
        name = {"codebook_size": "codebook size", "fingerprint": "tokenizer"}.get(field, field)
        with pytest.raises(ValueError, match=rf"its {name} must be .*maskgit tokenize"):
            module.require_tokenizer(**{**tokenizer, field: other})
