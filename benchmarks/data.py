"""Measures the throughput of the data loaders for images and tokens, and the start of a resumed run.

    python benchmarks/data.py --json data.json

benchmarks/README.md describes the contenders and the tables.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import format_table, read_cpu_name
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskgit_pl.data import ShuffledStream
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.loader import ImageBatches, TokenBatches, make_loader
from maskgit_pl.data.manifest import ShardReader, load_manifest
from maskgit_pl.data.order import TrainBatchSampler
from maskgit_pl.data.token_store import StoreDescription, TokenReader, open_store
from maskgit_pl.data.tokenizing import StoreParts
from maskgit_pl.distributed import describe_environment

_SIDE = 256  # pixels of the images that the loader returns
_SOURCES = {"256 x 256": (256, 256), "500 x 375": (500, 375)}  # width and height as stored
_SLOPE = 1.4  # exponent of amplitude over frequency: JPEGs of quality 90 have 2.5 to 3 bits per pixel, like photos
_PASSES = 3
_IMAGE_BATCH, _TOKEN_BATCHES = 64, (256, 1024)
_GRID, _CODES = (16, 16), 1024
_STEPS = (10, 10_000_000)
Run = Callable[[], int]


def measure_rates(contenders: Mapping[str, Run], *, repeats: int) -> dict[str, list[float]]:
    """Returns the items per CPU second of this process, which is the rate of one core, for each round.

    CPU time does not grow while the process waits on a busy machine.

    Args:
        contenders: Functions that process their items once and return their number. They run in turn.
        repeats: Number of rounds, after one that is not counted.
    """
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, run in contenders.items():
            start = time.process_time()
            count = run()
            # Round 0 fills caches and is not counted.
            if number > 0:
                measured[name].append(count / (time.process_time() - start))
    return measured


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
    """Writes a data folder of JPEGs of quality 90 and returns their mean size in bytes."""
    from webdataset import TarWriter

    generator, total = np.random.default_rng(0), 0
    folder.mkdir(parents=True)
    with TarWriter(str(folder / "train-000000.tar")) as tar:
        for number in range(count):
            buffer = io.BytesIO()
            make_texture(*size, generator).save(buffer, "JPEG", quality=90)
            total += buffer.tell()
            tar.write({"__key__": f"{number:08d}", "jpg": buffer.getvalue(), "cls": number % 10})
    index_shards(folder, {"train": find_shards(folder, "train-*.tar")})
    return total // count


def read_our_images(folder: Path) -> int:
    """Reads an epoch of shuffled uint8 batches with the loader of training; returns the number of images."""
    reader = ShardReader(load_manifest(folder, "train"))
    dataset = ImageBatches(reader, ShuffledStream(len(reader), seed=0), image_size=_SIDE, in_channels=3)
    order = TrainBatchSampler(len(reader), per_device=min(_IMAGE_BATCH, len(reader)))
    return sum(len(batch.content) for batch in make_loader(dataset, order, num_workers=0))


def read_webdataset_images(folder: Path) -> int:
    """Reads an epoch like the examples of webdataset and torchvision: PIL, then transforms v1."""
    from torchvision import transforms
    from webdataset import WebDataset

    transform = transforms.Compose([transforms.Resize(_SIDE), transforms.CenterCrop(_SIDE), transforms.ToTensor()])
    dataset = (
        WebDataset(str(folder / "train-000000.tar"), shardshuffle=False)
        .shuffle(100, initial=100)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(transform)
        .batched(_IMAGE_BATCH)
    )
    return sum(len(images) for images, _ in DataLoader(dataset, batch_size=None))


def _repeat_epochs(run: Run) -> Run:
    """Returns a run of several epochs, in which memory is mostly reused, as in a long run."""
    return lambda: sum(run() for _ in range(_PASSES))


def measure_images(folder: Path, *, count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each size of the stored images."""
    for name, size in _SOURCES.items():
        images = folder / name.replace(" ", "")
        length = write_images(images, size, count)
        contenders = {
            "ours": _repeat_epochs(partial(read_our_images, images)),
            "webdataset + PIL": _repeat_epochs(partial(read_webdataset_images, images)),
        }
        yield _row(f"images, {name}, {length / 1000:.0f} kB", measure_rates(contenders, repeats=repeats))


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


def read_our_tokens(reader: TokenReader, batch: int) -> int:
    """Reads an epoch of shuffled batches with the loader of training; returns the number of sequences."""
    return sum(len(rows.content) for rows in _token_loader(reader, batch))


def read_item_by_item(reader: TokenReader, batch: int) -> int:
    """Reads an epoch with PyTorch's shuffling loader; returns the number of sequences."""
    batches = DataLoader(ItemByItem(reader), batch_size=batch, shuffle=True)
    return sum(len(tokens) for tokens, _ in batches)


def _token_loader(reader: TokenReader, batch: int, *, step: int = 0, seed: int = 0) -> Iterable[Any]:
    order = TrainBatchSampler(len(reader), per_device=min(batch, len(reader)), current_step=lambda: step)
    return make_loader(TokenBatches(reader, ShuffledStream(len(reader), seed=seed)), order, num_workers=0)


def measure_tokens(reader: TokenReader, *, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each batch size."""
    for batch in _TOKEN_BATCHES:
        contenders = {
            "ours": partial(read_our_tokens, reader, batch),
            "item by item": partial(read_item_by_item, reader, batch),
        }
        subject = f"sequences of {reader.description.num_tokens} tokens, batches of {batch}"
        yield _row(subject, measure_rates(contenders, repeats=repeats))


# The start of a resumed run


def time_first_batch(folder: Path, step: int, seed: int) -> float:
    """Returns the CPU milliseconds until a fresh loader gives its first batch; a new seed avoids cached orders."""
    start = time.process_time()
    reader = open_store(folder, data="benchmark")["train"]
    batches = _token_loader(reader, _TOKEN_BATCHES[0], step=step, seed=seed)
    next(iter(batches))
    return 1000 * (time.process_time() - start)


def measure_start(folder: Path, *, repeats: int) -> dict[str, Any]:
    """Returns a row with the waiting time of a run that resumes early and of one that resumes late."""
    seconds: dict[int, list[float]] = {step: [] for step in _STEPS}
    for number in range(repeats + 1):
        for step in _STEPS:
            milliseconds = time_first_batch(folder, step, seed=1 + number)
            if number > 0:
                seconds[step].append(milliseconds)
    medians = {f"step {step:,}: ms": median(values) for step, values in seconds.items()}
    early, late = medians.values()
    return {"until the first batch of": "a resumed run", **medians, "late / early": late / early}


# The tables


def _row(subject: str, rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns a row of medians, and the median ratio of ours to the last contender, the usual method."""
    ours, usual = rates["ours"], list(rates.values())[-1]
    ratio = median(a / b for a, b in zip(ours, usual, strict=True))
    medians = {name: median(values) for name, values in rates.items()}
    return {"items per second and core": subject, **medians, "ours / usual": ratio}


def _format_row(row: Mapping[str, Any]) -> dict[str, str]:
    digits = {name: 0 if isinstance(value, float) and value >= 100 else 2 for name, value in row.items()}
    return {name: value if isinstance(value, str) else f"{value:,.{digits[name]}f}" for name, value in row.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=256, help="JPEGs of each size (default: 256)")
    parser.add_argument("--rows", type=int, default=100_000, help="token sequences (default: 100000)")
    parser.add_argument("--repeats", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = list(measure_images(folder, count=args.images, repeats=args.repeats))
        reader = write_tokens(folder / "tokens", args.rows)
        tokens = list(measure_tokens(reader, repeats=args.repeats))
        start = measure_start(folder / "tokens", repeats=args.repeats)
    print(f"{read_cpu_name()}, 1 thread, torch {torch.__version__}, medians of {args.repeats} rounds, CPU seconds\n")
    for rows in (images, tokens, [start]):
        print(format_table([_format_row(row) for row in rows]), end="\n\n")
    if args.json is not None:
        figures = {"images": images, "tokens": tokens, "start": start, "environment": describe_environment()}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
