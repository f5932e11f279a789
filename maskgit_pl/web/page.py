"""The page of a model: two tabs, Generate and Edit, made of gradio's own components.

Each task is one call of ``MaskGIT``, whose callback hands over the decoding steps: the page shows them as
they come. A run that nobody waits for any more ends after its current step. This module imports gradio;
``server`` imports it when it serves.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial, wraps
from html import escape
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskgit_pl.checks import height_width, pixels_text
from maskgit_pl.data.image_bytes import read_image_file
from maskgit_pl.data.images import decode_image, fit_image
from maskgit_pl.decoding import DecodingStep
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.errors import RunError, is_user_error
from maskgit_pl.grids import enlarge, scale_to, to_pil
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.display import describe_settings, token_panel
from maskgit_pl.pipeline.options import seeds_of
from maskgit_pl.pipeline.regions import Margins, box_mask, image_pixels
from maskgit_pl.text import markdown, printable, shorten

_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of events that use the model: they wait for one another."""
_LIGHT: dict[str, Any] = {"concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"}
"""Options of all other events."""
_NOISE = "choice_temperature"  # which some token selectors have
_MIX, _ANY = "mix", "any"  # the choice of another class for each image, and of no class
_PAINT, _EXTEND, _VARY = "Paint a region", "Extend (outpaint)", "Vary the whole image"
_SIDES = ("left", "right", "up", "down")
_COUNT, _MOST = 4, 8  # images of a run
_SEED = 11  # with which the page opens: a good one of the model of the package
_CANVAS = 448  # pixels of the longer edge of the canvas of the brush
_SMALL = 128  # pixels below which an image is shown enlarged, with visible pixels
_MOST_PAINTED = 2**22  # pixels of the canvas
_BRUSH, _PAINTED = "#009e73", 128  # color of REQUESTED in pipeline/grids.py; alpha from which a pixel counts as painted
_LONGEST_STEP, _LONGEST_RUN = 0.15, 2.0  # seconds to which a fast step and a fast run are stretched, to be seen
_WORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
_log = logging.getLogger(__name__)

STYLE = """
.gradio-container > main { max-width: 1200px !important; margin: 0 auto !important; }
.small img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.images .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
.images .thumbnail-lg { aspect-ratio: auto; height: auto; }
.images [data-testid="status-tracker"]:has(.error) { display: none; }  /* the message says it, and the images stay */
.images .caption-label { position: static; max-width: none; border: 0; background: none; text-align: center; }
.seed button { align-self: end; }
@media (max-width: 640px) {
  .gradio-container > main { padding: 8px 12px !important; }
  .images .grid-container { grid-template-columns: repeat(2, 1fr) !important; }
}
"""


def build_page(pipe: MaskGIT, name: str) -> gr.Blocks:
    """Builds the page of a model, which opens with images of several classes.

    Args:
        pipe: The model.
        name: Name of the model, for the title.
    """
    pipe.transformer.schedule_for("web")
    if pipe.transformer.network.config.condition_dim:
        raise ValueError(
            "web requires a model that generates from classes only, got one that needs a vector for each image; "
            "use MaskGIT.generate(vectors=...) in Python"
        )
    about = f"{len(pipe.class_names)} classes, {pixels_text(pipe.tokenizer.image_size)} pixels"
    with gr.Blocks(title=f"MaskGIT: {name}", analytics_enabled=False, delete_cache=(60, 1800)) as page:
        gr.Markdown(f"## MaskGIT\n{markdown(name)}: {about}, {pipe.transformer.network.config.num_tokens} tokens")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                edit_this, generated, selected = _add_generate_tab(pipe, page)
            with gr.Tab("Edit", id="edit"):
                take, source = _add_edit_tab(pipe)

        @answer
        def fill(images: list[tuple[Image.Image, str]] | None, number: int) -> Iterator[list[Any]]:
            if not images:
                raise ValueError("no image is generated yet; press Generate, or upload an image")
            pixels = image_pixels(images[min(number, len(images) - 1)][0], channels=pipe.tokenizer.channels)
            yield [gr.Tabs(selected="edit"), *_show_source(pixels, pipe)]

        for button in (edit_this, take):
            button.click(fill, [generated, selected], [tabs, *source], **_LIGHT)
    page.queue(api_open=False)
    return page


def _add_generate_tab(pipe: MaskGIT, page: gr.Blocks) -> tuple[Any, Any, Any]:
    """Adds the tab that generates; returns a button, the images, and the number of the one that is selected."""
    classes = [("a mix of classes", _MIX), *_class_choices(pipe)]
    generated, selected = gr.State(), gr.State(0)  # images and captions, which no browser sends back
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            images, caption = _add_gallery(pipe, "generated"), gr.Markdown()
            with gr.Row():
                keep = gr.Button("Keep to compare", size="sm", min_width=120)
                edit_this = gr.Button("Edit this image", size="sm", min_width=120)
            with gr.Column(visible=False) as kept:
                kept_images = _add_gallery(pipe, "kept")
                kept_caption = gr.Markdown()
        with gr.Column(scale=2, min_width=300):
            label = gr.Dropdown(classes, value=_MIX, label="Class", filterable=True)
            seed, count = _add_seed(), gr.Slider(1, _MOST, _COUNT, step=1, precision=0, label="Images")
            button, stop = _add_buttons("Generate")
            fields = _add_settings(pipe)

    @answer
    def generate(label: str | int, seed: int, count: int, *values: Any) -> Iterator[list[Any]]:
        labels = _mix(pipe, count) if label == _MIX else [_check_class(label)] * count
        for shown, said in run_task(pipe, pipe.generate, labels, seed, settings_of(pipe, values)):
            yield [shown, said, shown]

    # The page opens with what its settings give.
    labels = _mix(pipe, _COUNT)
    first = list(zip(pipe.generate(labels, seed=_SEED), _captions(pipe, labels, _SEED), strict=True))
    outputs = [images, caption, generated]
    page.load(lambda: [first, describe_settings(pipe.decoding), first], None, outputs, **_LIGHT)
    _on_run(button, stop, generate, [label, seed, count, *fields], outputs)
    images.select(_place_of, None, selected, **_LIGHT)
    keep.click(
        lambda images, said: [images, said, gr.Column(visible=True)],
        [generated, caption], [kept_images, kept_caption, kept], **_LIGHT,
    )  # fmt: skip
    return edit_this, generated, selected


def _add_edit_tab(pipe: MaskGIT) -> tuple[Any, list[Any]]:
    """Adds the tab that edits; returns a button that takes the generated image, and the outputs that show it."""
    factor, rows = pipe.tokenizer.token_size, min(pipe.tokenizer.grid)
    classes = [("any class", _ANY)] if pipe.classes.null_label is not None else []
    source = gr.State()  # (C, H, W) uint8
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                upload = gr.UploadButton(
                    "Upload an image", file_types=["image"], type="filepath", size="sm", min_width=120
                )
                take = gr.Button("Take the generated image", size="sm", min_width=120)
            drop = gr.Image(
                label="Image to edit", type="filepath", image_mode=None, format="png", height=320,
                sources=["upload", "clipboard"],
                placeholder="# Which image shall change?\nDrop one here, or take the one that you generated.\n"
                f"The model sees {pixels_text(pipe.tokenizer.image_size)} pixels"
                f"{', in grey' if pipe.tokenizer.channels == 1 else ''}.",
            )  # fmt: skip
            editor = _add_editor(pipe)
        with gr.Column(scale=2, min_width=300):
            task = gr.Radio([_PAINT, _EXTEND, _VARY], value=_PAINT, label="Task")
            with gr.Group() as paint:
                box = gr.Textbox(label="Box in place of the brush", placeholder="left,top,right,bottom: 0,0,14,28")
            with gr.Group(visible=False) as extend:
                sides = gr.CheckboxGroup(list(_SIDES), value=["right"], label="Sides")
                margin = gr.Slider(
                    factor, rows * factor, max(1, rows // 2) * factor, step=factor, precision=0,
                    label="Pixels to add on each side",
                )  # fmt: skip
            with gr.Group(visible=False) as vary:
                strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Share of the image that changes")
            label = gr.Dropdown(
                [*classes, *_class_choices(pipe)], value=_ANY if classes else 0, label="Class of the new part"
            )
            seed, count = _add_seed(), gr.Slider(1, _MOST, _COUNT, step=1, precision=0, label="Results")
            button, stop = _add_buttons("Edit")
            fields = _add_settings(pipe)
    images, caption = _add_gallery(pipe, "edited", columns=_COUNT + 1), gr.Markdown()

    @answer
    def edit(canvas: Any, pixels: Tensor | None, task: str, *rest: Any) -> Iterator[list[Any]]:
        box, sides, margin, strength, label, seed, count, *values = rest
        if pixels is None:
            raise ValueError("an image is missing; upload one, or take the generated image")
        labels, settings = [None if label == _ANY else _check_class(label)] * count, settings_of(pipe, values)
        height, width = pixels.shape[-2:]
        if task == _PAINT:
            mask = (
                box_mask(_parse_box(box), height=height, width=width)
                if box.strip()
                else painted_pixels((canvas or {}).get("layers") or [], height=height, width=width)
            )
            if not bool(mask.any()):
                raise ValueError("no region is painted; paint over the part to generate, or give a box")
            call = partial(pipe.inpaint, pixels, mask)
        elif task == _VARY:
            call, mask = partial(pipe.edit, pixels, strength=strength), None
        else:
            added: dict[str, Any] = {name: margin if name in sides else 0 for name in _SIDES}
            mask = Margins(**added).outside(height, width)
            call = partial(pipe.outpaint, pixels, **added)
        yield from run_task(pipe, call, labels, seed, settings, before=pixels, requested=mask)

    @answer
    def read(path: str) -> Iterator[list[Any]]:
        data = read_image_file(path, name=Path(path).name)
        yield _show_source(decode_image(data, channels=pipe.tokenizer.channels, name=Path(path).name), pipe)

    for component in (upload, drop):
        component.upload(read, component, [drop, editor, source], **_LIGHT)
    task.change(
        lambda chosen: [gr.Group(visible=chosen == task) for task in (_PAINT, _EXTEND, _VARY)],
        task, [paint, extend, vary], **_LIGHT,
    )  # fmt: skip
    inputs = [editor, source, task, box, sides, margin, strength, label, seed, count, *fields]
    _on_run(button, stop, edit, inputs, [images, caption])
    return take, [drop, editor, source]


def run_task(
    pipe: MaskGIT,
    call: Callable[..., Any],
    labels: Sequence[int | None],
    seed: int,
    settings: Mapping[str, Any],
    *,
    before: Tensor | None = None,
    requested: Tensor | None = None,
) -> Iterator[list[Any]]:
    """Runs a task, and yields its images and their caption after each step, and at the end.

    Args:
        pipe: The model.
        call: Method of the model, with all arguments but those that follow.
        labels: Class of each result; None is "no class".
        seed: Seed of the first result.
        settings: Decoding settings.
        before: (C, H, W) uint8, the image that is edited.
        requested: (H, W) bool, the pixels that are asked for, of the size of the results; None for all.
    """
    grid, decoding = None, pipe.decoding_with(**settings)
    if requested is not None and tuple(requested.shape) != height_width(pipe.tokenizer.image_size):  # a canvas
        grid = pipe.tokenizer.network.config.grid((requested.shape[0], requested.shape[1]))
    captions = _captions(pipe, labels, seed)
    original = [] if before is None else [(to_pil(before), "before")]
    call = partial(call, classes=list(labels), seed=seed, **settings)
    with closing(stream_steps(call, num_steps=decoding.num_steps)) as steps:
        for step in steps:
            if isinstance(step, DecodingStep):
                tiles = [
                    token_panel(step, row, image, pipe.tokenizer.token_size, requested=requested)
                    for row, image in enumerate(pipe.tokenizer.decode(step.tokens, grid=grid))
                ]
                decided = f"{int((~step.still_masked[0]).sum())} of {step.still_masked.shape[1]} tokens decided"
                text = f"Step {step.step + 1} of {decoding.num_steps}: {decided}"
                yield [[*original, *zip(tiles, captions, strict=True)], text]
            else:
                yield [[*original, *zip(step, captions, strict=True)], describe_settings(decoding)]


def stream_steps(
    call: Callable[..., Any], *, num_steps: int
) -> Generator[DecodingStep | list[Image.Image], None, None]:
    """Yields the decoding steps of a call as they come, slowly enough to be seen, and then its images.

    Args:
        call: Function that takes ``callback`` and returns images. It runs in the one thread that uses the
            model; if the iterator is closed, it ends after its current step.
        num_steps: Number of decoding steps, about.
    """
    queue: SimpleQueue[DecodingStep | None] = SimpleQueue()
    is_closed, least = threading.Event(), min(_LONGEST_STEP, _LONGEST_RUN / num_steps)

    def callback(step: DecodingStep) -> None:
        if is_closed.is_set():
            raise InterruptedError("nobody waits for the result")
        queue.put(step)

    result = _WORKER.submit(call, callback=callback)
    result.add_done_callback(lambda _: queue.put(None))
    try:
        while (step := queue.get()) is not None:
            began = time.monotonic()
            yield step
            time.sleep(max(0.0, least - (time.monotonic() - began)))
        yield result.result()
    finally:
        is_closed.set()
        result.cancel()


def start_values(pipe: MaskGIT) -> dict[str, Any]:
    """Returns the value of each field of the settings with which the page begins: the model's own."""
    decoding, temperature = pipe.decoding, pipe.decoding.sampling_temperature
    first, last = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    selector: Any = decoding.token_selector  # None has no page
    return {
        "num_steps": decoding.num_steps,
        "token_selector": "",  # the model's own, with its numbers
        "first": float(first),
        "last": float(last),
        _NOISE: float(getattr(token_selectors.build(selector), _NOISE, 4.5)),
        "guidance_scale": float(getattr(guidance_schedules.build(decoding.guidance), "scale", 0.0)),
    }


def settings_of(pipe: MaskGIT, values: Sequence[Any]) -> dict[str, Any]:
    """Returns the values of the fields as keyword arguments of ``MaskGIT.generate``.

    Args:
        pipe: The model.
        values: Values of the fields, in the order of ``start_values``.
    """
    settings = dict(zip(start_values(pipe), values, strict=True))
    first, last = settings.pop("first"), settings.pop("last")
    settings["sampling_temperature"] = first if first == last else (first, last)
    # Numbers belong to their part, and some parts take none.
    selector: Any = settings["token_selector"] or pipe.decoding.token_selector
    settings["token_selector"] = selector
    if not hasattr(token_selectors.build(selector), _NOISE):
        del settings[_NOISE]
    if not hasattr(guidance_schedules.build(pipe.decoding.guidance), "scale"):
        del settings["guidance_scale"]
    pipe.check_decoding(pipe.decoding_with(**settings))
    return settings


def _add_settings(pipe: MaskGIT) -> list[Any]:
    """Adds a field for each of ``start_values``, folded away."""
    start, spec = start_values(pipe), pipe.decoding.token_selector
    own = spec["name"] if isinstance(spec, Mapping) else spec
    selectors = [(f"as the model ({own})", ""), *((name, name) for name in token_selectors.build_all())]

    def slider(name: str, label: str, least: float, usual: float, step: float, **options: Any) -> Any:
        # gradio refuses values above the maximum, and any value may be the model's own.
        return gr.Slider(least, max(usual, start[name]), start[name], step=step, label=label, **options)

    with gr.Accordion("Decoding settings", open=False):
        return [
            slider("num_steps", "Decoding steps", 1, pipe.transformer.network.config.num_tokens, 1, precision=0),
            gr.Dropdown(selectors, value="", label="Token selector"),
            slider("first", "Sampling temperature, first step", 0, 4, 0.05),
            slider("last", "Sampling temperature, last step", 0, 4, 0.05),
            slider("choice_temperature", "Choice temperature (noise on the confidence)", 0, 30, 0.5),
            slider("guidance_scale", "Guidance scale (0: no guidance)", 0, 10, 0.05),
        ]


def _mix(pipe: MaskGIT, count: int) -> list[int]:
    """Returns ``count`` classes, evenly spread."""
    return [n * len(pipe.class_names) // count for n in range(count)]


def _captions(pipe: MaskGIT, labels: Sequence[int | None], seed: int) -> list[str]:
    """Returns class and seed of each image. See ``options.seeds_of`` for errors."""
    names = ["any class" if label is None else printable(pipe.class_names[label]) for label in labels]
    return [f"{name}, seed {number}" for name, number in zip(names, seeds_of(seed, len(labels)), strict=True)]


def _check_class(label: Any) -> int:
    """Returns the class of a field, which a script can send empty."""
    if not isinstance(label, int):
        raise ValueError(f"class must be one of the list, got {shorten(label)}; choose one")
    return label


def _class_choices(pipe: MaskGIT) -> list[tuple[str, Any]]:
    return [(printable(name), label) for label, name in enumerate(pipe.class_names)]


def _add_seed() -> Any:
    """Adds the number of the seed, and a button that draws another one in the browser."""
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(_SEED, label="Seed", precision=0, min_width=120, scale=2)  # its bounds: seeds_of
        button = gr.Button("Another seed", size="sm", min_width=110, scale=1)
    button.click(None, None, seed, js="() => Math.floor(Math.random() * 100000)", api_visibility="private")
    return seed


def _add_buttons(name: str) -> tuple[Any, Any]:
    with gr.Row():
        return gr.Button(name, variant="primary", min_width=120, scale=2), gr.Button("Stop", min_width=80, scale=1)


def _add_gallery(pipe: MaskGIT, name: str, *, columns: int = _COUNT) -> Any:
    is_small = max(height_width(pipe.tokenizer.image_size)) < _SMALL
    return gr.Gallery(
        label=f"Images, {name}", show_label=False, columns=columns, format="png", object_fit="contain",
        interactive=False, elem_id=name, elem_classes=["images", *["small"] * is_small],
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _on_run(button: Any, stop: Any, handler: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Lets a button run a task, and another one end it; the images scroll into view when it begins and ends."""
    element = f"document.getElementById('{outputs[0].elem_id}')"
    scroll = f"() => {element}.scrollIntoView({{behavior: 'smooth', block: 'nearest'}})"
    close = "() => document.querySelectorAll('.toast-close').forEach(cross => cross.click())"  # errors of earlier runs
    for script in (scroll, close):
        button.click(None, None, None, js=script, api_visibility="private")
    event = button.click(handler, inputs, outputs, show_progress_on=outputs[0], **_MODEL)
    event.then(None, None, None, js=scroll, api_visibility="private")
    stop.click(None, cancels=[event], api_visibility="private")


def _check_canvas(payload: Any) -> None:
    """Refuses pictures that the canvas cannot have sent, before any of them is decoded."""
    files = [] if payload is None else [payload.background, payload.composite, *payload.layers]
    if len(files) > 3 or any(math.prod(_size(file.path)) > _MOST_PAINTED for file in files if file is not None):
        raise gr.Error("the canvas must have one layer of its own size")


def _size(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def _add_editor(pipe: MaskGIT) -> Any:
    """Adds the canvas of the brush, which has the shape of the model's images."""
    height, width = height_width(pipe.tokenizer.image_size)
    scale = scale_to(torch.empty(height, width), _CANVAS)
    editor = gr.ImageEditor(
        label="Paint here", sources=(), transforms=(), layers=False, type="pil", format="png",
        image_mode="RGBA", canvas_size=(width * scale, height * scale), fixed_canvas=True,
        height=f"min({height * scale + 100}px, 115vw)",  # the picture and the toolbar above it
        brush=gr.Brush(default_size=max(16, width * scale // 12), colors=[_BRUSH], color_mode="fixed"),
        buttons=[], visible=False, elem_id="editor",
    )  # fmt: skip
    read = editor.preprocess

    def preprocess(payload: Any) -> Any:
        _check_canvas(payload)
        return read(payload)

    editor.preprocess = preprocess  # a subclass would write a file beside this module
    return editor


def _place_of(event: gr.SelectData) -> int:
    return int(event.index)


def _show_source(pixels: Tensor, pipe: MaskGIT) -> list[Any]:
    """Returns the editor with the centre of an image (C, H, W) uint8 in place of the drop zone, and its pixels."""
    pixels = fit_image(pixels, image_size=pipe.tokenizer.image_size, crop=None)
    value = {"background": enlarge(pixels, scale_to(pixels, _CANVAS)), "layers": [], "composite": None}
    return [gr.Image(visible=False), gr.ImageEditor(value, visible=True), pixels]


def _parse_box(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"box must be left,top,right,bottom in pixels, got {shorten(text)}") from None


def painted_pixels(layers: Sequence[Image.Image], *, height: int, width: int) -> Tensor:
    """Returns the pixels of an image that a brush has painted, (H, W) bool.

    A pixel of the image is painted if any pixel of the canvas that it covers is.

    Args:
        layers: Layers of the canvas, of any size, transparent where nothing is painted.
        height: H of the image.
        width: W of the image.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    for layer in layers:
        painted = torch.from_numpy(np.array(layer.convert("RGBA"))[..., 3]) >= _PAINTED
        mask |= F.adaptive_max_pool2d(painted[None].float(), (height, width))[0] > 0
    return mask


def answer(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Returns a handler whose errors the page shows as sentences; the terminal shows where an internal one comes from.

    gradio shows the message as HTML, so that it is escaped.
    """

    @wraps(handler)
    def run(*values: Any) -> Iterator[Any]:
        try:
            yield from handler(*values)
        except Exception as error:
            text = printable(error, limit=1000)
            if not (is_user_error(error) or isinstance(error, RunError)):
                _log.error("internal error of maskgit_pl or of a library", exc_info=error)
                text = f"{type(error).__name__}: internal error of maskgit_pl or of a library; the terminal shows where"
            raise gr.Error(escape(text), print_exception=False) from None

    return run
