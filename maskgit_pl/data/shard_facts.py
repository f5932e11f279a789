"""The parts of a manifest: a shard, the range of image sizes and the array of vectors, with their checks.

Used by ``manifest``, which exports them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from maskgit_pl.checks import (
    ImageSize,
    build_dataclass,
    check_choice,
    check_integer,
    check_keys,
    check_sha256,
    height_width,
    pixels_text,
    plain_size,
    shorten,
)
from maskgit_pl.data.vectors import MAX_VECTOR_DIM, VECTOR_DTYPES, VectorKind

__all__ = [
    "ImageRange",
    "Shard",
    "VectorArray",
    "describe_resizing",
    "parse_image_range",
    "parse_shard",
    "parse_vector_array",
    "union",
]

_MAX_SIDE = 2**26  # pixels; an image has at most 64 million


@dataclass(frozen=True)
class Shard:
    """A tar in a manifest.

    Args:
        name: Path inside the data folder.
        bytes: Length of the file.
        samples: Number of samples in it.
        sha256: Hash of the whole file, hex.

    Raises:
        ValueError: if a value is out of range, or the name leaves the folder.
    """

    name: str
    bytes: int
    samples: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _is_inside(self.name):
            raise ValueError(f"name must be a path inside the data folder, got {shorten(self.name)}")
        check_integer("bytes", self.bytes, "[0, 1125899906842624]")  # 1 PiB
        check_integer("samples", self.samples, "[0, 4294967296]")
        check_sha256("sha256", self.sha256)


@dataclass(frozen=True)
class ImageRange:
    """The range of image sizes in a split.

    Args:
        height: Smallest and largest height in pixels, after the EXIF orientation.
        width: Smallest and largest width.
        channels: Numbers of channels that occur, sorted: 1 and 3; alpha is not counted.
    """

    height: tuple[int, int]
    width: tuple[int, int]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class VectorArray:
    """The array of the vectors of a split, ``SPLIT-vectors.npy``.

    Args:
        kind: Size and type of the vectors.
        sha256: Hash of the whole file, hex.

    Raises:
        ValueError: if a value is out of range.
    """

    kind: VectorKind
    sha256: str

    def __post_init__(self) -> None:
        check_integer("vector_dim", self.kind.dim, f"[1, {MAX_VECTOR_DIM}]")
        check_choice("vector_dtype", self.kind.dtype, VECTOR_DTYPES)
        check_sha256("vectors_sha256", self.sha256)


def union(ranges: Sequence[ImageRange]) -> ImageRange:
    """Returns the smallest range that contains all given ranges.

    Args:
        ranges: At least one range.
    """
    return ImageRange(
        height=(min(r.height[0] for r in ranges), max(r.height[1] for r in ranges)),
        width=(min(r.width[0] for r in ranges), max(r.width[1] for r in ranges)),
        channels=tuple(sorted({channel for r in ranges for channel in r.channels})),
    )


def describe_resizing(images: ImageRange, image_size: ImageSize) -> str | None:
    """Describes that images are resized for a model, and how to avoid it.

    Only resizing that concerns all images is described: every image is enlarged, or all images have one size and are
    reduced. Photos of several sizes are expected to be resized.

    Args:
        images: Range of the image sizes.
        image_size: Size of the model's images: a side, or (height, width), in pixels.

    Returns:
        A sentence; None if not all images are resized, or this cannot be known from the range.
    """
    size, least, most = height_width(image_size), *zip(images.height, images.width, strict=True)
    wanted, own = pixels_text(size), plain_size(most)
    # An image is resized by the larger of the two ratios, and the rest of it is cropped.
    if any(side < model_side for side, model_side in zip(most, size, strict=True)):
        bound = "" if least == most else "at most "
        return (
            f"images of {bound}{pixels_text(most)} pixels are enlarged to {wanted}, which adds no detail; set "
            f"data.image_size of the tokenizer to {bound}{own}, or make the data from larger images with --image-size "
            f"{_flag_text(size)}"
        )
    if least == most and all(side > model_side for side, model_side in zip(most, size, strict=True)):
        return (
            f"images of {pixels_text(most)} pixels are reduced to {wanted}; set data.image_size of the tokenizer to "
            f"{own}, or make the data with --image-size {_flag_text(size)}"
        )
    return None


def parse_shard(fields: object, where: str) -> Shard:
    """Builds a shard from JSON. ``build_dataclass`` is too slow for many shards."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must be a mapping, got {shorten(fields)}")
    if fields.keys() != {"name", "bytes", "samples", "sha256"}:
        names = ("name", "bytes", "samples", "sha256")
        check_keys(where, fields, known=names, required=names)
    try:
        return Shard(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parse_image_range(fields: object, where: str) -> ImageRange:
    """Builds a range of image sizes from JSON.

    Raises:
        ValueError: if a number is missing or out of range.
    """
    made = build_dataclass(ImageRange, fields, where)
    for name, (low, high) in (("height", made.height), ("width", made.width)):
        check_integer(f"{where}.{name}", low, f"[1, {_MAX_SIDE}]")
        check_integer(f"{where}.{name}", high, f"[{low}, {_MAX_SIDE}]")
    if not made.channels or not set(made.channels) <= {1, 3}:
        raise ValueError(f"{where}.channels must be a subset of 1 and 3, got {shorten(made.channels)}")
    return ImageRange(*(tuple(sizes) for sizes in (made.height, made.width, made.channels)))  # type: ignore[arg-type]


def parse_vector_array(fields: Mapping[str, Any], where: str) -> VectorArray | None:
    """Builds the description of the vectors from the keys of a manifest; None if it has no vectors.

    Raises:
        ValueError: if a key is missing or invalid.
    """
    names = ("vector_dim", "vector_dtype", "vectors_sha256")
    if not any(fields.get(name) for name in names):
        return None
    missing = [name for name in names if not fields.get(name)]
    if missing:
        raise ValueError(f"{where}: {', '.join(names)} must be given together, got no {missing[0]}")
    try:
        return VectorArray(VectorKind(fields["vector_dim"], fields["vector_dtype"]), fields["vectors_sha256"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _flag_text(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]},{size[1]}"


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)  # a manifest may be hostile: no path may leave the folder or hide in it
    return not (path.is_absolute() or ".." in path.parts or path.name.startswith(".")) and name.isprintable()
