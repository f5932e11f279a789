"""The tabs that edit an image with a brush, extend it, and generate panoramas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor  # gradio reads the annotations of handlers

from maskgit_pl.checks import height_width
from maskgit_pl.pipeline.display import Recording
from maskgit_pl.pipeline.grids import enlarge, panel_scale, to_pil
from maskgit_pl.web.form import (
    MODEL,
    add_class,
    add_results,
    add_seed,
    add_settings,
    answer,
    class_choices,
    explain,
    pace,
    show_results,
)
from maskgit_pl.web.markup import draw_frame, figure, figures, frame_figures, legend, message
from maskgit_pl.web.regions import EditRegion, canvas_picture, read_upload
from maskgit_pl.web.settings import FormSettings, PageRequest
from maskgit_pl.web.studio import Made, Studio

__all__ = ["add_edit_tab", "add_panorama_tab"]

_TASKS = [("Fill in (inpaint)", "inpaint"), ("Change class", "edit"), ("Extend (outpaint)", "outpaint")]
_WINDOWS = 8  # of a canvas, about: for the pace of the steps
_HEIGHT = 336  # pixels: twice the smallest height of a panorama on the page
_SIDES = ("left", "right", "up", "down")
_BRUSH = "#009e73"  # REQUESTED of pipeline/grids.py
_PREVIEW: dict[str, Any] = {
    "show_progress": "hidden",
    "trigger_mode": "always_last",
    "concurrency_id": "preview",
    "concurrency_limit": 4,
    "api_visibility": "private",
}


def add_edit_tab(studio: Studio, tab: Any, generated: Any) -> None:
    """Adds the tab that edits an image.

    Args:
        studio: The model.
        tab: The tab itself, whose first display generates an image to edit.
        generated: State with the recording of the tab that generates.
    """
    import gradio as gr

    source = gr.State()  # (C, H, W) uint8
    with gr.Row():
        upload = gr.UploadButton("Upload an image", file_types=["image"], type="filepath", size="md", min_width=150)
        take = gr.Button("Use the generated image", size="md", min_width=150)
    editor = _add_editor(studio)
    with gr.Row():
        with gr.Column(min_width=300):
            task = gr.Radio(_TASKS, value="inpaint", label="Task")
            label = gr.Dropdown(class_choices(studio, with_none=True), value=0, label="Class of the new part")
            box = gr.Textbox(
                label="Box in place of the brush", placeholder="left,top,right,bottom: 0,0,14,28 or 0%,0%,50%,100%"
            )
            dilation = gr.Slider(0, 3, 1, step=1, precision=0, label="Tokens around the mask (dilation)")
            sides = _add_sides(studio)
        with gr.Column(min_width=300):
            preview = gr.HTML(elem_id="token-mask")
    with gr.Row():
        with gr.Column(min_width=300):
            seed = add_seed()
        with gr.Column(min_width=300):
            variants = gr.Slider(1, 8, 4, step=1, precision=0, label="Results")
    fields = add_settings(studio, is_open=False)
    button, stop = _add_buttons("Edit")
    shown = _add_edited()

    def show_mask(canvas: dict[str, Any], pixels: Tensor | None, box: str, dilation: int, task: str) -> str:
        return _preview(studio, canvas, pixels, box=box, dilation=dilation, task=task)

    def choose(task: str) -> list[Any]:
        is_outpaint = task == "outpaint"
        return [*[gr.Slider(visible=is_outpaint)] * len(_SIDES), gr.Slider(value=0 if is_outpaint else 1)]

    read = answer(lambda path: _fill(read_upload(Path(path), studio.pipe.outline)))
    upload.upload(read, upload, [editor, source], **MODEL)
    take.click(answer(lambda found: _fill(_image_of(studio, found))), generated, [editor, source], **MODEL)
    fill_once = answer(lambda pixels, found: [gr.skip()] * 2 if pixels is not None else _fill(_image_of(studio, found)))
    tab.select(fill_once, [source, generated], [editor, source], **MODEL)
    # The first stroke on a new picture is an input, but no change.
    triggers = [editor.input, editor.change, box.change, dilation.change, task.change, source.change]
    gr.on(triggers, show_mask, [editor, source, box, dilation, task], preview, **_PREVIEW)
    task.change(choose, task, [*sides, dilation], **_PREVIEW)
    inputs = [editor, source, box, task, label, seed, variants, dilation, *sides, *fields]
    run = answer(_editing(studio))
    event = button.click(run, inputs, list(shown.values()), show_progress_on=shown["pictures"], **MODEL)
    stop.click(None, cancels=[event], api_visibility="private")


def add_panorama_tab(studio: Studio) -> None:
    """Adds the tab that generates images larger than those of the model."""
    import gradio as gr

    (height, width), factor = studio.pipe.outline.least_canvas, studio.pipe.outline.token_size
    with gr.Row():
        with gr.Column(min_width=300):
            label, seed = add_class(studio), add_seed()
        with gr.Column(min_width=300):
            across = gr.Slider(width, 8 * width, 4 * width, step=factor, precision=0, label="Width in pixels")
            down = gr.Slider(height, 2 * height, height, step=factor, precision=0, label="Height in pixels")
            overlap = gr.Slider(0.1, 0.9, 0.5, step=0.05, label="Overlap of the windows")
    fields = add_settings(studio, is_open=False)
    button, stop = _add_buttons("Generate the panorama")
    shown = _add_edited()

    @answer
    def make(label: int, seed: int, width: int, height: int, overlap: float, *values: Any) -> Iterator[list[Any]]:
        request = PageRequest(label, seed, FormSettings(*values))
        size = {"width": width, "height": height, "overlap": overlap}

        def show(made: Made) -> str:
            text = f"{width} x {height} pixels"
            picture = figure(
                enlarge(made.images[0], panel_scale(made.images[0], _HEIGHT)),
                alt=f"Panorama, {text}, seed {seed}", caption=f"{made.recording.title}, {text}", kind="wide",
            )  # fmt: skip
            return figures([picture], title="Panorama")

        yield from _live(studio.panorama(size, request), show, num_steps=_WINDOWS * request.form.num_steps)

    inputs = [label, seed, across, down, overlap, *fields]
    event = button.click(make, inputs, list(shown.values()), show_progress_on=shown["pictures"], **MODEL)
    stop.click(None, cancels=[event], api_visibility="private")


def _add_buttons(name: str) -> tuple[Any, Any]:
    """Adds the button that starts a run, and the one that stops it."""
    import gradio as gr

    with gr.Row():
        return gr.Button(name, variant="primary", min_width=120, scale=4), gr.Button("Stop", min_width=80, scale=1)


def _add_editor(studio: Studio) -> Any:
    import gradio as gr
    import torch

    height, width = height_width(studio.pipe.outline.image_size)
    empty = canvas_picture(torch.full((1, height, width), 255, dtype=torch.uint8))
    return gr.ImageEditor(
        label="Paint a region",
        sources=(),
        transforms=(),
        type="pil",
        format="png",
        image_mode="RGBA",
        canvas_size=empty.size,
        height=f"min({empty.height + 100}px, 115vw)",  # the picture and the toolbar above it
        fixed_canvas=True,
        layers=False,
        brush=gr.Brush(default_size=max(16, empty.width // 12), colors=[_BRUSH], color_mode="fixed"),
        buttons=[],
        elem_id="editor",
    )


def _add_sides(studio: Studio) -> list[Any]:
    import gradio as gr

    (height, width), factor = height_width(studio.pipe.outline.image_size), studio.pipe.outline.token_size
    most = {"left": width, "right": width, "up": height, "down": height}
    return [
        gr.Slider(0, most[side], 0, step=factor, precision=0, label=f"Pixels to add: {side}", visible=False)
        for side in _SIDES
    ]


def _add_edited() -> dict[str, Any]:
    """Adds the pictures of a result, the scrubber over its steps, and its downloads; returns them by name."""
    import gradio as gr

    recording = gr.State()
    pictures = gr.HTML(elem_classes="edited")
    with gr.Accordion("The first result step by step", open=False, visible=False) as details:
        steps = gr.HTML()
        scrubber = gr.Slider(1, 2, 1, step=1, precision=0, label="Show step")
    box, files, lines = add_results()

    @answer
    def scrub(found: Recording | None, number: int) -> Any:
        return gr.skip() if found is None else frame_figures(draw_frame(found, number))

    scrubber.input(scrub, [recording, scrubber], steps, **_PREVIEW)
    return {
        "pictures": pictures, "details": details, "recording": recording, "steps": steps, "scrubber": scrubber,
        "box": box, "files": files, "lines": lines,
    }  # fmt: skip


def _live(run: Iterator[Recording | Made], show: Callable[[Made], str], *, num_steps: int) -> Iterator[list[Any]]:
    """Yields the values of ``_add_edited`` for each step of the first result, and for the results.

    Args:
        run: A task of the studio.
        num_steps: Number of decoding steps, about.
        show: Function that returns the pictures of the results.
    """
    import gradio as gr

    hidden = gr.Accordion(visible=False), gr.Column(visible=False)  # of an earlier run
    for found in pace(run, num_steps=num_steps):
        if isinstance(found, Made):
            count = len(found.recording.steps)
            steps = frame_figures(draw_frame(found.recording, count))
            scrubber = gr.Slider(maximum=max(2, count), value=count)
            yield [show(found), gr.Accordion(visible=True), found.recording, steps, scrubber, *show_results(found)]
        else:
            picture = frame_figures(draw_frame(found, len(found.steps)))
            yield [picture, hidden[0], found, gr.skip(), gr.skip(), hidden[1], gr.skip(), gr.skip()]


def _editing(studio: Studio) -> Any:
    """Returns the handler of the button that edits."""

    def edit(
        canvas: Any, pixels: Tensor | None, box: str, task: str, label: int | None, *rest: Any
    ) -> Iterator[list[Any]]:
        seed, variants, dilation, left, right, up, down, *values = rest
        if pixels is None:
            raise ValueError("image must be given; upload one, or use the generated one")
        request = PageRequest(label, seed, FormSettings(*values), variants, dilation)
        if task == "outpaint":
            run = studio.outpaint(pixels, dict(zip(_SIDES, (left, right, up, down), strict=True)), request)
        else:
            region = EditRegion(pixels, _layers(canvas), box=box, dilation=dilation, outline=studio.pipe.outline)
            run = studio.edit(pixels, region, task, request)  # type: ignore[arg-type]  # a choice
        original = figure(to_pil(pixels), alt="The image before the edit", caption="before")

        def show(made: Made) -> str:
            results = [
                figure(to_pil(image), alt=f"Result with seed {seed + n}", caption=f"seed {seed + n}")
                for n, image in enumerate(made.images)
            ]
            return figures([original, *results], title="Results")

        windows = _WINDOWS if task == "outpaint" else 1
        yield from _live(run, show, num_steps=windows * request.form.num_steps)

    return edit


def _preview(
    studio: Studio, canvas: dict[str, Any] | None, pixels: Tensor | None, *, box: str, dilation: int, task: str
) -> str:
    """Returns the picture of the tokens that an edit generates again."""
    if pixels is None:
        return message("Upload an image, or use the generated one.")
    if task == "outpaint":
        return message("The image stays; the pixels that you add around it are generated.")
    layers = _layers(canvas)
    if not box.strip() and not any(layer.getextrema()[-1][1] for layer in layers):
        return message("Paint over the part to generate. The tokens that it becomes are shown here.")
    try:
        region = EditRegion(pixels, layers, box=box, dilation=dilation, outline=studio.pipe.outline)
    except Exception as error:  # shown in place of the picture
        return message(explain(error))
    picture = figure(region.picture(), alt=f"Token mask. {region.describe()}", caption=region.describe(), kind="mask")
    return picture.replace("</figcaption>", f"</figcaption>{legend(['requested', 'again'])}")


def _layers(canvas: dict[str, Any] | None) -> list[Any]:
    return [layer.convert("RGBA") for layer in (canvas or {}).get("layers") or []]


def _fill(pixels: Tensor) -> list[Any]:
    """Returns the picture for the editor, without strokes, and the pixels."""
    return [{"background": canvas_picture(pixels), "layers": [], "composite": None}, pixels]


def _image_of(studio: Studio, recording: Recording | None) -> Tensor:
    """Returns the image of a recording; without one, an image of the first class."""
    if recording is None:
        own = FormSettings.of(studio.pipe.decoding)
        *_, recording = studio.decode(PageRequest(0, 0, own))
    return recording.images_at(len(recording.steps) - 1)[0]
