"""Thousands of images in one file, made in parts that several processes share and that a killed run resumes from.

Every image is a function of its index: image i has seed + i and the class that its place among all images gives it. So
parts can be made in any order, by any process, again and again. The file is what evaluators of class-conditional models
read: ``arr_0`` (n, H, W, 3) uint8 and ``arr_1`` (n,) int64, not compressed.

Source of the layout: openai/guided-diffusion, ``classifier_sample.py`` and ``evaluations/evaluator.py``.
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.files import write_atomically
from maskgit_pl.networks.int8 import Int8Linear
from maskgit_pl.networks.weight_file import tensors_digest
from maskgit_pl.old_names import restore_tensor
from maskgit_pl.pipeline.bulk_plan import BulkOptions, BulkPlan, check_same, read_plan
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.options import StepCallback, read_options

__all__ = ["BulkOptions", "BulkResult", "generate_many", "is_finished"]

_PLAN = "plan.json"
_CHANNELS = 3  # in the file, grey or not
_SPARE = 1 << 20  # labels, headers and the plan
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkResult:
    """The result of a call of ``generate_many``.

    Attributes:
        file: The file.
        made: Number of images that this call generated.
        found: Number of images of this process's share that were there before.
        missing_parts: Number of parts that other processes have yet to make; 0 if the file is complete.
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
    **options: Any,
) -> BulkResult:
    """Generates many images into one file; a second call resumes, or does nothing if the file is complete.

    1. The plan of all images is made, checked, and compared with that of the file or of its parts.
    2. Complete parts lie in ``FILE.parts``; those of this process that are missing are generated, one after the other.
    3. The process that finds all parts puts them together and removes them.

    Example::

        pipe = MaskGIT.from_pretrained("runs/demo/pretrained")
        generate_many(pipe, "samples.npz", num_images=50_000, num_steps=8)

    Args:
        pipe: The model.
        file: ``.npz``; it appears when it is complete.
        on_start: Called before the first image with the number of images of this process, and of those that are there.
        on_images: Called after each batch with the number of its images.
        on_step: Called after each decoding step of each batch.
        options: Fields of ``BulkOptions``, and settings of decoding as ``MaskGIT.generate`` takes them.

    Raises:
        ValueError: if a number is out of range, a class is unknown, parts or a file are of another plan, or there is
            too little space.
        FileExistsError: if the file holds something else.
        TypeError: as ``MaskGIT.generate``.
    """
    file = Path(file)
    if file.suffix != ".npz":
        raise ValueError(f"file {file}: a name that ends in .npz is needed")
    bulk, decoding = read_options(BulkOptions, options, pipe.decoding)
    plan = _plan(pipe, bulk, decoding)  # 1
    work = _Work(file, plan)
    if is_finished(file, plan):
        shutil.rmtree(work.folder, ignore_errors=True)  # of a run that was killed before it could
        return BulkResult(file, 0, plan.count, 0)
    work.begin()
    own = range(bulk.rank, plan.num_parts, bulk.world_size)
    missing = [part for part in own if not work.has(part)]
    found, to_make = (sum(len(plan.rows(part)) for part in parts) for parts in (set(own) - set(missing), missing))
    _log.info("%s: sampling %d images, %d of them are there", file, found + to_make, found)
    if on_start is not None:
        on_start(found + to_make, found)
    for part in missing:  # 2
        batches = _images(
            pipe, plan, decoding, part=part, batch_size=bulk.batch_size, on_images=on_images, on_step=on_step
        )
        work.keep(part, np.concatenate(list(batches)))
    return BulkResult(file, to_make, found, work.finish())  # 3


def is_finished(file: Path, plan: BulkPlan) -> bool:
    """Returns whether a file is there and holds the images of a plan.

    Raises:
        FileExistsError: if something else is there.
        ValueError: if it holds images of another plan.
    """
    if not file.exists():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            text = archive.comment
    except (OSError, zipfile.BadZipFile):
        text = b""
    known = read_plan(text)
    if known is None:
        raise FileExistsError(f"{file}: something else is there; name another file, or take it away")
    check_same(file, known, plan)
    return True


def _plan(pipe: MaskGIT, options: BulkOptions, decoding: DecodingConfig) -> BulkPlan:
    """Returns the plan, after everything in it that a decoder could refuse."""
    classes = range(len(pipe.class_names)) if options.classes is None else options.classes
    labels = pipe.class_ids(classes)
    negative = None if options.negative_class is None else pipe.class_ids(options.negative_class)[0]
    pipe.check_decoding(decoding)
    size = pipe.tokenizer.image_size
    return BulkPlan(
        count=options.num_images,
        seed=options.seed,
        part_size=options.part_size,
        classes=tuple(labels),
        negative_class=negative,
        decoding=asdict(decoding),
        mask_schedule=repr(pipe.transformer.mask_schedule),
        image=(size, size, pipe.tokenizer.network.config.in_channels),
        tokenizer=_digest(pipe.tokenizer.network),
        transformer=_digest(pipe.transformer.network),
    )


def _digest(network: nn.Module) -> str:
    """Returns the sha256 of a network's weights in their own type."""
    return tensors_digest(_weights(network))


def _weights(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((restore_tensor(name), tensor) for name, tensor in network.state_dict().items())
    for name, module in network.named_modules():
        if isinstance(module, Int8Linear):  # it has no state dict; its sums tell its weights
            yield f"{name}.int8", torch.stack([module.scales, module.row_sums, module.bias])


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
    """Yields the images of a part, batch by batch: (b, H, W, C) uint8."""
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
    """Returns a label as ``generate`` takes it: the null class is None."""
    return None if label == len(pipe.class_names) else label


class _Work:
    """The folder of parts beside the file."""

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
            raise ValueError(f"{self.folder}: no such folder can be made ({error}); name another file") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"{self.folder}: it cannot be written to; name another file")
        plan = self.folder / _PLAN
        if not plan.exists():
            with write_atomically(plan) as stream:
                stream.write(self.plan.text)
        known = read_plan(plan.read_bytes())  # perhaps another process's, written at the same time
        if known is None:
            raise ValueError(f"{plan}: it is no plan of this version; take {self.folder} away")
        check_same(self.folder, known, self.plan)

    def _check_space(self) -> None:
        """Checks the room for the missing parts and the file; parts are removed when the file is there."""
        plan = self.plan
        place = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.is_dir())
        missing = sum(len(plan.rows(part)) for part in range(plan.num_parts) if not self.part(part).exists())
        whole = plan.count * plan.image[0] * plan.image[1] * _CHANNELS
        needed = missing * plan.image_bytes + whole + _SPARE
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"{self.file}: {needed} bytes of space are needed, for parts and the file, got {free} free; make room, "
                "or name a file elsewhere"
            )

    def has(self, part: int) -> bool:
        """Returns whether a part is there, whole, and one of this plan."""
        path = self.part(part)
        if not path.exists():
            return False
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                known = str(arrays["plan"]) == self.plan.digest
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            known = False
        if not known:
            _log.warning("%s: not whole, or not of this plan; it is made again", path)
        return known

    def keep(self, part: int, images: npt.NDArray[np.uint8]) -> None:
        labels = np.array([self.plan.label(row) for row in self.plan.rows(part)], dtype=np.int64)
        with write_atomically(self.part(part)) as stream:
            np.savez(stream, images=images, labels=labels, plan=np.array(self.plan.digest))

    def finish(self) -> int:
        """Puts the file together once all parts are there, and removes them; returns the number of missing parts.

        Two processes that do so at once write the same bytes; the slower one finds that nothing is left to do.
        """
        missing = sum(not self.has(part) for part in range(self.plan.num_parts))
        if missing == 0:
            try:
                self._put_together()
            except FileNotFoundError:
                missing = 1
        if missing and not is_finished(self.file, self.plan):  # else another process was quicker
            return missing
        shutil.rmtree(self.folder, ignore_errors=True)
        return 0

    def _put_together(self) -> None:
        with write_atomically(self.file, partial_in=self.folder) as stream:
            self._write(stream)

    def _write(self, stream: IO[bytes]) -> None:
        """Writes part by part, so that it takes the memory of one."""
        plan = self.plan
        labels = np.array([plan.label(row) for row in range(plan.count)], dtype=np.int64)
        header = {"descr": "|u1", "fortran_order": False, "shape": (plan.count, *plan.image[:2], _CHANNELS)}
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.comment = plan.text
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in range(plan.num_parts):
                    with np.load(self.part(part), allow_pickle=False) as arrays:
                        images = arrays["images"]
                    grey = plan.image[2] == 1
                    member.write((np.repeat(images, _CHANNELS, axis=-1) if grey else images).tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)
