"""Thousands of images into one file, in parts that several processes share and that a killed run goes on from.

Every image is a function of its index: image i has seed + i and the class that its place among all images gives it. So
parts can be made in any order, by any process, again and again. The file is what evaluators of class-conditional models
read: ``arr_0`` (n, H, W, 3) uint8 and ``arr_1`` (n,) int64, not compressed.

Source of the layout: openai/guided-diffusion, ``classifier_sample.py`` and ``evaluations/evaluator.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import Unpack

from maskgit_pl.files import write_atomically
from maskgit_pl.networks.int8 import Int8Linear
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.options import Classes, DecodingSettings

__all__ = ["BulkPlan", "BulkResult", "finished", "generate_many"]

_FORMAT, _VERSION = "maskgit_pl.samples", 1
_PLAN = "plan.json"
_SEEDS = 2**32
_LONGEST_COMMENT = 65535  # of a zip file
_CHANNELS = 3  # in the file, grey or not
_SPARE = 1 << 20  # labels, headers and the plan
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkPlan:
    """What all images are, so that a part is never taken for one of other images.

    Args:
        count: Images, at least 1.
        seed: Of the first one.
        part_size: Images of a part, at least 1; the last one may have fewer.
        classes: Labels, each at most once; the images are spread over them evenly, class by class.
        negative_class: The label that guidance pushes away from; None is "no class".
        decoding: As ``DecodingConfig`` in plain values.
        mask_schedule: That of the model.
        image: Height, width and channels.
        tokenizer: Digest of its weights.
        transformer: Likewise.

    Raises:
        ValueError: A number out of range.
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

    def __post_init__(self) -> None:
        for name in ("count", "part_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1 is needed, got {getattr(self, name)}")
        if self.seed < 0 or self.seed + self.count > _SEEDS:
            raise ValueError(
                f"seed: seeds in [0, 2**32) are needed, got {self.seed} to {self.seed + self.count - 1}; begin lower"
            )
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: each at most once, since images are spread evenly, got one several times")
        if len(self.text) > _LONGEST_COMMENT:
            raise ValueError(f"classes: fewer are needed, got {len(self.classes)}; make several files")

    @cached_property
    def text(self) -> bytes:
        """As JSON: the content of ``plan.json``, and the comment of the finished file."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}).encode()

    @property
    def digest(self) -> str:
        """Names the plan in each of its parts."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def num_parts(self) -> int:
        """Parts of the whole."""
        return -(-self.count // self.part_size)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image in a part."""
        return self.image[0] * self.image[1] * self.image[2]

    def rows(self, part: int) -> range:
        """The images of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.count))

    def label(self, row: int) -> int:
        """The class of an image."""
        return self.classes[row * len(self.classes) // self.count]


@dataclass(frozen=True)
class BulkResult:
    """What a call of ``generate_many`` did.

    Attributes:
        file: The file.
        made: Images that this call generated.
        found: Images of this process's share that were there before.
        missing_parts: Parts that other processes are still to make; 0 where the file is complete.
    """

    file: Path
    made: int
    found: int
    missing_parts: int


def generate_many(
    pipe: MaskGIT,
    file: Path | str,
    *,
    count: int,
    classes: Classes | None = None,
    seed: int = 0,
    negative_class: int | str | None = None,
    part_size: int = 500,
    batch_size: int = 100,
    rank: int = 0,
    world_size: int = 1,
    on_start: Callable[[int, int], object] | None = None,
    on_images: Callable[[int], object] | None = None,
    **settings: Unpack[DecodingSettings],
) -> BulkResult:
    """Generates many images into one file; called again it goes on, and does nothing where the file is complete.

    Complete parts lie in ``FILE.parts`` until all are there. Whichever process finds that puts them together.

    Example::

        pipe = MaskGIT.from_pretrained("runs/demo/pretrained")
        generate_many(pipe, "samples.npz", count=50_000, num_steps=8)

    Args:
        pipe: The model.
        file: ``.npz``; it appears when it is complete.
        count: Images.
        classes: Ids or names, over which the images are spread evenly; all classes by default.
        seed: Image i has seed + i.
        negative_class: What guidance pushes away from, an id or a name; by default "no class".
        part_size: Images of a part, which are in memory at once.
        batch_size: Images decoded at a time. It may change on the way: tokens do not depend on it, pixels up to
            rounding.
        rank: This process's number: it makes the parts rank, rank + world_size, ...
        world_size: How many processes share the work. No connection between them is needed, only the folder.
        on_start: Called before the first image with how many images this process has, and how many are there already.
        on_images: Called with how many images were made.
        settings: As of ``MaskGIT.generate``.

    Raises:
        ValueError: A number out of range, an unknown class, parts or a file of another plan, or too little space.
        FileExistsError: The file holds something else.
        TypeError: As of ``MaskGIT.generate``.
    """
    file = Path(file)
    _check_call(file, batch_size=batch_size, rank=rank, world_size=world_size)
    labels = pipe.class_ids(range(len(pipe.class_names)) if classes is None else classes)
    negative = None if negative_class is None else pipe.class_ids([negative_class])[0]
    plan = _plan(pipe, labels, negative, count=count, seed=seed, part_size=part_size, settings=settings)
    work = _Work(file, plan)
    if finished(file, plan):
        shutil.rmtree(work.folder, ignore_errors=True)  # of a run that was killed before it could
        return BulkResult(file, 0, count, 0)
    work.begin()
    own = range(rank, plan.num_parts, world_size)
    missing = [part for part in own if not work.has(part)]
    found, to_make = (sum(len(plan.rows(part)) for part in parts) for parts in (set(own) - set(missing), missing))
    if on_start is not None:
        on_start(found + to_make, found)
    for part in missing:
        images = np.concatenate(list(_images(pipe, plan, part, batch_size, on_images, settings)))
        work.keep(part, images)
    return BulkResult(file, to_make, found, work.finish())


def finished(file: Path, plan: BulkPlan) -> bool:
    """Whether a file is there and holds the images of a plan.

    Raises:
        FileExistsError: Something else is there.
        ValueError: Images of another plan.
    """
    if not file.exists():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            text = archive.comment
    except (OSError, zipfile.BadZipFile):
        text = b""
    known = _read_plan(text)
    if known is None:
        raise FileExistsError(f"{file}: something else is there; name another file, or take it away")
    _check_same(file, known, plan)
    return True


def _check_call(file: Path, *, batch_size: int, rank: int, world_size: int) -> None:
    if file.suffix != ".npz":
        raise ValueError(f"file {file}: a name that ends in .npz is needed")
    if batch_size < 1:
        raise ValueError(f"batch_size: at least 1 is needed, got {batch_size}")
    if world_size < 1:
        raise ValueError(f"world_size: at least 1 is needed, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: a number in [0, {world_size}) is needed, the world's size, got {rank}")


def _plan(
    pipe: MaskGIT,
    labels: list[int],
    negative: int | None,
    *,
    count: int,
    seed: int,
    part_size: int,
    settings: DecodingSettings,
) -> BulkPlan:
    """The plan, with everything in it that a decoder could refuse."""
    decoding = pipe.decoding_with(**settings)
    pipe.check_decoding(decoding)
    size = pipe.tokenizer.image_size
    return BulkPlan(
        count=count,
        seed=seed,
        part_size=part_size,
        classes=tuple(labels),
        negative_class=negative,
        decoding=asdict(decoding),
        mask_schedule=repr(pipe.transformer.mask_schedule),
        image=(size, size, pipe.tokenizer.network.config.in_channels),
        tokenizer=_digest(pipe.tokenizer.network),
        transformer=_digest(pipe.transformer.network),
    )


def _digest(network: nn.Module) -> str:
    """sha256 of a network's weights as they are, in whatever type."""
    digest = hashlib.sha256()
    for name, tensor in _weights(network):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from network.state_dict().items()
    for name, module in network.named_modules():
        if isinstance(module, Int8Linear):  # it has no state dict; its sums tell its weights
            yield f"{name}.int8", torch.stack([module.scales, module.row_sums, module.bias])


def _images(
    pipe: MaskGIT,
    plan: BulkPlan,
    part: int,
    batch_size: int,
    on_images: Callable[[int], object] | None,
    settings: DecodingSettings,
) -> Iterator[npt.NDArray[np.uint8]]:
    """The images of a part, batch by batch: (b, H, W, C) uint8."""
    rows = plan.rows(part)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        yield pipe.generate(
            [_class(pipe, plan.label(row)) for row in batch],
            seed=plan.seed + batch[0],
            negative_classes=plan.negative_class,
            batch_size=len(batch),
            output_type="np",
            **settings,
        )
        if on_images is not None:
            on_images(len(batch))


def _class(pipe: MaskGIT, label: int) -> int | None:
    """A label as ``generate`` takes it: the null class is None."""
    return None if label == len(pipe.class_names) else label


class _Work:
    """The folder of parts beside the file."""

    def __init__(self, file: Path, plan: BulkPlan) -> None:
        self.file, self.plan = file, plan
        self.folder = file.with_name(f"{file.name}.parts")

    def part(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npz"

    def begin(self) -> None:
        """Makes the folder, or finds in it the plan that is to be followed.

        Raises:
            ValueError: Another plan, too little space, or no folder that can be written to.
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
        known = _read_plan(plan.read_bytes())  # perhaps another process's, written at the same time
        if known is None:
            raise ValueError(f"{plan}: it is no plan of this version; take {self.folder} away")
        _check_same(self.folder, known, self.plan)

    def _check_space(self) -> None:
        """Room for the parts that are missing and for the file; parts go when the file is there."""
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
        """Whether a part is there, whole, and one of this plan."""
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
        """Puts the file together once all parts are there, and takes them away; how many are missing.

        Two processes that do so at once write the same bytes; the slower one finds that nothing is left to do.
        """
        missing = sum(not self.has(part) for part in range(self.plan.num_parts))
        if missing == 0:
            try:
                self._put_together()
            except FileNotFoundError:
                missing = 1
        if missing and not finished(self.file, self.plan):  # else another process was quicker
            return missing
        shutil.rmtree(self.folder, ignore_errors=True)
        return 0

    def _put_together(self) -> None:
        whole = self.folder / f"whole-{os.getpid()}.npz"
        with write_atomically(whole) as stream:
            self._write(stream)
        whole.replace(self.file)

    def _write(self, stream: IO[bytes]) -> None:
        """Part by part, so that it takes the memory of one."""
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


def _read_plan(text: bytes) -> dict[str, Any] | None:
    """A plan of this version; None where it is something else."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    known = isinstance(content, dict) and (content.get("format"), content.get("version")) == (_FORMAT, _VERSION)
    return content if known else None


def _check_same(place: Path, known: Mapping[str, Any], plan: BulkPlan) -> None:
    """Refuses to go on with other images.

    Raises:
        ValueError: What differs, as ``key old -> new``.
    """
    old, new = dict(_flat(known)), dict(_flat(json.loads(plan.text)))
    changed = [f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in sorted({*old, *new})
               if old.get(key) != new.get(key)]  # fmt: skip
    if changed:
        raise ValueError(
            f"{place}: it holds other images, got {', '.join(changed)}; set them back, name another file, or take it "
            "away"
        )


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:24]}..."
