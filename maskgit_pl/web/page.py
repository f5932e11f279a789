"""The page of a model: its title, its style, and the tabs that generate, compare settings and compare mask schedules.

``tab_edit`` adds the tabs that edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from maskgit_pl.errors import markdown
from maskgit_pl.evaluation.figures import draw_schedules
from maskgit_pl.pipeline.display import Recording, select_steps
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.web.form import (
    MODEL,
    PLOTS,
    add_class,
    add_results,
    add_schedule_plot,
    add_seed,
    add_settings,
    answer,
    explain,
    kept_by_schedule,
    pace,
    show_results,
)
from maskgit_pl.web.markup import (
    counts_table,
    draw_frame,
    figure,
    frame_figures,
    message,
    plot,
    schedule_heading,
    strip,
)
from maskgit_pl.web.settings import FormSettings, PageRequest
from maskgit_pl.web.studio import Studio

__all__ = [
    "STYLE",
    "build_page",
]

STYLE = Path(__file__).with_name("style.css")
_FIELDS = 8  # of FormSettings
_SCRUB: dict[str, Any] = {
    "show_progress": "hidden",
    "trigger_mode": "always_last",
    "concurrency_id": "scrub",
    "concurrency_limit": 4,
    "api_visibility": "private",
}


def build_page(studio: Studio) -> Any:
    """Builds the page of a model.

    Args:
        studio: The model.

    Returns:
        The ``gradio.Blocks``.
    """
    import gradio as gr

    from maskgit_pl.web.tab_edit import add_edit_tab, add_panorama_tab

    with gr.Blocks(title=f"MaskGIT: {studio.name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# MaskGIT\n{_describe(studio)}")
        with gr.Tab("Generate"):
            generated = _add_generate_tab(studio, page)
        with gr.Tab("Compare"):
            _add_compare_tab(studio, page)
        with gr.Tab("Edit") as tab:
            add_edit_tab(studio, tab, generated)
        with gr.Tab("Panorama"):
            add_panorama_tab(studio)
        with gr.Tab("Schedules"):
            _add_schedules_tab(studio, page)
    return page


def _add_generate_tab(studio: Studio, page: Any) -> Any:
    """Adds the tab that generates an image; returns the state that holds its recording."""
    import gradio as gr

    recording = gr.State()
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            label, seed = add_class(studio), add_seed()
            with gr.Row():
                button = gr.Button("Generate", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
            fields = add_settings(studio)
        with gr.Column(scale=3, min_width=320):
            picture = gr.HTML(message("Choose a class and press Generate."), elem_id="generated")
            scrubber = gr.Slider(1, 2, 1, step=1, precision=0, label="Show step", elem_id="scrubber")
            add_schedule_plot(studio, page, fields)
            results = add_results()

    @answer
    def generate(label: int, seed: int, *values: Any) -> Iterator[list[Any]]:
        request = PageRequest(label, seed, FormSettings(*values))
        none_yet = [gr.skip()] * len(results)
        for found in pace(studio.decode(request), num_steps=request.form.num_steps):
            yield [*_show(found), found, *none_yet]
        yield [*_show(found), found, *show_results(studio.keep(found, request))]

    outputs = [picture, scrubber, recording, *results]
    event = button.click(
        generate, [label, seed, *fields], outputs, show_progress_on=picture, scroll_to_output=True, **MODEL
    )
    stop.click(None, cancels=[event], api_visibility="private")
    scrubber.input(answer(_scrub), [recording, scrubber], picture, **_SCRUB)
    return recording


def _add_compare_tab(studio: Studio, page: Any) -> None:
    """Adds the tab that generates an image with two settings, on the same noise."""
    import gradio as gr

    recordings = gr.State(), gr.State()
    with gr.Row():
        with gr.Column(min_width=300):
            label = add_class(studio)
        with gr.Column(min_width=300):
            seed = add_seed()
    with gr.Row():
        button = gr.Button("Compare", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=80)
    pictures, fields = [], []
    with gr.Row():
        for side in "AB":
            with gr.Column(min_width=320):
                pictures.append(gr.HTML(message(f"Settings {side}"), elem_id=f"compared-{side}"))
    scrubber = gr.Slider(1, 2, 1, step=1, precision=0, label="Show step of both", elem_id="scrubber-both")
    agreement = gr.HTML()
    with gr.Row():
        # B begins with half of the steps, so that there is something to see.
        steps = studio.pipe.decoding.num_steps
        for side, num_steps in {"A": steps, "B": max(1, steps // 2)}.items():
            with gr.Column(min_width=320):
                fields.append(add_settings(studio, title=f"Settings {side}", num_steps=num_steps))
                add_schedule_plot(studio, page, fields[-1])

    @answer
    def compare(label: int, seed: int, *values: Any) -> Iterator[list[Any]]:
        forms = FormSettings(*values[:_FIELDS]), FormSettings(*values[_FIELDS:])
        runs = [studio.decode(PageRequest(label, seed, form)) for form in forms]
        found: list[Recording] = []
        num_steps = max(form.num_steps for form in forms)
        # The shorter run keeps its last step.
        for pair in pace(zip_longest(*runs), num_steps=num_steps):
            found = [new or old for new, old in zip(pair, found or pair, strict=True)]
            yield [*_show_pair(found, num_steps), *found, _agreement(*found)]

    @answer
    def scrub(first: Recording | None, second: Recording | None, number: int) -> list[Any]:
        if first is None or second is None:
            return [gr.skip(), gr.skip()]
        return _pair([first, second], number)

    outputs = [*pictures, scrubber, *recordings, agreement]
    event = button.click(compare, [label, seed, *fields[0], *fields[1]], outputs, show_progress_on=pictures, **MODEL)
    stop.click(None, cancels=[event], api_visibility="private")
    scrubber.input(scrub, [*recordings, scrubber], pictures, **_SCRUB)


def _add_schedules_tab(studio: Studio, page: Any) -> None:
    """Adds the tab that compares all registered mask schedules."""
    import gradio as gr

    own = FormSettings.of(studio.pipe.decoding)
    num_tokens = studio.pipe.outline.num_tokens
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            label, seed = add_class(studio), add_seed()
            steps = gr.Slider(1, num_tokens, own.num_steps, step=1, precision=0, label="Decoding steps")
            with gr.Row():
                button = gr.Button("Decode with each schedule", variant="primary", min_width=200)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            curves = gr.HTML()
    table = gr.HTML(counts_table(kept_by_schedule(num_tokens, own.num_steps)), elem_id="counts")
    pictures = gr.HTML(elem_id="schedules")

    def count(num_steps: int) -> str:
        try:
            return counts_table(kept_by_schedule(num_tokens, num_steps))
        except Exception as error:  # shown in place of the table
            return message(explain(error))

    @answer
    def decode(label: int, seed: int, num_steps: int) -> Iterator[str]:
        values = {**own.__dict__, "num_steps": num_steps}
        shown = ""
        for name, recording in studio.decode_schedules(PageRequest(label, seed, FormSettings(**values))):
            shown += _row(name, recording)
            yield shown

    page.load(lambda: _curves(num_tokens), None, curves, **PLOTS)
    steps.change(count, steps, table, trigger_mode="always_last", **PLOTS)
    event = button.click(decode, [label, seed, steps], pictures, **MODEL)
    stop.click(None, cancels=[event], api_visibility="private")


def _describe(studio: Studio) -> str:
    """Returns the name and the sizes of the model as Markdown."""
    sizes = repr(studio.pipe).removeprefix("MaskGIT(").removesuffix(")")
    named = sizes if sizes.startswith(f"{studio.name}: ") else f"{studio.name}: {sizes}"
    return markdown(named)


def _show(found: Recording) -> list[Any]:
    """Returns the pictures of the last step, and the scrubber at that step."""
    import gradio as gr

    number = len(found.steps)
    return [frame_figures(draw_frame(found, number)), gr.Slider(maximum=max(2, found.decoding.num_steps), value=number)]


def _show_pair(found: list[Recording], num_steps: int) -> list[Any]:
    import gradio as gr

    number = max(len(each.steps) for each in found)
    return [*_pair(found, number), gr.Slider(maximum=max(2, num_steps), value=number)]


def _pair(found: list[Recording], number: int) -> list[str]:
    return [frame_figures(draw_frame(each, number), title=f"{side}. ") for side, each in zip("AB", found, strict=True)]


def _scrub(recording: Recording | None, number: int) -> Any:
    import gradio as gr

    return gr.skip() if recording is None else frame_figures(draw_frame(recording, number))


def _agreement(first: Recording, second: Recording) -> str:
    same = (first.steps[-1].tokens == second.steps[-1].tokens).sum()
    return message(f"{int(same)} of {first.steps[-1].tokens.numel()} tokens are the same in A and B.")


@cache
def _curves(num_tokens: int) -> str:
    picture = draw_schedules(mask_schedules.build_all(), num_tokens=num_tokens)
    alt = f"Plot of the mask ratio of each schedule against progress, for {num_tokens} tokens"
    return plot(picture, alt=alt, kind="image/png")


def _row(name: str, recording: Recording) -> str:
    """Returns the heading of a schedule, and its decoding as a strip of at most 12 steps."""
    tiles = []
    for place in select_steps(len(recording.steps), "filmstrip"):
        frame = draw_frame(recording, place + 1)
        tiles.append(figure(frame.tokens, alt=f"{name}. {frame.caption}", caption=f"step {place + 1}", kind="thumb"))
    last = figure(recording.images[0], alt=f"{name}. The image", caption="image", kind="thumb")
    return schedule_heading(name, mask_schedules.summary(name)) + strip([*tiles, last], label=f"Decoding with {name}")
