"""The tables and figures of the paper as functions: run folders in, a page out.

Everything that can be refused without torch is refused before torch is imported. Used by ``maskgit table``, ``figure``
and ``ablation``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.evaluation.pages import command_line
from maskgit_pl.evaluation.reports.options import ReportOptions, TimingOptions
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.progress import Bars, no_bars

if TYPE_CHECKING:
    from maskgit_pl.evaluation.pages import Page
    from maskgit_pl.evaluation.reports.paper_measurements import OpenedModels

__all__ = ["figure_4", "figure_8", "table_1", "table_2", "table_3"]

Runs = Sequence[Path | str]


def table_1(runs: Runs, options: ReportOptions | None = None, *, bars: Bars = no_bars) -> Page:
    """Makes Table 1: class-conditional generation, a row for each model.

    Args:
        runs: Run folders or pretrained folders of the same data.
        options: What is measured, and where it is kept; None for the defaults.
        bars: Shows the progress.

    Raises:
        FileNotFoundError: if there is no such run or data.
        ValueError: if no run is named, runs are of different data or classes, or an option is wrong.
    """
    options = options or ReportOptions()
    command = command_line(["maskgit table 1", *runs], {**options.flags(), **options.cas_flags()})
    opened = _open("table 1", runs, options, command, bars)
    from maskgit_pl.evaluation.reports.paper_measurements import measure_generation

    return measure_generation(opened)


def table_2(runs: Runs, options: ReportOptions | None = None, *, bars: Bars = no_bars) -> Page:
    """Makes Table 2: outpainting and inpainting of held-out images. For arguments and errors see ``table_1``."""
    options = options or ReportOptions()
    opened = _open("table 2", runs, options, command_line(["maskgit table 2", *runs], options.flags()), bars)
    from maskgit_pl.evaluation.reports.paper_measurements import measure_editing

    return measure_editing(opened)


def table_3(
    runs: Runs,
    options: ReportOptions | None = None,
    *,
    num_steps: Sequence[int] | None = None,
    command: str | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Makes Table 3 and Figure 8: mask schedules, a run for each (``runs.train_schedules`` trains them).

    Args:
        runs: Run folders of models that differ only in their mask schedule.
        options: What is measured, and where it is kept; None for the defaults.
        num_steps: The T; None for 2, 3, 4, 6, 8, 12, 16 and 24. Those above half of the number of tokens are left out.
        command: The command that makes the page again; None for ``maskgit table 3``.
        bars: Shows the progress.

    Raises:
        FileNotFoundError: if there is no such run or data.
        ValueError: if runs were not trained alike, two are of one schedule, or as in ``table_1``.
    """
    options = options or ReportOptions()
    own = command_line(["maskgit table 3", *runs], {**options.flags(), "num_steps": num_steps})
    opened = _open("table 3", runs, options, command or own, bars)
    from maskgit_pl.evaluation.reports.paper_measurements import measure_schedules

    return measure_schedules(opened, num_steps=num_steps)


figure_8 = table_3
"""Makes the page of Table 3, whose picture is Figure 8."""


def figure_4(run: Path | str | None = None, options: TimingOptions | None = None, *, bars: Bars = no_bars) -> Page:
    """Makes Figure 4: the time of an image by its number of tokens, autoregressive decoding against MaskGIT.

    Args:
        run: Run folder or pretrained folder whose sizes are timed, with random weights; None for sizes that suit a CPU.
        options: What is timed, and where it is kept; None for the defaults.
        bars: Shows the progress.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if a size is out of range, or a number of tokens is not a square.
    """
    from maskgit_pl.pipeline.sharing import local_folder

    options = options or TimingOptions()
    folder = None if run is None else local_folder(run) / "transformer"
    from maskgit_pl.evaluation.reports.timing_page import measure_figure_4

    words = ["maskgit figure 4", *([] if run is None else [run])]
    return measure_figure_4(folder, options, command=command_line(words, options.flags()), bars=bars)


def _open(task: str, runs: Runs, options: ReportOptions, command: str, bars: Bars) -> OpenedModels:
    if not runs:
        raise ValueError(f"{task}: at least one run is needed, such as runs/fashion-mnist-cosine")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{task}: one process measures it; `maskgit evaluate` is what several share, drop torchrun")
    folders = [find_run(run, data=options.data, classifier=options.classifier) for run in runs]
    from maskgit_pl.evaluation.reports.paper_measurements import open_models

    return open_models(folders, options, command, bars)
