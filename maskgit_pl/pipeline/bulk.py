"""``generate_many``: thousands of images in one ``.npz`` file, which several processes may share.

Used by ``maskgit sample --num-images`` and by the evaluation. Image i is a function of its index: it has seed + i, and
its class follows from its place among all images. The file has the layout that evaluators of class-conditional models
read: ``arr_0`` (n, H, W, 3) uint8 and ``arr_1`` (n,) int64, not compressed. The comment of the zip archive is its plan.

Source of the layout: openai/guided-diffusion, ``classifier_sample.py`` and ``evaluations/evaluator.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from maskgit_pl.checks import check_integer, height_width
from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.files import parse_json, remove_partials, write_atomically
from maskgit_pl.networks.weights import tensors_digest
from maskgit_pl.pipeline.card import flatten
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.text import shorten, size_text

_FORMAT = "maskgit_pl.samples"
_SEEDS = 2**32  # number of seeds
_LONGEST_COMMENT = 65535  # bytes of the comment of a zip file, which holds the plan
_CHUNK = 1 << 24  # bytes of a part that are copied at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """The images of ``generate_many``.

    Args:
        num_images: Number of images, at least 1.
        classes: Indices or names. The images are spread evenly over them. All classes by default.
        seed: Seed of the first image; image i has seed + i.
        negative_class: Index or name of the class that guidance moves away from; "no class" by default.
        batch_size: Number of images that are decoded, and in memory, at a time. Tokens do not depend on it,
            and pixels differ by rounding only.
        rank: Index of this process in [0, world_size).
        world_size: Number of processes that share the work. They share a folder and need no network.
        decoding: Decoding settings; by default those of the model.
        keep_tokens: True to write the tokens into a new file, too: ``tokens``, (n, N) int32.
    """

    num_images: int
    classes: Sequence[int | str | None] | None = None
    seed: int = 0
    negative_class: int | str | None = None
    batch_size: int = 100
    rank: int = 0
    world_size: int = 1
    decoding: DecodingConfig | None = None
    keep_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "world_size"):
            check_integer(name, getattr(self, name), "[1, inf)")
        check_integer("rank", self.rank, f"[0, {self.world_size})")
        check_integer("seed", self.seed, f"[0, {_SEEDS - self.num_images}]")  # the last image has the largest seed


@dataclass(frozen=True)
class BulkResult:
    """The result of a call of ``generate_many``.

    Attributes:
        made: Number of images that this call generated; 0 if they existed already.
        missing_parts: Number of processes that have not finished; 0 if the file is complete.
    """

    made: int
    missing_parts: int = 0


@dataclass(frozen=True)
class BulkPlan:
    """Everything that changes a pixel of a file, so that images of two plans are never mixed.

    Args:
        count: Number of images, at least 1.
        seed: Seed of the first image.
        classes: Labels, each at most once. The images are spread evenly over them, class by class.
        negative_class: Label that guidance moves away from; None is "no class".
        decoding: ``DecodingConfig`` in plain values.
        mask_schedule: ``repr`` of the mask schedule of the model.
        image: (H, W, C) of an image.
        tokenizer, transformer, negative_model: SHA-256 of the weights of each; None without a negative model.
        accept_rate: Fraction of the candidates that are kept; None without rejection sampling.
        classifier: Digest of the classifier, or judge, that ranks candidates; None without rejection sampling.
    """

    count: int
    seed: int
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

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be different, because the images are spread evenly over them, got one twice")
        if len(self.text) > _LONGEST_COMMENT:
            raise ValueError(f"classes must be fewer for one file, got {len(self.classes)}; write several files")

    @cached_property
    def text(self) -> bytes:
        """The plan as JSON, the comment of the file."""
        return json.dumps({"format": _FORMAT, **asdict(self)}).encode()

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The label of each image, (count,): that of image i is number floor(i * classes / images)."""
        return np.array(self.classes, dtype=np.int64)[np.arange(self.count) * len(self.classes) // self.count]


def generate_many(
    pipe: MaskGIT,
    file: Path | str,
    options: BulkOptions,
    *,
    on_images: Callable[[int], object] = lambda count: None,
) -> BulkResult:
    """Generates many images into one file, or does nothing if the file holds them already.

    A single process writes the file. Of several, each writes its part to ``FILE.parts``, and the one that finds all
    parts there joins them. A stopped process starts over; finished parts of the same settings are used.

    Example::

        pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
        generate_many(pipe, "samples.npz", BulkOptions(num_images=50_000, decoding=pipe.decoding_with(num_steps=8)))

    Args:
        pipe: Model that generates the images.
        file: Path that ends in ``.npz``. The file appears when it is complete.
        options: The images, and the share of this process.
        on_images: Called after each batch with its number of images.
    """
    file = Path(file)
    if file.suffix != ".npz":
        raise ValueError(f"file must end in .npz, got {file}")
    plan = make_plan(pipe, options)
    if is_finished(file, plan):
        return BulkResult(0)
    identity = plan.text + (b"tokens" if options.keep_tokens else b"")
    folder, digest = file.with_name(f"{file.name}.parts"), hashlib.sha256(identity).hexdigest()[:16]
    parts = [folder / f"{digest}-{rank}-of-{options.world_size}" for rank in range(options.world_size)]
    if parts[options.rank].exists():
        return BulkResult(0, _join(file, plan, parts, options))
    rows = range(*(plan.count * rank // options.world_size for rank in (options.rank, options.rank + 1)))
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder, parts[options.rank].name)
    needed, free = len(rows) * plan.image[0] * plan.image[1] * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{file} needs {size_text(needed)} of disk space, {size_text(free)} are free; free some, or "
                         "name a file elsewhere")  # fmt: skip
    _log.info("%s: sampling %d images", file, len(rows))
    arrays = {}
    if options.keep_tokens:  # they are filled in with the images, which are written first
        arrays["tokens"] = np.empty((len(rows), pipe.transformer.network.config.num_tokens), np.int32)
    images = _generate(pipe, plan, options, rows, arrays.get("tokens"), on_images=on_images)
    if options.world_size == 1:
        with write_atomically(file) as stream:
            write_samples(stream, plan, images, plan.labels, **arrays)
        _remove_parts(file, folder)
        return BulkResult(len(rows))
    with write_atomically(parts[options.rank]) as stream:
        stream.writelines(images)
        for tokens in arrays.values():  # complete before the part appears
            np.save(_tokens_of(parts[options.rank]), tokens)
    return BulkResult(len(rows), _join(file, plan, parts, options))


def make_plan(pipe: MaskGIT, options: BulkOptions) -> BulkPlan:
    """Returns the plan after all checks of its classes and decoding settings."""
    labels = pipe.classes.labels(range(len(pipe.class_names)) if options.classes is None else options.classes)
    decoding = options.decoding or pipe.decoding
    negative_model = pipe.negative_model if any(decoding.scales()) else None
    pipe.check_decoding(decoding)
    return BulkPlan(
        count=options.num_images,
        seed=options.seed,
        classes=tuple(labels),
        negative_class=None if options.negative_class is None else pipe.classes.labels(options.negative_class)[0],
        decoding=asdict(decoding),
        mask_schedule=repr(pipe.transformer.mask_schedule),
        image=(*height_width(pipe.tokenizer.image_size), pipe.tokenizer.channels),
        tokenizer=tensors_digest(pipe.tokenizer.network.state_dict().items()),
        transformer=tensors_digest(pipe.transformer.network.state_dict().items()),
        negative_model=None if negative_model is None else negative_model.digest,
    )


def is_finished(file: Path, plan: BulkPlan) -> bool:
    """Returns True if a file exists and holds the images of a plan."""
    if not file.exists():
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            old = parse_json(archive.comment, "plan")
    except (ValueError, zipfile.BadZipFile):
        old = {}
    if old.get("format") != _FORMAT:
        raise FileExistsError(f"{file} exists and was not written by generate_many; delete it, or name another file")
    # JSON turns tuples into lists, so the new plan is converted too before the comparison.
    before, now = dict(flatten(old)), dict(flatten(json.loads(plan.text)))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if keys:
        changes = ", ".join(f"{key} {shorten(before.get(key))} -> {shorten(now.get(key))}" for key in keys)
        raise ValueError(
            f"{file} holds images of other settings: {changes}. Use the same settings, name another file, or delete it"
        )
    return True


def write_samples(
    stream: IO[bytes],
    plan: BulkPlan,
    images: Iterable[Buffer],
    labels: npt.NDArray[np.int64],
    **arrays: npt.NDArray[Any],
) -> None:
    """Writes the ``.npz`` file of a plan piece by piece; numpy writes an array only as a whole.

    Args:
        stream: File to write to.
        plan: Plan of the images, which becomes the comment of the zip archive. numpy ignores it.
        images: Pixels of all images in pieces of any size, (b, H, W, 3) uint8 or their bytes.
        labels: (n,) int64.
        arrays: Further arrays by name.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (plan.count, *plan.image[:2], 3)}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.comment = plan.text
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            member.writelines(images)
        for name, values in {"arr_1": labels, **arrays}.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _generate(
    pipe: MaskGIT,
    plan: BulkPlan,
    options: BulkOptions,
    rows: range,
    tokens: npt.NDArray[np.int32] | None,
    *,
    on_images: Callable[[int], object],
) -> Iterator[bytes]:
    """Yields the pixels of a range of images batch by batch; grey ones are repeated to three channels.

    Writes their tokens into the rows of ``tokens``, unless it is None.
    """
    labels, steps = plan.labels.tolist(), deque[DecodingStep](maxlen=1)
    for first in range(rows.start, rows.stop, options.batch_size):
        batch = labels[first : min(first + options.batch_size, rows.stop)]
        images = pipe.generate(
            # ``generate`` takes None for the null class.
            [label if label < len(pipe.class_names) else None for label in batch],
            seed=plan.seed + first,
            negative_class=plan.negative_class,
            batch_size=options.batch_size,
            output_type="np",
            decoding=options.decoding,
            callback=None if tokens is None else steps.append,
        )
        if tokens is not None:
            tokens[first - rows.start :][: len(batch)] = steps[-1].tokens.numpy(force=True)
        yield np.broadcast_to(images, (*images.shape[:3], 3)).tobytes()
        on_images(len(batch))


def _join(file: Path, plan: BulkPlan, parts: list[Path], options: BulkOptions) -> int:
    """Joins the parts to the file and deletes them if all exist; returns the number of those that are missing.

    Two processes that join at the same time write the same bytes. The slower one finds the file complete.
    """
    missing = sum(not part.exists() for part in parts)
    if missing == 0:
        try:
            arrays = {}
            if options.keep_tokens:
                arrays["tokens"] = np.concatenate([np.load(_tokens_of(part)) for part in parts])
            with write_atomically(file) as stream:
                write_samples(stream, plan, _read(parts), plan.labels, **arrays)
        except FileNotFoundError:  # another process has joined and deleted the parts
            missing = 1
    if missing and not is_finished(file, plan):
        return missing
    _remove_parts(file, parts[0].parent)
    return 0


def _tokens_of(part: Path) -> Path:
    return part.with_name(f"{part.name}-tokens.npy")


def _remove_parts(file: Path, folder: Path) -> None:
    """Removes what the making of a file has left, also by processes that were killed; other files stay."""
    with suppress(OSError):  # another process has removed the folder, or it has other files
        for part in folder.glob(f"*{'[0-9a-f]' * 16}-*-of-*"):  # also partial files of parts
            part.unlink(missing_ok=True)
        folder.rmdir()
    remove_partials(file.parent, file.name)


def _read(parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
