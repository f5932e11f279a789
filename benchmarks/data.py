"""Measures the data loaders for images and tokens against the usual ones, and the start of a resumed run."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import Contender, build_parser, compare, start
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from maskgit_pl.data import ShuffledStream
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.loader import ImageBatches, TokenBatches, make_loader
from maskgit_pl.data.manifest import ShardReader, load_manifest
from maskgit_pl.data.order import TrainBatchSampler
from maskgit_pl.data.token_store import StoreDescription, TokenReader, open_store
from maskgit_pl.data.tokenizing import StoreParts
from maskgit_pl.networks.vqgan import to_unit_range

_SIDE = 256  # pixels of the images that the loader returns
_SOURCES = {"256 x 256": (256, 256), "500 x 375": (500, 375)}  # width and height as stored
_SLOPE = 1.4  # exponent of amplitude over frequency: JPEGs of quality 90 have 2.5 to 3 bits per pixel, like photos
_EPOCHS = 3  # of images in a round, in which memory is mostly reused, as in a long run
_IMAGE_BATCH, _TOKEN_BATCHES = 64, (256, 1024)
_GRID, _CODES = (16, 16), 1024
_TO_FLOATS = v2.ToDtype(torch.float32, scale=True)
_FIT = (v2.Resize(_SIDE), v2.CenterCrop(_SIDE))  # of v1, which resizes uint8 through floats, take twice as long


# Images


def make_texture(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Returns a random image with the spectrum of a photo: mostly grey, with softer colours."""
    # Random phases with amplitudes that fall with the frequency, as in natural images.
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def plane(exponent: float) -> npt.NDArray[np.float64]:
        phase = np.exp(2j * np.pi * generator.random(frequency.shape))
        values = np.fft.irfft2(phase / frequency**exponent, s=(height, width))
        return (values - values.mean()) / values.std()

    # One grey plane for all channels, and a weaker, smoother one per channel.
    grey = plane(_SLOPE)
    pixels = np.stack([128 + 45 * grey + 15 * plane(_SLOPE + 0.5) for _ in range(3)], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_images(folder: Path, size: tuple[int, int], count: int) -> int:
    """Writes JPEGs of quality 90, as a data folder and as single files; returns their mean size in bytes."""
    from webdataset import TarWriter

    generator, total = np.random.default_rng(0), 0
    files = folder / "files" / "class"
    files.mkdir(parents=True)
    with TarWriter(str(folder / "train-000000.tar")) as tar:
        for number in range(count):
            buffer = io.BytesIO()
            make_texture(*size, generator).save(buffer, "JPEG", quality=90)
            total += buffer.tell()
            tar.write({"__key__": f"{number:08d}", "jpg": buffer.getvalue(), "cls": number % 10})
            (files / f"{number:08d}.jpg").write_bytes(buffer.getvalue())
    index_shards(folder, {"train": find_shards(folder, "train-*.tar")})
    return total // count


def read_our_images(folder: Path, convert: Callable[[Tensor], Tensor] = lambda images: images) -> int:
    """Reads an epoch of shuffled batches with the loader of training, converted; returns the number of images."""
    reader = ShardReader(load_manifest(folder, "train"))
    dataset = ImageBatches(reader, ShuffledStream(len(reader), seed=0), image_size=_SIDE, in_channels=3)
    order = TrainBatchSampler(len(reader), per_device=min(_IMAGE_BATCH, len(reader)))
    return sum(len(convert(batch.content)) for batch in make_loader(dataset, order, num_workers=0))


def open_image(data: bytes) -> Image.Image:
    """Decodes a JPEG with PIL, in the smallest size that PIL's draft mode has for the crop."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (_SIDE, _SIDE))
    return image.convert("RGB")


def read_webdataset_images(folder: Path, convert: Callable[[Image.Image], Tensor]) -> int:
    """Reads an epoch with webdataset and PIL, and converts each image; returns the number of images."""
    from webdataset import WebDataset

    dataset = (
        WebDataset(str(folder / "train-000000.tar"), shardshuffle=False)
        .shuffle(100, initial=100)
        .to_tuple("jpg", "cls")
        .map_tuple(v2.Compose([open_image, *_FIT, convert]), int)
        .batched(_IMAGE_BATCH)
    )
    return sum(len(images) for images, _ in DataLoader(dataset, batch_size=None))


def read_image_files(folder: Path, convert: Sequence[nn.Module] = ()) -> int:
    """Reads an epoch of shuffled batches of files with torchvision's JPEG decoder; returns the number of images."""
    dataset = ImageFolder(
        folder / "files",
        transform=v2.Compose([*_FIT, *convert]),
        loader=lambda path: decode_jpeg(read_file(path), mode=ImageReadMode.RGB),
    )
    return sum(len(images) for images, _ in DataLoader(dataset, batch_size=_IMAGE_BATCH, shuffle=True))


IMAGE_READERS: Sequence[tuple[str, str, Callable[[Path], int]]] = (
    ("uint8", "ours", read_our_images),
    ("uint8", "webdataset + PIL", partial(read_webdataset_images, convert=v2.PILToTensor())),
    ("uint8", "files + torchvision", read_image_files),
    ("floats", "ours", partial(read_our_images, convert=to_unit_range)),
    ("floats", "webdataset + PIL", partial(read_webdataset_images, convert=v2.Compose([v2.ToImage(), _TO_FLOATS]))),
    ("floats", "files + torchvision", partial(read_image_files, convert=[_TO_FLOATS])),
)
"""Readers of an epoch of images: what they return, name, and function."""


def repeat_epochs(read: Callable[[Path], int], folder: Path) -> int:
    """Reads the epochs of a round; returns the number of images."""
    return sum(read(folder) for _ in range(_EPOCHS))


# Tokens


class ItemByItem(Dataset[tuple[Tensor, int]]):
    """A common map-style dataset: it reads one sequence at a time, and the loader stacks them."""

    def __init__(self, reader: TokenReader) -> None:
        paths = (reader.folder / f"train-{name}.npy" for name in ("tokens", "labels"))
        self.tokens, self.labels = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.tokens[index].astype(np.int64)), int(self.labels[index])


def write_tokens(folder: Path, count: int) -> TokenReader:
    """Writes a token store of random codes and opens it."""
    generator = np.random.default_rng(0)
    description = StoreDescription(_GRID, _CODES, _SIDE, "benchmark", "benchmark", ("a", "b"), {"train": count})
    parts = StoreParts(folder, description, part_size=10_000)
    for part in parts.parts():
        rows = part.stop - part.start
        tokens = generator.integers(_CODES, size=(rows, 1, description.num_tokens))
        parts.write(part, tokens, generator.integers(2, size=rows))
    parts.finish()
    return open_store(folder, data="benchmark")["train"]


def load_our_tokens(reader: TokenReader, batch: int, *, step: int = 0, seed: int = 0) -> Iterable[Any]:
    """Returns the loader of training: an epoch of shuffled batches from a training step."""
    order = TrainBatchSampler(len(reader), per_device=min(batch, len(reader)), current_step=lambda: step)
    return make_loader(TokenBatches(reader, ShuffledStream(len(reader), seed=seed)), order, num_workers=0)


def read_our_tokens(reader: TokenReader, batch: int) -> int:
    """Reads an epoch of shuffled batches with the loader of training; returns the number of sequences."""
    return sum(len(rows.content) for rows in load_our_tokens(reader, batch))


def read_item_by_item(reader: TokenReader, batch: int) -> int:
    """Reads an epoch with PyTorch's shuffling loader; returns the number of sequences."""
    batches = DataLoader(ItemByItem(reader), batch_size=batch, shuffle=True)
    return sum(len(tokens) for tokens, _ in batches)


# Contenders


def build_start(folder: Path, step: int) -> Contender:
    """Returns the start of a run that resumes from a step, up to its first batch."""
    seeds = itertools.count(1)  # a new one in each round, so that no order is cached

    def run() -> None:
        next(iter(load_our_tokens(open_store(folder, data="benchmark")["train"], 256, step=step, seed=next(seeds))))

    return Contender("first batch of a run", f"resumed from step {step:,}", run)


def list_contenders(folder: Path, *, images: int, rows: int) -> list[Contender]:
    """Writes images and tokens into a folder and returns all contenders."""
    readers: list[tuple[str, str, Callable[[], int]]] = []
    for name, size in _SOURCES.items():
        source = folder / name.replace(" ", "")
        group = f"images, {name}, {write_images(source, size, images) / 1000:.0f} kB"
        for output, contender, read in IMAGE_READERS:
            readers.append((f"{group}, {output}", contender, partial(repeat_epochs, read, source)))
    reader = write_tokens(folder / "tokens", rows)
    for batch in _TOKEN_BATCHES:
        group = f"sequences of {reader.description.num_tokens} tokens, batches of {batch}"
        readers.append((group, "ours", partial(read_our_tokens, reader, batch)))
        readers.append((group, "item by item", partial(read_item_by_item, reader, batch)))
    starts = [build_start(folder / "tokens", step) for step in (10, 10_000_000)]
    # The first run of each reader counts its items.
    return [*(Contender(group, name, run, items=run()) for group, name, run in readers), *starts]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = build_parser(__doc__, images=256, rows=100_000)
    arguments = start(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, list_contenders(Path(folder), images=arguments.images, rows=arguments.rows))


if __name__ == "__main__":
    main()
