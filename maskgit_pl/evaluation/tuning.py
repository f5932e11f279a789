"""``tune``: searches for the best decoding of a run's model and writes it next to the weights, with a report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

from maskgit_pl.checks import build_dataclass, check_integer
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.distributed import describe_environment
from maskgit_pl.evaluation.comparison import list_selectors
from maskgit_pl.evaluation.decoding_search import (
    FINALISTS,
    ScheduleCurves,
    SearchPlan,
    SearchResult,
    Trial,
    draw_curves,
    make_page,
    measure_curves,
    search,
)
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, collect_numbers
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.metrics import Metrics, is_fast, tuning_column
from maskgit_pl.evaluation.opening import (
    can_guide,
    check_model_decoding,
    create_evaluated_model,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.options import (
    Spec,
    TuningOptions,
    default_steps,
    describe_decoding,
    round_to_classes,
)
from maskgit_pl.evaluation.pages import command_line
from maskgit_pl.evaluation.run_folders import RunFolders, find_run
from maskgit_pl.evaluation.search_space import SearchSpace, list_schedules
from maskgit_pl.files import check_writable
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.card import refresh_card
from maskgit_pl.pipeline.pretrained import read_negative_model, save_decoding
from maskgit_pl.pipeline.sharing import bundled_models
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.schedules import mask_schedules

__all__ = ["plan_trials", "tune"]

_MAX_TRIALS = 100_000  # far more than a search has time for; all are planned before the first one
_STEPS = (4, 6, 8, 12, 16)
_log = logging.getLogger(__name__)


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
) -> SearchResult:
    """Searches for the best decoding of a model, and writes it next to the weights, with a page and a figure.

    Args:
        run: Run folder or pretrained folder.
        data: Data folder; None for the data that the run was trained on.
        trials: Maximum number of trials.
        metric: A metric of the registry, such as ``fid`` or ``kid``, in the features of the data's own classifier, or
            ``agreement``.
        num_images: Number of images per trial, at least 2 per class.
        out: Folder of the page and the ledger; None for ``RUN/tuning`` and ``RUN/evaluation``.
        options: The search, the seed and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run or the data do not exist.
        TypeError: if a selector does not accept its arguments.
        ValueError: if a name is unknown, the model is autoregressive or one of the package, the classes of the data are
            not the model's, an output cannot be written, or a number is out of range.
    """
    options = options or TuningOptions()
    name = _check_search(metric, trials, num_images)
    _check_outputs(find_run(run, data=data, classifier=options.classifier), out)
    folders, pipe, space = _open(run, data, options)

    images = open_data(folders, pipe, num_workers=options.num_workers)
    count = round_to_classes(num_images, images.num_classes)
    points = round_to_classes(options.plot_images or num_images, images.num_classes, name="plot_images")
    model = create_evaluated_model(folders, pipe, out)
    ledger = Ledger(model.folder / FILE_NAME)
    evaluator = open_evaluator(folders, pipe, images, ledger, batch_size=options.batch_size, bars=bars)
    begun = _iter_first_trials(evaluator, model, options.seed)
    space = space.resume(begun, trials=trials, seed=options.seed, method=options.search)

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

    plan = SearchPlan(name, trials, count, options.seed, options.search, options.seconds, current=pipe.decoding)
    found = search(measure, space, plan, on_trial=_make_trial_callback(bars, trials, name))
    result = replace(found, folder=out or folders.run / "tuning")
    command, figure = _command(run, trials, metric, num_images, options), None
    _write_page(evaluator, result, None, command)  # first, in case that the folder of the model is full by now
    result = _save_decoding(folders, pipe, evaluator, result, options)
    if options.plot:
        figure = measure_curves(measure, pipe, result, num_images=points, seed=options.seed, bars=bars)
        _write_page(evaluator, result, figure, command)
    return replace(result, figure=figure is not None, num_measured=evaluator.num_measured)


def _make_trial_callback(bars: Bars, trials: int, metric: str) -> Callable[[Trial], None]:
    """Returns a function that logs each trial and advances a progress bar."""
    advance = bars("trials", trials + FINALISTS + 1)

    def on_trial(trial: Trial) -> None:
        advance(1)
        value = trial.numbers[metric]
        _log.info("trial %3d  %s %8.4f  %s", trial.number, metric, value, describe_decoding(trial.decoding))

    return on_trial


def plan_trials(
    run: Path | str,
    *,
    data: Path | None = None,
    trials: int = 40,
    metric: str = "fid",
    options: TuningOptions | None = None,
) -> list[DecodingConfig]:
    """Returns the decodings that ``tune`` would measure. See ``tune`` for arguments and errors."""
    options = options or TuningOptions()
    _check_search(metric, trials)
    _, _, space = _open(run, data, options)
    return list(space.iter_trials(trials, seed=options.seed, method=options.search))


def _check_search(metric: str, trials: int, num_images: int = 2) -> str:
    """Checks the metric and the numbers of trials and images, and returns the name of the metric in the ledger."""
    check_integer("trials", trials, f"[1, {_MAX_TRIALS}]")
    check_integer("num_images", num_images, "[2, inf)")
    return tuning_column(metric)


def _check_outputs(folders: RunFolders, out: Path | None) -> None:
    """Checks that the decoding and the page can be written, before a search that takes hours."""
    name = folders.pretrained.name
    if folders.pretrained.resolve() in (each.resolve() for each in bundled_models().values()):
        raise ValueError(
            f"tune must have a model outside of the package, next to whose weights it writes, got {name}; copy it with "
            f"MaskGIT.from_pretrained({name!r}).save_pretrained('DIR'), and tune DIR"
        )
    for file in ("decoding.json", "decoding.json.old"):
        check_writable(file, folders.pretrained / file)
    if out is None:
        check_writable("RUN/tuning", folders.run / "tuning", is_folder=True)
    check_writable("ledger", (out or folders.evaluation) / FILE_NAME)


def _open(run: Path | str, data: Path | None, options: TuningOptions) -> tuple[RunFolders, MaskGIT, SearchSpace]:
    """Opens the model and the search space, and checks all that the search tries."""
    folders = find_run(run, data=data, classifier=options.classifier)
    pipe = open_model(folders, options.device, dtype=options.dtype, negative_model=options.negative_model)
    pipe.outline.check_parallel("tune")
    _check_schedules(options.schedules or ())
    space = SearchSpace(
        pipe.decoding,
        tuple(options.selectors or (spec for _, spec in list_selectors())),
        tuple(options.num_steps or default_steps(pipe.outline.num_tokens, _STEPS)),
        pipe.tokenizer.network.config.codebook_size,
        can_guide=can_guide(pipe),
        schedules=list_schedules() if options.schedules is None else tuple(options.schedules),
        num_tokens=pipe.outline.num_tokens,
    )
    # Every selector and number of steps is checked before the first trial.
    for decoding in space.iter_selectors_and_steps():
        check_model_decoding(pipe, decoding)
    return folders, pipe, space


def _check_schedules(schedules: Sequence[Spec]) -> None:
    """Checks names and arguments of mask schedules; ``pow`` needs no exponent, and ``free`` is none of them."""
    for spec in schedules:
        if spec == "pow":
            mask_schedules.build({"name": "pow", "exponent": 2.0})
        elif spec != "free":
            mask_schedules.build(spec)


def _iter_first_trials(evaluator: Evaluator, model: EvaluatedModel, seed: int) -> Iterator[DecodingConfig]:
    """Yields the decodings of trial 0 in earlier searches with this model and seed, the latest first.

    A search that was stopped after it had written its winner continues with the trials that it began with.
    """
    for row in reversed(evaluator.ledger.rows("samples")):
        same_model = all(row.get(name) == model.identity[name] for name in ("tokenizer", "transformer", "config"))
        if same_model and (row.get("purpose"), row.get("seed")) == ("trial 0", seed):
            # The key holds digests of a negative model and of vectors beside the fields of the decoding.
            known = {field.name for field in fields(DecodingConfig)}
            given = {name: value for name, value in row["decoding"].items() if name in known}
            with suppress(ValueError):  # it names a part of another package that is not installed now
                decoding = build_dataclass(DecodingConfig, given, "trial 0")
                if model.decoding_key(decoding) == row["decoding"]:
                    yield decoding


def _save_decoding(
    folders: RunFolders, pipe: MaskGIT, evaluator: Evaluator, result: SearchResult, options: TuningOptions
) -> SearchResult:
    """Writes the winner to ``decoding.json`` next to the weights, if the model has another decoding."""
    file = folders.pretrained / "decoding.json"
    negative = None if pipe.negative_model is None else pipe.negative_model.folder
    if result.winner.decoding == pipe.decoding and _is_recorded(file, negative):
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
    # The previous decoding is kept next to it, and the model card shows the new one.
    old = save_decoding(folders.pretrained, result.winner.decoding, tuned=tuned, negative_model=negative)
    refresh_card(folders.pretrained)
    return replace(result, decoding_file=file, old_decoding_file=old)


def _is_recorded(file: Path, negative: Path | None) -> bool:
    """Returns True if ``decoding.json`` names a negative model; for None, if it names none."""
    try:
        recorded = read_negative_model(file)
    except (FileNotFoundError, ValueError):  # it names none that exists, and the search took that of its options
        return False
    return negative is None if recorded is None else negative is not None and recorded.samefile(negative)


def _write_page(evaluator: Evaluator, result: SearchResult, figure: ScheduleCurves | None, command: str) -> None:

    (network,) = evaluator.networks.values()
    assert network.accuracy is not None
    found = {"class_agreement": network.accuracy}

    def real(num_images: int) -> dict[str, float]:
        rows = evaluator.measure_real(num_images=num_images, metrics="fast" if is_fast(result.metric) else "all")
        return collect_numbers(rows) | found | {"num_images": rows[network.extractor.label]["num_images"]}

    page = make_page(result, real(result.num_images), command=command, figure=figure)
    # The floor of the figure is measured with as many images as its points.
    if figure is not None:
        floor = real(figure.num_images)[result.metric]
        page = replace(page, pictures={"tuning.png": draw_curves(figure, metric=result.metric, floor=floor)})
    page.write()


def _command(run: Path | str, trials: int, metric: str, num_images: int, options: TuningOptions) -> str:
    given = {"trials": trials, "metric": metric, "num_images": num_images, "seed": options.seed}
    names = ("seconds", "num_steps", "plot_images", "selectors", "negative_model")
    given |= {name: getattr(options, name) for name in names}
    # An empty list has a word of its own on the command line.
    given["schedules"] = "own" if options.schedules is not None and not options.schedules else options.schedules
    return command_line(
        ["maskgit tune", run], given | {"search": None if options.search == "random" else options.search}
    )
