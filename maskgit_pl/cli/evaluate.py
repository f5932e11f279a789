"""``maskgit evaluate``, ``evaluate-tokenizer`` and ``tune``: measure models on the val split.

``maskgit train-classifier`` trains a classifier of a data set, whose features measure generated images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import rich

from maskgit_pl import evaluation
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import Device, Folder, ImageSize, Numbers, Run, Specs, print_page
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.evaluation.options import (
    FEATURES,
    EvaluationOptions,
    Spec,
    TokenizerOptions,
    TuningOptions,
    default_training,
)
from maskgit_pl.evaluation.run_folders import find_run, find_tokenizer_folders
from maskgit_pl.pipeline.sharing import local_folder
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.recipe import parse_specs


def _parse_selectors(flag: str, text: str) -> list[Spec] | None:
    """Returns the selectors to measure; None for all."""
    return None if text == "all" else parse_specs(flag, text)


def _parse_schedules(flag: str, text: str) -> Sequence[Spec] | None:
    """Returns the mask schedules to try besides the model's own; None for all."""
    return {"all": None, "own": ()}[text] if text in ("all", "own") else parse_specs(flag, text)


Selectors = Annotated[Sequence[Spec], Word("A,B,...", _parse_selectors)]


@dataclass(frozen=True)
class EvaluationFlags(EvaluationOptions):
    """The options of an evaluation as they are typed."""

    data: Folder | None = None
    features: Specs = FEATURES
    out: Annotated[Path, Output(".json")] | None = None


def evaluate(folder: Run, *, measurement: EvaluationFlags = EvaluationFlags()) -> None:
    """Measures a trained model on the val split.

    That is its reconstructions, generated images in the features of several networks, likelihood and speed.
    The command writes evaluation.json and pictures. Processes that torchrun starts share the work.

    Example: maskgit evaluate runs/fashion-mnist-adaln --num-images 2000 --features classifier

    Args:
        folder: Run folder (runs/NAME) or pretrained folder.
    """
    find_run(folder, data=measurement.data)  # before torch is imported
    # All ranks measure; rank 0 shows the progress and prints the table.
    is_first = os.environ.get("RANK", "0") == "0"
    with progress_bars(shown=is_first) as bars:
        report = evaluation.evaluate(folder, measurement, bars=bars)
    if is_first:
        from maskgit_pl.pipeline.card import refresh_card  # imports torch

        if measurement.out is None:
            refresh_card(local_folder(folder))
        rich.print(report.table())
        print(*report.findings(), sep="\n")
        pictures = "; beside it samples.png, reconstructions.png and decoding.gif"
        print(f"{report.file}: results{pictures if report.content['protocol']['features'] else ''}")


def evaluate_tokenizer(
    folder: Run,
    *,
    data: Folder | None = None,
    features: Specs = ("classifier",),
    out: Annotated[Path, Output(".json")] | None = None,
    measurement: TokenizerOptions = TokenizerOptions(),
) -> None:
    """Measures a tokenizer on the val split.

    That is the reconstructions, codes, bits per pixel and speed of a trained, exported or imported
    tokenizer. The command writes tokenizer.json.

    Example: maskgit evaluate-tokenizer runs/fashion-mnist-adaln --num-images 2000

    Args:
        folder: Run folder, pretrained folder or tokenizer folder.
        data: Data folder (default: that of the training).
        features: Feature networks: classifier, lite0, inception[=FILE], timm:MODEL=FILE, or mappings.
        out: Results (default: RUN/tokenizer.json).
    """
    find_tokenizer_folders(folder, data=data)  # before torch is imported
    with progress_bars() as bars:
        report = evaluation.evaluate_tokenizer(
            folder, data=data, features=features, out=out, options=measurement, bars=bars
        )
    rich.print(report.table())
    print(f"{report.file}: results")


@dataclass(frozen=True)
class TuningFlags(TuningOptions):
    """The options of a search as they are typed."""

    data: Folder | None = None
    out: Annotated[Path, Output("")] | None = None
    num_steps: Numbers | None = None
    selectors: Selectors | None = None
    schedules: Annotated[Sequence[Spec], Word("A,B,...", _parse_schedules)] | None = None


def tune(folder: Run, *, search: TuningFlags = TuningFlags()) -> None:
    """Searches for better decoding settings of a model.

    The search tries token selectors, temperatures, truncation, guidance, mask schedules and numbers of steps T on the
    val split, confirms the best settings with new noise, and writes decoding.json beside the weights, and a page. Every
    command uses decoding.json from then on. The same command resumes after a stop. Requires the extra
    tune: pip install 'maskgit_pl[tune]'.

    Example: maskgit tune runs/fashion-mnist-adaln --trials 40 --metric fid

    Args:
        folder: Run folder (runs/NAME) or pretrained folder.
    """
    find_run(folder, data=search.data)  # before torch is imported
    with progress_bars() as bars:
        result = evaluation.tune(folder, search, bars=bars)
    assert result.page is not None
    print_page(result.page)
    if result.decoding_file is None:  # without a better trial, the files of the model stay as they are
        print(f"the current settings are the best of {len(result.trials)} trials; decoding.json is unchanged")
    else:
        print(f"{result.decoding_file}: new decoding settings of this model")


def train_classifier(
    *,
    data: Folder,
    model: str = "small",
    max_steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    num_workers: int = 0,
    seed: int = 0,
    device: Device | None = None,
    runs_folder: Folder = Path("runs"),
    out: Annotated[Path, Output("")] | None = None,
) -> None:
    """Trains a classifier of a data set for evaluation.

    It learns from the train split of a data folder. The command prints its accuracy on the val split, and
    writes it to a folder, by default that of `--features classifier` of other commands; `--features classifier=DIR`
    takes another. An existing classifier of the same data and settings is reused.

    Example: maskgit train-classifier --data data/shards/fashion-mnist --model resnet18

    Args:
        data: Data folder.
        model: small, or the name of a timm network such as resnet18.
        max_steps: Training steps (default: 900, for timm 1000).
        batch_size: Images per step (default: 128, for timm 64).
        learning_rate: Peak learning rate (default: 4e-3, for timm 1e-3).
        image_size: S x S pixels, or height H and width W (default: the size of the data).
        channels: 1 or 3 (default: those of the data).
        num_workers: Processes that read images (default: 0).
        seed: Seed of weights and order (default: 0).
        device: cpu, cuda, cuda:1, mps ... (default: a GPU if there is one).
        runs_folder: Folder of all runs.
        out: Classifier folder (default: runs/DATA-classifier/NAME).
    """
    read_manifest_summary(data)  # before torch is imported
    # Flags that are not given keep the defaults of the network.
    training: dict[str, Any] = {"max_steps": max_steps, "batch": batch_size, "peak_rate": learning_rate}
    given = {name: value for name, value in training.items() if value is not None}
    is_any = (model, seed, given) == ("small", 0, {})  # then one of any training is reused
    config = None if is_any else replace(default_training(model), seed=seed, **given)
    with progress_bars() as bars:
        classifier = evaluation.train_classifier(
            data,
            config=config,
            image_size=image_size,
            channels=channels,
            num_workers=num_workers,
            device=device,
            runs_folder=runs_folder,
            out=out,
            bars=bars,
        )
    accuracy, how = classifier.accuracy, "reused" if classifier.is_reused else "trained"
    print(f"{classifier.folder}: {how}; on {accuracy.images} real val images:")
    print(f"  top-1 {accuracy.top1:.2%}" + (f", top-5 {accuracy.top5:.2%}" if classifier.num_classes > 5 else ""))
