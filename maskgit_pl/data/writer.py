"""Makes a data folder from a source: shards, manifests and a record of the source.

Used by ``maskgit data make`` and ``fetch``; see ``make_shards``. ``webdataset`` writes the
shards, whose bytes do not depend on interruptions or on the number of workers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

from maskgit_pl.checks import ImageSize, check_image_size, check_integer, height_width, plain_size
from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.data.images import decode_image, encode_jpeg, encode_png, fit_image, parse_image_header
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import Split, load_manifests, splits_of
from maskgit_pl.data.samples import Sample, Source, UnreadableSample
from maskgit_pl.files import read_json, remove_partials, write_atomically, write_text
from maskgit_pl.folders import has_content, replace_folder, resolve_folder
from maskgit_pl.processes import choose_workers, run_jobs
from maskgit_pl.text import printable

_Job: TypeAlias = tuple[Split, int]  # split and number of a shard

RECORD = "made_from.json"
_MAX_RECORD_BYTES = 100_000_000  # a record lists the class names
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
        on_samples: Called with the split and the number of samples of each finished shard (for a progress bar).

    Returns:
        False if the folder already holds the result, True if it was written.
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
            f"{RECORD}); give another --out (of demo: --dataset), or remove it"
        )
    partial = _partial_folder(folder, record)
    plan = _Plan(source, partial, size, shard_size)
    done = [job for job in plan.jobs() if plan.is_done(job, lenient=lenient)]
    for job in done:
        on_samples(job[0], len(plan.places(job)))
    missing = [job for job in plan.jobs() if job not in done]
    for job, _ in run_jobs(_write_job, plan, missing, workers=workers):  # 2.
        on_samples(job[0], len(plan.places(job)))
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
    from webdataset import TarWriter  # imports torch

    with TarWriter(stream, mtime=0, user="", group="") as writer:
        for number, sample in enumerate(samples, first_key):
            # webdataset writes bytes as they are.
            writer.write({"__key__": f"{number:08d}", sample.extension: sample.data, "cls": sample.label})


@dataclass(frozen=True)
class _Plan:
    """The settings of all shards of a data folder."""

    source: Source
    folder: Path
    size: ImageSize | None
    shard_size: int

    def jobs(self) -> list[_Job]:
        """Returns all shards, those of train first."""
        counts = self.source.counts
        return [(split, shard) for split in counts for shard in range(-(-counts[split] // self.shard_size))]

    def places(self, job: _Job) -> range:
        """Returns the places of a shard's samples in the split's order."""
        split, shard = job
        return range(self.source.counts[split])[shard * self.shard_size : (shard + 1) * self.shard_size]

    def path(self, job: _Job) -> Path:
        """Returns the path of a complete shard."""
        return self.folder / "{}-{:06d}.tar".format(*job)

    def left_out(self, job: _Job) -> Path:
        """Returns the path of the temporary list of a shard's unreadable images, which exists if there are any."""
        return self.folder / ".left-out-{}-{:06d}".format(*job)

    def is_done(self, job: _Job, *, lenient: bool) -> bool:
        """Returns whether a shard is on disk. Unreadable images may have been replaced, unless they are left out."""
        return self.path(job).exists() and (lenient or not self.left_out(job).exists())


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
        return read_json(folder / RECORD, max_bytes=_MAX_RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _write_job(plan: _Plan, job: _Job) -> None:
    """Writes one shard; the list of its unreadable images is on disk before the shard has its name."""
    plan.path(job).unlink(missing_ok=True)  # of an earlier run, with other unreadable images
    left_out: list[str] = []
    samples = _read_samples(plan, job, left_out)
    if (first := next(samples, None)) is None:  # a shard without readable images does not become a file
        _write_lines(plan.left_out(job), left_out)
        return
    with write_atomically(plan.path(job)) as stream:
        write_shard(chain([first], samples), stream, first_key=job[1] * plan.shard_size)
        _write_lines(plan.left_out(job), left_out)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes a text file; without lines, there is none."""
    if lines:
        write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)


def _read_samples(plan: _Plan, job: _Job, left_out: list[str]) -> Iterator[Sample]:
    """Yields the readable samples of a shard, resized if ``plan.size`` is given; adds the others to ``left_out``."""
    for sample in plan.source.samples(job[0], plan.places(job)):
        result = sample if isinstance(sample, UnreadableSample) or plan.size is None else _resize(sample, plan.size)
        if isinstance(result, Sample):
            yield result
        else:
            left_out.append(result.error)


def _list_left_out(plan: _Plan, *, lenient: bool) -> None:
    """Joins the lists of unreadable images of all shards into one file."""
    jobs = plan.jobs()
    paths = [path for job in jobs if (path := plan.left_out(job)).exists()]
    lines = [line for path in paths for line in path.read_bytes().decode().split("\n")[:-1]]
    made = {split for split, shard in jobs if plan.path((split, shard)).exists()}
    empty = [split for split in plan.source.counts if split not in made]
    if not lines or (lenient and not empty):
        _write_lines(plan.folder / LEFT_OUT, lines)
        return
    hint = f": {empty[0]} has no others" if empty else ", or leave them out with --lenient"
    more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    listed = "\n  ".join([*lines[:_MAX_LISTED], *more])
    raise ValueError(
        f"{len(lines)} of {sum(plan.source.counts.values())} images cannot be read:\n  {listed}\n"
        f"replace or remove them{hint}"
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
