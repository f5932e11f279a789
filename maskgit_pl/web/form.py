"""The fields of the page that several tabs share: class, seed, decoding settings, downloads and commands."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from maskgit_pl.text import printable
from maskgit_pl.web.markup import code, message, plot
from maskgit_pl.web.plots import count_kept, describe_counts, draw_counts
from maskgit_pl.web.settings import FormSettings
from maskgit_pl.web.studio import Made, Studio

__all__ = [
    "MODEL",
    "PLOTS",
    "add_class",
    "add_results",
    "add_schedule_plot",
    "add_seed",
    "add_settings",
    "class_choices",
    "schedule_plot",
    "show_results",
]

MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of events that use the model: they wait for one another, and other events do not wait for them."""

PLOTS: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_id": "plots",
    "concurrency_limit": 2,
    "api_visibility": "private",
}
"""Options of events that draw plots."""

_NO_CLASS = "no class"


def class_choices(studio: Studio, *, with_none: bool = False) -> list[tuple[str, int | None]]:
    """Returns the label and the value of each class; with ``with_none`` also "no class", if the model knows it."""
    names: list[tuple[str, int | None]] = [(printable(name), n) for n, name in enumerate(studio.pipe.class_names)]
    return [(_NO_CLASS, None), *names] if with_none and studio.pipe.outline.null_label is not None else names


def add_class(studio: Studio, *, label: str = "Class") -> Any:
    """Adds the picker of a class."""
    import gradio as gr

    return gr.Dropdown(class_choices(studio), value=0, label=label, filterable=True)


def add_seed() -> Any:
    """Adds the number of the seed, and a button that draws another one."""
    import gradio as gr

    with gr.Row(equal_height=True, elem_classes="seed"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=120, scale=2)
        button = gr.Button("Another seed", size="sm", min_width=110, scale=1)
    # In the browser: it needs no answer of the server.
    button.click(None, None, seed, js="() => Math.floor(Math.random() * 100000)", api_visibility="private")
    return seed


def add_settings(
    studio: Studio, *, title: str = "Decoder settings", is_open: bool = True, num_steps: int | None = None
) -> list[Any]:
    """Adds the fields of ``FormSettings`` in their order, with the model's own values.

    Args:
        studio: The model.
        title: Heading of the fields.
        is_open: False folds them away.
        num_steps: Number of steps in place of the model's own.
    """
    import gradio as gr

    pipe, own = studio.pipe, FormSettings.of(studio.pipe.decoding)
    selectors, schedules, guidances = studio.choices
    temperature = {"minimum": 0, "step": 0.05}
    with gr.Accordion(title, open=is_open):
        selector = gr.Dropdown(selectors, value=own.token_selector, label="Token selector")
        schedule = gr.Dropdown(schedules, value=own.mask_schedule, label="Mask schedule")
        steps = gr.Slider(
            1, pipe.outline.num_tokens, num_steps or own.num_steps, step=1, precision=0, label="Decoding steps"
        )
        # Gradio refuses values above the maximum, and any value may be the model's own.
        first, last = (
            gr.Slider(**temperature, maximum=max(4, value), value=value, label=f"Sampling temperature, {step} step")
            for step, value in (("first", own.first_temperature), ("last", own.last_temperature))
        )
        noise = gr.Slider(
            0,
            max(30, own.choice_temperature),
            own.choice_temperature,
            step=0.5,
            label="Choice temperature (noise on the confidence)",
        )
        guidance = gr.Dropdown(guidances, value=own.guidance, label="Guidance schedule")
        scale = gr.Slider(
            0, max(10, own.guidance_scale), own.guidance_scale, step=0.05, label="Guidance scale (0: no guidance)"
        )
    fields = [selector, schedule, steps, first, last, noise, guidance, scale]
    assert len(fields) == len(asdict(own))
    return fields


def schedule_plot(studio: Studio, *values: Any) -> str:
    """Returns the plot of the tokens that each step keeps, for the values of the settings' fields.

    Raises:
        ValueError: if the model does not support the settings.
    """
    pipe = studio.pipe
    decoding = pipe.decoding_with(**FormSettings(*values).changes(pipe.decoding))
    pipe.check_decoding(decoding)
    counts = count_kept(pipe, decoding)
    text = describe_counts(counts, decoding)
    return plot(draw_counts(counts), alt=f"Plot of the mask schedule. {text}", caption=text)


def add_schedule_plot(studio: Studio, page: Any, fields: list[Any]) -> None:
    """Adds the plot of the schedule, which follows the fields of ``add_settings``; ``page`` draws it when it opens."""
    import gradio as gr

    from maskgit_pl.web.answers import explain

    def draw(*values: Any) -> str:
        try:
            return schedule_plot(studio, *values)
        except Exception as error:  # shown in place of the plot
            return message(explain(error))

    picture = gr.HTML(elem_classes="schedule")
    triggers = [page.load, *(field.change for field in fields)]
    gr.on(triggers, draw, fields, picture, trigger_mode="always_last", **PLOTS)


def add_results() -> list[Any]:
    """Adds the downloads and the lines that make the same image, hidden until ``show_results`` gives their values."""
    import gradio as gr

    with gr.Column(visible=False) as box:
        files = gr.File(label="Downloads", file_count="multiple", interactive=False)
        with gr.Accordion("Make the same image without this page", open=False):
            lines = gr.HTML()
    return [box, files, lines]


def show_results(made: Made) -> list[Any]:
    """Returns the values of ``add_results``."""
    import gradio as gr

    lines = code("Python", made.python) + code("Command line", made.command)
    return [gr.Column(visible=True), [str(file) for file in made.files], lines]
