"""``maskgit data``: fetches public data sets, makes shards from images, indexes and verifies shards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import Folder, ImageSize, check_one_of
from maskgit_pl.data.sources.public import public_datasets
from maskgit_pl.processes import named_bars
from maskgit_pl.text import count_text, shorten


def _read_class_names(flag: str, text: str) -> Sequence[str]:
    from maskgit_pl.data.samples import parse_class_names

    return parse_class_names(text)


def _read_grid(flag: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]{0,6}(x[1-9][0-9]{0,6}){0,2}", text):
        raise ValueError(f"{flag} must be one to three numbers such as 256, 16x16 or 4x7x7, got {shorten(text)}")
    return tuple(map(int, text.split("x")))


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
    class_names: ClassNames | None = None,
    num_workers: int | None = None,
) -> None:
    """Writes images of folders, archives or data sets as shards.

    The shards have a train and a val split. The source is a folder, zip or tar of images (one sub-folder per class, or
    metadata.csv with file_name and label, or one class; train/ and val/ are kept as splits), a folder of IDX or
    parquet files, or a data set of the Hugging Face Hub such as hf:zalando-datasets/fashion_mnist.

    Example: maskgit data make photos.zip --out data/shards/photos --image-size 64

    Args:
        source: Folder or archive of images, folder of IDX or parquet files, or
            hf:OWNER/NAME[@REVISION][:SPLIT] of the Hugging Face Hub, which is downloaded to data/raw.
        out: Data folder to write.
        val_fraction: Val fraction of a source without a val split (default: 0.1).
        image_size: Crop the centre and resize to S x S pixels, or height H and width W (default: keep the files).
        shard_size: Images per shard.
        label_field: Column of the labels in a table.
        lenient: Skip and list images that cannot be read.
        class_names: Class names in order, or a file with one name per line (default: those of the source).
        num_workers: Worker processes (default: one per CPU core, fewer for little data).
    """
    from maskgit_pl.data.sources.shards import convert_images

    convert_images(
        source,
        out,
        image_size=image_size,
        shard_size=shard_size,
        val_fraction=val_fraction,
        classes=class_names,
        label_field=label_field,
        lenient=lenient,
        workers=num_workers,
    )


def index(
    shards: Annotated[str, Word("DIR|PATTERN")],
    *,
    val: Pattern | None = None,
    label_field: str | None = None,
    no_labels: bool = False,
    lenient: bool = False,
    class_names: ClassNames | None = None,
    num_workers: int | None = None,
) -> None:
    """Writes the manifests of existing WebDataset tars.

    Another program may have made the tars. They are not changed.

    Example: maskgit data index 'imagenet/imagenet-{train,val}-*.tar'

    Args:
        shards: Folder of tars, or a quoted glob or brace pattern.
        val: Val tars (default: those with val or test in their names, else the last tenth).
        label_field: Read labels from this field of .json (default: from .cls).
        no_labels: Put all images into one class.
        lenient: Skip and count damaged samples.
        class_names: Class names in order, or a file with one name per line (default: numbers).
        num_workers: Worker processes (default: one per CPU core, fewer for little data).
    """
    from maskgit_pl.data.index import index_shards, locate_shards, split_shards
    from maskgit_pl.data.verify import describe_data, index_lines

    check_one_of(label_field=label_field, no_labels=no_labels)
    folder, tars = locate_shards(shards)
    splits, how = split_shards(folder, tars, val=val)
    with named_bars("shards") as advance:
        manifests = index_shards(
            folder,
            splits,
            classes=class_names,
            labels="none" if no_labels else f"json:{label_field}" if label_field else "cls",
            lenient=lenient,
            workers=num_workers,
            on_shard=lambda split, total: advance(split, 1, total),
        )
    print(describe_data(folder, "indexed", index_lines(folder, splits, how, manifests)))


def tokens(
    source: Annotated[Path, Word("FILE|DIR")],
    *,
    grid: Annotated[tuple[int, ...], Word("4x7x7", _read_grid)],
    codebook_size: int,
    out: Folder,
    labels: Annotated[Path, Word("FILE")] | None = None,
    val_fraction: float = 0.1,
) -> None:
    """Writes tokens of another tokenizer as a token store.

    The source is a .npy file of integers, or a folder of them in the order of their names. An array has a row of
    tokens for each sample, in raster order, or the axes of the grid.

    Example: maskgit data tokens clips.npy --grid 4x7x7 --codebook-size 256 --out data/clips

    Args:
        source: File or folder of arrays.
        grid: Sides of the token grid: N, HxW or TxHxW.
        codebook_size: Number of codes of the tokenizer.
        out: Token store to write.
        labels: Class number of each sample, .npy or text with one number per line (default: one class).
        val_fraction: Fraction of the samples for validation.
    """
    from maskgit_pl.data.own_tokens import write_own_tokens

    made = write_own_tokens(
        source, out, grid=grid, codebook_size=codebook_size, labels=labels, val_fraction=val_fraction
    )
    counts = ", ".join(f"{count:,} {split}" for split, count in made.samples.items())
    print(f"{out}: {counts}; {made.num_tokens} tokens each; {count_text(len(made.classes), 'class')}")


def verify(folder: Folder, *, decode: bool = False, num_workers: int | None = None) -> None:
    """Reads every shard and lists the damaged ones.

    The files of a data folder are compared with their manifests, and their content is printed.

    Example: maskgit data verify data/shards/fashion-mnist

    Args:
        folder: Data folder.
        decode: Also decode every image.
        num_workers: Worker processes (default: one per CPU core, fewer for little data).
    """
    from maskgit_pl.data.verify import describe_data, verify_shards

    with named_bars("shards") as advance:
        result = verify_shards(
            folder, decode=decode, workers=num_workers, on_shard=lambda split, total: advance(split, 1, total)
        )
    if result.faults:
        files = count_text(len(result.faults), "damaged file")
        raise ValueError("\n  ".join([f"data {folder}: {files}:", *result.faults]))
    print(
        f"{folder}: {result.amount}: hashes agree with the manifest{'; every image can be decoded' if decode else ''}"
    )
    if (folder / "train.json").is_file():
        print(describe_data(folder, "content"))


def fetch(name: str, *, out: Folder | None = None, source: Path | None = None) -> None:
    """Downloads a public data set and writes its shards.

    The files are checked, and complete data are kept. {contents}.

    Example: maskgit data fetch fashion-mnist

    Args:
        name: Name of the data set.
        out: Data folder to write (default: data/shards/NAME).
        source: Existing files in place of a download to data/raw/NAME: the folder of the IDX files or of the
            packages, or bmng.jpg.
    """
    from maskgit_pl.data.sources.shards import fetch_dataset

    fetch_dataset(name, out, source=source)


fetch.__doc__ = (fetch.__doc__ or "").format(
    contents="; ".join(f"{name}: {dataset.contents}" for name, dataset in public_datasets().items())
)
