"""The report of ``evaluate_tokenizer``: ``tokenizer.json``, ``tokenizer.md``, a picture, a ledger row and a table."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from maskgit_pl.checks import plain_size
from maskgit_pl.distributed import default_device, describe_environment, device_name, parse_dtype
from maskgit_pl.errors import markdown
from maskgit_pl.evaluation.cache import digest_of, shorten_digest
from maskgit_pl.evaluation.metrics import format_value, metric_name, title
from maskgit_pl.evaluation.options import TokenizerOptions
from maskgit_pl.evaluation.pages import image_to_png, markdown_table, paragraph
from maskgit_pl.evaluation.reconstruction import psnr
from maskgit_pl.evaluation.run_folders import RunFolders, data_name, describe_held_out
from maskgit_pl.evaluation.tokenizer_measurement import BEST_PSNR, ImagePair, MeasuredTokenizer
from maskgit_pl.files import write_atomically, write_text
from maskgit_pl.pipeline.grids import image_grid
from maskgit_pl.pipeline.pretrained import fingerprint, read_config

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["TokenizerReport", "make_tokenizer_report", "tokenizer_key"]

_SHOWN_EDGE = 256  # pixels of a picture's images
_FLOORS = ("rfid", "rkid")  # metrics whose value for real halves stands beside them


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
    worst: list[ImagePair]

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
        from rich.table import Table

        table = Table(title=f"tokenizer of {self.content['run']}, {self.content['protocol']['num_images']} images")
        for name in ("", "value", "real halves"):
            table.add_column(name, justify="right" if name else "left")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def _cells(self) -> Iterator[tuple[str, str, str]]:
        """Yields name, value and floor of each metric."""
        numbers = self.content["numbers"]
        for name, value in numbers.items():
            metric, _, network = name.partition("/")
            if metric.endswith("_floor"):
                continue
            floor = numbers.get(metric_name(f"{metric}_floor", network)) if metric in _FLOORS else None
            yield title(name), format_value(name, value), "" if floor is None else format_value(name, floor)


def make_tokenizer_report(
    folders: RunFolders, measured: MeasuredTokenizer, options: TokenizerOptions, file: Path
) -> TokenizerReport:
    """Returns the report of measurements, with everything that reproduces them.

    Args:
        folders: Folders of the tokenizer and of the data.
        measured: The measurements.
        options: Options of the measurements.
        file: Path of the JSON file.
    """
    tokenizer, data = measured.tokenizer, measured.data
    config, device = tokenizer.network.config, next(tokenizer.network.parameters()).device
    names = data.class_names
    content = {
        "run": folders.run.name,
        "protocol": {
            "num_images": measured.num_images,
            "data": data.summary.fingerprint,
            "split": "val",
            "features": measured.networks,
            "tile": options.tile,
            "tile_overlap": None if options.tile is None else options.overlap,
            "lpips": options.lpips,
            "dtype": _dtype_name(options),
        },
        "held_out": describe_held_out(folders.data, data.summary),
        "numbers": measured.numbers,
        "psnr_db_per_class": measured.psnr_db,
        "worst": [
            {"index": each.index, "class": names[each.label], "psnr_db": min(BEST_PSNR, psnr(each.error))}
            for each in measured.worst
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
    key = tokenizer_key(folders, data.summary.fingerprint, measured.num_images, measured.networks, options)
    return TokenizerReport(content, key, file, measured.worst)


def tokenizer_key(
    folders: RunFolders, data: str, num_images: int, networks: Mapping[str, str], options: TokenizerOptions
) -> dict[str, Any]:
    """Returns the columns of the ledger that determine the values of an evaluation.

    Args:
        folders: Folders of the tokenizer and of the data.
        data: Fingerprint of the data.
        num_images: Number of images.
        networks: SHA-256 of each feature network, by label.
        options: Options of the evaluation.
    """
    folder = folders.pretrained / "tokenizer"
    settings: dict[str, Any] = {
        "networks": {label: shorten_digest(digest) for label, digest in networks.items()},
        "dtype": _dtype_name(options),
    }
    if options.tile is not None:
        settings |= {"tile": options.tile, "tile_overlap": options.overlap}
    if options.lpips is not None:
        settings["lpips"] = options.lpips.partition("=")[0]
    return {
        "dataset": data_name(folders.data),
        "data": shorten_digest(data),
        "split": "val",
        "tokenizer": fingerprint(folder),
        "config": shorten_digest(digest_of(read_config(folder, "tokenizer"))),
        "num_images": num_images,
        "settings": settings,
    }


def _dtype_name(options: TokenizerOptions) -> str:
    dtype = parse_dtype(options.dtype, options.device or default_device())
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")  # files hold float32


def _draw_pairs(pairs: list[ImagePair]) -> Image.Image:
    """Draws originals above their reconstructions; all are cut to the smallest of their sizes and 256 px."""
    height, width = (min(_SHOWN_EDGE, *(pair.original.shape[axis] for pair in pairs)) for axis in (1, 2))
    images = [pair.original for pair in pairs] + [pair.reconstruction for pair in pairs]
    shown = torch.stack([image[..., :height, :width] for image in images])
    return image_grid(shown, columns=len(pairs), row_captions=["original", "reconstruction"])
