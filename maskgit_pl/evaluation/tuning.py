"""``tune``: searches for the best decoding of a run's model with Optuna, and writes it next to the weights.

1. Measure the trials. Trial 0 is the model's current decoding; Optuna draws the others from ``SearchSpace``.
   The study is an SQLite file, so that the same command continues it.
2. Measure trial 0, the best trials and the current decoding again, with other noise and twice the number of images.
3. The best of step 2 wins. Without the second measurement, the winner would be the trial with the luckiest noise.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

from maskgit_pl.checks import check_integer
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import guidance_schedules
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.devices import describe_environment
from maskgit_pl.errors import CannotWriteError
from maskgit_pl.evaluation.evaluator import collect_numbers
from maskgit_pl.evaluation.folders import can_guide, check_model_decoding, open_data, open_evaluator, open_model
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row, digest_of, shorten_digest
from maskgit_pl.evaluation.metrics import Metrics, computed_metrics, direction, find_metric, title, tuning_column
from maskgit_pl.evaluation.options import (
    Spec,
    TuningOptions,
    decoding_key,
    default_steps,
    describe_decoding,
    round_to_classes,
    with_steps,
)
from maskgit_pl.evaluation.pages import Page, heading, markdown_table, metric_cell, paragraph
from maskgit_pl.evaluation.run_folders import RunFolders, find_run
from maskgit_pl.files import check_writable
from maskgit_pl.folders import hold_lock
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.card import refresh_card
from maskgit_pl.pipeline.sharing import bundled_models
from maskgit_pl.pretrained.networks import NEGATIVE, copy_stage_folder, save_decoding
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.randomness import random_bits
from maskgit_pl.registry import describe
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.text import markdown, printable

if TYPE_CHECKING:
    import optuna

# Measures a decoding, given the number of images, the seed of the first one, and a remark for the ledger.
Measure: TypeAlias = Callable[[DecodingConfig, int, int, str], Mapping[str, float]]

_FINALISTS = 3  # trials of step 2, besides trial 0 and the current decoding
_STEPS = (4, 6, 8, 12, 16)
_CONFIRMATION_OFFSET = 1_000_000  # between the seeds of steps 1 and 2, so that no image has the same noise
_SHOWN_TRIALS = 10  # of the table of trials
_BAD_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
# Arguments that are searched for every selector that has them, on a logarithmic scale.
_ARGUMENTS = {"choice_temperature": (1.0, 20.0), "gamma": (1.0, 60.0), "eta": (0.02, 0.5)}
_EXPONENTS = (0.5, 4.0)  # of the schedule pow: from sqrt to beyond cubic, which Table 3 of the paper spans
_OWN, _POW = "own", "pow"
_COLUMNS = ("class_agreement", "fid/classifier", "kid/classifier", "diversity", "seconds_per_image")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchSpace:
    """The decodings of a search."""

    start: DecodingConfig  # which gives the settings that are not searched
    selectors: tuple[Spec, ...]  # the arguments in a mapping are fixed
    num_steps: tuple[int, ...]
    schedules: tuple[Spec, ...]  # besides that of ``start``, ``pow`` with any exponent; empty keeps that of ``start``
    codebook_size: int
    can_guide: bool  # True if guidance has something to move away from

    def draw(self, trial: optuna.trial.BaseTrial) -> DecodingConfig:
        """Returns the decoding of a trial, whose sampler makes the choices."""
        num_steps = trial.suggest_categorical("num_steps", self.num_steps)
        selector = _choose(trial, "token_selector", self.selectors)
        guidance = _draw_guidance(trial) if self.can_guide else self.start.guidance
        match trial.suggest_categorical("temperature", ["one", "constant", "annealed"]):
            case "constant":
                temperature: float | tuple[float, float] = _draw(trial, "sampling_temperature", 0.6, 1.3)
            case "annealed":
                temperature = _draw(trial, "first_temperature", 0.8, 1.6), _draw(trial, "last_temperature", 0.3, 1.0)
            case _:
                temperature = 1.0
        truncation = trial.suggest_categorical("truncation", ["none", "top_k"])
        least = min(4, self.codebook_size)
        decoding = replace(
            with_steps(self.start, num_steps),
            token_selector=_draw_arguments(trial, selector),
            guidance=guidance,
            sampling_temperature=temperature,
            top_k=trial.suggest_int("top_k", least, self.codebook_size, log=True) if truncation == "top_k" else None,
        )
        if self.schedules:
            schedule = _choose(trial, "mask_schedule", (_OWN, *self.schedules))
            if schedule == _POW:
                schedule = {"name": _POW, "exponent": _draw(trial, "exponent", *_EXPONENTS, log=True)}
            if schedule != _OWN:
                decoding = replace(decoding, mask_schedule=schedule)
        return decoding


def _draw(trial: optuna.trial.BaseTrial, name: str, low: float, high: float, *, log: bool = False) -> float:
    """Suggests a number with 3 digits, which are short in tables and on the command line."""
    return float(f"{trial.suggest_float(name, low, high, log=log):.3g}")


def _choose(trial: optuna.trial.BaseTrial, name: str, specs: Sequence[Spec]) -> Spec:
    """Suggests one of several specs, which Optuna stores by their description."""
    described = {describe(spec): spec for spec in specs}
    return described[trial.suggest_categorical(name, list(described))]


def _draw_arguments(trial: optuna.trial.BaseTrial, spec: Spec) -> Spec:
    """Returns a selector with the arguments that are searched and not fixed by its mapping."""
    fixed = {"name": spec} if isinstance(spec, str) else spec
    selector = token_selectors.build(spec)
    drawn = {
        name: _draw(trial, name, *bounds, log=True)
        for name, bounds in _ARGUMENTS.items()
        if hasattr(selector, name) and name not in fixed
    }
    return {**fixed, **drawn} if drawn else spec


def _draw_guidance(trial: optuna.trial.BaseTrial) -> Spec:
    scaled = [name for name, schedule in guidance_schedules.build_all().items() if hasattr(schedule, "scale")]
    name = trial.suggest_categorical("guidance", ["none", *scaled])
    if name == "none":  # which a continuous scale would never reach
        return {"name": "constant", "scale": 0.0}
    return {"name": name, "scale": _draw(trial, "guidance_scale", 0.1, 3.0)}


@dataclass(frozen=True)
class Trial:
    """A decoding with its measured values."""

    number: int  # 0 is the decoding that the search began with
    decoding: DecodingConfig
    numbers: Mapping[str, float]  # by name, such as ``fid/classifier``


@dataclass(frozen=True)
class TuningResult:
    """The result of a search."""

    metric: str  # such as ``fid/classifier``
    trials: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]  # trial 0, the best trials and the current decoding, measured with other noise
    num_images: int  # of each trial; ``confirmed`` has twice as many
    page: Page | None = None  # None before it is made
    decoding_file: Path | None = None  # the written one; None if the model already had the winning decoding

    @property
    def before(self) -> Trial:
        """The decoding that the search began with, measured again."""
        return self.confirmed[0]

    @property
    def winner(self) -> Trial:
        """The best of ``confirmed``; a tie keeps the earlier one, which is the decoding that the search began with."""
        return _rank(self.confirmed, self.metric)[0]


def _rank(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Returns trials sorted by a metric, the best first; equal ones keep their order."""
    sign = -1 if find_metric(metric).higher_is_better else 1
    return sorted(trials, key=lambda trial: sign * trial.numbers[metric])


def tune(run: Path | str, options: TuningOptions | None = None, *, bars: Bars = no_bars) -> TuningResult:
    """Searches for the best decoding of a model, and writes it next to the weights, and a page.

    The same call continues a search that was stopped, to the same result.

    Args:
        run: Run folder or pretrained folder.
        options: The search, the data and other options; None for the defaults.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the run or the data do not exist.
        TypeError: if a selector does not accept its arguments.
        ValueError: if Optuna is not installed, a name is unknown, the model is autoregressive or one of the
            package, the classes of the data are not the model's, a number is out of range, another process uses
            the study, or its file cannot be read.
        CannotWriteError: if the disk of the study is full.
    """
    options = options or TuningOptions()
    name, out = tuning_column(options.metric), options.out
    folders = find_run(run, data=options.data)
    _check_search(folders, options)
    from optuna.exceptions import StorageInternalError

    model = open_model(folders, options.device, dtype=options.dtype, negative_model=options.negative_model, out=out)
    pipe = model.pipe
    space = _make_space(pipe, options)
    images = open_data(folders, pipe, num_workers=options.num_workers)
    count = round_to_classes(options.num_images, images.num_classes)
    ledger = Ledger(model.folder / FILE_NAME)
    evaluator = open_evaluator(folders, images, ledger, device=pipe.device, batch_size=options.batch_size, bars=bars)
    amount: Metrics = "fast" if computed_metrics()[name.partition("/")[0]].is_fast else "all"

    def measure(decoding: DecodingConfig, num_images: int, seed: int, purpose: str) -> Mapping[str, float]:
        rows = evaluator.measure_samples(
            model, decoding, num_images=num_images, seed=seed, metrics=amount, purpose=purpose
        )
        numbers = collect_numbers(rows)
        if name not in numbers:
            raise ValueError(
                f"metric {options.metric} has no value for {num_images} images; raise --num-images, or choose another"
            )
        return numbers

    folder = out or folders.run / "tuning"
    key = {  # what determines the trials of a study, besides the decoding that it begins with
        **{name: model.identity[name] for name in ("tokenizer", "transformer", "config")},
        "negative_model": None if pipe.negative_model is None else pipe.negative_model.digest,
        "data": images.summary.fingerprint,
        "classifier": [network.extractor.digest for network in evaluator.networks.values()],
        "space": [space.selectors, space.num_steps, space.schedules, guidance_schedules.names()],
        "num_images": count,
        "seed": options.seed,
    }
    file = folder / "study.db"
    with hold_lock(file, hint="choose another --out"):
        study = _open_study(file, name, key)
        try:
            result = search(
                study,
                space,
                measure,
                metric=name,
                trials=options.trials,
                num_images=count,
                seed=options.seed,
                bars=bars,
            )
        except StorageInternalError as error:
            raise _study_error(file, error) from error
    (real,) = evaluator.measure_real(num_images=2 * count, model=model, metrics=amount).values()
    page = replace(make_page(result, real), folder=folder)
    # The page is written before the decoding, in case that the folder of the model is full by now.
    page.write()
    result = replace(result, page=page)
    if result.winner.decoding == pipe.decoding and options.negative_model is None:
        return result
    tuned = {
        "metric": name,
        "value": result.winner.numbers[name],
        "before": result.before.numbers[name],
        "trials": len(result.trials),
        "num_images": 2 * count,
        "seed": options.seed,
        "data": images.summary.fingerprint,
        "split": "val",
        "commit": describe_environment()["commit"],
    }
    return replace(result, decoding_file=_write_winner(result, pipe, folders.pretrained, tuned))


def _write_winner(result: TuningResult, pipe: MaskGIT, folder: Path, tuned: Mapping[str, object]) -> Path:
    """Writes the best decoding, the negative model that it needs and the card next to the weights; returns the file."""
    if pipe.negative_model is not None and pipe.negative_model.folder is not None:
        copy_stage_folder(pipe.negative_model.folder, folder / NEGATIVE)
    save_decoding(folder, result.winner.decoding, tuned=tuned)
    refresh_card(folder)
    return folder / "decoding.json"


def _check_search(folders: RunFolders, options: TuningOptions) -> None:
    """Checks what would end a search of hours: its length, the package, and the folder that it writes to."""
    check_integer("trials", options.trials, "[1, inf)")
    if find_spec("optuna") is None:
        raise ValueError("tune requires the package optuna: pip install 'maskgit_pl[tune]'")
    if folders.pretrained.resolve() in (model_folder.resolve() for model_folder in bundled_models().values()):
        raise ValueError(
            "tune must have a model outside of the package, next to whose weights it writes; copy it with "
            f"MaskGIT.from_pretrained({folders.pretrained.name!r}).save_pretrained('DIR'), and tune DIR"
        )
    check_writable("decoding.json", folders.pretrained / "decoding.json")


def _make_space(pipe: MaskGIT, options: TuningOptions) -> SearchSpace:
    """Returns the space of a search, all of whose selectors, numbers of steps and schedules the model can decode."""
    pipe.transformer.schedule_for("tune")
    space = SearchSpace(
        pipe.decoding,
        tuple(options.selectors or token_selectors.build_all()),
        tuple(options.num_steps or default_steps(pipe.transformer.network.config.num_tokens, _STEPS)),
        tuple(sorted({*mask_schedules.build_all(), _POW}) if options.schedules is None else options.schedules),
        pipe.tokenizer.network.config.codebook_size,
        can_guide=can_guide(pipe),
    )
    check_model_decoding(pipe, pipe.decoding)
    for selector, num_steps in product(space.selectors, space.num_steps):
        check_model_decoding(pipe, replace(with_steps(pipe.decoding, num_steps), token_selector=selector))
    for schedule in space.schedules:
        if schedule != _POW:
            mask_schedules.build(schedule)
    return space


def _open_study(file: Path, metric: str, key: Mapping[str, Any]) -> optuna.Study:
    import optuna
    from sqlalchemy.pool import NullPool  # of optuna; closes connections, which Python 3.13 warns of

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{quote(str(file))}"  # a path may hold ``?`` and ``%``
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool}),
            study_name=f"{metric} {shorten_digest(digest_of(key))}",
            direction="maximize" if find_metric(metric).higher_is_better else "minimize",
            load_if_exists=True,
        )
        _rank(_read_trials(study), metric)  # raises for trials that no search has written
    except Exception as error:  # of several libraries
        raise _study_error(file, error) from error
    return study


def _study_error(file: Path, error: BaseException) -> Exception:
    """Returns the error for the user if a study cannot be read or written."""
    while error.__cause__ is not None:  # Optuna passes on errors of SQLAlchemy, which passes on those of sqlite3
        error = error.__cause__
    reason = printable(f"{type(error).__name__}: {error}".partition("\n")[0])
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BAD_DISK:
        return CannotWriteError(f"study {file} cannot be written: {reason}; free space, and run the same command again")
    return ValueError(f"study {file} cannot be opened: {reason}; move it away, or choose another --out")


def search(
    study: optuna.Study,
    space: SearchSpace,
    measure: Measure,
    *,
    metric: str,
    trials: int,
    num_images: int,
    seed: int,
    bars: Bars = no_bars,
) -> TuningResult:
    """Runs a search, or continues it; the module docstring describes its steps.

    ``trials`` is the number of trials with those of earlier calls, which the study holds. ``space.start`` is the
    current decoding.
    """
    import optuna

    done = _read_trials(study)
    advance = bars("trials", trials, done=len(done))
    # 1. The current decoding is a trial, also if another search has written it since the first one.
    while (is_new := all(trial.decoding != space.start for trial in done)) or len(done) < trials:
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


def make_page(result: TuningResult, real: Row) -> Page:
    """Returns the page of a search; ``real`` is the row of as many real training images."""
    count, best = result.num_images, _rank(result.trials, result.metric)[:_SHOWN_TRIALS]
    known = dict.fromkeys(("fid", "kid", result.metric.partition("/")[0]))
    floor = [f"{title(name)} {metric_cell(real, name)}" for name in known if real.get(name) is not None]
    lines = heading("Search for a decoding")
    lines += paragraph(
        f"{len(result.trials)} trials of {count} images were compared by {result.metric} ({direction(result.metric)}),",
        "all with the same noise. Trial 0 is the decoding that the search began with. It and the best",
        f"{len(result.confirmed) - 1} others were then measured again with other noise and {2 * count} images.",
        "The best of this second measurement wins. Distances are measured from the real val images, in the features of",
        "the data set's own classifier and not of Inception; the classifier is correct for",
        f"{real['class_agreement']:.1%} of these images. For comparison, {real['num_images']} real training images",
        f"have {' and '.join(floor)}.",
    )
    lines += ["", "## Second measurement", "", *_trial_table(result, result.confirmed), "", *_explain_winner(result)]
    lines += ["", f"## Best of {len(result.trials)} trials, {count} images each", "", *_trial_table(result, best)]
    rows = [
        {"trial": trial.number, **trial.numbers, "decoding": decoding_key(trial.decoding)} for trial in result.trials
    ]
    return Page("tuning", lines, rows)


def _trial_table(result: TuningResult, trials: Sequence[Trial]) -> list[str]:
    columns = list(dict.fromkeys((result.metric, *_COLUMNS)))
    rows = []
    for trial in trials:
        cells = [str(trial.number), markdown(describe_decoding(trial.decoding))]
        cells += [metric_cell(trial.numbers, name, more_digits=1) for name in columns]
        is_winner = trial.number == result.winner.number
        rows.append([f"**{cell}**" if cell and is_winner else cell for cell in cells])
    return markdown_table(["trial", "decoding", *map(title, columns)], rows, left=2)


def _explain_winner(result: TuningResult) -> list[str]:
    metric, winner = result.metric, result.winner
    before, after = result.before.numbers[metric], winner.numbers[metric]
    if winner.number == 0:
        return [f"Trial 0 wins, with {metric} {before:.4g}: no other decoding is better."]
    return [
        f"Trial {winner.number} wins: {metric} was {before:.4g} and is now {after:.4g}. decoding.json has the winner."
    ]
