"""The functions ``table_1`` to ``table_3``, ``figure_4`` and others, which turn run folders into a page.

``maskgit table``, ``figure`` and ``ablation`` use them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from maskgit_pl.checks import check_integer, shorten
from maskgit_pl.evaluation.classifier import check_cas
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.options import CAS_TRAINING, CASConfig
from maskgit_pl.evaluation.pages import Page, command_line
from maskgit_pl.evaluation.reports.ablation_measurements import Failure, run_ablation
from maskgit_pl.evaluation.reports.ablation_page import make_ablation_page
from maskgit_pl.evaluation.reports.options import NUM_TOKENS, ReportOptions, cas_flags, select_rows
from maskgit_pl.evaluation.reports.paper_tables import (
    OpenedModels,
    measure_editing,
    measure_generation,
    measure_schedules,
    open_models,
)
from maskgit_pl.evaluation.reports.timing import measure_figure_4
from maskgit_pl.evaluation.reports.tokenizer_table import measure_tokenizers
from maskgit_pl.evaluation.run_folders import find_run, find_tokenizer_folders
from maskgit_pl.files import check_writable
from maskgit_pl.pipeline.sharing import local_folder
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.runs.ablation_plan import AblationConfig
from maskgit_pl.runs.layers import flag_words

__all__ = ["ablation", "compare_tokenizers", "figure_4", "figure_8", "table_1", "table_2", "table_3"]

Runs = Sequence[Path | str]


def table_1(
    runs: Runs,
    options: ReportOptions | None = None,
    *,
    cas: CASConfig | None = CAS_TRAINING,
    cas_images: int | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Makes Table 1: class-conditional generation, with a row per model.

    Args:
        runs: Run folders or pretrained folders of the same data.
        options: Number of images, networks, folders and other options; None for the defaults.
        cas: Training of the classification accuracy score; None leaves the score out.
        cas_images: Number of training images of the score; None for that of a row.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if a run or the data do not exist.
        ValueError: if there is no run, the runs have different data or classes, or an option is out of range.
    """
    options = options or ReportOptions()
    if cas_images is not None:
        check_integer("cas_images", cas_images, "[1, inf)")
    check_cas(cas)
    command = command_line(["maskgit table 1", *runs], {**options.flags(), **cas_flags(cas, cas_images)})
    opened = _open("table 1", runs, options, command, bars)
    return measure_generation(opened, cas, cas_images)


def table_2(runs: Runs, options: ReportOptions | None = None, *, bars: Bars = no_bars) -> Page:
    """Makes Table 2: outpainting and inpainting of val images. See ``table_1`` for arguments and errors."""
    options = options or ReportOptions()
    opened = _open("table 2", runs, options, command_line(["maskgit table 2", *runs], options.flags()), bars)
    return measure_editing(opened)


def table_3(
    runs: Runs,
    options: ReportOptions | None = None,
    *,
    num_steps: Sequence[int] | None = None,
    command: str | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Makes Table 3 and Figure 8: mask schedules, with a run per schedule (``runs.train_schedules`` trains them).

    Args:
        runs: Run folders of models that differ only in their mask schedule.
        options: Number of images, networks, folders and other options; None for the defaults.
        num_steps: Numbers of steps; None for 2, 3, 4, 6, 8, 12, 16 and 24. Those above half the number of tokens are
            left out.
        command: Command that produces the page; None for ``maskgit table 3``.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if a run or the data do not exist.
        ValueError: if the training budgets differ, two runs have the same schedule, or for a reason of ``table_1``.
    """
    options = options or ReportOptions()
    own = command_line(["maskgit table 3", *runs], {**options.flags(), "num_steps": num_steps})
    opened = _open("table 3", runs, options, command or own, bars)

    return measure_schedules(opened, num_steps=num_steps)


figure_8 = table_3
"""Makes the page of Table 3, which contains Figure 8."""


def ablation(
    config: AblationConfig | None,
    options: ReportOptions | None = None,
    *,
    name: str | None = None,
    bars: Bars = no_bars,
) -> tuple[Page, list[Failure]]:
    """Runs an ablation, or makes its page again: trains variants of a recipe with several seeds and compares them.

    Finished runs, and the measurements that the ledger holds, are reused. An error of one variant does not end the
    others.

    Args:
        config: The ablation; None makes the page from the ledger, without training or measuring anything.
        options: Number of images, networks, folders and other options; None for the defaults. The data folder is that
            of ``config``.
        name: Name of the ablation, and of the files of its page; None for ``config.name``.
        bars: Progress bars.

    Returns:
        The page, and the variants that failed.

    Raises:
        FileNotFoundError: if a recipe, the data or the tokenizer do not exist.
        ValueError: if a value of a variant is wrong, or the ledger has no row of the ablation.
        PreemptedError: if a training is stopped by a signal. The same call resumes.
    """
    options = options or ReportOptions()
    if name is None:
        if config is None:
            raise ValueError("name must be given, or the ablation (--vary) that it comes from, got neither")
        name = config.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise ValueError(f"name must be letters, digits and ._- only, got {shorten(name)}")
    check_writable("results", options.results, is_folder=True)
    failures: list[Failure] = []
    if config is not None:
        failures = run_ablation(config, options, name=name, command=_describe(config, options, name), bars=bars)

    rows = select_rows(Ledger(options.results / FILE_NAME).rows("ablation"), name)
    page = make_ablation_page(name, rows)
    return replace(page, folder=_dataset_folder(options.results, rows)), failures


def _describe(config: AblationConfig, options: ReportOptions, name: str) -> str:
    """Returns the command that repeats an ablation, for its page."""
    words = ["maskgit ablation", *(f"--vary {shlex.quote(str(factor))}" for factor in config.factors)]
    words += ["--grid"] if config.grid else []
    if config.stage_2 is not None:
        text = shlex.join(flag_words(config.stage_2))
        words.append(f"--stage-2={shlex.quote(text)}" if text else "--stage-2")
    files = ";".join(config.recipes)
    flags = {
        "recipes" if len(config.recipes) > 1 else "recipe": files or None,
        "dataset": config.dataset,
        "stage": None if config.stage == "transformer" else config.stage,
        "seeds": config.seeds,
        "budget": None if config.budget.amount is None else config.budget,
        "pilot_steps": config.pilot_steps if config.budget.unit == "seconds" else None,
        "name": None if name == config.name else name,
        **options.flags(),
    }
    return " ".join([command_line(words, flags), shlex.join(flag_words(config.overrides))]).rstrip()


def _dataset_folder(results: Path, rows: Sequence[Row]) -> Path:
    """Returns the folder of a page. The name of the data comes from the ledger, which may be that of a stranger."""
    dataset = str(rows[-1]["dataset"])
    if dataset == ".." or Path(dataset).name != dataset:
        raise ValueError(
            f"ledger: ablation {rows[-1]['ablation']}: dataset must be the name of a folder without a path, got "
            f"{shorten(dataset)}; remove its lines, or make the page with another --results"
        )
    return results / dataset


def figure_4(
    run: Path | str | None = None,
    options: ReportOptions | None = None,
    *,
    num_tokens: Sequence[int] = NUM_TOKENS,
    sizes: Mapping[str, int] | None = None,
    bars: Bars = no_bars,
) -> Page:
    """Makes Figure 4: the time per image over the number of tokens, for autoregressive decoding and MaskGIT.

    Args:
        run: Run folder or pretrained folder whose sizes are timed, with random weights; None for sizes that suit a CPU.
        options: Folder of the results, and device; None for the defaults.
        num_tokens: Numbers N of tokens, all squares.
        sizes: Sizes of the transformer, such as ``{"depth": 8}``, that replace those of the run or the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run does not exist.
        ValueError: if a size is out of range, or a number of tokens is not a square.
    """
    options, sizes = options or ReportOptions(), dict(sizes or {})
    folder = None if run is None else local_folder(run) / "transformer"

    words = ["maskgit figure 4", *([] if run is None else [run])]
    points = None if tuple(num_tokens) == NUM_TOKENS else num_tokens
    command = command_line(words, {"num_tokens": points, **sizes, "device": options.device})
    return measure_figure_4(folder, options, num_tokens=num_tokens, sizes=sizes, command=command, bars=bars)


def compare_tokenizers(runs: Runs, options: ReportOptions | None = None, *, bars: Bars = no_bars) -> Page:
    """Makes the table of tokenizers, with a row for each.

    Args:
        runs: Run folders, pretrained folders or tokenizer folders.
        options: Number of images, networks, folders and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if a tokenizer or the data do not exist.
        ValueError: if there is no run, or the data do not fit a tokenizer.
    """
    options = options or ReportOptions()
    _check_runs("table tokenizers", runs)
    folders = [find_tokenizer_folders(run, data=options.data, classifier=options.classifier) for run in runs]
    # All rows compare with the same real images.
    folders = [replace(each, data=folders[0].data) for each in folders]

    command = command_line(["maskgit table tokenizers", *runs], options.flags())
    return measure_tokenizers(folders, options, command, bars)


def _open(task: str, runs: Runs, options: ReportOptions, command: str, bars: Bars) -> OpenedModels:
    _check_runs(task, runs)
    folders = [find_run(run, data=options.data, classifier=options.classifier) for run in runs]

    return open_models(folders, options, command, bars)


def _check_runs(task: str, runs: Runs) -> None:
    if not runs:
        raise ValueError(f"{task} must have at least one run, such as runs/fashion-mnist-adaln, got none")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{task} must run in one process; start it without torchrun, or use `maskgit evaluate`")
