"""The search for a better way to decode one model: a plain search, measured on held-out data, kept in the ledger.

Trial 0 is the model's own decoding; ``search_space`` says what the others are. The best trials are measured once more
with fresh noise and twice the images, the model's own decoding among them, and the best of those wins, so that luck
does not. Importing this file does not import torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from maskgit_pl.checks import build_dataclass, check_choice, check_integer, check_number
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.limits import check_num_steps
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.command_line import command_line
from maskgit_pl.evaluation.decodings import Spec, describe_decoding
from maskgit_pl.evaluation.metric_names import is_better, metric_of
from maskgit_pl.evaluation.progress import Bars, no_bars
from maskgit_pl.evaluation.run_folders import (
    MeasuringOptions,
    RunFolders,
    check_decoding,
    default_steps,
    even_count,
    find_run,
    open_data,
    open_evaluator,
    open_model,
    read_outline,
)
from maskgit_pl.files import write_atomically

if TYPE_CHECKING:
    from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
    from maskgit_pl.evaluation.schedule_curves import ScheduleCurves
    from maskgit_pl.evaluation.search_space import SearchSpace
    from maskgit_pl.pipeline import MaskGIT

__all__ = [
    "METRIC_NAMES",
    "Measure",
    "SearchPlan",
    "SearchResult",
    "Trial",
    "TuningOptions",
    "plan_trials",
    "ranked",
    "search",
    "tune",
]

METRIC_NAMES = {"fid": "fid/classifier", "kid": "kid/classifier", "agreement": "class_agreement"}
_STEPS = (4, 6, 8, 12, 16)
_FINALISTS = 3
_FRESH = 1_000_000  # how far the seeds of the second measurement lie from those of the trials
_log = logging.getLogger(__name__)

Measure: TypeAlias = Callable[[DecodingConfig, int, int, str], Mapping[str, float]]
# (decoding, num_images, seed, purpose) -> numbers by name


@dataclass(frozen=True)
class TuningOptions(MeasuringOptions):
    """Options of ``tune``; see ``MeasuringOptions`` for the others.

    Args:
        search: Random draws or a grid.
        num_steps: T to choose from; None for 4, 6, 8, 12 and 16, as far as there are tokens.
        selectors: Names and mappings, whose arguments then stay; None for all.
        seconds: No further trial begins after so many; None for no limit.
        plot: Whether the figure of mask schedules is measured and drawn, which takes longer than the search.
        plot_images: Images of a point of the figure; None for as many as of a trial.
    """

    search: Literal["random", "grid"] = "random"
    num_steps: Sequence[int] | None = None
    selectors: Sequence[Spec] | None = None
    seconds: float | None = None
    plot: bool = True
    plot_images: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("search", self.search, ("random", "grid"))
        check_integer("seed", self.seed, "[0, 2147483647]")
        if self.seconds is not None:
            check_number("seconds", self.seconds, "(0, inf)")
        if self.plot_images is not None:
            check_integer("plot_images", self.plot_images, "[2, inf)")


@dataclass(frozen=True)
class Trial:
    """A decoding and its numbers.

    Args:
        number: 0 is the model's own.
        decoding: How its images were decoded.
        numbers: By name, such as ``fid/classifier``.
    """

    number: int
    decoding: DecodingConfig
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        trials: All trials, in order.
        confirmed: The model's own decoding and the best trials, measured again with fresh noise; trial 0 first.
        winner: The best of ``confirmed``.
        num_images: Images of each of ``confirmed``.
        seed: Of their first image.
        metric: Name of the metric of the search.
        folder: Where the page and the figure are.
        figure: Whether there is a figure.
        recipe: ``decoding.json`` of the winner; None where the model is decoded in this way already.
        old_recipe: Where the one before is kept, if there was one.
        measured: Number of measurements that were made, those of the ledger not counted.
    """

    trials: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    winner: Trial
    num_images: int
    seed: int
    metric: str
    folder: Path = Path()
    figure: bool = False
    recipe: Path | None = None
    old_recipe: Path | None = None
    measured: int = 0

    @property
    def before(self) -> Trial:
        """The model's own decoding, measured again."""
        return self.confirmed[0]


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Returns trials by a metric, the best first."""
    sign = -1 if metric_of(metric).higher_is_better else 1
    return sorted(trials, key=lambda trial: sign * trial.numbers[metric])


@dataclass(frozen=True)
class SearchPlan:
    """The budget of a search.

    Args:
        metric: Name of the metric, such as ``fid/classifier``.
        trials: At most so many, trial 0 included.
        num_images: Images of a trial; twice as many confirm.
        options: Seed, of the trials and of their first image: all trials have the same noise; the search; seconds.
        current: How the model is decoded now, where that is one of the trials: it is measured again with the best.
    """

    metric: str
    trials: int
    num_images: int
    options: TuningOptions = TuningOptions()  # frozen
    current: DecodingConfig | None = None


def search(
    measure: Measure,
    space: SearchSpace,
    plan: SearchPlan,
    *,
    on_trial: Callable[[Trial], object] = lambda trial: None,
) -> SearchResult:
    """Tries decodings, measures the best again, and returns the best of those.

    Args:
        measure: Measures a decoding with a number of images and a seed.
        space: Decodings that are tried.
        plan: Metric and budget.
        on_trial: Called after each trial and each confirmation.
    """
    metric, num_images, options = plan.metric, plan.num_images, plan.options
    start, made = time.monotonic(), list[Trial]()
    for number in range(plan.trials):
        decoding = space.trial(number, seed=options.seed, how=options.search)
        late = options.seconds is not None and time.monotonic() - start >= options.seconds
        if decoding is None or (made and late):
            break
        made.append(Trial(number, decoding, measure(decoding, num_images, options.seed, f"trial {number}")))
        on_trial(made[-1])
    confirmed, seed = [], options.seed + _FRESH
    for trial in _finalists(made, metric, plan.current):
        purpose = f"confirmation of trial {trial.number}"
        confirmed.append(replace(trial, numbers=measure(trial.decoding, 2 * num_images, seed, purpose)))
        on_trial(confirmed[-1])
    winner = confirmed[0]
    for trial in confirmed[1:]:
        winner = trial if is_better(metric, trial.numbers[metric], winner.numbers[metric]) else winner
    return SearchResult(tuple(made), tuple(confirmed), winner, 2 * num_images, seed, metric)


def _finalists(made: Sequence[Trial], metric: str, current: DecodingConfig | None) -> list[Trial]:
    """Returns trial 0, the trial that is in use, and the best others, no decoding twice."""
    others = ranked(made[1:], metric)
    chosen = [made[0], *(trial for trial in others if trial.decoding == current)][:2]
    most = len(chosen) + _FINALISTS - sum(trial in others[:_FINALISTS] for trial in chosen)
    for trial in others:
        if len(chosen) < most and all(trial.decoding != other.decoding for other in chosen):
            chosen.append(trial)
    return chosen


def tune(
    run: Path | str,
    *,
    data: Path | None = None,
    trials: int = 40,
    metric: str = "fid",
    num_images: int = 500,
    out: Path | None = None,
    options: TuningOptions = TuningOptions(),  # frozen
    bars: Bars = no_bars,
) -> SearchResult:
    """Searches for a better way to decode a model, and writes it beside the weights, with a page and a figure.

    Args:
        run: Run folder or pretrained folder.
        data: Data folder; None for what the run was trained on.
        trials: At most so many.
        metric: ``fid``, ``kid`` (in the features of the data's own classifier) or ``agreement``.
        num_images: Images of a trial, at least 2 for each class.
        out: Folder of the page; the ledger lies there too, and in ``RUN/evaluation`` where ``out`` is None.
        options: The search, the seed and others.
        bars: Shows the progress.

    Raises:
        FileNotFoundError: if there is no such run or data.
        TypeError: if a selector does not take its arguments.
        ValueError: if a name is unknown, the model is autoregressive, the data are not the model's, or a number is out
            of range.
    """
    name = METRIC_NAMES[check_choice("metric", metric, METRIC_NAMES)]
    check_integer("trials", trials, "[1, inf)")
    check_integer("num_images", num_images, "[2, inf)")
    folders, pipe, space = _open(run, data, options)
    from maskgit_pl.evaluation.evaluator import numbers_of

    images = open_data(folders, pipe, num_workers=options.num_workers)
    count = even_count(num_images, images.num_classes)
    points = even_count(options.plot_images or num_images, images.num_classes, name="plot_images")
    evaluator, model = open_evaluator(folders, pipe, images, options=options, out=out, bars=bars)
    begun = _first_trials(evaluator, model, options.seed)
    space = space.resumed(begun, trials=trials, seed=options.seed, how=options.search)

    def measure(decoding: DecodingConfig, num_images: int, seed: int, purpose: str) -> Mapping[str, float]:
        return numbers_of(evaluator.samples(model, decoding, num_images=num_images, seed=seed, purpose=purpose))

    advance = bars("trials", trials + _FINALISTS + 1)  # and the confirmation

    def on_trial(trial: Trial) -> None:
        advance(1)
        value = trial.numbers[name]
        _log.info("trial %3d  %s %8.4f  %s", trial.number, name, value, describe_decoding(trial.decoding))

    plan = SearchPlan(name, trials, count, options, current=pipe.decoding)
    result = search(measure, space, plan, on_trial=on_trial)
    result = _with_recipe(folders, pipe, evaluator, result, options)
    page = _Page(out or folders.home / "tuning", _command(run, trials, metric, num_images, options), points, options)
    figure = _write_page(evaluator, pipe, measure, result, page)
    return replace(result, folder=page.folder, figure=figure is not None, measured=evaluator.measured)


def plan_trials(
    run: Path | str,
    *,
    data: Path | None = None,
    trials: int = 40,
    options: TuningOptions = TuningOptions(),  # frozen
) -> list[DecodingConfig]:
    """Returns the decodings that ``tune`` would try; arguments and errors are those of ``tune``."""
    _, _, space = _open(run, data, options)
    planned = (space.trial(number, seed=options.seed, how=options.search) for number in range(trials))
    return [decoding for decoding in planned if decoding is not None]


def _open(run: Path | str, data: Path | None, options: TuningOptions) -> tuple[RunFolders, MaskGIT, SearchSpace]:
    """Opens the model and what is searched, after everything is refused that can be refused without torch."""
    folders = find_run(run, data=data, classifier=options.classifier)
    outline = read_outline(folders)
    outline.check_parallel("tune")
    for number in options.num_steps or ():
        check_num_steps(number, outline.num_tokens)
    for spec in options.selectors or ():
        token_selectors.build(spec)
    pipe = open_model(folders, options.device)
    from maskgit_pl.evaluation.comparison import every_selector
    from maskgit_pl.evaluation.search_space import SearchSpace

    space = SearchSpace(
        pipe.decoding,
        tuple(options.selectors or (spec for _, spec in every_selector())),
        tuple(options.num_steps or default_steps(outline.num_tokens, _STEPS)),
        pipe.tokenizer.network.config.num_codes,
        guided=pipe.transformer.network.config.null_label is not None,
    )
    for decoding in space.corners():
        check_decoding(pipe, decoding)
    return folders, pipe, space


def _first_trials(evaluator: Evaluator, model: EvaluatedModel, seed: int) -> Iterator[DecodingConfig]:
    """Yields the decodings that searches of this model and seed began with, the latest first."""
    for row in reversed(evaluator.ledger.rows("samples")):
        same_model = all(row.get(name) == model.identity[name] for name in ("tokenizer", "transformer", "config"))
        if same_model and (row.get("purpose"), row.get("seed")) == ("trial 0", seed):
            with suppress(ValueError, TypeError):  # of another version
                yield build_dataclass(DecodingConfig, row["decoding"], "trial 0")


def _with_recipe(
    folders: RunFolders, pipe: MaskGIT, evaluator: Evaluator, result: SearchResult, options: TuningOptions
) -> SearchResult:
    """Writes the winner beside the weights, where it is another decoding than the model's own."""
    from maskgit_pl.pipeline.card import refresh_card
    from maskgit_pl.pretrained import save_decoding
    from maskgit_pl.provenance import describe_environment

    if result.winner.decoding == pipe.decoding:
        return result
    tuned = {
        "metric": result.metric,
        "value": result.winner.numbers[result.metric],
        "before": result.before.numbers[result.metric],
        "trials": len(result.trials),
        "search": options.search,
        "num_images": result.num_images,
        "seed": result.seed,
        "data": evaluator.data.summary.fingerprint,
        "split": "val",
        "commit": describe_environment()["commit"],
    }
    old = save_decoding(folders.pretrained, result.winner.decoding, tuned=tuned)
    refresh_card(folders.pretrained)
    return replace(result, recipe=folders.pretrained / "decoding.json", old_recipe=old)


@dataclass(frozen=True)
class _Page:
    """Where the page of a search goes, and what it shows beside the search."""

    folder: Path
    command: str
    plot_images: int
    options: TuningOptions


def _write_page(
    evaluator: Evaluator,
    pipe: MaskGIT,
    measure: Measure,
    result: SearchResult,
    page: _Page,
) -> ScheduleCurves | None:
    """Writes ``tuning.md``, and ``tuning.png`` where it is asked for and a trial follows a mask schedule."""
    from maskgit_pl.evaluation.evaluator import numbers_of
    from maskgit_pl.evaluation.schedule_curves import draw_curves, measure_curves
    from maskgit_pl.evaluation.tuning_report import RealNumbers, as_markdown

    (network,) = evaluator.networks.values()
    assert network.accuracy is not None
    accuracy = {"class_agreement": network.accuracy}

    def real(num_images: int) -> RealNumbers:
        rows = evaluator.real(num_images=num_images)
        numbers = numbers_of(rows) | accuracy
        return RealNumbers(numbers, rows[network.extractor.label]["num_images"])

    figure = None
    if page.options.plot:
        seed = page.options.seed
        figure = measure_curves(measure, pipe, result, num_images=page.plot_images, seed=seed, bars=evaluator.bars)
    page.folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(result, real(result.num_images), command=page.command, figure=figure)
    with write_atomically(page.folder / "tuning.md") as stream:
        stream.write(text.encode())
    if figure is not None:
        floor = real(figure.num_images).numbers[result.metric]
        draw_curves(figure, page.folder / "tuning.png", metric=result.metric, floor=floor)
    return figure


def _command(run: Path | str, trials: int, metric: str, num_images: int, options: TuningOptions) -> str:
    given = {"trials": trials, "metric": metric, "num_images": num_images, "seed": options.seed}
    given |= {name: getattr(options, name) for name in ("seconds", "num_steps", "plot_images", "selectors")}
    return command_line(
        ["maskgit tune", run], given | {"search": None if options.search == "random" else options.search}
    )
