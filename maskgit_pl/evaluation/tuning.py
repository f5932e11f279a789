"""``tune``: searches for the best decoding of a run's model with Optuna, and writes it next to the weights.

1. Measure the trials. Trial 0 is the model's current decoding; Optuna draws the others from ``SearchSpace``. The study
   is an SQLite file, so that the same command continues it.
2. Measure trial 0, the best trials and the current decoding again, with other noise and twice the number of images.
3. The best of step 2 wins. Without the second measurement, the winner would be the trial with the luckiest noise.

The figure shows the best decoding with every mask schedule, as a metric over the number of steps (paper, Figure 8,
right). The paper trains a model for each schedule; here one model is decoded with all.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from maskgit_pl.checks import check_integer
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.distributed import describe_environment
from maskgit_pl.errors import markdown
from maskgit_pl.evaluation.cache import digest_of, shorten_digest
from maskgit_pl.evaluation.comparison import list_selectors, measure_real
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, collect_numbers
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.metrics import (
    Metrics,
    direction,
    find_metric,
    format_value,
    is_fast,
    title,
    tuning_column,
)
from maskgit_pl.evaluation.opening import (
    RunFolders,
    can_guide,
    check_model_decoding,
    create_evaluated_model,
    find_run,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.options import (
    TuningOptions,
    choose_plot_steps,
    decoding_key,
    default_steps,
    describe_decoding,
    round_to_classes,
    with_steps,
)
from maskgit_pl.evaluation.pages import (
    LineEnd,
    Page,
    command_line,
    figure_to_png,
    heading,
    markdown_table,
    name_lines,
    paragraph,
    plot_by_steps,
    plot_floor,
    terminal_table,
    terminal_word,
)
from maskgit_pl.evaluation.search_space import SearchSpace, check_schedules, list_schedules
from maskgit_pl.files import check_writable
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.card import refresh_card
from maskgit_pl.pipeline.pretrained import save_decoding
from maskgit_pl.pipeline.sharing import bundled_models
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.randomness import random_bits
from maskgit_pl.schedules import mask_schedules

if TYPE_CHECKING:
    import optuna
    from rich.table import Table

__all__ = ["ScheduleCurves", "Trial", "TuningResult", "draw_curves", "make_page", "measure_curves", "search", "tune"]

Measure: TypeAlias = Callable[[DecodingConfig, int, int, str], Mapping[str, float]]
"""Measures a decoding, given the number of images, the seed of the first one, and a remark for the ledger."""

_FINALISTS = 3  # trials of step 2, besides trial 0 and the current decoding
_STEPS = (4, 6, 8, 12, 16)
_CONFIRMATION_OFFSET = 1_000_000  # between the seeds of steps 1 and 2, so that no image has the same noise
_SHOWN_TRIALS = 10  # of the table of trials
_COLUMNS = ("class_agreement", "fid/classifier", "kid/classifier", "diversity", "seconds_per_image")
_COLOURS = ("#14427a", "#c58b3a", "#6d9a5c", "#a0709f", "#5aa0a3", "#b3605b", "#8a8a8a", "#9a8c4f", "#7f86c4")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A decoding with its measured values.

    Args:
        number: Index of the trial; 0 is the decoding that the search began with.
        decoding: The decoding.
        numbers: Values by name, such as ``fid/classifier``.
    """

    number: int
    decoding: DecodingConfig
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class TuningResult:
    """The result of a search.

    Args:
        metric: Name of the metric of the search, such as ``fid/classifier``.
        trials: All trials, in order.
        confirmed: Trial 0, the best trials and the current decoding, measured again with other noise.
        num_images: Number of images of each trial; ``confirmed`` has twice as many.
        folder: Folder of the study, the page and the figure.
        decoding_file: Path of the written ``decoding.json``; None if the model already had the winning decoding.
        old_decoding_file: Path of the copy of the previous ``decoding.json``; None if there was none.
        num_measured: Number of new measurements, without those that the ledger already held.
    """

    metric: str
    trials: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    num_images: int
    folder: Path = Path()
    decoding_file: Path | None = None
    old_decoding_file: Path | None = None
    num_measured: int = 0

    @property
    def before(self) -> Trial:
        """The decoding that the search began with, measured again."""
        return self.confirmed[0]

    @property
    def winner(self) -> Trial:
        """The best of ``confirmed``; a tie keeps the earlier one, which is the decoding that the search began with."""
        return _rank(self.confirmed, self.metric)[0]

    def table(self) -> Table:
        """Returns the second measurement as a table for the terminal."""
        above = f"second measurement with other noise, {2 * self.num_images} images each"
        rows = self.iter_cells(self.confirmed, terminal_word, "[bold]{}[/]")
        return terminal_table(above, self.headings, rows, left=2)

    @property
    def columns(self) -> list[str]:
        """The names of the values in tables, with the metric of the search first."""
        return list(dict.fromkeys((self.metric, *_COLUMNS)))

    @property
    def headings(self) -> list[str]:
        """The headings of a table of trials."""
        return ["trial", "decoding", *map(title, self.columns)]

    def iter_cells(self, trials: Sequence[Trial], word: Callable[[str], str], bold: str = "{}") -> Iterator[list[str]]:
        """Yields the cells of each trial; ``word`` escapes a text, and ``bold`` formats the cells of the winner."""
        for trial in trials:
            given = trial.numbers
            cells = [format_value(name, given[name], more_digits=1) if name in given else "" for name in self.columns]
            form = bold if trial.number == self.winner.number else "{}"
            yield [form.format(cell) for cell in (str(trial.number), word(describe_decoding(trial.decoding)), *cells)]


def _rank(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Returns trials sorted by a metric, the best first; equal ones keep their order."""
    sign = -1 if find_metric(metric).higher_is_better else 1
    return sorted(trials, key=lambda trial: sign * trial.numbers[metric])


def tune(
    run: Path | str,
    *,
    data: Path | None = None,
    trials: int = 40,
    metric: str = "fid",
    num_images: int = 500,
    out: Path | None = None,
    options: TuningOptions | None = None,
    bars: Bars = no_bars,
) -> TuningResult:
    """Searches for the best decoding of a model, and writes it next to the weights, with a page and a figure.

    The same call continues a search that was stopped, to the same result.

    Args:
        run: Run folder or pretrained folder.
        data: Data folder; None for the data that the run was trained on.
        trials: Number of trials of the study, with those of earlier calls.
        metric: A metric of the registry, such as ``fid`` or ``kid``, in the features of the data's own classifier, or
            ``agreement``.
        num_images: Number of images per trial, at least 2 per class.
        out: Folder of the study, the page and the ledger; None for ``RUN/tuning`` and ``RUN/evaluation``.
        options: The search, the seed and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run or the data do not exist.
        TypeError: if a selector does not accept its arguments.
        ValueError: if Optuna is not installed, a name is unknown, the model is autoregressive or one of the package,
            the classes of the data are not the model's, or a number is out of range.
    """
    options = options or TuningOptions()
    check_integer("trials", trials, "[1, inf)")
    name = tuning_column(metric)
    if find_spec("optuna") is None:
        raise ValueError("tune requires the package optuna: pip install 'maskgit_pl[tune]'")
    folders = find_run(run, data=data, classifier=options.classifier)
    _check_model_folder(folders.pretrained)
    pipe = open_model(folders, options.device, dtype=options.dtype, negative_model=options.negative_model)
    space = _make_space(pipe, options)
    images = open_data(folders, pipe, num_workers=options.num_workers)
    count = round_to_classes(num_images, images.num_classes)
    model = create_evaluated_model(folders, pipe, out)
    ledger = Ledger(model.folder / FILE_NAME)
    evaluator = open_evaluator(folders, pipe, images, ledger, batch_size=options.batch_size, bars=bars)
    amount: Metrics = "fast" if is_fast(name) else "all"

    def measure(decoding: DecodingConfig, num_images: int, seed: int, purpose: str) -> Mapping[str, float]:
        rows = evaluator.measure_samples(
            model, decoding, num_images=num_images, seed=seed, metrics=amount, purpose=purpose
        )
        numbers = collect_numbers(rows)
        if name not in numbers:
            raise ValueError(
                f"metric {metric} has no value for {num_images} images; raise --num-images, or choose another"
            )
        return numbers

    folder = out or folders.run / "tuning"
    key = _study_key(evaluator, model, space, num_images=count, seed=options.seed)
    study = _open_study(folder / "study.db", name, key)
    result = search(study, space, measure, metric=name, trials=trials, num_images=count, options=options, bars=bars)
    result = replace(result, folder=folder)
    # The page is written before the decoding, in case that the folder of the model is full by now.
    command, real = _command(run, trials, metric, num_images, options), measure_real(evaluator, 2 * count, amount)
    make_page(result, real, command=command).write()
    result = _save_decoding(folders, pipe, evaluator, result, options)
    if options.plot:
        floor = measure_real(evaluator, count, amount)[name]
        curves = measure_curves(measure, pipe, result, seed=options.seed, floor=floor, bars=bars)
        make_page(result, real, command=command, curves=curves).write()
    return replace(result, num_measured=evaluator.num_measured)


def _check_model_folder(folder: Path) -> None:
    """Checks that the decoding can be written, before a search that takes hours."""
    name = folder.name
    if folder.resolve() in (each.resolve() for each in bundled_models().values()):
        raise ValueError(
            f"tune must have a model outside of the package, next to whose weights it writes, got {name}; copy it with "
            f"MaskGIT.from_pretrained({name!r}).save_pretrained('DIR'), and tune DIR"
        )
    check_writable("decoding.json", folder / "decoding.json")


def _make_space(pipe: MaskGIT, options: TuningOptions) -> SearchSpace:
    """Returns the space of a search, all of whose selectors, numbers of steps and schedules the model can decode."""
    pipe.outline.check_parallel("tune")
    num_tokens = pipe.outline.num_tokens
    space = SearchSpace(
        pipe.decoding,
        tuple(options.selectors or (spec for _, spec in list_selectors())),
        tuple(options.num_steps or default_steps(num_tokens, _STEPS)),
        list_schedules() if options.schedules is None else tuple(options.schedules),
        pipe.tokenizer.network.config.codebook_size,
        num_tokens,
        can_guide=can_guide(pipe),
    )
    check_schedules(space.schedules)
    check_model_decoding(pipe, pipe.decoding)
    for selector, num_steps in product(space.selectors, space.num_steps):
        check_model_decoding(pipe, replace(with_steps(pipe.decoding, num_steps), token_selector=selector))
    return space


def _study_key(
    evaluator: Evaluator, model: EvaluatedModel, space: SearchSpace, *, num_images: int, seed: int
) -> dict[str, Any]:
    """Returns what determines the trials of a study, besides the decoding that it begins with."""
    negative = model.pipe.negative_model
    return {
        **{name: model.identity[name] for name in ("tokenizer", "transformer", "config")},
        "negative_model": None if negative is None else negative.digest,
        "data": evaluator.data.summary.fingerprint,
        "classifier": [network.extractor.digest for network in evaluator.networks.values()],
        "space": [space.selectors, space.num_steps, space.schedules],
        "num_images": num_images,
        "seed": seed,
    }


def _open_study(file: Path, metric: str, key: Mapping[str, Any]) -> optuna.Study:
    """Opens the study of a metric and a key in an SQLite file, which holds one for each of them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file.parent.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        storage=f"sqlite:///{file}",
        study_name=f"{metric} {shorten_digest(digest_of(key))}",
        direction="maximize" if find_metric(metric).higher_is_better else "minimize",
        load_if_exists=True,
    )


def search(
    study: optuna.Study,
    space: SearchSpace,
    measure: Measure,
    *,
    metric: str,
    trials: int,
    num_images: int,
    options: TuningOptions,
    bars: Bars = no_bars,
) -> TuningResult:
    """Runs a search, or continues it; the module docstring describes its steps.

    Args:
        study: The study, which holds the trials of earlier calls.
        space: The decodings of the trials; its ``start`` is the current decoding.
        measure: Measures a decoding.
        metric: Name of the metric, such as ``fid/classifier``.
        trials: Number of trials, with those of earlier calls.
        num_images: Number of images per trial.
        options: Seed of the choices and of the first image of each trial, and time limit.
        bars: Progress bars.
    """
    import optuna

    seed, begin, limit = options.seed, time.monotonic(), options.seconds or math.inf
    done = _read_trials(study)
    advance = bars("trials", trials, done=len(done))
    # 1. The current decoding is a trial, also if another search has written it since the first one.
    while (is_new := all(trial.decoding != space.start for trial in done)) or (
        len(done) < trials and time.monotonic() - begin < limit
    ):
        number = len(done)
        # With a sampler of its own, a trial depends only on the seed, its index and the trials before it.
        study.sampler = optuna.samplers.TPESampler(seed=int(random_bits("tuning", seed=seed, index=number)))
        trial = study.ask()
        decoding = space.start if is_new else replace(space, start=done[0].decoding).draw(trial)
        numbers = dict(measure(decoding, num_images, seed, f"trial {number}"))
        trial.set_user_attr("decoding", asdict(decoding))
        trial.set_user_attr("numbers", numbers)
        study.tell(trial, numbers[metric])
        done.append(Trial(number, decoding, numbers))
        _log.info("trial %3d  %s %8.4f  %s", number, metric, numbers[metric], describe_decoding(decoding))
        advance(1)
    # 2.
    seed, confirmed = (seed + _CONFIRMATION_OFFSET) % 2**32, list[Trial]()
    for finalist in _choose_finalists(done, metric, space.start):
        numbers = dict(measure(finalist.decoding, 2 * num_images, seed, f"confirmation of trial {finalist.number}"))
        confirmed.append(replace(finalist, numbers=numbers))
    # 3. ``TuningResult.winner`` is the best of ``confirmed``.
    return TuningResult(metric, tuple(done), tuple(confirmed), num_images)


def _read_trials(study: optuna.Study) -> list[Trial]:
    """Reads the complete trials of a study; those that a kill cut off are left out."""
    complete = [trial.user_attrs for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return [
        Trial(number, DecodingConfig(**values["decoding"]), values["numbers"]) for number, values in enumerate(complete)
    ]


def _choose_finalists(trials: Sequence[Trial], metric: str, current: DecodingConfig) -> list[Trial]:
    """Returns trial 0, the best others, and the trial with the current decoding, without equal decodings."""
    chosen: list[Trial] = []
    for trial in (trials[0], *_rank(trials, metric)):
        if len(chosen) <= _FINALISTS and all(trial.decoding != other.decoding for other in chosen):
            chosen.append(trial)
    if all(trial.decoding != current for trial in chosen):
        chosen.append(next(trial for trial in trials if trial.decoding == current))
    return chosen


def _save_decoding(
    folders: RunFolders, pipe: MaskGIT, evaluator: Evaluator, result: TuningResult, options: TuningOptions
) -> TuningResult:
    """Writes the winner to ``decoding.json`` next to the weights, with a negative model that the user names."""
    if result.winner.decoding == pipe.decoding and options.negative_model is None:
        return result
    tuned = {
        "metric": result.metric,
        "value": result.winner.numbers[result.metric],
        "before": result.before.numbers[result.metric],
        "trials": len(result.trials),
        "num_images": 2 * result.num_images,
        "seed": options.seed,
        "data": evaluator.data.summary.fingerprint,
        "split": "val",
        "commit": describe_environment()["commit"],
    }
    negative = None if pipe.negative_model is None else pipe.negative_model.folder
    # The previous decoding is kept next to it, and the model card shows the new one.
    old = save_decoding(folders.pretrained, result.winner.decoding, tuned=tuned, negative_model=negative)
    refresh_card(folders.pretrained)
    return replace(result, decoding_file=folders.pretrained / "decoding.json", old_decoding_file=old)


def _command(run: Path | str, trials: int, metric: str, num_images: int, options: TuningOptions) -> str:
    given = {"trials": trials, "metric": metric, "num_images": num_images, "seed": options.seed}
    given |= {name: getattr(options, name) for name in ("seconds", "num_steps", "selectors", "negative_model")}
    # An empty list has a word of its own on the command line.
    given["schedules"] = "own" if options.schedules is not None and not options.schedules else options.schedules
    return command_line(["maskgit tune", run], given)


def make_page(
    result: TuningResult, real: Mapping[str, float], *, command: str, curves: ScheduleCurves | None = None
) -> Page:
    """Returns the page of a search.

    Args:
        result: The search.
        real: Values of as many real training images as in the second measurement; see ``comparison.measure_real``.
        command: Command that produces the page.
        curves: Curves of the figure; None for no figure.
    """
    count, shown = result.num_images, _rank(result.trials, result.metric)[:_SHOWN_TRIALS]
    floor = [f"{title(name)} {format_value(name, real[name])}" for name in ("fid/classifier", "kid/classifier")]
    lines = heading("Search for a decoding", command)
    lines += paragraph(
        f"{len(result.trials)} trials of {count} images were compared by {result.metric} ({direction(result.metric)}),",
        "all with the same noise. Trial 0 is the decoding that the search began with. It and the best",
        f"{len(result.confirmed) - 1} others were then measured again with other noise and {2 * count} images.",
        "The best of this second measurement wins. Distances are measured from the real val images, in the features of",
        "the data set's own classifier and not of Inception; the classifier is correct for",
        f"{real['class_agreement']:.1%} of these images. For comparison, {real['num_images']} real training images",
        f"have {' and '.join(floor)}.",
    )
    lines += ["", "## Second measurement", ""]
    lines += markdown_table(result.headings, result.iter_cells(result.confirmed, markdown, "**{}**"), left=2)
    lines += ["", *_explain_winner(result), "", f"## Best of {len(result.trials)} trials, {count} images each", ""]
    lines += markdown_table(result.headings, result.iter_cells(shown, markdown), left=2)
    pictures = {}
    if curves is not None:
        lines += ["", *_describe_curves(result, curves)]
        pictures["tuning.png"] = draw_curves(result, curves)
    rows = [{"trial": each.number, **each.numbers, "decoding": decoding_key(each.decoding)} for each in result.trials]
    return Page("tuning", "\n".join(lines) + "\n", rows, pictures, folder=result.folder)


def _explain_winner(result: TuningResult) -> list[str]:
    metric, winner = result.metric, result.winner
    before, after = result.before.numbers[metric], winner.numbers[metric]
    if winner.number == 0:
        return [f"Trial 0 wins, with {metric} {before:.4g}: no other decoding is better."]
    verdict = f"Trial {winner.number} wins: {metric} was {before:.4g} and is now {after:.4g}. The new decoding is:"
    return [verdict, "", "```json", json.dumps(asdict(winner.decoding), indent=2), "```"]


@dataclass(frozen=True)
class ScheduleCurves:
    """The metric of a search for one decoding with each mask schedule, over the number of steps.

    Args:
        values: Values by schedule and T; the schedule of the training comes first.
        decoding: Description of the decoding that all points share.
        floor: Value of as many real images as each point has.
    """

    values: Mapping[str, Mapping[int, float]]
    decoding: str
    floor: float


def measure_curves(
    measure: Measure, pipe: MaskGIT, result: TuningResult, *, seed: int, floor: float, bars: Bars = no_bars
) -> ScheduleCurves | None:
    """Measures the best decoding of a search with each mask schedule at several numbers of steps.

    Args:
        measure: Measures a decoding.
        pipe: The model.
        result: The search.
        seed: Seed of the first image of each point: the curves differ by the schedule, not by the noise.
        floor: Value of real images.
        bars: Progress bars.

    Returns:
        The curves, or None if no trial follows a mask schedule.
    """
    ranked = [result.winner, *_rank(result.trials, result.metric)]
    best = next((trial.decoding for trial in ranked if _follows_schedule(trial.decoding)), None)
    if best is None:
        _log.info("no figure is drawn, because no trial follows a mask schedule")
        return None
    trained, built = pipe.transformer.schedule_for("tune"), mask_schedules.build_all()
    # The schedule of the training may have arguments that no registered name has.
    own = next((name for name, schedule in built.items() if schedule == trained), repr(trained))
    specs = {f"{own} (trained)": None, **{name: name for name in sorted(built) if name != own}}
    steps = choose_plot_steps(pipe.outline.num_tokens)
    advance = bars("mask schedules", len(specs) * sum(steps))
    values: dict[str, dict[int, float]] = {name: {} for name in specs}
    for num_steps, (name, spec) in product(steps, specs.items()):
        point = replace(with_steps(best, num_steps), mask_schedule=spec)
        numbers = measure(point, result.num_images, seed, f"mask schedule {name}, {num_steps} steps")
        values[name][num_steps] = numbers[result.metric]
        advance(num_steps)
    return ScheduleCurves(values, describe_decoding(replace(best, mask_schedule=None), steps=False), floor)


def _follows_schedule(decoding: DecodingConfig) -> bool:
    assert decoding.token_selector is not None  # the model is not autoregressive
    return token_selectors.build(decoding.token_selector).follows_schedule


def _describe_curves(result: TuningResult, curves: ScheduleCurves) -> list[str]:
    """Returns the section of the figure, with a table of its points."""
    metric = result.metric
    steps = list(next(iter(curves.values.values())))
    lines = ["## Mask schedules", "", f"![{metric} against the number of steps for each mask schedule](tuning.png)", ""]
    lines += paragraph(
        f"{title(metric)} ({direction(metric)}) from {result.num_images} images per point, with the same noise for all",
        f"points. The model is decoded with each schedule and {markdown(curves.decoding)}.",
    )
    rows = [
        [markdown(name), *(format_value(metric, line[number], more_digits=1) for number in steps)]
        for name, line in curves.values.items()
    ]
    return [*lines, "", *markdown_table(["mask schedule", *(f"T = {number}" for number in steps)], rows)]


def draw_curves(result: TuningResult, curves: ScheduleCurves) -> bytes:
    """Draws a line per mask schedule as a PNG; that of the training is emphasised.

    Source: paper, Figure 8, right.
    """
    from matplotlib.figure import Figure

    metric, page = result.metric, Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = page.subplots()
    colours = dict(zip(curves.values, cycle(_COLOURS), strict=False))
    trained, *_ = curves.values
    plot_by_steps(axes, curves.values, colours, front=trained)
    plot_floor(axes, curves.floor, f"real images: {format_value(metric, curves.floor, more_digits=1)}")
    axes.set_ylabel(f"{title(metric)} of {result.num_images} images ({direction(metric)})")
    axes.set_title("one model, decoded with each mask schedule", fontsize=11, loc="left")
    ends = {
        name: LineEnd(name, (max(line), line[max(line)]), colours[name], bold=name == trained)
        for name, line in curves.values.items()
    }
    name_lines(page, axes, ends)
    return figure_to_png(page)
