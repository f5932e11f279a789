"""The text output of ``maskgit data``: the content of a data folder and its faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.data.manifest import DataSummary, Split, load_manifest
from maskgit_pl.data.scan import format_counts
from maskgit_pl.data.writer import LEFT_OUT
from maskgit_pl.files import size_text
from maskgit_pl.image_format import CHANNELS, pixels_text
from maskgit_pl.text import printable

if TYPE_CHECKING:
    from maskgit_pl.data.duplicates import Duplicates
    from maskgit_pl.data.index import IndexResult
    from maskgit_pl.data.stats import DataStatistics
    from maskgit_pl.data.verify import BadFile, StoreVerification, Verification

__all__ = [
    "count_shards",
    "describe_bad_files",
    "describe_data",
    "describe_store_verification",
    "describe_verification",
    "duplicate_lines",
    "index_lines",
    "statistics_lines",
    "unreadable_lines",
    "untrained_lines",
]

_SHOWN_CLASSES = 10
_LONGEST_BAR = 40  # characters of the histogram's largest bar


def count_shards(count: int) -> str:
    """Returns ``1 shard`` or ``12 shards``."""
    return "1 shard" if count == 1 else f"{count} shards"


def describe_data(folder: Path, summary: DataSummary, done: str) -> str:
    """Returns one line about the samples, classes and images of a data folder.

    Args:
        folder: The data folder.
        summary: Summary of its manifests.
        done: The completed action, such as ``"indexed"``.
    """
    heights, widths = summary.images.height, summary.images.width
    counts = ", ".join(f"{count} {split}" for split, count in summary.samples.items())
    size = " x ".join(str(low) if low == high else f"{low}-{high}" for low, high in (widths, heights))
    colour = "grey" if summary.channels == 1 else "colour"
    classes = "1 class" if summary.num_classes == 1 else f"{summary.num_classes} classes"
    vectors = "" if summary.vectors is None else f"; vectors of {summary.vectors}"
    return f"{folder}: {done}: {counts}; {classes}; {size} pixels, {colour}{vectors}"


def unreadable_lines(folder: Path) -> Iterator[str]:
    """Yields one line about the images that ``maskgit data make --lenient`` left out, if there are any."""
    if (folder / LEFT_OUT).is_file():
        with open(folder / LEFT_OUT, "rb") as file:
            yield f"{sum(1 for _ in file)} images that cannot be read, listed in {LEFT_OUT}"


def untrained_lines(folder: Path) -> Iterator[str]:
    """Yields one line about the classes without images in train, which a model cannot learn, if there are any."""
    import numpy as np

    manifest = load_manifest(folder, "train", check=False)
    missing = sorted(set(range(len(manifest.classes))) - set(np.unique(manifest.index()["label"]).tolist()))
    if missing:
        names = [printable(manifest.classes[label]) for label in missing[:_SHOWN_CLASSES]]
        more = ["..."] * (len(missing) > _SHOWN_CLASSES)
        yield f"no image in train of {len(missing)} of {len(manifest.classes)} classes: {', '.join([*names, *more])}"


def index_lines(folder: Path, shards: Mapping[Split, Sequence[Path]], how: str, indexed: IndexResult) -> Iterator[str]:
    """Yields lines about the result of ``index_shards``.

    Args:
        folder: The data folder.
        shards: The shards of each split.
        how: A phrase that tells how the splits were chosen; see ``split_shards``.
        indexed: The result.
    """
    for split, paths in shards.items():
        names = [path.relative_to(folder).as_posix() for path in paths]
        yield f"  {split}: {count_shards(len(names))}, {names[0] if len(names) == 1 else f'{names[0]} ... {names[-1]}'}"
    yield f"  {how}"
    for split, manifest in indexed.manifests.items():
        yield from (f"  {split}: left out: {count} {printable(fault)}" for fault, count in manifest.left_out.items())
        if indexed.ignored[split]:
            yield f"  {split}: members not read: {format_counts(indexed.ignored[split])}"
    yield from (f"  {printable(note, limit=None)}" for note in indexed.notes)


def describe_bad_files(bad: Sequence[BadFile], source: str) -> str:
    """Returns a table of files that differ from their description.

    Args:
        bad: The files, at least one.
        source: Name of the description, such as ``"the manifest"``.
    """
    # The last column is not padded: reasons are long.
    rows = [("file", "expected", "found", "reason"), *bad]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    files = "1 file differs" if len(bad) == 1 else f"{len(bad)} files differ"
    return "\n  ".join([f"{files} from {source}", *lines])


def describe_verification(folder: Path, found: Verification, *, decoded: bool) -> str:
    """Returns one line about shards that agree with their manifests."""
    what = "hashes, headers, labels and images" if decoded else "hashes, headers and labels"
    amount = f"{count_shards(found.shards)}, {found.samples} samples, {size_text(found.bytes)}"
    return f"{folder}: {amount}: {what} agree with the index"


def describe_store_verification(folder: Path, found: StoreVerification) -> str:
    """Returns one line about a token store that agrees with its description."""
    return f"{folder}: {found.rows} rows, {size_text(found.bytes)}: hashes and ranges agree with the description"


def statistics_lines(folder: Path, statistics: DataStatistics) -> Iterator[str]:
    """Yields lines about the splits, classes and image sizes of a data folder."""
    for split, manifest in statistics.manifests.items():
        total = size_text(sum(shard.bytes for shard in manifest.shards))
        yield f"{folder}: {split}: {manifest.samples} samples in {count_shards(len(manifest.shards))}, {total}"
        yield from (f"  left out: {count} {printable(fault)}" for fault, count in manifest.left_out.items())
    yield from (f"  left out: {printable(line)}" for line in unreadable_lines(folder))
    yield ""
    yield from _class_table(statistics)
    yield ""
    yield from _size_lines(statistics)


def duplicate_lines(found: Duplicates) -> Iterator[str]:
    """Yields lines about the duplicates of a data folder."""
    kind = "the same bytes" if found.compared == "bytes" else "the same pixels"
    total = sum(found.repeated.values()) + found.val_in_train
    if not total:
        yield f"duplicates: no two images have {kind}"
        return
    counts = ", ".join(f"{count} in {split}" for split, count in found.repeated.items() if count)
    within = f" ({counts} of the same split)" if counts else ""
    images = "1 image has" if total == 1 else f"{total} images have"
    yield f"duplicates: {images} {kind} as an earlier one{within}"
    if found.val_in_train:
        share = f"{found.val_in_train} of {found.images['val']} val images ({found.share_of_val:.1%})"
        yield f"  {share} are in train, so val does not measure new images"
    if found.other_label:
        yield f"  {found.other_label} have another class than the earlier one"
    yield from (f"  {printable(pair.repeated)} = {printable(pair.first)}" for pair in found.pairs)
    if total > len(found.pairs):
        yield f"  ... and {total - len(found.pairs)} more"


def _class_table(statistics: DataStatistics) -> Iterator[str]:
    names, splits = [printable(name) for name in statistics.summary.classes], list(statistics.classes)
    width = max(map(len, ["class", *names]))
    # Columns are right-aligned; each is as wide as its header or its largest number.
    digits = {split: max(len(split), len(str(statistics.classes[split].max()))) for split in splits}
    yield "  ".join(["label", "class".ljust(width), *(split.rjust(digits[split]) for split in splits)])
    for label, name in enumerate(names):
        counts = (str(statistics.classes[split][label]).rjust(digits[split]) for split in splits)
        yield "  ".join([str(label).rjust(5), name.ljust(width), *counts])


def _size_lines(statistics: DataStatistics) -> Iterator[str]:
    heights, widths = statistics.summary.images.height, statistics.summary.images.width
    channels = ", ".join(CHANNELS[channel] for channel in statistics.summary.images.channels)
    if heights[0] == heights[1] and widths[0] == widths[1]:
        yield f"all images {pixels_text((heights[0], widths[0]))} pixels (width x height), {channels}"
        return
    sizes = ((heights[0], widths[0]), statistics.medians, (heights[1], widths[1]))
    smallest, median, largest = map(pixels_text, sizes)
    yield f"width x height: smallest {smallest}, median {median}, largest {largest} pixels; {channels}"
    bars = statistics.short_sides
    if len(bars) < 2:
        return
    yield f"shorter side in pixels, {statistics.measured} images of train:"
    largest_bar = max(bar.images for bar in bars)
    spans = [f"{bar.low}-{bar.high}" if bar.low < bar.high else str(bar.low) for bar in bars]
    for span, bar in zip(spans, bars, strict=True):
        # Rounded up, so that every bar with images is visible.
        stroke = "#" * -(-_LONGEST_BAR * bar.images // largest_bar)
        yield f"  {span.rjust(max(map(len, spans)))}  {stroke} {bar.images}".rstrip()
