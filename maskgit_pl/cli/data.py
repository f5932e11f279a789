"""``maskgit data``: fetches public data sets, makes shards from images, indexes, verifies and counts shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import Folder, ImageSize, check_one_of, print_json
from maskgit_pl.data.sources.public import Dataset, public_datasets
from maskgit_pl.processes import named_bars

if TYPE_CHECKING:
    from maskgit_pl.data.stats import DataStatistics

__all__ = ["fetch", "index", "make", "stats", "verify"]


def _read_class_names(flag: str, text: str) -> Sequence[str]:
    from maskgit_pl.data.samples import parse_class_names

    return parse_class_names(text)


Pattern = Annotated[str, Word("PATTERN")]
ClassNames = Annotated[Sequence[str], Word("A,B,...|FILE", _read_class_names)]


def make(
    source: Annotated[str, Word("SOURCE")],
    *,
    out: Folder,
    val_fraction: float | None = None,
    image_size: ImageSize | None = None,
    shard_size: int = 10_000,
    label_field: str = "label",
    lenient: bool = False,
    no_vectors: bool = False,
    class_names: ClassNames | None = None,
    num_workers: int | None = None,
) -> None:
    """Writes images of folders, archives or data sets as shards.

    The shards have a train and a val split. The source is a folder, zip, tar or .tar.gz of images (one sub-folder per
    class, or metadata.csv or .jsonl with file_name and label, or one class; train/ and val/ are kept as splits), a
    folder of IDX or parquet files, or a data set of the Hugging Face Hub such as hf:zalando-datasets/fashion_mnist.

    Example: maskgit data make photos.zip --out data/shards/photos --image-size 64

    Args:
        source: Folder or archive of images, folder of IDX or parquet files, or hf:OWNER/NAME[@REVISION][:SPLIT] of the
            Hugging Face Hub, which is downloaded to data/raw.
        out: Data folder to write.
        val_fraction: Val fraction of a source without a val split (default: 0.1).
        image_size: Crop the centre and resize to S x S pixels, or height H and width W (default: keep the files).
        shard_size: Images per shard.
        label_field: Column of the labels in a table.
        lenient: Skip and list images that cannot be read.
        no_vectors: Ignore .npy files beside the images (default: they are the images' vectors).
        class_names: Class names in order, or a file with one name per line (default: those of the source).
        num_workers: Worker processes (default: one per CPU core, fewer for little data).
    """
    from maskgit_pl.data.sources.making import convert_images

    convert_images(
        source,
        out,
        image_size=image_size,
        shard_size=shard_size,
        val_fraction=val_fraction,
        classes=class_names,
        label_field=label_field,
        vectors=not no_vectors,
        lenient=lenient,
        workers=num_workers,
    )


def index(
    shards: Annotated[str, Word("DIR|PATTERN")],
    *,
    train: Pattern | None = None,
    val: Pattern | None = None,
    val_fraction: float | None = None,
    label_field: str | None = None,
    no_labels: bool = False,
    lenient: bool = False,
    no_vectors: bool = False,
    class_names: ClassNames | None = None,
    num_workers: int | None = None,
) -> None:
    """Writes the manifests of existing WebDataset tars.

    Another program may have made the tars. They are not changed.

    Example: maskgit data index 'imagenet/imagenet-{train,val}-*.tar'

    Args:
        shards: Folder of tars, or a quoted glob or brace pattern.
        train: Train tars in the folder (default: all except val).
        val: Val tars (default: those with val or test in their names).
        val_fraction: Without val tars: fraction of the tars, the last ones, that become val (default: 0.1).
        label_field: Read labels from this field of .json (default: from .cls).
        no_labels: Put all images into one class.
        lenient: Skip and count damaged samples.
        no_vectors: Ignore .npy members (default: they are the images' vectors).
        class_names: Class names in order, or a file with one name per line (default: numbers).
        num_workers: Worker processes (default: one per CPU core, fewer for little data).
    """
    from maskgit_pl.data.index import index_shards
    from maskgit_pl.data.manifest import read_manifest_summary
    from maskgit_pl.data.reader import locate_shards, split_shards
    from maskgit_pl.data.samples import find_class_names
    from maskgit_pl.data.verify import describe_data, index_lines, untrained_lines

    check_one_of(label_field=label_field, no_labels=no_labels)
    folder, found = locate_shards(shards)
    splits, how = split_shards(folder, found, train=train, val=val, val_fraction=val_fraction)
    # Without --class-names, the names of an existing manifest are kept, unless all images get one class.
    names = class_names or (None if no_labels else find_class_names(folder))
    with named_bars("shards") as advance:
        indexed = index_shards(
            folder,
            splits,
            classes=names,
            labels="none" if no_labels else f"json:{label_field}" if label_field else "cls",
            vectors=not no_vectors,
            lenient=lenient,
            workers=num_workers,
            on_shard=lambda split, total: advance(split, 1, total),
        )
    print(describe_data(folder, read_manifest_summary(folder), "indexed"))
    if names is not None and class_names is None:
        print("  class names: kept from the existing manifest")
    print("\n".join(index_lines(folder, splits, how, indexed)))
    for line in untrained_lines(folder):
        print(f"  {line}")


def verify(folder: Folder, *, decode: bool = False, num_workers: int | None = None) -> None:
    """Reads every shard or token file and lists the damaged ones.

    The files of a data folder or a token store are compared with their manifests.

    Example: maskgit data verify data/shards/fashion-mnist

    Args:
        folder: Data folder or token store.
        decode: Also decode every image.
        num_workers: Worker processes (default: one per CPU core, fewer for little data).
    """
    from maskgit_pl.data.token_store import DESCRIPTION_FILE, REMAKE_HINT
    from maskgit_pl.data.verify import describe_bad_files, verify_shards, verify_store

    if (folder / DESCRIPTION_FILE).exists():  # a token store has another manifest and no images
        if decode:
            raise ValueError(f"--decode must be left out for a token store, which has no images, got {folder}")
        found = verify_store(folder)
        if found.bad:
            raise ValueError(f"token store {folder}: {describe_bad_files(found.bad, DESCRIPTION_FILE)}\n{REMAKE_HINT}")
        print(f"{folder}: {found.amount}: hashes agree with the description")
        return
    with named_bars("shards") as advance:
        found = verify_shards(
            folder, decode=decode, workers=num_workers, on_shard=lambda split, total: advance(split, 1, total)
        )
    if found.bad:
        raise ValueError(f"data {folder}: {describe_bad_files(found.bad, 'the manifest')}")
    print(f"{folder}: {found.amount}: hashes and {'decoded ' if decode else ''}images agree with the index")


def stats(
    folder: Folder,
    *,
    no_duplicates: bool = False,
    decode: bool = False,
    json: bool = False,
    out: Annotated[Path, Output(".png")] | None = None,
) -> None:
    """Counts the classes, images and bytes of a data folder.

    Sizes are printed too, and images that are equal to others.

    Example: maskgit data stats data/shards/fashion-mnist --out sheet.png

    Args:
        folder: Data folder.
        no_duplicates: Do not read all images to find equal ones.
        decode: Compare decoded pixels (default: the files' bytes).
        json: Print JSON.
        out: Draw the first images of each class.
    """
    from maskgit_pl.data.stats import find_duplicates, read_statistics, statistics_as_json
    from maskgit_pl.data.verify import duplicate_lines, statistics_lines

    check_one_of(no_duplicates=no_duplicates, decode=decode)
    statistics = read_statistics(folder)
    duplicates = None
    if not no_duplicates:
        with named_bars("images") as advance:
            duplicates = find_duplicates(
                statistics.manifests,
                compare="pixels" if decode else "bytes",
                on_image=lambda split, total: advance(split, 1, total),
            )
    if json:
        print_json(statistics_as_json(statistics, duplicates))
    else:
        print("\n".join(statistics_lines(folder, statistics)))
        if duplicates is not None:
            print("\n".join(["", *duplicate_lines(duplicates)]))
    if out is not None:
        _draw_first_images(statistics, out)
        if not json:
            print(f"{out}: first images of each class")


def _draw_first_images(statistics: DataStatistics, out: Path) -> None:
    """Draws a row of images for each class, or for 40 evenly spread classes if there are more."""
    import numpy as np
    import torch

    from maskgit_pl.data.images import decode_image, fit_image
    from maskgit_pl.data.stats import images_of_classes
    from maskgit_pl.pipeline.grids import TILE_SIZE, image_grid, save_png

    summary, columns = statistics.summary, 8
    (height, highest), (width, widest) = summary.images.height, summary.images.width
    side = TILE_SIZE if min(highest, widest) > TILE_SIZE else min(TILE_SIZE, height, width)
    size = side, side
    if (height, width) == (highest, widest):  # all images have one shape
        scale = min(1.0, TILE_SIZE / max(height, width))
        size = max(1, round(scale * height)), max(1, round(scale * width))
    shown = np.unique(np.linspace(0, summary.num_classes - 1, min(40, summary.num_classes)).round().astype(int))
    # Classes with fewer images than columns end with white tiles.
    tiles = torch.full((len(shown), columns, summary.channels, *size), 255, dtype=torch.uint8)
    for row, files in enumerate(images_of_classes(statistics.manifests["train"], shown.tolist(), each=columns)):
        for column, (data, name) in enumerate(files):
            image = decode_image(data, channels=summary.channels, name=name)
            tiles[row, column] = fit_image(image, image_size=size, crop=None)
    names = [summary.classes[label] for label in shown]
    captions = [name if len(name) <= 32 else f"{name[:31]}…" for name in names]
    save_png(image_grid(tiles.flatten(0, 1), columns=columns, row_captions=captions), out)


def fetch(
    name: str,
    *,
    out: Folder | None = None,
    raw: Folder | None = None,
    source: Path | None = None,
    image_size: Annotated[int, Word("S")] | None = None,
) -> None:
    """Downloads a public data set and writes its shards.

    The files are checked, and complete data are kept. {contents}.

    Example: maskgit data fetch fashion-mnist

    Args:
        name: Name of the data set.
        out: Data folder to write (default: data/shards/NAME).
        raw: Folder that keeps the downloaded files (default: data/raw/NAME).
        source: Existing files in place of a download: {source}.
        image_size: Side of the images in pixels ({sizes}).
    """
    from maskgit_pl.data.sources.making import fetch_dataset

    fetch_dataset(name, out, raw=raw, source=source, image_size=image_size)


def _sizes(dataset: Dataset) -> str:
    return " or ".join(map(str, dataset.image_sizes))


def _of_each(text: Callable[[Dataset], str]) -> str:
    """Returns a text of each data set, for the help."""
    return "; ".join(f"{name}: {text(each)}" for name, each in public_datasets().items())


fetch.__doc__ = (fetch.__doc__ or "").format(
    contents=_of_each(lambda each: each.contents), source=_of_each(lambda each: each.source), sizes=_of_each(_sizes)
)
