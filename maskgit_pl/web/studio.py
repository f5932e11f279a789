"""``Studio``: what the page makes with a model, each result with its files and the commands that repeat it."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal

from maskgit_pl.decoding import SETTINGS_FORMAT, DecodingConfig
from maskgit_pl.pipeline.display import Recording, StepRecorder
from maskgit_pl.pipeline.grids import save_png, to_pil
from maskgit_pl.pipeline.regions import Margins, check_canvas
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.web.settings import (
    Call,
    Choices,
    PageRequest,
    call_edit,
    call_outpaint,
    call_panorama,
    call_sample,
    guidance_choices,
    schedule_choices,
    selector_choices,
)

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.generate import StepsOfImages
    from maskgit_pl.web.regions import EditRegion

__all__ = ["Made", "Studio"]

_MAX_KEPT = 64  # results whose files are kept
_MAX_CANVAS = 16  # area of a canvas, in images of the model


@dataclass(frozen=True)
class Made:
    """A result.

    Args:
        recording: Decoding steps of the first image.
        images: (n, C, H, W) uint8.
        files: Files to download.
        python: Python line that makes the same images.
        command: Command line that makes the same images.
    """

    recording: Recording
    images: Tensor
    files: list[Path]
    python: str
    command: str


class Studio:
    """Makes images for the page.

    Args:
        pipe: The model.
        name: Name of the model for commands: argument of ``MaskGIT.from_pretrained``.
        folder: Temporary folder for files; those of the last 64 results are kept.

    Raises:
        ValueError: if the model is autoregressive, or needs a vector for each image.
    """

    def __init__(self, pipe: MaskGIT, name: str, folder: Path) -> None:
        pipe.outline.check_parallel("web")
        if pipe.outline.condition_dim:
            raise ValueError(
                "web requires a model that generates from classes only, got one that needs a vector for each image; "
                "use `maskgit sample --vectors`"
            )
        self.pipe, self.name, self.folder = pipe, name, folder
        self._folders: deque[Path] = deque()

    @cached_property
    def choices(self) -> tuple[Choices, Choices, Choices]:
        """The token selectors, mask schedules and guidance schedules of a form."""
        own = self.pipe.decoding
        schedules = schedule_choices(own, self.pipe.transformer.schedule_for("web"))
        return selector_choices(own), schedules, guidance_choices(own)

    def decode(self, request: PageRequest) -> Iterator[Recording]:
        """Generates an image of a class, and yields the recording after each step.

        Raises:
            ValueError: if a setting is out of range.
        """
        assert request.label is not None
        yield from self._decode(request, self._changes(request))

    def keep(self, recording: Recording, request: PageRequest) -> Made:
        """Returns the finished recording of ``decode`` with its files and commands."""
        changes = self._changes(request)
        call = call_sample(request, self.pipe.class_names, changes)
        folder = self._new_folder()
        images = recording.images_at(len(recording.steps) - 1)
        save_png(to_pil(images[0]), folder / "image.png")
        return self._made(folder, [folder / "image.png"], recording, images, call)

    def edit(
        self, pixels: Tensor, region: EditRegion, task: Literal["inpaint", "edit"], request: PageRequest
    ) -> Iterator[Recording | Made]:
        """Generates a region of an image again, with ``edit`` as another class.

        Yields the recording of the first result after each step, then the results. Closing the iterator ends the work.

        Args:
            pixels: (C, H, W) uint8 of the model's size.
            region: EditRegion to generate, made with the dilation of ``request``.
            task: ``inpaint`` or ``edit``.
            request: Class, seed, number of results and settings. ``edit`` requires a class.

        Raises:
            ValueError: if a setting is out of range, or ``edit`` has no class.
        """
        if task == "edit" and request.label is None:
            raise ValueError("class must be named to change the class of a region, got no class; choose one")
        changes = self._changes(request)
        options = {"dilation": request.dilation, **self._options(request, changes)}
        steps = self.pipe.inpaint_steps(pixels, region.mask, **options)
        made, recording = yield from self._record(steps, self._empty(request, changes, requested=region.mask))
        folder = self._new_folder()
        files = [folder / "image.png", folder / "mask.png"]
        save_png(to_pil(pixels), files[0])
        save_png(region.mask_picture(), files[1])
        files += self._save_images(folder, made, request)
        yield self._made(folder, files, recording, made, call_edit(task, request, self.pipe.class_names, changes))

    def outpaint(self, pixels: Tensor, sides: Mapping[str, int], request: PageRequest) -> Iterator[Recording | Made]:
        """Extends an image beyond its borders. See ``edit`` for what it yields.

        Args:
            pixels: (C, H, W) uint8 of the model's size.
            sides: Pixels to add: ``left``, ``right``, ``up``, ``down``.
            request: Class, seed, number of results and settings.

        Raises:
            ValueError: if a value is out of range, or the canvas is larger than 16 images.
        """
        added = Margins(*(sides[name] for name in ("left", "right", "up", "down")))
        added.check(pixels.shape[-2:], **self._canvas_rules())
        outside = added.outside(pixels.shape[-2], pixels.shape[-1])
        size = (outside.shape[0], outside.shape[1])
        self._check_canvas(*size)
        changes = self._changes(request)
        options = {**sides, "dilation": request.dilation, **self._options(request, changes)}
        empty = self._empty(request, changes, size=size, requested=outside)
        made, recording = yield from self._record(self.pipe.outpaint_steps(pixels, **options), empty)
        folder = self._new_folder()
        save_png(to_pil(pixels), folder / "image.png")
        files = [folder / "image.png", *self._save_images(folder, made, request)]
        yield self._made(folder, files, recording, made, call_outpaint(sides, request, self.pipe.class_names, changes))

    def panorama(self, size: Mapping[str, Any], request: PageRequest) -> Iterator[Recording | Made]:
        """Generates an image of any size, window by window. See ``edit`` for what it yields.

        Args:
            size: ``width`` and ``height`` in pixels, and ``overlap`` in (0, 1); see ``MaskGIT.panorama``.
            request: Class, seed and settings.

        Raises:
            ValueError: if a value is out of range, or the canvas is larger than 16 images.
        """
        height, width = check_canvas(size["height"], size["width"], **self._canvas_rules())
        self._check_canvas(height, width)
        changes = self._changes(request)
        options = {"height": height, "overlap": size["overlap"], **self._options(request, changes)}
        classes = options.pop("classes")
        steps = self.pipe.panorama_steps(classes, width, **options)
        made, recording = yield from self._record(steps, self._empty(request, changes, size=(height, width)))
        folder = self._new_folder()
        files = self._save_images(folder, made, request)
        yield self._made(folder, files, recording, made, call_panorama(size, request, self.pipe.class_names, changes))

    def decode_schedules(self, request: PageRequest) -> Iterator[tuple[str, Recording]]:
        """Generates the same image with each registered mask schedule, and yields each name with its recording.

        Raises:
            ValueError: if a setting is out of range.
        """
        assert request.label is not None
        changes = self._changes(request)
        for name in mask_schedules.build_all():
            (last,) = deque(self._decode(request, {**changes, "mask_schedule": name}), maxlen=1)
            yield name, last

    def _changes(self, request: PageRequest) -> dict[str, Any]:
        changes = request.form.changes(self.pipe.decoding)
        self.pipe.check_decoding(self.pipe.decoding_with(**changes))
        return changes

    def _options(self, request: PageRequest, changes: Mapping[str, Any]) -> dict[str, Any]:
        classes = [request.label] * request.variants
        return {"classes": classes, "seed": request.seed, **changes}

    def _empty(
        self,
        request: PageRequest,
        changes: Mapping[str, Any],
        *,
        size: tuple[int, int] | None = None,
        requested: Tensor | None = None,
    ) -> Recording:
        """Returns a recording of the first result without steps; ``size`` is that of a canvas in pixels."""
        tokenizer = self.pipe.tokenizer
        grid = tokenizer.grid if size is None else tokenizer.network.config.grid(size)
        name = "no class" if request.label is None else self.pipe.class_names[request.label]
        decode = tokenizer.decode if size is None else partial(tokenizer.decode, grid=grid)
        decoding, token_size = self.pipe.decoding_with(**changes), self.pipe.outline.token_size
        return Recording((), decode, grid, decoding, [name], [request.seed], requested, token_size)

    def _decode(self, request: PageRequest, changes: Mapping[str, Any]) -> Iterator[Recording]:
        found = self._empty(request, changes)
        for step in self.pipe.steps([request.label], seed=request.seed, decoding=found.decoding):
            found = replace(found, steps=[*found.steps, step])
            yield found

    def _record(self, steps: StepsOfImages, empty: Recording) -> Generator[Recording, None, tuple[Tensor, Recording]]:
        """Yields the recording of the first result after each step; returns the images of all and the recording."""
        recorder, found = StepRecorder(max_images=1), empty
        with closing(steps):
            while True:
                try:
                    recorder(next(steps))
                except StopIteration as end:
                    return end.value, found
                found = replace(empty, steps=list(recorder.steps))
                yield found

    def _canvas_rules(self) -> dict[str, Any]:
        return {"factor": self.pipe.outline.token_size, "least": self.pipe.outline.image_size}

    def _check_canvas(self, height: int, width: int) -> None:
        outline = self.pipe.outline
        if height * width > _MAX_CANVAS * outline.num_tokens * outline.token_size**2:
            raise ValueError(
                f"width x height must be at most {_MAX_CANVAS} images of the model on this page, got {width} x "
                f"{height} pixels; use the command for larger ones"
            )

    def _save_images(self, folder: Path, images: Tensor, request: PageRequest) -> list[Path]:
        files = [folder / f"seed-{request.seed + number}.png" for number in range(len(images))]
        for file, image in zip(files, images, strict=True):
            save_png(to_pil(image), file)
        return files

    def _made(self, folder: Path, files: Sequence[Path], recording: Recording, images: Tensor, call: Call) -> Made:
        """Adds the pictures of the decoding and the settings to the files of a result."""
        settings = folder / "decoding.json"
        decoding: DecodingConfig = self.pipe.decoding_with(**call.changes)
        content = {"format": SETTINGS_FORMAT, "version": 1, "decoding": asdict(decoding)}
        settings.write_text(json.dumps(content, indent=2) + "\n")
        pictures = [folder / "decoding.gif", folder / "filmstrip.png"]
        for file in pictures:
            recording.save(file)
        every = [*files, *pictures, settings]
        return Made(recording, images, every, call.python(self.name), call.shell(self.name))

    def _new_folder(self) -> Path:
        folder = Path(mkdtemp(dir=self.folder))
        self._folders.append(folder)
        if len(self._folders) > _MAX_KEPT:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        return folder
