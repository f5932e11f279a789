"""``Studio``: what the page makes with a model, each result with its files and the commands that repeat it."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal, cast

from maskgit_pl.checks import check_integer
from maskgit_pl.decoding import SETTINGS_FORMAT, DecodingConfig
from maskgit_pl.imaging import StepRecorder, save_png, to_pil
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.web.commands import Call, call_edit, call_outpaint, call_panorama, call_sample
from maskgit_pl.web.recording import Playback, decode, record
from maskgit_pl.web.settings import PageRequest

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.web.regions import EditRegion

__all__ = ["EditTask", "Made", "Studio"]

EditTask = Literal["inpaint", "edit"]
OnStep = Callable[["DecodingStep"], object]

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

    recording: Playback
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

    def decode(self, request: PageRequest) -> Iterator[Playback]:
        """Generates an image of a class, and yields the recording after each step.

        Raises:
            ValueError: if a setting is out of range.
        """
        assert request.label is not None
        yield from decode(self.pipe, request.label, seed=request.seed, settings=self._changes(request))

    def keep(self, recording: Playback, request: PageRequest) -> Made:
        """Returns the finished recording of ``decode`` with its files and commands."""
        changes = self._changes(request)
        call = call_sample(request, self.pipe.class_names, changes)
        folder = self._new_folder()
        save_png(to_pil(recording.images[-1][0]), folder / "image.png")
        return self._made(folder, [folder / "image.png"], recording, recording.images[-1], call)

    def edit(
        self, pixels: Tensor, region: EditRegion, task: EditTask, request: PageRequest, *, on_step: OnStep
    ) -> Made:
        """Generates a region of an image again, with ``edit`` as another class.

        Args:
            pixels: (C, H, W) uint8 of the model's size.
            region: EditRegion to generate, made with the dilation of ``request``.
            task: ``inpaint`` or ``edit``.
            request: Class, seed, number of results and settings. ``edit`` requires a class.
            on_step: Called after each decoding step.

        Raises:
            ValueError: if a setting is out of range, or ``edit`` has no class.
        """
        if task == "edit" and request.label is None:
            raise ValueError("class must be named to change the class of a region, got no class; choose one")
        changes = self._changes(request)
        options = {"dilation": request.dilation, **self._options(request, changes)}
        made, recording = self._record(
            lambda recorder: self.pipe.inpaint(pixels, region.mask, callback=recorder, **options), changes, on_step
        )
        folder = self._new_folder()
        files = [folder / "image.png", folder / "mask.png"]
        save_png(to_pil(pixels), files[0])
        save_png(region.mask_picture(), files[1])
        files += self._save_images(folder, made, request)
        return self._made(folder, files, recording, made, call_edit(task, request, self.pipe.class_names, changes))

    def outpaint(self, pixels: Tensor, sides: Mapping[str, int], request: PageRequest, *, on_step: OnStep) -> Made:
        """Extends an image beyond its borders.

        Args:
            pixels: (C, H, W) uint8 of the model's size.
            sides: Pixels to add: ``left``, ``right``, ``up``, ``down``.
            request: Class, seed, number of results and settings.
            on_step: Called after each decoding step.

        Raises:
            ValueError: if a value is out of range, or the canvas is larger than 16 images.
        """
        left, right, up, down = (
            check_integer(name, sides[name], "[0, 65536]") for name in ("left", "right", "up", "down")
        )
        self._check_canvas(pixels.shape[-2] + up + down, pixels.shape[-1] + left + right)
        changes = self._changes(request)
        options = {**sides, "dilation": request.dilation, **self._options(request, changes)}
        made, recording = self._record(
            lambda recorder: self.pipe.outpaint(pixels, callback=recorder, **options), changes, on_step
        )
        folder = self._new_folder()
        save_png(to_pil(pixels), folder / "image.png")
        files = [folder / "image.png", *self._save_images(folder, made, request)]
        return self._made(folder, files, recording, made, call_outpaint(sides, request, self.pipe.class_names, changes))

    def panorama(self, size: Mapping[str, Any], request: PageRequest, *, on_step: OnStep) -> Made:
        """Generates an image of any size, window by window.

        Args:
            size: ``width`` and ``height`` in pixels, and ``overlap`` in (0, 1); see ``MaskGIT.panorama``.
            request: Class, seed and settings.
            on_step: Called after each decoding step.

        Raises:
            ValueError: if a value is out of range, or the canvas is larger than 16 images.
        """
        width, height = (check_integer(name, size[name], "[1, 65536]") for name in ("width", "height"))
        self._check_canvas(height, width)
        changes = self._changes(request)
        options = {"height": height, "overlap": size["overlap"], **self._options(request, changes)}
        classes = options.pop("classes")
        made, recording = self._record(
            lambda recorder: self.pipe.panorama(classes, width, callback=recorder, **options), changes, on_step
        )
        folder = self._new_folder()
        files = self._save_images(folder, made, request)
        return self._made(folder, files, recording, made, call_panorama(size, request, self.pipe.class_names, changes))

    def decode_schedules(self, request: PageRequest) -> Iterator[tuple[str, Playback]]:
        """Generates the same image with each registered mask schedule, and yields each name with its recording.

        Raises:
            ValueError: if a setting is out of range.
        """
        assert request.label is not None
        changes = self._changes(request)
        for name in mask_schedules.build_all():
            settings = {**changes, "mask_schedule": name}
            *_, last = decode(self.pipe, request.label, seed=request.seed, settings=settings)
            yield name, last

    def _changes(self, request: PageRequest) -> dict[str, Any]:
        changes = request.form.changes(self.pipe.decoding)
        self.pipe.check_decoding(self.pipe.decoding_with(**changes))
        return changes

    def _options(self, request: PageRequest, changes: Mapping[str, Any]) -> dict[str, Any]:
        classes = [request.label] * request.variants
        return {"classes": classes, "seed": request.seed, "output_type": "pt", **changes}

    def _record(
        self, make: Callable[[StepRecorder], object], changes: Mapping[str, Any], on_step: OnStep
    ) -> tuple[Tensor, Playback]:
        """Calls an editing method with a recorder; returns its images and the recording of the first one."""
        recorder = _Recorder(on_step)
        images = cast("Tensor", make(recorder))  # output_type "pt"
        grid = self.pipe.tokenizer.network.config.grid((images.shape[-2], images.shape[-1]))
        num_steps = self.pipe.decoding_with(**changes).num_steps
        return images, record(self.pipe, recorder.steps, grid=grid, num_steps=num_steps)

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

    def _made(self, folder: Path, files: Sequence[Path], recording: Playback, images: Tensor, call: Call) -> Made:
        """Adds the pictures of the decoding and the settings to the files of a result."""
        settings = folder / "decoding.json"
        decoding: DecodingConfig = self.pipe.decoding_with(**call.changes)
        content = {"format": SETTINGS_FORMAT, "version": 1, "decoding": asdict(decoding)}
        settings.write_text(json.dumps(content, indent=2) + "\n")
        every = [*files, *recording.save(self.pipe, folder), settings]
        return Made(recording, images, every, call.python(self.name), call.shell(self.name))

    def _new_folder(self) -> Path:
        self._folders.append(Path(mkdtemp(dir=self.folder)))
        if len(self._folders) > _MAX_KEPT:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        return self._folders[-1]


class _Recorder(StepRecorder):
    """A recorder of the first image that also calls a function after each step."""

    def __init__(self, on_step: OnStep) -> None:
        super().__init__(max_images=1)
        self._on_step = on_step

    def __call__(self, step: DecodingStep) -> None:
        super().__call__(step)
        self._on_step(step)
