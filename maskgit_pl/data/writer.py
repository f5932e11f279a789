"""Makes a data folder from a source: shards, manifests and a record of the source.

Used by ``maskgit data make`` and the scripts in ``data/``; see ``make_shards``. ``webdataset`` writes the
shards, whose bytes do not depend on interruptions or on the number of workers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from webdataset import TarWriter

from maskgit_pl.checks import ImageSize, check_image_size, check_integer, height_width, plain_size
from maskgit_pl.data.folders import has_content, replace_folder, resolve_folder
from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.data.images import decode_image, encode_jpeg, encode_png, fit_image, parse_image_header
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import Split, load_manifests, splits_of
from maskgit_pl.data.samples import Sample, Source, UnreadableSample
from maskgit_pl.data.vectors import VECTOR_EXTENSION
from maskgit_pl.errors import printable
from maskgit_pl.files import read_json, remove_partials, write_atomically, write_text
from maskgit_pl.processes import choose_workers, run_jobs

RECORD = "made_from.json"
MAX_RECORD_BYTES = 100_000_000  # a record lists the class names
LEFT_OUT = "left_out.txt"  # one line for each image that could not be read
_MAX_LISTED = 20  # lines of this file in an error message
_SAMPLES = 5_000  # one process writes this many in about 10 seconds


def make_shards(
    source: Source,
    folder: str | Path,
    *,
    image_size: ImageSize | None = None,
    shard_size: int = 10_000,
    lenient: bool = False,
    workers: int | None = 1,
    on_samples: Callable[[Split, int], object] = lambda split, count: None,
) -> bool:
    """Makes a data folder from a source.

    1. Do nothing if the folder already holds the result, by its record; reject a folder of other content.
    2. Write the missing shards to ``.NAME.partial``, in parallel. After an error, the complete ones stay there for the
       next run.
    3. List the unreadable images, and reject them unless ``lenient``. The next run reads their shards again, since they
       may have been replaced.
    4. Index the shards.
    5. Rename the folder.

    Args:
        source: Source of the samples.
        folder: The data folder to make. A link stays, and its target is written.
        image_size: Side, or (height, width), to which each image is cropped (centre) and resized; None keeps the files.
        shard_size: Maximum number of samples per shard.
        lenient: True leaves out unreadable images and lists them in ``left_out.txt``; False rejects them.
        workers: Number of processes; each writes one shard at a time, and the result does not depend on it.
            None: one per core, fewer for little data.
        on_samples: Called with the split and the number of its samples that were just finished (for a progress bar).

    Returns:
        False if the folder already holds the result, True if it was written.

    Raises:
        ValueError: if the folder has other content or cannot be written, or images cannot be read without ``lenient``.
    """
    folder = Path(folder)
    workers = choose_workers(workers, work=sum(source.counts.values()) / _SAMPLES)
    check_integer("shard_size", shard_size, "[1, inf)")
    size = None if image_size is None else check_image_size("image_size", image_size, "[1, 65536]")
    # All that determines the content of the folder.
    record = {"source": source.describe(), "size": size and plain_size(size), "shard_size": shard_size}
    if _read_record(folder) == record:  # 1.
        load_manifests(folder, splits_of(folder))  # raises an error if the shards have changed since
        return False
    folder = resolve_folder("data folder", folder)
    if has_content(folder):
        raise ValueError(
            f"data folder {printable(folder)} must be empty or made from the same source, got other content (see its "
            f"{RECORD}); give another --out, or remove it"
        )
    partial = _partial_folder(folder, record)
    plan = _Plan(source, partial, size, shard_size)
    _write_missing(plan, workers=workers, on_samples=on_samples)  # 2.
    _list_left_out(plan, lenient=lenient)  # 3.
    shards = {split: find_shards(partial, f"{split}-*.tar") for split in source.counts}
    index_shards(partial, shards, classes=source.classes, workers=workers)  # 4.
    replace_folder(partial, folder)  # 5.
    for path in folder.glob(".left-out-*"):  # a run that resumes needs them until here
        path.unlink()
    return True


def write_shard(samples: Iterable[Sample], stream: IO[bytes], *, first_key: int) -> None:
    """Writes samples as a WebDataset tar. Their keys are numbers from ``first_key``, which sort in their order."""
    # All members have the same owner and time, so equal samples give equal bytes and an equal fingerprint.
    with TarWriter(stream, mtime=0, user="", group="") as writer:
        for number, sample in enumerate(samples, first_key):
            content = {"__key__": f"{number:08d}", sample.extension: sample.data, "cls": sample.label}
            # webdataset writes bytes as they are.
            writer.write(content if sample.vector is None else {**content, VECTOR_EXTENSION: sample.vector})


@dataclass(frozen=True)
class _Plan:
    """The settings of all shards of a data folder."""

    source: Source
    folder: Path
    size: ImageSize | None
    shard_size: int

    def shards(self, split: Split) -> range:
        """Returns the numbers of a split's shards."""
        return range(-(-self.source.counts[split] // self.shard_size))

    def places(self, split: Split, shard: int) -> range:
        """Returns the places of a shard's samples in the split's order."""
        return range(self.source.counts[split])[shard * self.shard_size : (shard + 1) * self.shard_size]

    def path(self, split: Split, shard: int) -> Path:
        """Returns the path of a complete shard."""
        return self.folder / f"{split}-{shard:06d}.tar"

    def left_out_path(self, split: Split, shard: int) -> Path:
        """Returns the path of the temporary list of a shard's unreadable images, which is written after the shard."""
        return self.folder / f".left-out-{split}-{shard:06d}"

    def left_out(self, split: Split, shard: int) -> list[str]:
        """Returns the lines of this list."""
        return self.left_out_path(split, shard).read_bytes().decode().split("\n")[:-1]


def _partial_folder(folder: Path, record: dict[str, Any]) -> Path:
    """Returns the temporary folder, with the shards of an interrupted run if it had the same record."""
    partial = folder.with_name(f".{folder.name}.partial")
    if _read_record(partial) != record:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)  # fails for a file, a link, or a folder of another user
        write_text(partial / RECORD, json.dumps(record, indent=1) + "\n")
    remove_partials(partial)
    return partial


def _read_record(folder: Path) -> Any:
    try:
        return read_json(folder / RECORD, max_bytes=MAX_RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _write_missing(plan: _Plan, *, workers: int, on_samples: Callable[[Split, int], object]) -> None:
    jobs: list[tuple[Split, int]] = []
    for split in plan.source.counts:
        for shard in plan.shards(split):
            if plan.left_out_path(split, shard).exists():  # the shard is done
                on_samples(split, len(plan.places(split, shard)))
            else:
                jobs.append((split, shard))
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            _write_job(plan, job, on_sample=lambda split: on_samples(split, 1))
        return
    for (split, shard), _ in run_jobs(_write_job, plan, jobs, workers=workers):
        on_samples(split, len(plan.places(split, shard)))


def _write_job(
    plan: _Plan, job: tuple[Split, int], *, on_sample: Callable[[Split], object] = lambda split: None
) -> None:
    """Writes one shard, and then the list of its unreadable images."""
    split, shard = job
    left_out: list[UnreadableSample] = []
    samples = _read_samples(plan, split, shard, left_out, on_sample=on_sample)
    path = plan.path(split, shard)
    if (first := next(samples, None)) is None:  # a shard without readable images does not become a file
        path.unlink(missing_ok=True)
    else:
        with write_atomically(path) as stream:
            write_shard(chain([first], samples), stream, first_key=shard * plan.shard_size)
    write_text(plan.left_out_path(split, shard), "".join(f"{sample.error}\n" for sample in left_out))


def _read_samples(
    plan: _Plan,
    split: Split,
    shard: int,
    left_out: list[UnreadableSample],
    *,
    on_sample: Callable[[Split], object],
) -> Iterator[Sample]:
    """Yields the readable samples of a shard, resized if ``plan.size`` is given; adds the others to ``left_out``."""
    for sample in plan.source.samples(split, plan.places(split, shard)):
        result = sample if isinstance(sample, UnreadableSample) or plan.size is None else _resize(sample, plan.size)
        if isinstance(result, Sample):
            yield result
        else:
            left_out.append(result)
        on_sample(split)


def _list_left_out(plan: _Plan, *, lenient: bool) -> None:
    """Joins the lists of unreadable images of all shards into one file.

    Raises:
        ValueError: if there are unreadable images and ``lenient`` is False, or a split has no readable images.
    """
    counts, lines, hint = plan.source.counts, list[str](), "" if lenient else ", or leave them out with --lenient"
    for split, count in counts.items():
        of_split = [line for shard in plan.shards(split) for line in plan.left_out(split, shard)]
        hint = f": {split} has no others" if len(of_split) == count else hint
        lines += of_split
    (plan.folder / LEFT_OUT).unlink(missing_ok=True)  # of an interrupted run
    if not lines:
        return
    if not hint:
        write_text(plan.folder / LEFT_OUT, "".join(f"{line}\n" for line in lines))
        return
    for path in plan.folder.glob(".left-out-*"):
        if path.stat().st_size:  # the next run reads these shards again
            path.unlink()
    more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    listed = "\n  ".join([*lines[:_MAX_LISTED], *more])
    no_vectors = "; --no-vectors ignores .npy files" if any("vector" in line for line in lines) else ""
    raise ValueError(
        f"{len(lines)} of {sum(counts.values())} images cannot be read:\n  {listed}\n"
        f"replace or remove them{hint}{no_vectors}"
    )


def _resize(sample: Sample, size: ImageSize) -> Sample | UnreadableSample:
    """Crops and resizes a sample's image. JPEG stays JPEG (quality 95); other formats become PNG, over white."""
    header = parse_image_header(sample.data, name=sample.name)
    if (header.height, header.width) == height_width(size):
        return sample
    try:
        image = decode_image(sample.data, channels=header.channels, name=sample.name)
    except UnreadableImageError as error:
        return UnreadableSample(str(error))
    fitted = fit_image(image, image_size=size, crop=None)
    if header.format == "JPEG":
        return sample._replace(data=encode_jpeg(fitted))
    return sample._replace(data=encode_png(fitted), extension="png")
