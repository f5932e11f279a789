"""What the commands that measure have in common: the run, its data, the judge, and a bar for each part of the work."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from maskgit_pl.checks import check_number, shorten
from maskgit_pl.cli.model import add_device_argument, check_at_least, device_of, read_outline

if TYPE_CHECKING:
    import torch

    from maskgit_pl.data import ShardData
    from maskgit_pl.evaluation.bench.bench import Judge as FeatureJudge
    from maskgit_pl.evaluation.cas import CASConfig
    from maskgit_pl.evaluation.classifier import Classifier
    from maskgit_pl.evaluation.metrics import Distances
    from maskgit_pl.evaluation.protocol import RealImages
    from maskgit_pl.pipeline import MaskGIT

__all__ = [
    "FEATURES",
    "Bars",
    "Judge",
    "RunFolders",
    "add_cas_arguments",
    "add_feature_arguments",
    "add_run_arguments",
    "add_worker_argument",
    "cas_config",
    "check_cas_arguments",
    "check_wanted",
    "decoding_spec",
    "decoding_specs",
    "default_steps",
    "feature_specs",
    "find_run",
    "flag_words",
    "open_data",
    "open_judges",
    "open_model",
    "plain_protocol",
    "progress_bars",
    "read_own_recipe",
    "ready",
    "step_numbers",
    "trained_classifier",
]

Bars: TypeAlias = Callable[[str, int], Callable[[int], Any]]
FEATURES = "classifier,lite0"
_SECONDS_BETWEEN_LINES = 15.0
_SHOWN_BARS = 10  # finished ones go where there are more


@dataclass(frozen=True)
class RunFolders:
    """Where things are.

    Args:
        pretrained: The folder with ``tokenizer/`` and ``transformer/``.
        home: The run's folder; the pretrained folder itself where it stands alone.
        data: The data folder.
        judge: Where the classifier is kept.
        real: Where features of real images are kept, for all runs of the same data.
    """

    pretrained: Path
    home: Path
    data: Path
    judge: Path
    real: Path

    @property
    def evaluation(self) -> Path:
        """Where generated images, and what was measured on them, are kept."""
        return self.home / "evaluation"


@dataclass(frozen=True)
class Judge:
    """What generated images are measured with.

    Args:
        classifier: Trained on the train split.
        real: What it says about the val split.
        floor: The distance of as many real images as are generated.
    """

    classifier: Classifier
    real: RealImages
    floor: Distances


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run, and the flags that say what it is measured on and where."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME) or pretrained folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: what the run was trained on)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i (default: 0)")
    parser.add_argument("--batch", type=int, default=100, metavar="N", help="images at a time (default: 100)")
    add_device_argument(parser)
    parser.add_argument(
        "--classifier", type=Path, metavar="DIR", help="where the judge is kept (default: runs/DATA-classifier/small)"
    )


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the feature networks, and what is compared with in them."""
    parser.add_argument(
        "--features",
        default=FEATURES,
        metavar="A,B,...",
        help="feature networks: classifier, lite0, inception[=FILE], timm:MODEL=FILE, or mappings (default: "
        f"{FEATURES}); the first one chooses where there is something to choose",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE.npz", help="ADM's statistics or images in place of the val split"
    )


def add_cas_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the training of the classification accuracy score, as far as the paper's scale."""
    parser.add_argument("--cas-model", metavar="NAME", help="timm network of the classification accuracy score, or "
                        "none to leave it out (default: resnet50, or resnet18 below 64 pixels)")  # fmt: skip
    parser.add_argument("--cas-steps", type=int, metavar="N", help="its training steps (default: 500)")
    parser.add_argument("--cas-batch", type=int, metavar="N", help="images of a step (default: 64)")
    parser.add_argument("--cas-learning-rate", type=float, metavar="X", help="its peak (default: 1e-3)")
    parser.add_argument("--cas-precision", choices=("32-true", "bf16-mixed"), help="(default: 32-true)")


def add_worker_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the number of processes that read."""
    parser.add_argument("--num-workers", type=int, default=0, metavar="N",
                        help="processes that read real images and those of CAS (default: 0)")  # fmt: skip


def check_cas_arguments(args: argparse.Namespace) -> None:
    """Refuses numbers out of range before anything is loaded.

    Raises:
        ValueError: with the first of them.
    """
    check_at_least(args, cas_steps=1, cas_batch=2)
    if args.cas_learning_rate is not None:
        check_number("--cas-learning-rate", args.cas_learning_rate, "(0, inf)")


def cas_config(image_size: int, args: argparse.Namespace) -> CASConfig:
    """Returns what the flags of ``add_cas_arguments`` say, and the defaults of images of a size."""
    from maskgit_pl.evaluation.cas import default_config

    return default_config(
        image_size,
        model=args.cas_model,
        max_steps=args.cas_steps,
        batch=args.cas_batch,
        peak_rate=args.cas_learning_rate,
        precision=args.cas_precision,
    )


def step_numbers(text: str, *, flag: str = "--num-steps") -> tuple[int, ...]:
    """Numbers of steps, or others that a flag takes: ``4,8,16``, ``4-16``, or both; each once, in the order given.

    Raises:
        ValueError: None, something else, a number below 1, or a range that falls.
    """
    found: list[int] = []
    for word in filter(None, map(str.strip, text.split(","))):
        first, dash, last = word.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise ValueError(f"{flag} {text}: numbers such as 4,8,16 or a range such as 4-16 are needed, got {word!r}")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high:
            raise ValueError(f"{flag} {text}: numbers of at least 1 that rise are needed, got {word!r}")
        found += range(low, high + 1)
    if not found:
        raise ValueError(f"{flag} {text!r}: at least one number is needed, such as 8")
    return tuple(dict.fromkeys(found))


def default_steps(pipe: MaskGIT, usual: Sequence[int]) -> tuple[int, ...]:
    """The usual T, as far as an image has tokens; all of its tokens where it has fewer than the least of them."""
    num_tokens = pipe.tokenizer.grid[0] * pipe.tokenizer.grid[1]
    return tuple(number for number in usual if number <= num_tokens) or (num_tokens,)


def flag_words(given: Mapping[str, object]) -> list[str]:
    """Flags as they are typed, for the line that says what makes a page again; those that are None are left out."""
    return [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items() if value is not None
    ]


def decoding_specs(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Names and mappings, separated by commas: ``confidence, {name: remdm, eta: 0.4}``.

    Args:
        flag: For the error.
        text: What was written.

    Raises:
        ValueError: None, or something that is neither.
    """
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    specs = [decoding_spec(flag, word.strip()) for word in words if word.strip()]
    if not specs:
        raise ValueError(f"{flag} {text!r}: at least one name is needed")
    for spec in specs:
        if not isinstance(spec, str | dict):
            raise ValueError(f"{flag} {text}: names or mappings are needed, got {spec!r}")
    return specs


def decoding_spec(flag: str, text: str) -> Any:
    """One name, number or mapping; ``{"name": "remdm"}`` and ``{name: remdm}`` are the same.

    Raises:
        ValueError: A mapping that cannot be read.
    """
    import yaml

    try:
        spec = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{flag} {shorten(text)}: a name or a mapping such as '{{name: remdm, eta: 0.4}}' is needed ({why})"
        ) from error
    if not isinstance(spec, str | dict | int | float) or isinstance(spec, bool):
        raise ValueError(
            f"{flag} {text}: a name or a mapping such as '{{name: remdm, eta: 0.4}}' is needed, got {spec!r}"
        )
    return spec


def find_run(args: argparse.Namespace) -> RunFolders:
    """The folders that the flags of ``add_run_arguments`` name.

    Raises:
        FileNotFoundError: No such run or data, or the run does not say what it was trained on.
    """
    from maskgit_pl.pipeline.sharing import local_folder

    pretrained = local_folder(args.folder)
    home = pretrained.parent if pretrained.name == "pretrained" else pretrained
    path = args.data or _trained_on(home)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such folder; name one with --data")
    real = home.absolute().parent / f"{path.absolute().name}-classifier"  # one judge for all runs of the data
    return RunFolders(pretrained, home, path, args.classifier or real / "small", real)


def check_wanted(
    folders: RunFolders, task: str, *, numbers: Sequence[int] | None, selectors: Sequence[Any] | None
) -> None:
    """Checks what is to be compared with the outline of the model, before torch is imported and weights are read.

    Args:
        folders: Those of the run.
        task: What the command does, for the error.
        numbers: Numbers of steps, of ``--num-steps``.
        selectors: Names and mappings of token selectors, of ``--selectors``.

    Raises:
        ValueError: if the model is sequential, has fewer tokens than steps, or a selector is unknown.
    """
    from maskgit_pl.decoding.limits import check_num_steps
    from maskgit_pl.decoding.selectors import token_selectors

    outline = read_outline(folders.pretrained)
    outline.check_parallel(task)
    for number in numbers or ():
        check_num_steps(number, outline.num_tokens)
    for spec in selectors or ():
        token_selectors.build(spec)


def open_model(folders: RunFolders, args: argparse.Namespace) -> MaskGIT:
    """The model, on the device that the flags name."""
    device = device_of(args)
    from maskgit_pl.pipeline import MaskGIT

    return MaskGIT.from_pretrained(folders.pretrained).to(device)


def open_data(folders: RunFolders, pipe: MaskGIT, *, num_workers: int = 0) -> ShardData:
    """The images that a model is measured on.

    Args:
        folders: Where they are.
        pipe: The model.
        num_workers: Processes that read them.

    Raises:
        ValueError: Their classes are not the model's.
    """
    from maskgit_pl.data import ShardData
    from maskgit_pl.evaluation.protocol import check_data

    data = ShardData(
        str(folders.data),
        image_size=pipe.tokenizer.image_size,
        in_channels=pipe.tokenizer.network.config.in_channels,
        validation_batch=200,
        num_workers=num_workers,
    )
    data.setup()
    check_data(pipe, data)
    return data


def plain_protocol(
    folders: RunFolders, pipe: MaskGIT, data: ShardData, judge: Judge, *, batch_size: int
) -> dict[str, Any]:
    """What decides numbers beside decoding, number of images and seed, in plain values."""
    from maskgit_pl.evaluation.digests import model_digests
    from maskgit_pl.evaluation.protocol import Protocol
    from maskgit_pl.networks.features import weights_digest

    return {
        **model_digests(pipe, folders.pretrained),
        "judge": weights_digest(judge.classifier.network),
        "mask_schedule": repr(pipe.transformer.mask_schedule),
        "data": data.summary.fingerprint,
        "split": "val",
        "diversity_per_class": Protocol().diversity_per_class,
        "batch_size": batch_size,
        "device": str(pipe.device),
    }


def ready(folders: RunFolders, pipe: MaskGIT, data: ShardData, bars: Bars, *, num_images: int) -> Judge:
    """The judge, trained where it is not yet, with what it says about real images.

    Args:
        folders: Where it is kept.
        pipe: For its device.
        data: What it is trained on.
        bars: Progress.
        num_images: As many real images give the floor of distances.
    """
    from maskgit_pl.evaluation.protocol import judge_real_images, real_floor

    classifier = trained_classifier(folders.judge, data, bars).to(pipe.device)
    on_images = bars("classifier: real images", data.summary.samples["val"])
    real = judge_real_images(classifier, data, on_images=on_images)
    return Judge(classifier, real, real_floor(classifier, data, real, num_images=num_images))


def feature_specs(text: str) -> list[str | dict[str, Any]]:
    """The feature networks of ``--features``; a name, ``NAME=PATH``, ``timm:MODEL=FILE`` or a mapping each.

    Raises:
        ValueError: None, one twice, or one that is neither.
    """
    specs = decoding_specs("--features", text)
    names = [str(spec if isinstance(spec, str) else spec.get("name")).partition("=")[0] for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--features {text}: each network once is enough, got {', '.join(twice)} twice")
    return specs


def open_judges(
    specs: Sequence[str | dict[str, Any]],
    data: ShardData,
    folders: RunFolders,
    *,
    reference: Path | None,
    device: torch.device,
    bars: Bars,
) -> dict[str, FeatureJudge]:
    """Feature networks and what they say of the real images, each under its label.

    Args:
        specs: As ``feature_specs`` gives them; ``classifier`` alone is the one of ``folders.judge``.
        data: The real images.
        folders: Where the classifier of the data is kept, which is trained where there is none, and features of the
            real images.
        reference: ADM's file of a data set in place of the val split; None for that.
        device: Where the networks work.
        bars: Progress.

    Raises:
        TypeError: A network does not take its arguments.
        ValueError: An unknown network, or its weights are missing or others.
    """
    from maskgit_pl.evaluation.bench.bench import CLASSIFIER, Judge
    from maskgit_pl.evaluation.features import Extractor
    from maskgit_pl.evaluation.reference import obtain_references, read_references, real_labels
    from maskgit_pl.networks.features import ClassifierSpec, parse_feature_network

    parsed = [
        ClassifierSpec(str(folders.judge)) if spec == CLASSIFIER else parse_feature_network(spec) for spec in specs
    ]
    if CLASSIFIER in specs:
        trained_classifier(folders.judge, data, bars)
    extractors = [Extractor.create(spec, device=device) for spec in parsed]
    names = ", ".join(extractor.label for extractor in extractors)
    on_images = bars(f"real images: {names}", data.summary.samples["val"])
    if reference is not None:
        references = read_references(reference, extractors, folder=folders.real, on_images=on_images)
    else:
        references = obtain_references(folders.real, data, extractors, on_images=on_images)
    labels = None if reference is not None else real_labels(data)
    return {each.label: Judge(each, references[each.label], labels) for each in extractors}


def trained_classifier(folder: Path, data: ShardData, bars: Bars) -> Classifier:
    """The classifier of some data, trained and kept in a folder where it is not there yet."""
    from maskgit_pl.evaluation import classifier as judges

    train = bars("classifier: training", judges.ClassifierConfig().max_steps)
    return judges.obtain_classifier(folder, data, on_step=lambda: train(1))


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[Bars]:
    """Yields what makes a bar of a title and a total, and gives the function that advances it.

    On a terminal these are bars; elsewhere a line each now and then, for logs. Both tell the time left.

    Args:
        shown: False on all ranks but one.
    """
    if not shown:
        yield lambda title, total: lambda count: None
        return
    if not sys.stdout.isatty():
        yield lambda title, total: _Lines(title, total).advance
        return
    from rich.progress import Progress, TimeElapsedColumn

    columns = Progress.get_default_columns()  # title, bar, share, time left
    with Progress(*columns, TimeElapsedColumn(), transient=True, speed_estimate_period=300) as progress:

        def bar(title: str, total: int) -> Callable[[int], Any]:
            task = progress.add_task(title, total=total)

            def advance(count: int) -> None:
                progress.advance(task, count)
                progress.update(task, visible=not progress.tasks[task].finished or len(progress.tasks) < _SHOWN_BARS)

            return advance

        yield bar


class _Lines:
    """Progress in lines; the time left follows the pace since the line before."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.done = self.done_before = 0
        self.told = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now, made = time.monotonic(), self.done - self.done_before
        if now - self.told < _SECONDS_BETWEEN_LINES or not made:
            return
        left = datetime.timedelta(seconds=round((now - self.told) * (self.total - self.done) / made))
        print(f"{self.title}: {self.done} of {self.total}, {left} left", flush=True)
        self.told, self.done_before = now, self.done


def read_own_recipe(file: Path) -> dict[str, Any]:
    """Returns what a run's ``config.yaml`` says, in plain values; nothing where it is not there.

    Raises:
        ValueError: if it is no recipe. The message is one line.
    """
    from maskgit_pl.runs.safe_yaml import read_yaml

    if not file.is_file():
        return {}
    try:
        return read_yaml(file)
    except RecursionError as error:
        raise ValueError(f"recipe {file} is nested too deep") from error
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _trained_on(home: Path) -> Path:
    """The data folder that stands in the run's own configuration.

    Raises:
        FileNotFoundError: There is none.
    """
    for stage in ("transformer", "tokenizer"):
        file = home / stage / "config.yaml"
        data = read_own_recipe(file).get("data") or {}
        path = data.get("path") if isinstance(data, dict) else data
        if path is not None and not isinstance(path, str):
            raise ValueError(f"{file}: data.path must be a string, got {shorten(path)}")
        if path:
            return Path(path)
    raise FileNotFoundError(f"run {home}: it does not say what data it was trained on; name them with --data")
