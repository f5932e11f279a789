"""Every registered augmentation is a function of (seed, index, epoch), with the pixels of the reference."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop as Reference

from maskgit_pl.data import InOrder, ShardData, ShardDataConfig, TokenizingConfig, describe_store, flip, tokenize
from maskgit_pl.data.augmentations import Augmentation, RandomResizedCrop, augmentations, build_augmentations
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.loader import ImageBatches
from maskgit_pl.data.manifest import ShardReader, load_manifest
from maskgit_pl.data.token_store import augmentations_text, open_store
from tests.data_folders import save_data

LISTS = [[name] for name in augmentations.names()] + [
    [],
    ["random_resized_crop", {"name": "flip", "probability": 0.3}],
    ["flip", {"name": "random_resized_crop", "scale": [0.5, 0.9], "ratio": [1.0, 1.0]}],
]
COUNT = 13


def pixels(channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def augment(listed: list, image: torch.Tensor, *, index: int = 3, epoch: int = 1, seed: int = 5, size=(8, 12)):
    (function,) = build_augmentations(listed).draw(torch.tensor([index]), torch.tensor([epoch]), seed=seed)
    return function(image, size)


@pytest.mark.parametrize("listed", LISTS, ids=str)
@pytest.mark.parametrize(("channels", "shape"), [(1, (5, 9)), (3, (40, 60)), (1, (1, 30)), (3, (8, 12))])
def test_an_image_of_any_size_becomes_uint8_of_the_models_size(listed, channels, shape):
    image = pixels(channels, *shape)
    before = image.clone()
    result = augment(listed, image)
    assert (result.dtype, result.shape) == (torch.uint8, (channels, 8, 12))
    assert torch.equal(image, before)


@pytest.mark.parametrize("listed", LISTS, ids=str)
def test_numbers_depend_on_seed_index_and_epoch_and_not_on_the_batch(listed):
    parts, image = build_augmentations(listed), pixels(3, 20, 31)
    index, epoch = torch.arange(32), torch.arange(32) // 8
    whole = [function(image, (8, 8)) for function in parts.draw(index, epoch, seed=1)]
    some = [function(image, (8, 8)) for function in parts.draw(index[7:21], epoch[7:21], seed=1)]
    assert all(map(torch.equal, whole[7:21], some))
    others = (
        parts.draw(index, epoch, seed=2),
        parts.draw(index, epoch + 9, seed=1),
        parts.draw(index + 99, epoch, seed=1),
    )
    is_random = any(part.num_random for part in parts.parts.values())
    for other in others:
        assert all(torch.equal(a, b(image, (8, 8))) for a, b in zip(whole, other, strict=True)) is not is_random


def test_a_listed_flip_equals_that_on_the_device():
    images = torch.stack([pixels(3, 8, 14, seed) for seed in range(20)])
    index, epoch = torch.arange(20), torch.full((20,), 2)
    functions = build_augmentations(["flip"]).draw(index, epoch, seed=4)
    flipped = [f(image, (8, 14)) for f, image in zip(functions, images, strict=True)]
    assert torch.equal(torch.stack(flipped), flip(images, probability=0.5, seed=4, index=index, epoch=epoch))


@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
def test_random_resized_crop_has_the_pixels_of_pil(size):
    # Away from 0 and 255: PIL clamps between its two passes.
    image, part = 64 + pixels(3, 90, 120) // 2, RandomResizedCrop()
    for seed in range(20):
        random = torch.rand(part.num_random, generator=torch.Generator().manual_seed(seed)).tolist()
        top, left, height, width = part.box(90, 120, random, size=size)
        result = part(image, random, size=size)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        expected = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(result.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(90, 120), (200, 60)])
@pytest.mark.parametrize("options", [{}, {"scale": (0.4, 0.8), "ratio": (0.9, 1.4)}])
def test_parts_are_distributed_as_those_of_torchvision(height, width, options):
    part, generator = RandomResizedCrop(**options), torch.Generator().manual_seed(0)
    ours = [part.box(height, width, torch.rand(40, generator=generator).tolist(), size=(8, 8)) for _ in range(3000)]
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = [Reference.get_params(image, list(part.scale), list(part.ratio)) for _ in range(3000)]
    for places in (ours, theirs):
        assert all(0 <= y <= height - h and 0 <= x <= width - w for y, x, h, w in places)
    values = [[(y / height, x / width, h * w / (height * width), np.log(w / h)) for y, x, h, w in boxes]
              for boxes in (ours, theirs)]  # fmt: skip
    for statistic in (np.mean, np.std):
        np.testing.assert_allclose(statistic(values[0], axis=0), statistic(values[1], axis=0), atol=0.02)


def test_an_image_in_which_no_part_fits_gives_the_largest_central_one():
    long = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert long.box(10, 30, [0.5] * 40, size=(8, 8)) == (0, 10, 10, 10)
    assert long.box(30, 10, [0.5] * 40, size=(8, 8)) == (10, 0, 10, 10)
    assert long.box(30, 10, [0.5] * 40, size=(8, 16)) == (12, 0, 5, 10)  # the shape is that of the result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    samples = [(encode_png(pixels(1, 12, 15, number)), number % 3) for number in range(COUNT)]
    return save_data(tmp_path_factory.mktemp("data"), {"train": samples, "val": samples})


def encode(images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, :4].long()


def test_a_token_store_has_augmented_views_and_is_refused_with_others(folder, tmp_path):
    listed = [{"name": "random_resized_crop", "scale": [0.3, 0.8]}, "flip"]
    description = describe_store(
        folder, grid=(2, 2), codebook_size=256, tokenizer="me", image_size=8, crops=3,
        augmentations=augmentations_text(listed),
    )  # fmt: skip
    tokenize(folder, tmp_path, description, encode=encode, in_channels=1, config=TokenizingConfig(batch_size=5))
    reader = open_store(tmp_path, data=None)["train"]
    samples = ShardReader(load_manifest(folder, "train"))
    for view in range(3):
        drawn = build_augmentations(listed if view else None)
        images = ImageBatches(samples, InOrder(COUNT), image_size=8, in_channels=1, augmentations=drawn)
        rows = InOrder(COUNT)(range(COUNT))
        functions = drawn.draw(rows.index, torch.full_like(rows.index, view), seed=0)
        plain = [pixels(1, 12, 15, number) for number in range(COUNT)]
        expected = torch.stack([function(image, (8, 8)) for function, image in zip(functions, plain, strict=True)])
        assert images.augmentations is drawn
        assert (reader.read(np.arange(COUNT), view)[0] == encode(expected).numpy()).all()
    assert len({reader.read(np.arange(COUNT), view)[0].tobytes() for view in range(3)}) == 3
    options = {"source": "tokens", "token_store": str(tmp_path), "image_size": 8, "in_channels": 1, "global_batch": 4}
    ShardData(ShardDataConfig(str(folder), views=3, augmentations=listed, **options)).setup()
    ShardData(ShardDataConfig(str(folder), **options)).setup()
    for other in ({"views": 2}, {"augmentations": ["flip"]}):
        with pytest.raises(ValueError, match=r"its (crops|augmentations) must be .*regenerate it"):
            ShardData(ShardDataConfig(str(folder), **other, **options)).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentations": ["random_resize_crop"]}, "unknown augmentation 'random_resize_crop': did you mean 'random"),
        ({"augmentations": [{"name": "flip", "probability": 2}]}, "probability must be a number in [0, 1], got 2"),
        ({"augmentations": [{"name": "random_resized_crop", "scale": [0.0, 1.0]}]}, "scale must be a number in (0, 1]"),
        ({"augmentations": ["flip", {"name": "flip"}]}, "augmentations must be different, got ['flip', 'flip']"),
    ],
    ids=str,
)
def test_a_wrong_name_or_value_is_refused_with_the_rule(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ShardDataConfig("nowhere", **options)


class Float(Augmentation):
    def __call__(self, image, random, *, size):
        return image / 255


@pytest.mark.parametrize("made", [Float, object])
def test_an_augmentation_without_a_uint8_result_is_refused_by_name(made, monkeypatch):
    monkeypatch.setitem(augmentations._factories, "mine", made)
    with pytest.raises(ValueError, match=r"'mine' must (return a uint8 image .* got torch.float32|derive from)"):
        build_augmentations(["mine"])
