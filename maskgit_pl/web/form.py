"""The parts of the page that several tabs share: fields, plots of the schedule, downloads, and answers to events.

Fields are class, seed and decoding settings. An answer shows an error as a sentence, and decoding steps at a pace at
which people see them. gradio is imported when a part is added.
"""

from __future__ import annotations

import inspect
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.errors import RunError, is_user_error, printable
from maskgit_pl.evaluation.figures import count_known_tokens
from maskgit_pl.schedules import MaskSchedule, mask_schedules
from maskgit_pl.web.markup import code, message, plot
from maskgit_pl.web.settings import FormSettings
from maskgit_pl.web.studio import Made, Studio

if TYPE_CHECKING:
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.pipeline import MaskGIT

__all__ = [
    "MODEL",
    "PLOTS",
    "add_class",
    "add_results",
    "add_schedule_plot",
    "add_seed",
    "add_settings",
    "answer",
    "class_choices",
    "count_kept",
    "describe_counts",
    "draw_counts",
    "explain",
    "kept_by_schedule",
    "pace",
    "show_results",
]

_T = TypeVar("_T")

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
_SECONDS = 20  # for which an error is shown
_LONGEST_STEP, _LONGEST_RUN = 0.15, 3.0  # seconds that a fast step and a fast run are stretched to
_KEPT, _MASKED = "#e65a14", "#8a8a8a"  # as in the pictures of tokens
_log = logging.getLogger(__name__)


def add_class(studio: Studio, *, label: str = "Class") -> Any:
    """Adds the picker of a class."""
    import gradio as gr

    return gr.Dropdown(class_choices(studio), value=0, label=label, filterable=True)


def class_choices(studio: Studio, *, with_none: bool = False) -> list[tuple[str, int | None]]:
    """Returns the label and the value of each class; with ``with_none`` also "no class", if the model knows it."""
    names: list[tuple[str, int | None]] = [(printable(name), n) for n, name in enumerate(studio.pipe.class_names)]
    return [(_NO_CLASS, None), *names] if with_none and studio.pipe.outline.null_label is not None else names


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


def add_schedule_plot(studio: Studio, page: Any, fields: list[Any]) -> None:
    """Adds the plot of the schedule, which follows the fields of ``add_settings``; ``page`` draws it when it opens."""
    import gradio as gr

    def draw(*values: Any) -> str:
        try:
            return _schedule_plot(studio, *values)
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


def answer(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a handler of gradio whose errors the page shows as sentences. ``handler`` may be a generator."""
    import gradio as gr

    def shown(error: Exception) -> Any:
        if isinstance(error, gr.Error):
            return error
        # gradio renders the message as HTML.
        return gr.Error(escape(explain(error)), duration=_SECONDS, title="This cannot be done", print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def run(*values: Any) -> Iterator[Any]:
            try:
                yield from handler(*values)
            except Exception as error:
                raise shown(error) from None

        return run

    @wraps(handler)
    def call(*values: Any, **named: Any) -> Any:
        try:
            return handler(*values, **named)
        except Exception as error:
            raise shown(error) from None

    return call


def explain(error: Exception) -> str:
    """Returns the text that the page shows for an error; an internal error is logged with its traceback.

    Args:
        error: A caught error.
    """
    if is_user_error(error) or isinstance(error, RunError):
        return printable(error, limit=1000)
    _log.error("internal error of maskgit_pl or of a library", exc_info=error)
    return f"{type(error).__name__}: internal error of maskgit_pl or of a library; the terminal shows where"


def pace(steps: Iterable[_T], *, num_steps: int) -> Iterator[_T]:
    """Yields the steps of a fast model slowly enough to be seen: 0.15 s each, and at most 3 s in all.

    Args:
        steps: Results of the steps.
        num_steps: Number of steps.
    """
    least = min(_LONGEST_STEP, _LONGEST_RUN / num_steps)
    for step in steps:
        began = time.monotonic()
        yield step
        # Time that the page took to draw the step counts.
        time.sleep(max(0.0, least - (time.monotonic() - began)))


def count_kept(pipe: MaskGIT, decoding: DecodingConfig) -> list[int]:
    """Counts the tokens that each decoding step keeps.

    Args:
        pipe: The model.
        decoding: Settings that ``pipe.check_decoding`` accepts.

    Returns:
        T counts. A selector that sets the counts itself may keep more.
    """
    num_tokens = pipe.outline.num_tokens
    decoder = decoding.build_decoder(pipe.transformer.schedule_for("web"))
    return [step.before[0] - step.after[0] for step in decoder.plan([num_tokens], num_tokens)]


def describe_counts(counts: Sequence[int], decoding: DecodingConfig) -> str:
    """Returns the counts of ``count_kept`` as a sentence."""
    listed = ", ".join(map(str, counts))
    selector = decoding.token_selector
    if selector is not None and not token_selectors.build(selector).follows_schedule:
        return f"The token selector keeps as many tokens as it is sure of; the mask schedule asks for at least {listed}"
    return f"Tokens kept at each step: {listed}"


def draw_counts(counts: Sequence[int]) -> bytes:
    """Draws the tokens that each step keeps as bars, and those that stay masked as a line.

    Returns:
        An SVG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    page = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes, steps, total = page.subplots(), range(1, len(counts) + 1), sum(counts)
    axes.bar(steps, counts, color=_KEPT, label="kept at the step")
    masked = [total - sum(counts[:step]) for step in range(len(counts) + 1)]
    axes.plot(range(len(counts) + 1), masked, color=_MASKED, marker="o", markersize=3, label="still masked after it")
    axes.set(xlabel="step", ylabel="tokens", ylim=(0, total * 1.04))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    page.savefig(stream, format="svg")
    return stream.getvalue()


def kept_by_schedule(num_tokens: int, num_steps: int) -> Mapping[str, list[int]]:
    """Returns the tokens that each step keeps, for each registered mask schedule without required arguments.

    Args:
        num_tokens: N, tokens per image.
        num_steps: T, in [1, N].

    Raises:
        ValueError: if ``num_steps`` is out of range.
    """
    return {name: _kept(schedule, num_tokens, num_steps) for name, schedule in mask_schedules.build_all().items()}


def _kept(schedule: MaskSchedule, num_tokens: int, num_steps: int) -> list[int]:
    known = count_known_tokens(schedule, num_tokens=num_tokens, num_steps=num_steps)
    return [after - before for before, after in pairwise([0, *known])]


def _schedule_plot(studio: Studio, *values: Any) -> str:
    """Returns the plot of the tokens that each step keeps, for the values of the settings' fields."""
    pipe = studio.pipe
    decoding = pipe.decoding_with(**FormSettings(*values).changes(pipe.decoding))
    pipe.check_decoding(decoding)
    counts = count_kept(pipe, decoding)
    text = describe_counts(counts, decoding)
    return plot(draw_counts(counts), alt=f"Plot of the mask schedule. {text}", caption=text)
