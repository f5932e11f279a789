"""The tab of mask schedules: their curves, the tokens that each step keeps, and the image under each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from maskgit_pl.evaluation.reports.schedule_figures import draw_schedules
from maskgit_pl.pipeline.decoding_figures import select_steps
from maskgit_pl.pipeline.display import Recording
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.web.answers import answer, explain
from maskgit_pl.web.form import MODEL, PLOTS, add_class, add_seed
from maskgit_pl.web.frames import draw_frame
from maskgit_pl.web.markup import counts_table, figure, message, plot, schedule_heading, strip
from maskgit_pl.web.plots import kept_by_schedule
from maskgit_pl.web.settings import FormSettings, PageRequest
from maskgit_pl.web.studio import Studio

__all__ = ["add_schedules_tab"]


def add_schedules_tab(studio: Studio, page: Any) -> None:
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
