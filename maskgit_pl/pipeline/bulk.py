"""``generate_many``: thousands of images in one ``.npz`` file, generated in parts that processes share.

Used by ``maskgit sample --num-images`` and by the evaluation. Image i is a function of its index: it has seed + i, and
its class follows from its place among all images. Any process can therefore generate any part at any time, and a killed
run resumes from the parts on disk. Every part and the file contain the plan of all images. The file has the layout that
evaluators of class-conditional models read: ``arr_0`` (n, H, W, 3) uint8 and ``arr_1`` (n,) int64, not compressed.

Source of the layout: openai/guided-diffusion, ``classifier_sample.py`` and ``evaluations/evaluator.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Required, Unpack

import numpy as np
import numpy.typing as npt
from torch import nn

from maskgit_pl.checks import check_integer, height_width, plain_number
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.files import open_zip, parse_json, size_text, write_atomically
from maskgit_pl.networks.weights import tensors_digest
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.options import Classes, DecodingKeywords, StepCallback, read_options

__all__ = [
    "BulkKeywords",
    "BulkOptions",
    "BulkPlan",
    "BulkResult",
    "check_same",
    "generate_many",
    "is_finished",
    "make_plan",
    "write_samples",
]

_FORMAT, _VERSION = "maskgit_pl.samples", 1
_SEEDS = 2**32  # number of seeds
_LONGEST_COMMENT = 65535  # bytes of the comment of a zip file, which holds the plan
_PLAN = "plan.json"
_CHANNELS = 3  # of an image in the file; evaluators read grey images as RGB
_MAX_ENTRIES = 100  # of the file; it has one for each array
_SPARE = 1 << 20  # bytes reserved for labels, headers and the plan
# Exceptions that reading a damaged part may raise; a damaged zip may seem encrypted or compressed.
_BROKEN = (OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """Options of ``generate_many`` besides the decoding settings.

    Args:
        num_images: Number of images, at least 1.
        classes: Indices or names. The images are spread evenly over them. All classes by default.
        seed: Seed of the first image; image i has seed + i.
        negative_class: Index or name of the class that guidance moves away from; "no class" by default.
        part_size: Number of images of a part, which are in memory at the same time.
        batch_size: Number of images decoded at a time. A resumed run may use another: tokens do not depend on it, and
            pixels differ by rounding only.
        rank: Index of this process in [0, world_size). It generates the parts rank, rank + world_size, ...
        world_size: Number of processes that share the work. They share a folder and need no network.

    Raises:
        ValueError: if a number is out of range.
    """

    num_images: int
    classes: Classes | None = None
    seed: int = 0
    negative_class: int | str | None = None
    part_size: int = 500
    batch_size: int = 100
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_images", "part_size", "batch_size", "world_size", "rank", "seed"):
            least = 0 if name in ("rank", "seed") else 1
            number = check_integer(name, plain_number(getattr(self, name)), f"[{least}, inf)")
            object.__setattr__(self, name, number)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), the world size, got {self.rank}")
        # The last image has the largest seed.
        if self.seed + self.num_images > _SEEDS:
            last = self.seed + self.num_images - 1
            raise ValueError(f"seed must leave room below 2**32 for a seed for each image, got {self.seed} to {last}")


class BulkKeywords(DecodingKeywords, total=False):
    """Keyword arguments of ``generate_many``: the fields of ``BulkOptions``, and decoding settings."""

    num_images: Required[int]
    classes: Classes | None
    seed: int
    negative_class: int | str | None
    part_size: int
    batch_size: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class BulkResult:
    """The result of a call of ``generate_many``.

    Attributes:
        file: Path of the ``.npz`` file.
        made: Number of images that this call generated.
        found: Number of images of this process that existed before the call.
        missing_parts: Number of parts that other processes have not finished; 0 if the file is complete.
    """

    file: Path
    made: int
    found: int
    missing_parts: int


def generate_many(
    pipe: MaskGIT,
    file: Path | str,
    *,
    on_start: Callable[[int, int], object] | None = None,
    on_images: Callable[[int], object] | None = None,
    on_step: StepCallback | None = None,
    **options: Unpack[BulkKeywords],
) -> BulkResult:
    """Generates many images into one file; a second call resumes, or does nothing if the file is complete.

    1. Makes the plan of all images, checks it, and compares it with the plan in the file or in ``FILE.parts``.
    2. Generates the missing parts of this process one by one and writes each to ``FILE.parts``.
    3. The process that finds all parts complete joins them to the file and removes them.

    Example::

        pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
        generate_many(pipe, "samples.npz", num_images=50_000, num_steps=8)

    Args:
        pipe: Model that generates the images.
        file: Path that ends in ``.npz``. The file appears when it is complete.
        on_start: Called before the first image as ``on_start(total, found)``: the number of images of this process, and
            how many of them exist already.
        on_images: Called after each batch with its number of images.
        on_step: Called after each decoding step of each batch.
        options: Fields of ``BulkOptions``, and the decoding settings of ``MaskGIT.generate``.

    Raises:
        ValueError: if a number is out of range, a class is unknown, the file or its parts have another plan, or there
            is too little disk space.
        FileExistsError: if the file is not one of ``generate_many``.
        TypeError: see ``MaskGIT.generate``.
    """
    file = Path(file)
    if file.suffix != ".npz":
        raise ValueError(f"file must end in .npz, got {file}")
    bulk, decoding = read_options(BulkOptions, options, pipe.decoding)
    # 1. The plan, and the check that what is on disk has the same one.
    plan = make_plan(pipe, bulk, decoding)
    work = _Work(file, plan)
    if is_finished(file, plan):
        shutil.rmtree(work.folder, ignore_errors=True)  # left by a run that was killed in step 3
        return BulkResult(file, 0, plan.count, 0)
    work.begin()
    # 2. Parts go to processes in turn: rank r has the parts r, r + world_size, ...
    own = range(bulk.rank, plan.num_parts, bulk.world_size)
    missing = [part for part in own if not work.has(part)]
    found, to_make = (sum(len(plan.rows(part)) for part in parts) for parts in (set(own) - set(missing), missing))
    _log.info("%s: sampling %d images, %d of them exist already", file, found + to_make, found)
    if on_start is not None:
        on_start(found + to_make, found)
    for part in missing:
        batches = _images(
            pipe, plan, decoding, part=part, batch_size=bulk.batch_size, on_images=on_images, on_step=on_step
        )
        work.keep(part, np.concatenate(list(batches)))
    # 3. Joins the parts if no process has any left to do.
    return BulkResult(file, to_make, found, work.finish())


@dataclass(frozen=True)
class BulkPlan:
    """A description of all images. Parts and files carry it, so that images of different plans are never mixed.

    Args:
        count: Number of images, at least 1.
        seed: Seed of the first image.
        part_size: Number of images of a part, at least 1. The last part may have fewer.
        classes: Labels, each at most once. The images are spread evenly over them, class by class.
        negative_class: Label that guidance moves away from; None is "no class".
        decoding: ``DecodingConfig`` in plain values.
        mask_schedule: ``repr`` of the mask schedule of the model.
        image: (H, W, C) of an image.
        tokenizer: SHA-256 of the weights of the tokenizer.
        transformer: SHA-256 of the weights of the transformer.
        negative_model: SHA-256 of the weights of the model that guidance moves away from; None without one.
        accept_rate: Fraction of the candidates that are kept; None without rejection sampling.
        classifier: SHA-256 of the classifier that ranks candidates; None without rejection sampling.
        vectors: SHA-256 of the vectors of the images; None for a model without vectors.

    Raises:
        ValueError: if a class is given twice, or there are too many classes for the file.
    """

    count: int
    seed: int
    part_size: int
    classes: tuple[int, ...]
    negative_class: int | None
    decoding: Mapping[str, Any]
    mask_schedule: str
    image: tuple[int, int, int]
    tokenizer: str
    transformer: str
    negative_model: str | None = None
    accept_rate: float | None = None
    classifier: str | None = None
    vectors: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be different, because the images are spread evenly over them, got one twice")
        if len(self.text) > _LONGEST_COMMENT:
            raise ValueError(f"classes must be fewer for one file, got {len(self.classes)}; write several files")

    @cached_property
    def text(self) -> bytes:
        """The plan as JSON: the content of ``plan.json`` and the comment of the finished file."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}).encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of ``text``, which every part contains."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def num_parts(self) -> int:
        """The number of parts."""
        return -(-self.count // self.part_size)

    @property
    def image_bytes(self) -> int:
        """The number of bytes of an image in a part."""
        return self.image[0] * self.image[1] * self.image[2]

    def rows(self, part: int) -> range:
        """Returns the indices of the images of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.count))

    def label(self, row: int) -> int:
        """Returns the label of an image."""
        # Image i belongs to class floor(i * classes / images): class by class, evenly.
        return self.classes[row * len(self.classes) // self.count]


def make_plan(pipe: MaskGIT, options: BulkOptions, decoding: DecodingConfig) -> BulkPlan:
    """Returns the plan after all checks of its classes and decoding settings."""
    # Everything that changes a pixel is in the plan, so that images of two plans are never mixed.
    classes = range(len(pipe.class_names)) if options.classes is None else options.classes
    labels = pipe.class_ids(classes)
    negative = None if options.negative_class is None else pipe.class_ids(options.negative_class)[0]
    pipe.check_decoding(decoding)
    return BulkPlan(
        count=options.num_images,
        seed=options.seed,
        part_size=options.part_size,
        classes=tuple(labels),
        negative_class=negative,
        decoding=asdict(decoding),
        mask_schedule=repr(pipe.transformer.mask_schedule),
        image=(*height_width(pipe.tokenizer.image_size), pipe.tokenizer.network.config.in_channels),
        tokenizer=_digest(pipe.tokenizer.network),
        transformer=_digest(pipe.transformer.network),
        negative_model=pipe.negative_model.digest
        if pipe.negative_model is not None and any(decoding.scales())
        else None,
        vectors=None if pipe.vector_pool is None else pipe.vector_pool.digest,
    )


def is_finished(file: Path, plan: BulkPlan) -> bool:
    """Returns True if a file exists and holds the images of a plan.

    Raises:
        FileExistsError: if the file was not written by ``generate_many``.
        ValueError: if it holds images of another plan.
    """
    if not file.exists():
        return False
    try:
        with file.open("rb") as stream, open_zip(stream, max_entries=_MAX_ENTRIES) as archive:
            text = archive.comment
    except (OSError, zipfile.BadZipFile):
        text = b""
    known = _read_plan(text)
    if known is None:
        raise FileExistsError(f"{file} exists and was not written by generate_many; delete it, or name another file")
    check_same(file, known, plan)
    return True


def check_same(place: Path, known: Mapping[str, Any], plan: BulkPlan) -> None:
    """Raises if two plans differ, so that their images are not mixed.

    Raises:
        ValueError: if they differ. The message lists each difference as ``key old -> new``.
    """
    # JSON turns tuples into lists, so the new plan is converted too before the comparison.
    old, new = dict(_flat(known)), dict(_flat(json.loads(plan.text)))
    changed = [f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in sorted({*old, *new})
               if old.get(key) != new.get(key)]  # fmt: skip
    if changed:
        raise ValueError(
            f"{place} holds images of other settings: {', '.join(changed)}. Use the same settings, name another file, "
            "or delete it"
        )


def write_samples(
    stream: IO[bytes],
    plan: BulkPlan,
    parts: Iterable[npt.NDArray[np.uint8]],
    labels: npt.NDArray[np.int64],
    **arrays: npt.NDArray[Any],
) -> None:
    """Writes the ``.npz`` file of a plan part by part, with the memory of one part.

    numpy writes an array only as a whole, so the zip members and their headers are written here.

    Args:
        stream: File to write to.
        plan: Plan of the images, which becomes the comment of the file.
        parts: All images, in parts (b, H, W, C) of any size; grey ones are repeated to three channels.
        labels: (n,) int64.
        arrays: Further arrays by name.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (plan.count, *plan.image[:2], _CHANNELS)}
    # An .npz file is a zip archive of .npy files. The plan is its comment, which numpy ignores.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.comment = plan.text
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for images in parts:
                member.write(np.broadcast_to(images, (*images.shape[:3], _CHANNELS)).tobytes())
        for name, values in {"arr_1": labels, **arrays}.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


class _Work:
    """The folder ``FILE.parts`` of the finished parts.

    Args:
        file: File to write in the end.
        plan: Plan of all images.
    """

    def __init__(self, file: Path, plan: BulkPlan) -> None:
        self.file, self.plan = file, plan
        self.folder = file.with_name(f"{file.name}.parts")

    def part(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npz"

    def begin(self) -> None:
        """Makes the folder, or checks that it holds parts of the same plan.

        Raises:
            ValueError: if it holds another plan, there is too little space, or it cannot be written to.
        """
        self._check_space()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {self.folder} ({error}); name another file") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"cannot write to the folder {self.folder}; name another file")
        # Processes that start at the same time write the same plan; the last one stays.
        plan = self.folder / _PLAN
        if not plan.exists():
            with write_atomically(plan) as stream:
                stream.write(self.plan.text)
        known = _read_plan(plan.read_bytes())  # another process may have written it in the meantime
        if known is None:
            raise ValueError(f"{plan} is not a plan of this version; delete {self.folder}")
        check_same(self.folder, known, self.plan)

    def _check_space(self) -> None:
        """Checks the disk space for the missing parts and the file, which exist at the same time until the end."""
        plan = self.plan
        # The file system is that of the nearest existing folder.
        place = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.is_dir())
        missing = sum(len(plan.rows(part)) for part in range(plan.num_parts) if not self.part(part).exists())
        whole = plan.count * plan.image[0] * plan.image[1] * _CHANNELS
        needed = missing * plan.image_bytes + whole + _SPARE
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"{self.file} and its parts need {size_text(needed)} of disk space, {size_text(free)} are free; free "
                "some, or name a file elsewhere"
            )

    def has(self, part: int) -> bool:
        """Returns True if a part exists, is not damaged, and belongs to this plan."""
        path = self.part(part)
        if not path.exists():
            return False
        rows = self.plan.rows(part)
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                known = str(arrays["plan"]) == self.plan.digest
                # Reads all values, with the checksum of each array.
                images, labels = arrays["images"], arrays["labels"]
                known = known and (images.dtype, images.shape) == (np.uint8, (len(rows), *self.plan.image))
                known = known and np.array_equal(labels, self._labels(rows))
        except _BROKEN:
            known = False
        if not known:
            _log.warning("%s: damaged or of another plan; generating it again", path)
        return known

    def _labels(self, rows: range) -> npt.NDArray[np.int64]:
        return np.array([self.plan.label(row) for row in rows], dtype=np.int64)

    def keep(self, part: int, images: npt.NDArray[np.uint8]) -> None:
        labels = self._labels(self.plan.rows(part))
        with write_atomically(self.part(part)) as stream:
            np.savez(stream, images=images, labels=labels, plan=np.array(self.plan.digest))

    def finish(self) -> int:
        """Joins the parts to the file and removes them if all are complete; returns the number of missing parts.

        Two processes that join at the same time write the same bytes. The slower one finds the file complete.
        """
        parts = range(self.plan.num_parts)
        # Parts are read only when all of them exist, so that not every process reads all images.
        missing = sum(not self.part(part).exists() for part in parts) or sum(not self.has(part) for part in parts)
        if missing == 0:
            try:
                self._put_together()
            except FileNotFoundError:  # another process has joined and removed the parts
                missing = 1
        if missing and not is_finished(self.file, self.plan):  # False if another process has written the file
            return missing
        shutil.rmtree(self.folder, ignore_errors=True)
        return 0

    def _put_together(self) -> None:
        plan = self.plan
        labels = self._labels(range(plan.count))
        with write_atomically(self.file, partial_in=self.folder) as stream:
            write_samples(stream, plan, map(self._read, range(plan.num_parts)), labels)

    def _read(self, part: int) -> npt.NDArray[np.uint8]:
        with np.load(self.part(part), allow_pickle=False) as arrays:
            images: npt.NDArray[np.uint8] = arrays["images"]
        return images


def _images(
    pipe: MaskGIT,
    plan: BulkPlan,
    decoding: DecodingConfig,
    *,
    part: int,
    batch_size: int,
    on_images: Callable[[int], object] | None,
    on_step: StepCallback | None,
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields the images of a part batch by batch, (b, H, W, C) uint8."""
    rows = plan.rows(part)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        yield pipe.generate(
            [_class(pipe, plan.label(row)) for row in batch],
            seed=plan.seed + batch[0],
            negative_classes=plan.negative_class,
            batch_size=len(batch),
            output_type="np",
            callback=on_step,
            decoding=decoding,
        )
        if on_images is not None:
            on_images(len(batch))


def _class(pipe: MaskGIT, label: int) -> int | None:
    """Returns the class of a label for ``generate``, which takes None for the null class."""
    return None if label == len(pipe.class_names) else label


def _digest(network: nn.Module) -> str:
    """Returns the SHA-256 of the weights of a network in their dtype."""
    return tensors_digest(network.state_dict().items())


def _read_plan(text: bytes) -> dict[str, Any] | None:
    """Parses a plan of this version; returns None for any other text."""
    try:
        content = parse_json(text, "plan")
    except ValueError:
        return None
    if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        return None
    return content


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:24]}..."
