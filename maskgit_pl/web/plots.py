"""Plots of mask schedules: the tokens that each step keeps, and the mask ratios of all schedules."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.reports.schedule_figures import count_known_tokens
from maskgit_pl.schedules import MaskSchedule, mask_schedules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["count_kept", "describe_counts", "draw_counts", "kept_by_schedule"]

_KEPT, _MASKED = "#e65a14", "#8a8a8a"  # as in the pictures of tokens


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
    masked = [row[0] for row in decoder.count_masked([num_tokens], num_tokens)]
    return [before - after for before, after in pairwise(masked)]


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
    return _svg(page)


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


def _svg(page: Figure) -> bytes:
    stream = io.BytesIO()
    page.savefig(stream, format="svg")
    return stream.getvalue()
