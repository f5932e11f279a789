"""``evaluate_tokenizer``: measures a tokenizer without a transformer, and writes its report.

The report has reconstructions, codes, bits per pixel, speed and memory: ``tokenizer.json``, ``tokenizer.md``, a picture
of the worst reconstructions, and a row of the ledger. Originals and reconstructions go through the feature networks in
the same pass over the val images, so that any random choice of images has its own reference. The table of tokenizers
in ``tables`` uses the same functions.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from maskgit_pl.checks import height_width, pixels_text, plain_size
from maskgit_pl.data import ShardData
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.distributed import (
    default_device,
    describe_environment,
    device_name,
    find_device,
    parse_dtype,
    peak_memory,
)
from maskgit_pl.errors import markdown
from maskgit_pl.evaluation.cache import digest_of, shorten_digest
from maskgit_pl.evaluation.distances import frechet_distance, kernel_distance
from maskgit_pl.evaluation.features import Extractor, FeatureCollector, open_extractors
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.metrics import format_value, metric_name, title
from maskgit_pl.evaluation.opening import (
    RunFolders,
    data_name,
    describe_held_out,
    find_tokenizer_folders,
    open_images,
)
from maskgit_pl.evaluation.options import LEAST_IMAGES, Spec, TokenizerOptions
from maskgit_pl.evaluation.pages import image_to_png, markdown_table, paragraph, terminal_table
from maskgit_pl.evaluation.reconstruction import ReconstructionMeter, psnr
from maskgit_pl.evaluation.reference import Statistics, iter_real_batches
from maskgit_pl.files import check_writable, write_atomically, write_text
from maskgit_pl.networks.features import LPIPS, load_lpips
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer, images_at_once
from maskgit_pl.pipeline.grids import image_grid
from maskgit_pl.pipeline.pretrained import fingerprint, load_tokenizer, read_config
from maskgit_pl.processes import Bars, no_bars

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["OpenedTokenizer", "TokenizerReport", "evaluate_tokenizer", "measure_tokenizer", "open_tokenizer"]

_BEST_PSNR = 100.0  # dB, of an image without any error
_SHOWN = 8  # worst reconstructions
_SHOWN_EDGE = 256  # pixels of the picture's images
_FLOORS = ("rfid", "rkid")  # metrics whose value for real halves stands beside them


def evaluate_tokenizer(
    folder: Path | str,
    *,
    data: Path | None = None,
    features: Sequence[Spec] = ("classifier",),
    out: Path | None = None,
    options: TokenizerOptions | None = None,
    bars: Bars = no_bars,
) -> TokenizerReport:
    """Measures a tokenizer, and writes ``tokenizer.json``, ``tokenizer.md``, a picture and a ledger row.

    Args:
        folder: Run folder, pretrained folder, or the folder of a tokenizer.
        data: Data folder; None for the data that the run was trained on.
        features: Feature networks: names or mappings, see ``networks.features.parse_feature_network``.
        out: Path of the JSON file, beside which the others are written; None for ``RUN/tokenizer.json``.
        options: Number of images and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if there is no tokenizer, or no data.
        TypeError: if a feature network does not accept its arguments.
        ValueError: if the data do not fit the tokenizer, a network is unknown, or a number is out of range.
    """
    options = options or TokenizerOptions()
    folders = find_tokenizer_folders(folder, data=data, classifier=options.classifier)
    file = out or folders.run / "tokenizer.json"
    check_writable("out", file)
    check_writable("ledger", folders.evaluation / FILE_NAME)
    ledger = Ledger(folders.evaluation / FILE_NAME)

    report = measure_tokenizer(open_tokenizer(folders, features, options, bars), file, bars)
    report.save()
    ledger.add("tokenizer", report.row())
    return report


@dataclass(frozen=True)
class OpenedTokenizer:
    """A tokenizer with what it is measured with.

    Args:
        folders: Folders of the tokenizer and of the data.
        options: Number of images and other options.
        tokenizer: The tokenizer, on its device.
        data: The real images.
        extractors: Feature networks.
        lpips: Perceptual distance; None leaves it out.
    """

    folders: RunFolders
    options: TokenizerOptions
    tokenizer: PretrainedTokenizer
    data: ShardData
    extractors: Sequence[Extractor]
    lpips: LPIPS | None

    @property
    def num_images(self) -> int:
        """The number of images to measure."""
        available = self.data.summary.samples["val"]
        return min(self.options.num_images or available, available)

    @property
    def dtype(self) -> str:
        """The name of the arithmetic of the tokenizer."""
        dtype = parse_dtype(self.options.dtype, self.options.device or default_device())
        return "float32" if dtype is None else str(dtype).removeprefix("torch.")  # files hold float32

    @cached_property
    def key(self) -> dict[str, Any]:
        """The columns of the ledger that determine the values of an evaluation."""
        folder = self.folders.pretrained / "tokenizer"
        settings: dict[str, Any] = {
            "networks": {each.label: shorten_digest(each.digest) for each in self.extractors},
            "dtype": self.dtype,
        }
        if self.options.lpips is not None:
            settings["lpips"] = self.options.lpips.partition("=")[0]
        return {
            "dataset": data_name(self.folders.data),
            "data": shorten_digest(self.data.summary.fingerprint),
            "split": "val",
            "tokenizer": fingerprint(folder),
            "config": shorten_digest(digest_of(read_config(folder, "tokenizer"))),
            "num_images": self.num_images,
            "settings": settings,
        }


def open_tokenizer(
    folders: RunFolders, features: Sequence[Spec], options: TokenizerOptions, bars: Bars
) -> OpenedTokenizer:
    """Opens a tokenizer, the data and the feature networks; trains the classifier of the data if it is missing.

    Raises: see ``evaluate_tokenizer``.
    """
    device = find_device(options.device)
    tokenizer = load_tokenizer(folders.pretrained / "tokenizer")
    _check_data(folders.data, tokenizer)
    tokenizer.network.to(device, dtype=parse_dtype(options.dtype, device))
    lpips = None if options.lpips is None else load_lpips(options.lpips, device=device)
    channels = tokenizer.network.config.in_channels
    data = open_images(folders.data, tokenizer.image_size, channels, num_workers=options.num_workers)
    data.warn_if_resized()
    extractors = open_extractors(
        folders.classifier, data, features=features, device=device, bars=bars, replaces=folders.shares_classifier
    )
    return OpenedTokenizer(folders, options, tokenizer, data, extractors, lpips)


def _check_data(folder: Path, tokenizer: PretrainedTokenizer) -> None:
    """Checks that there are enough images, of the channels of a tokenizer, and none smaller than it takes."""
    summary, size = read_manifest_summary(folder), height_width(tokenizer.image_size)
    images, smallest = summary.samples.get("val", 0), (summary.images.height[0], summary.images.width[0])
    if images < LEAST_IMAGES:
        raise ValueError(f"data {folder}: the val split must have >= {LEAST_IMAGES} images, got {images}")
    if tokenizer.network.config.in_channels == 1 and summary.channels != 1:
        raise ValueError(
            f"data {folder}: the images must be grey for this tokenizer, got colour; choose others with --data"
        )
    if any(have < need for have, need in zip(smallest, size, strict=True)):
        raise ValueError(
            f"data {folder}: the images must have >= {pixels_text(size)} pixels, those of the tokenizer, got "
            f"{pixels_text(smallest)}; choose larger images with --data"
        )


class _Pair(NamedTuple):
    """An image with its reconstruction."""

    error: float  # mean squared, for pixels in [0, 1]
    number: int  # of the image in the val split
    label: int
    original: Tensor  # (C, H, W) uint8
    reconstruction: Tensor


def measure_tokenizer(opened: OpenedTokenizer, file: Path, bars: Bars) -> TokenizerReport:
    """Measures a tokenizer on random val images, the same in every call; does not write the report to ``file``."""
    tokenizer, data, count = opened.tokenizer, opened.data, opened.num_images
    device = next(tokenizer.network.parameters()).device
    meter = ReconstructionMeter(tokenizer, opened.extractors, opened.lpips)
    originals = {each.label: FeatureCollector(each) for each in opened.extractors}
    size = min(opened.options.batch_size, images_at_once(*height_width(tokenizer.image_size)))
    on_images = bars(f"{opened.folders.run.name}: reconstructing", count)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    labels: list[Tensor] = []
    worst: list[_Pair] = []
    for batch in iter_real_batches(data, "val", num_images=count, shuffled=True, batch_size=size):
        pixels, label, index, position = (
            each[batch.valid] for each in (batch.content, batch.labels, batch.index, batch.position)
        )
        rounded, errors = meter.add(pixels, position)
        for collector in originals.values():
            collector.add(pixels, position)
        pairs = zip(errors.tolist(), index.tolist(), label.tolist(), pixels, rounded, strict=True)
        worst = sorted([*worst, *(_Pair(*pair) for pair in pairs)], key=lambda pair: -pair.error)[:_SHOWN]
        labels.append(label)
        on_images(len(pixels))
    numbers = {**_numbers(meter, originals), "images_per_second": count / max(meter.seconds, 1e-9)}
    numbers["peak_memory_mb"] = peak_memory(device) / 2**20
    psnr_db = _psnr_of_images(meter.values()["error"])
    by_class = _means_by_class(psnr_db, torch.cat(labels), data.class_names)
    return TokenizerReport(_content(opened, numbers, by_class, worst), opened.key, file, worst)


def _numbers(meter: ReconstructionMeter, originals: Mapping[str, FeatureCollector]) -> dict[str, float]:
    """Returns the values of reconstructions by name."""
    values, codes = meter.values(), meter.code_usage()
    errors = values.pop("error")
    numbers = {
        "psnr_db": min(_BEST_PSNR, psnr(float(errors.mean()))),
        "mean_psnr_db": float(_psnr_of_images(errors).mean()),
        **{name: float(of_image.mean()) for name, of_image in values.items()},
    }
    for label, collector in meter.collectors.items():
        fake, real = (each.gather().pooled.double() for each in (collector, originals[label]))
        # The floor compares one half of the originals, every second image, with the other.
        for floor, (one, other) in {"": (fake, real), "_floor": (real[::2], real[1::2])}.items():
            fid = frechet_distance(Statistics.from_features(one), Statistics.from_features(other))
            numbers |= {f"rfid{floor}/{label}": fid, f"rkid{floor}/{label}": kernel_distance(one, other)[0]}
    (rows, columns), (height, width) = meter.tokenizer.grid, height_width(meter.tokenizer.image_size)
    tokens_per_pixel = rows * columns / (height * width)
    return {
        **numbers,
        **codes,
        "bits_per_pixel": tokens_per_pixel * math.log2(meter.tokenizer.network.config.codebook_size),
        "coded_bits_per_pixel": tokens_per_pixel * math.log2(codes["perplexity"]),
    }


def _psnr_of_images(errors: Tensor) -> Tensor:
    """Returns (n,) dB of (n,) mean squared errors; an image without an error has 100 dB."""
    return (-10 * errors.log10()).clamp(max=_BEST_PSNR)


def _means_by_class(values: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Returns the mean value of the images of each class that has any."""
    return {names[label]: float(values[labels == label].mean()) for label in sorted(set(labels.tolist()))}


def _content(
    opened: OpenedTokenizer, numbers: Mapping[str, float], by_class: Mapping[str, float], worst: Sequence[_Pair]
) -> dict[str, Any]:
    """Returns the content of ``tokenizer.json``: the values, and everything that reproduces them."""
    tokenizer, data = opened.tokenizer, opened.data
    config, device = tokenizer.network.config, next(tokenizer.network.parameters()).device
    return {
        "run": opened.folders.run.name,
        "protocol": {
            "num_images": opened.num_images,
            "data": data.summary.fingerprint,
            "split": "val",
            "features": {each.label: each.digest for each in opened.extractors},
            "lpips": opened.options.lpips,
            "dtype": opened.dtype,
        },
        "held_out": describe_held_out(opened.folders.data, data.summary),
        "numbers": numbers,
        "psnr_db_per_class": by_class,
        "worst": [
            {
                "index": each.number,
                "class": data.class_names[each.label],
                "psnr_db": min(_BEST_PSNR, psnr(each.error)),
            }
            for each in worst
        ],
        "model": {
            "image_size": plain_size(tokenizer.image_size),
            "in_channels": config.in_channels,
            "grid": list(tokenizer.grid),
            "codebook_size": config.codebook_size,
            "quantizer": json.dumps(asdict(config)["quantizer"]).strip('"'),
            "parameters": sum(each.numel() for each in tokenizer.network.parameters()),
            "fingerprint": tokenizer.fingerprint,
        },
        "environment": {**describe_environment(), "device": str(device), "device_name": device_name(device)},
    }


@dataclass(frozen=True)
class TokenizerReport:
    """The values of an evaluation of a tokenizer.

    Args:
        content: Content of ``tokenizer.json``, in plain values.
        key: Columns of the ledger that determine the values.
        file: Path of the JSON file.
        worst: The worst reconstructions.
    """

    content: Mapping[str, Any]
    key: Mapping[str, Any]
    file: Path
    worst: Sequence[_Pair]

    def row(self) -> dict[str, Any]:
        """Returns the row of the ledger."""
        model, environment = self.content["model"], self.content["environment"]
        return {
            **self.key,
            "run": self.content["run"],
            "numbers": self.content["numbers"],
            "parameters": model["parameters"],
            "quantizer": model["quantizer"],
            "codes": f"{model['grid'][0]} x {model['grid'][1]} of {model['codebook_size']}",
            "commit": environment["commit"],
            "date": datetime.date.today().isoformat(),
            "device": environment["device_name"],
        }

    def save(self) -> None:
        """Writes the JSON file, and the Markdown and the picture beside it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(self.content, indent=2) + "\n")
        write_text(self.file.with_suffix(".md"), self.markdown())
        with write_atomically(self.picture) as stream:
            stream.write(image_to_png(_draw_pairs(self.worst)))

    @property
    def picture(self) -> Path:
        """The path of the picture of the worst reconstructions."""
        return self.file.with_name(f"{self.file.stem}-worst.png")

    def markdown(self) -> str:
        """Returns the page: all values, the floors beside them, the PSNR of each class and the worst images."""
        content = self.content
        classes = sorted(content["psnr_db_per_class"].items(), key=lambda pair: pair[1])
        worst = "; ".join(
            f"image {each['index']} ({markdown(each['class'])}) {each['psnr_db']:.2f} dB" for each in content["worst"]
        )
        lines = [
            f"# Tokenizer of {markdown(content['run'])}",
            "",
            *paragraph(content["held_out"]["text"], f"{content['protocol']['num_images']} of them were measured."),
            "",
            *markdown_table(["metric", "value", "real halves"], self._cells()),
            "",
            *paragraph(
                "Real halves: the distance between two halves of the real images, each of half as many images, is what "
                "perfect reconstructions of other images would have. Bits per pixel count log2 K for each token; "
                "entropy-coded ones count the entropy of the codes' frequencies."
            ),
            "",
            *markdown_table(["class", "mean PSNR, dB"], [[markdown(name), f"{value:.2f}"] for name, value in classes]),
            "",
            *paragraph(f"The worst reconstructions: {worst}."),
            "",
            f"![originals above, reconstructions below]({self.picture.name})",
        ]
        return "\n".join([*lines, ""])

    def table(self) -> Table:
        """Returns all values as a table for the terminal."""
        heading = f"tokenizer of {self.content['run']}, {self.content['protocol']['num_images']} images"
        return terminal_table(heading, ["", "value", "real halves"], self._cells())

    def _cells(self) -> Iterator[tuple[str, str, str]]:
        """Yields name, value and floor of each metric."""
        numbers = self.content["numbers"]
        for name, value in numbers.items():
            metric, _, network = name.partition("/")
            if metric.endswith("_floor"):
                continue
            floor = numbers.get(metric_name(f"{metric}_floor", network)) if metric in _FLOORS else None
            yield title(name), format_value(name, value), "" if floor is None else format_value(name, floor)


def _draw_pairs(pairs: Sequence[_Pair]) -> Image.Image:
    """Draws originals above their reconstructions, cut to 256 px."""
    images = [pair.original for pair in pairs] + [pair.reconstruction for pair in pairs]
    shown = torch.stack(images)[..., :_SHOWN_EDGE, :_SHOWN_EDGE]
    return image_grid(shown, columns=len(pairs), row_captions=["original", "reconstruction"])
