"""Measures tokenizers: the reconstruction error, and ``evaluate_tokenizer``, which needs no transformer.

In ``evaluate_tokenizer``, originals and reconstructions go through the feature networks in the same pass over the val
images, so that any random choice of images has its own reference.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from maskgit_pl.checks import height_width
from maskgit_pl.data import Batch, ShardData
from maskgit_pl.devices import describe_environment, device_name, find_device, parse_dtype
from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.distances import frechet_distance, kernel_distance
from maskgit_pl.evaluation.evaluator import FeatureMetrics
from maskgit_pl.evaluation.extractors import Extractor, gather_rows, open_extractors
from maskgit_pl.evaluation.ledger import Ledger, Row, digest_of, shorten_digest
from maskgit_pl.evaluation.metrics import format_value, title
from maskgit_pl.evaluation.options import Spec, TokenizerOptions
from maskgit_pl.evaluation.reference import Statistics, iter_real_batches
from maskgit_pl.evaluation.run_folders import RunFolders, data_name, find_tokenizer_folders
from maskgit_pl.files import check_writable, write_text
from maskgit_pl.networks.features import LPIPSSpec, create_distance
from maskgit_pl.networks.vqgan import to_unit_range
from maskgit_pl.pretrained.networks import PretrainedTokenizer, fingerprint, images_at_once, load_tokenizer, read_config
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.tokenizer.module import CodebookUsage

_SSIM_WINDOW = 11  # pixels; smaller images have no SSIM
_BEST_PSNR = 100.0  # dB, of an image without any error
_SHOWN = 8  # worst reconstructions


Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Two (B, C, H, W) float images in [0, 1] to (B,) float."""


def open_lpips(file: Path | None, tokenizer: PretrainedTokenizer) -> Distance | None:
    """Builds LPIPS on the device of a tokenizer; None without a file of its weights.

    Args:
        file: torchvision's weight file of VGG-16; see ``networks.features.LPIPSSpec``.
        tokenizer: The tokenizer whose reconstructions are measured.

    Raises:
        ValueError: if there is no such file, it is another one, or the images are too small.
    """
    if file is None:
        return None
    shorter = min(height_width(tokenizer.image_size))
    if shorter < LPIPSSpec.min_image_size:
        raise ValueError(
            f"image_size must be >= {LPIPSSpec.min_image_size} with lpips, got {shorter}; leave --lpips out"
        )
    return create_distance({"name": "lpips", "weights": str(file)}).to(next(tokenizer.network.parameters()).device)


def psnr(mean_squared_error: float) -> float:
    """Computes the PSNR in dB, for pixels in [0, 1], at most 100 dB."""
    return _BEST_PSNR if mean_squared_error == 0 else min(_BEST_PSNR, -10 * math.log10(mean_squared_error))


def measure_reconstruction(
    tokenizer: PretrainedTokenizer,
    batches: Iterable[Batch],
    *,
    networks: Iterable[FeatureMetrics] = (),
    lpips: Distance | None = None,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Measures the reconstruction error of a tokenizer, for pixels in [0, 1] and clipped reconstructions.

    The ranks share the batches; the result does not depend on their number if each rank takes whole batches.

    Args:
        tokenizer: The tokenizer, on its device.
        batches: This rank's batches of uint8 images. Rows that are not valid are ignored.
        networks: Feature networks of the reconstruction FID, which see reconstructions rounded to uint8, with
            references of the originals.
        lpips: The perceptual distance, see ``open_lpips``; None does not measure it.
        on_images: Called after each batch with its number of images, for a progress bar.

    Returns:
        Values by name: ``psnr_db`` (from the mean squared error of all images together), ``ssim`` (for images
        of 11 pixels or more), ``lpips`` (if given), ``rfid/NETWORK``, ``codebook_usage``, ``perplexity``, and
        ``images``, their number.
    """
    references = {network.extractor: network.reference.pooled for network in networks}
    meter = ReconstructionMeter(tokenizer, list(references), lpips)
    for batch in batches:
        if batch.valid.any():
            meter.add(batch)
        on_images(int(batch.valid.sum()))
    values = meter.values()
    errors = values.pop("error")
    return {
        "psnr_db": psnr(float(errors.mean())),
        **{name: float(of_image.mean()) for name, of_image in values.items()},
        **{
            f"rfid/{extractor.label}": frechet_distance(
                Statistics.from_features(gather_rows(meter.features[extractor.label])["pooled"]), statistics
            )
            for extractor, statistics in references.items()
        },
        **meter.code_usage(),
        "images": len(errors),
    }


class Pair(NamedTuple):
    """An image with its reconstruction."""

    error: float  # mean squared, for pixels in [0, 1]
    number: int  # of the image in the val split
    label: int
    original: Tensor  # (C, H, W) uint8
    reconstruction: Tensor


class ReconstructionMeter:
    """The measurements of this rank's reconstructions, image by image.

    Attributes:
        features: Features of the reconstructions of each batch by label; see ``gather_rows``.
        codes: Use of the codebook.
        labels: (b,) int64 classes of each batch.
        worst: The 8 images with the largest errors, the worst first.
        seconds: Time of encoding and decoding.
    """

    def __init__(
        self, tokenizer: PretrainedTokenizer, extractors: Sequence[Extractor] = (), lpips: Distance | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.extractors = extractors
        self.features: dict[str, list[dict[str, Tensor]]] = {extractor.label: [] for extractor in extractors}
        self.codes = CodebookUsage(tokenizer.network.config.codebook_size)
        # An empty update, so that the counts exist on a rank without images.
        self.codes.update(torch.empty(0, 1, dtype=torch.int64), torch.empty(0))
        self.labels: list[Tensor] = []
        self.worst: list[Pair] = []
        self.seconds = 0.0
        self._measures: dict[str, Distance] = {"error": _mean_squared_error}
        if min(height_width(tokenizer.image_size)) >= _SSIM_WINDOW:
            self._measures["ssim"] = _ssim
        if lpips is not None:
            self._measures["lpips"] = lpips
        self._batches: list[dict[str, Tensor]] = []

    @torch.inference_mode()
    def add(self, batch: Batch) -> None:
        """Reconstructs and measures the valid images of a batch."""
        pixels, labels, index, positions = (
            each[batch.valid] for each in (batch.content, batch.labels, batch.index, batch.position)
        )
        network, (height, width) = self.tokenizer.network, height_width(self.tokenizer.image_size)
        like = next(network.parameters())  # for device and dtype
        images = to_unit_range(pixels.to(like.device))
        start = now(like.device)
        tokens = network.encode(images.to(like.dtype))
        # The decoder may add a margin, since it produces whole tokens; crop it.
        decoded = network.decode(tokens, self.tokenizer.grid)[..., :height, :width].float().clamp(0, 1)
        self.seconds += now(like.device) - start
        self.codes.update(tokens.cpu(), torch.ones(len(tokens)))
        # One value per image and measure, in float64: the means do not depend on the batch size.
        rows = torch.stack([measure(decoded, images).double().cpu() for measure in self._measures.values()], 1)
        self._batches.append({"index": positions, "measures": rows})
        # Feature networks see uint8 images, as they do for the originals.
        rounded = (decoded * 255).round().to(torch.uint8)
        for extractor in self.extractors:
            self.features[extractor.label].append({"index": positions, **extractor(rounded)})
        pairs = zip(rows[:, 0].tolist(), index.tolist(), labels.tolist(), pixels, rounded.cpu(), strict=True)
        self.worst = sorted([*self.worst, *map(Pair._make, pairs)], key=lambda pair: -pair.error)[:_SHOWN]
        self.labels.append(labels)

    def values(self) -> dict[str, Tensor]:
        """Returns (n,) float64 values of each measure for the images of all ranks; ``error`` is the squared one."""
        rows = gather_rows(self._batches)["measures"]  # (n, measures)
        return dict(zip(self._measures, rows.unbind(1), strict=True))

    def code_usage(self) -> dict[str, float]:
        """Returns ``codebook_usage`` and ``perplexity`` of the tokens of all ranks, see ``CodebookUsage``."""
        return {name: float(value) for name, value in self.codes.compute().items()}


def now(device: torch.device) -> float:
    """Returns the seconds of a clock, after the work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run asynchronously
    return time.perf_counter()


def _mean_squared_error(images: Tensor, others: Tensor) -> Tensor:
    return (images - others).double().square().flatten(1).mean(1)


def _ssim(images: Tensor, others: Tensor) -> Tensor:
    """Computes the (B,) float64 structural similarity with a Gaussian window of 11 x 11 pixels and sigma 1.5.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    # In float32, which a CPU convolves 20 times as fast; the mean differs by 2e-7.
    similarity = structural_similarity_index_measure(images, others, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity.double().reshape(len(images))


def evaluate_tokenizer(
    folder: Path | str,
    *,
    data: Path | None = None,
    features: Sequence[Spec] = ("classifier",),
    out: Path | None = None,
    options: TokenizerOptions | None = None,
    bars: Bars = no_bars,
) -> TokenizerReport:
    """Measures a tokenizer, and writes ``tokenizer.json``.

    Args:
        folder: Run folder, pretrained folder, or the folder of a tokenizer.
        data: Data folder; None for the data that the run was trained on.
        features: Feature networks: names or mappings, see ``networks.features.parse_feature_network``.
        out: Path of the JSON file; None for ``RUN/tokenizer.json``.
        options: Number of images and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if there is no tokenizer, or no data.
        TypeError: if a feature network does not accept its arguments.
        ValueError: if a network is unknown, or a number is out of range.
    """
    options = options or TokenizerOptions()
    folders = find_tokenizer_folders(folder, data=data)
    file = out or folders.run / "tokenizer.json"
    check_writable("out", file)
    report = TokenizerReport(measure_tokenizer(open_tokenizer(folders, features, options), bars), file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(report.content, indent=2) + "\n")
    return report


@dataclass(frozen=True)
class OpenedTokenizer:
    """A tokenizer, on its device, with what it is measured with."""

    folders: RunFolders
    options: TokenizerOptions
    tokenizer: PretrainedTokenizer
    data: ShardData
    extractors: Sequence[Extractor]
    lpips: Distance | None = None

    @property
    def num_images(self) -> int:
        """The number of images to measure."""
        available = self.data.summary.samples["val"]
        return min(self.options.num_images or available, available)

    @property
    def key(self) -> dict[str, Any]:
        """The columns of the ledger that determine the values of an evaluation."""
        folder = self.folders.pretrained / "tokenizer"
        networks = {extractor.label: shorten_digest(extractor.digest) for extractor in self.extractors}
        lpips = {} if self.lpips is None else {"lpips": LPIPSSpec.sha256}
        dtype = str(next(self.tokenizer.network.parameters()).dtype).removeprefix("torch.")
        return {
            "dataset": data_name(self.folders.data),
            "data": shorten_digest(self.data.summary.fingerprint),
            "split": "val",
            "tokenizer": fingerprint(folder),
            "config": shorten_digest(digest_of(read_config(folder, "tokenizer"))),
            "num_images": self.num_images,
            "settings": {"networks": networks, "dtype": dtype, **lpips},
        }


def open_tokenizer(folders: RunFolders, features: Sequence[Spec], options: TokenizerOptions) -> OpenedTokenizer:
    """Opens a tokenizer, the data and the feature networks."""
    device = find_device(options.device)
    tokenizer = load_tokenizer(folders.pretrained / "tokenizer")
    tokenizer.network.to(device, dtype=parse_dtype(options.dtype, device))
    lpips = open_lpips(options.lpips, tokenizer)
    data = open_images(folders.data, tokenizer.image_size, tokenizer.channels, num_workers=options.num_workers)
    data.warn_if_enlarged()
    extractors = open_extractors(folders.classifier, data, features, device=device)
    return OpenedTokenizer(folders, options, tokenizer, data, extractors, lpips)


def measure_tokenizer_once(ledger: Ledger, opened: OpenedTokenizer, bars: Bars) -> Row:
    """Returns the row of a tokenizer, which is measured if the ledger lacks it."""
    return ledger.find("tokenizer", opened.key) or ledger.add("tokenizer", measure_tokenizer(opened, bars))


def measure_tokenizer(opened: OpenedTokenizer, bars: Bars) -> dict[str, Any]:
    """Measures a tokenizer on random val images, the same in every call; returns its row of the ledger."""
    tokenizer, data, count = opened.tokenizer, opened.data, opened.num_images
    device = next(tokenizer.network.parameters()).device
    meter = ReconstructionMeter(tokenizer, opened.extractors, opened.lpips)
    originals: dict[str, list[dict[str, Tensor]]] = {extractor.label: [] for extractor in opened.extractors}
    size = min(opened.options.batch_size, images_at_once(*height_width(tokenizer.image_size)))
    on_images = bars(f"{opened.folders.run.name}: reconstructing", count)
    for batch in iter_real_batches(data, "val", num_images=count, batch_size=size):
        meter.add(batch)
        for extractor in opened.extractors:
            features = extractor(batch.content[batch.valid])
            originals[extractor.label].append({"index": batch.position[batch.valid], **features})
        on_images(int(batch.valid.sum()))
    numbers = {**_numbers(meter, originals), "images_per_second": count / max(meter.seconds, 1e-9)}
    config, (rows, columns) = tokenizer.network.config, tokenizer.grid
    return {
        **opened.key,
        "run": opened.folders.run.name,
        "numbers": numbers,
        "parameters": sum(each.numel() for each in tokenizer.network.parameters()),
        "quantizer": json.dumps(asdict(config)["quantizer"]).strip('"'),
        "codes": f"{rows} x {columns} of {config.codebook_size}",
        "commit": describe_environment()["commit"],
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
    }


def _numbers(meter: ReconstructionMeter, originals: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, float]:
    values, codes = meter.values(), meter.code_usage()
    errors = values.pop("error")
    numbers = {
        "psnr_db": psnr(float(errors.mean())),
        "mean_psnr_db": float((-10 * errors.log10()).clamp(max=_BEST_PSNR).mean()),
        **{name: float(of_image.mean()) for name, of_image in values.items()},
    }
    for label in originals:
        fake, real = (gather_rows(batches[label])["pooled"].double() for batches in (meter.features, originals))
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


@dataclass(frozen=True)
class TokenizerReport:
    """The values of an evaluation of a tokenizer."""

    content: Mapping[str, Any]  # of ``tokenizer.json``, in plain values: a row of the ledger
    file: Path  # of that content

    def table(self) -> Table:
        """Returns the values as a table for the terminal, with the distances of two halves of the real images."""
        numbers: Mapping[str, float] = self.content["numbers"]
        table = Table("", title=f"{self.content['num_images']} images")
        for heading in ("value", "real halves"):
            table.add_column(heading, justify="right")
        for name, value in numbers.items():
            metric, _, network = name.partition("/")
            if not metric.endswith("_floor"):
                floor = f"{metric}_floor/{network}"
                cell = format_value(floor, numbers[floor]) if floor in numbers else ""
                table.add_row(title(name), format_value(name, value), cell)
        return table
