"""``maskgit_pl.demo``: makes the data, trains both stages and measures the model, in one process.

Each step is one call of a public function, which leaves the process as it was: its results are those of the
command that the step shows, bit for bit.
"""

from __future__ import annotations

import io
import logging
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from rich.console import Console

from maskgit_pl import evaluation, runs
from maskgit_pl.data.sources.public import public_datasets
from maskgit_pl.data.sources.shards import convert_images, fetch_dataset
from maskgit_pl.errors import PreemptedError
from maskgit_pl.evaluation.options import EvaluationOptions
from maskgit_pl.processes import catch_stop_signals, is_requested, progress_bars
from maskgit_pl.runs.plan import read_tokenizer_sizes
from maskgit_pl.runs.recipe import DEFAULT_DATASET, STAGES, Overrides, Recipe, flag_words

log = logging.getLogger(__name__)

_RECIPE, _BUDGET = "adaln", "15m"  # the temperatures of `adaln` without a budget suit Fashion-MNIST
_SHORT_RUN = "demo-short"
_SHORT = ("--trainer.max_steps=60", "--trainer.val_check_interval=60", "--data.validation_samples=500")
_NUM_IMAGES, _SHORT_NUM_IMAGES = 1000, 50


class DemoOptions(TypedDict, total=False):
    """The options of ``demo``.

    Args:
        recipe: Recipes from left to right. Default: ``adaln``, and on other data than Fashion-MNIST ``adaln 15m``.
        dataset: Name of a public data set, or of your own. Default: ``fashion-mnist``.
        data: Data folder. Default: ``data/shards/DATASET``.
        images: Folder or archive of your own images; see ``open_source``.
        lenient: True leaves out and lists images that cannot be read; False rejects them.
        cluster: A file of ``recipes/cluster`` with one device. Default: ``single``.
        run: Name of the run. Default: ``DATASET-RECIPE``, or ``demo-short``.
        runs_folder: Folder of all runs. Default: ``runs``.
        tokenizer: Pretrained tokenizer folder, in place of the training of stage 1.
        pretrained: Pretrained folder with the initial weights.
        overrides: Overrides of recipe values of both stages; see ``Recipe.read``.
        short: True trains 60 steps per stage and generates 50 images, as a quick check.
    """

    recipe: str
    dataset: str
    data: str | Path | None
    images: str | Path | None
    lenient: bool
    cluster: str
    run: str | None
    runs_folder: str | Path
    tokenizer: str | Path | None
    pretrained: str | Path | None
    overrides: Overrides
    short: bool


class Step(NamedTuple):
    """A step of the demo."""

    title: str  # one line for people: what it does
    words: list[str]  # the command line after ``maskgit`` that does the same
    work: Callable[[], object]


def demo(**options: Unpack[DemoOptions]) -> Path:
    """Fetches a data set, or converts your own images, trains both stages of a model, and measures it.

    The same call resumes after a stop; only the measurement is always made again. Several processes convert
    many images, so a script must call it below ``if __name__ == "__main__"``.

    Args:
        options: See ``DemoOptions``.

    Returns:
        The run folder, which holds the model, its pictures and ``evaluation.json``.

    Raises:
        ValueError: if the recipe is wrong or names several devices, or there are neither data nor a way to get them.
        FileNotFoundError: if there is no recipe with a given name, or no source of the data answers.
        RunError: if a step ends early, such as a training that has saved after a stop signal; see ``runs.fit``.
    """
    steps, folder = plan_demo(**options)
    for number, step in enumerate(steps, start=1):
        log.info("\n[%d/%d] %s\n      maskgit %s", number, len(steps), step.title, shlex.join(step.words))
        step.work()
    return folder


def plan_demo(**options: Unpack[DemoOptions]) -> tuple[list[Step], Path]:
    """Returns the steps of ``demo``, and its run folder. Finds mistakes before anything is downloaded."""
    if unknown := options.keys() - DemoOptions.__annotations__.keys():
        raise TypeError(f"demo has no options {sorted(unknown)}, only {', '.join(DemoOptions.__annotations__)}")
    dataset, cluster = options.get("dataset", DEFAULT_DATASET), options.get("cluster", "single")
    is_short = options.get("short", False)
    usual = _RECIPE if dataset == DEFAULT_DATASET else f"{_RECIPE} {_BUDGET}"
    recipe = options.get("recipe") or usual
    data = Path(options.get("data") or Path("data/shards", dataset))
    steps = _plan_data(dataset, options.get("images"), data, lenient=options.get("lenient", False))
    flags = [*flag_words(options.get("overrides", ())), *(_SHORT if is_short else ())]
    read = [Recipe.read(stage, names=recipe, dataset=dataset, cluster=cluster, overrides=flags) for stage in STAGES]
    for stage in read:
        devices = stage.get("trainer.devices")
        if devices != 1 and not (isinstance(devices, list) and len(devices) == 1):
            raise ValueError(
                f"trainer.devices must be 1 or a list of one index in the demo, got {devices!r}; for several "
                "devices run its steps one by one, such as `maskgit train tokenizer`"
            )
    pretrained = {name: options.get(name) for name in ("tokenizer", "pretrained")}
    tokenizer, weights = options.get("tokenizer"), options.get("pretrained")
    if named := tokenizer or (weights and Path(weights, "tokenizer")):
        read_tokenizer_sizes(Path(named))  # before anything is trained
    name = options.get("run") or (_SHORT_RUN if is_short else str(read[0].run_name))
    runs_folder = options.get("runs_folder", "runs")
    run = Path(runs_folder, name)
    folders = {"run": run, "data": data, **pretrained}
    common = ["--dataset", dataset, "--data", str(data), "--recipe", recipe, "--run", name]
    common += ["--runs-folder", str(runs_folder), "--cluster", cluster]
    common += [word for flag, folder in pretrained.items() if folder is not None for word in (f"--{flag}", str(folder))]
    common += flags
    num_images = _SHORT_NUM_IMAGES if is_short else _NUM_IMAGES
    # A classifier of coloured images may read only their palette.
    features = ["classifier"] if read[0].get("data.in_channels") == 1 else ["classifier", "lite0"]
    words = ["evaluate", str(run), "--data", str(data)]
    words += ["--features", ",".join(features), "--num-images", str(num_images)]
    if pretrained["tokenizer"] is None:
        work = partial(_train, read[0], folders)
        steps.append(Step("train the tokenizer (stage 1)", ["train", "tokenizer", *common], work))
    return [
        *steps,
        Step("encode the images to tokens", ["tokenize", *common], partial(_encode, read[1], folders)),
        Step("train the transformer (stage 2)", ["train", "transformer", *common], partial(_train, read[1], folders)),
        _plan_classifier(read[0], data, Path(runs_folder)),
        Step("generate pictures and measure the model", words, partial(_measure, run, data, features, num_images)),
    ], run


def _plan_data(dataset: str, images: str | Path | None, data: Path, *, lenient: bool) -> list[Step]:
    """Returns the step that makes the data folder; none if it is the user's own and exists."""
    datasets = public_datasets()
    if images is not None:
        if dataset in datasets:  # with a recipe of its own, such as grey images of 28 pixels
            raise ValueError(f"dataset must be a name of your own with images, got {dataset!r}; add --dataset NAME")
        words = ["data", "make", str(images), "--out", str(data), *(["--lenient"] if lenient else [])]
        work = partial(convert_images, images, data, lenient=lenient)
        return [Step(f"write the images of {images} as shards", words, work)]
    if dataset in datasets:
        title = f"fetch {dataset}: {datasets[dataset].contents}"
        return [Step(title, ["data", "fetch", dataset, "--out", str(data)], partial(fetch_dataset, dataset, data))]
    if not data.is_dir():
        raise ValueError(
            f"data {data}: no such folder; convert your own images with --images FOLDER, or name a data set that can "
            f"be fetched with --dataset: {', '.join(datasets)}"
        )
    return []


def _plan_classifier(recipe: Recipe, data: Path, runs_folder: Path) -> Step:
    size, channels = recipe.get("data.image_size"), recipe.get("data.in_channels")
    image_size = size if isinstance(size, int) else tuple(size)
    words = ["train-classifier", "--data", str(data), "--channels", str(channels)]
    words += ["--image-size", str(size) if isinstance(size, int) else ",".join(map(str, size))]
    words += ["--runs-folder", str(runs_folder)]
    work = partial(_train_classifier, data, image_size=image_size, channels=channels, runs_folder=runs_folder)
    return Step("train the classifier that measures the images", words, work)


def _train_classifier(data: Path, **options: Any) -> None:
    with progress_bars() as bars:
        evaluation.train_classifier(data, bars=bars, **options)


def _train(recipe: Recipe, folders: Mapping[str, Any]) -> None:
    with catch_stop_signals():
        runs.fit(recipe, **folders)
        if is_requested():  # too late to stop this step: the next one does not begin
            raise PreemptedError("stopped by a signal after the end of a training; repeat the command to resume")


def _encode(recipe: Recipe, folders: Mapping[str, Any]) -> None:
    with progress_bars() as bars:
        runs.tokenize(recipe, **folders, bars=bars)


def _measure(run: Path, data: Path, features: list[str], num_images: int) -> None:
    options = EvaluationOptions(data=data, num_images=num_images, features=features)
    with progress_bars() as bars:
        report = evaluation.evaluate(run, options, bars=bars)
    from maskgit_pl.pipeline.card import refresh_card  # imports torch

    refresh_card(run / "pretrained")
    table = io.StringIO()
    Console(file=table, force_jupyter=False).print(report.table())
    log.info("%s", "\n".join([table.getvalue().rstrip("\n"), *report.findings()]))
    log.info("%s: results; beside it samples.png, reconstructions.png and decoding.gif", report.file)
