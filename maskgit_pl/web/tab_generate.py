"""The tabs that generate: one image step by step, and two settings side by side on the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from maskgit_pl.pipeline.display import Recording
from maskgit_pl.web.answers import answer, pace
from maskgit_pl.web.form import MODEL, add_class, add_results, add_schedule_plot, add_seed, add_settings, show_results
from maskgit_pl.web.frames import draw_frame
from maskgit_pl.web.markup import frame_figures, message
from maskgit_pl.web.settings import FormSettings, PageRequest
from maskgit_pl.web.studio import Studio

__all__ = ["add_compare_tab", "add_generate_tab"]

_FIELDS = 8  # of FormSettings
_SCRUB: dict[str, Any] = {
    "show_progress": "hidden",
    "trigger_mode": "always_last",
    "concurrency_id": "scrub",
    "concurrency_limit": 4,
    "api_visibility": "private",
}


def add_generate_tab(studio: Studio, page: Any) -> Any:
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


def add_compare_tab(studio: Studio, page: Any) -> None:
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


def _show(found: Recording) -> list[Any]:
    """Returns the pictures of the last step, and the scrubber at that step."""
    import gradio as gr

    number = len(found.steps)
    return [frame_figures(draw_frame(found, number)), gr.Slider(maximum=max(2, found.decoding.num_steps), value=number)]


def _show_pair(found: list[Recording], num_steps: int) -> list[Any]:
    import gradio as gr

    number = max(len(each.steps) for each in found)
    pictures = [
        frame_figures(draw_frame(each, number), title=f"{side}. ") for side, each in zip("AB", found, strict=True)
    ]
    return [*pictures, gr.Slider(maximum=max(2, num_steps), value=number)]


def _pair(found: list[Recording], number: int) -> list[str]:
    return [frame_figures(draw_frame(each, number), title=f"{side}. ") for side, each in zip("AB", found, strict=True)]


def _scrub(recording: Recording | None, number: int) -> Any:
    import gradio as gr

    return gr.skip() if recording is None else frame_figures(draw_frame(recording, number))


def _agreement(first: Recording, second: Recording) -> str:
    same = (first.steps[-1].tokens == second.steps[-1].tokens).sum()
    return message(f"{int(same)} of {first.steps[-1].tokens.numel()} tokens are the same in A and B.")
