"""``maskgit evaluate``: numbers and pictures of a trained model, beside real images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.sample import default_device, pretrained_folder, write_animation

if TYPE_CHECKING:
    from maskgit_pl.data import Batch, ShardData
    from maskgit_pl.evaluation.protocol import Protocol, Samples
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["add_parser", "run"]

_SHOWN_CLASSES, _SHOWN_OF_A_CLASS, _SHOWN_PAIRS, _ANIMATED = 10, 8, 16, 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained model on the val split",
        description="Measure reconstruction, class agreement, diversity and speed; write metrics.json and pictures.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME) or pretrained folder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: what the run was trained on)")
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="images generated (default: 1000)")
    parser.add_argument("--num-steps", "--steps", type=int, default=8, metavar="T", help="decoding steps (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i (default: 0)")
    parser.add_argument("--batch", type=int, default=100, metavar="N", help="images at a time (default: 100)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: a GPU if there is one)")
    parser.add_argument(
        "--classifier", type=Path, metavar="DIR", help="where the judge is kept (default: RUN/classifier)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="the numbers; pictures go beside it (default: RUN/metrics.json)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, writes, and prints a table.

    Raises:
        FileNotFoundError: No such run or data.
        ValueError: The data are not the model's, or a number is out of range.
    """
    pretrained = pretrained_folder(args.folder)
    home = pretrained.parent if pretrained.name == "pretrained" else pretrained
    path = args.data or _trained_on(home)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such folder; name one with --data")
    from maskgit_pl.evaluation.protocol import Protocol, check_data
    from maskgit_pl.pipeline import MaskGIT

    protocol = Protocol(args.num_images, args.num_steps, args.seed, batch_size=args.batch)
    pipe = MaskGIT.from_pretrained(pretrained).to(args.device or default_device())
    data = _data(path, pipe)
    check_data(pipe, data)
    protocol.labels(data.num_classes)  # refuses too few images before the classifier is trained
    out = args.out or home / "metrics.json"
    _evaluate(pipe, data, protocol, judge=args.classifier or home / "classifier", out=out)
    return 0


def _evaluate(pipe: MaskGIT, data: ShardData, protocol: Protocol, *, judge: Path, out: Path) -> None:
    from rich.console import Console

    from maskgit_pl.evaluation.classifier import ClassifierConfig, obtain_classifier
    from maskgit_pl.evaluation.metrics import reconstruction
    from maskgit_pl.evaluation.protocol import judge_real_images, measure_samples
    from maskgit_pl.evaluation.report import as_report, as_table, save_report

    val = data.summary.samples["val"]
    with _progress() as bar:
        advance = bar("reconstructing", val)
        rebuilt = reconstruction(pipe.tokenizer, _counted(data, advance))
        advance = bar("classifier: training", ClassifierConfig().max_steps)
        classifier = obtain_classifier(judge, data, on_step=lambda: advance(1)).to(pipe.device)
        real = judge_real_images(classifier, data, on_images=bar("classifier: real images", val))
        batches = -(-len(protocol.labels(data.num_classes)) // protocol.batch_size)
        guided_bar, plain_bar = (
            bar(f"sampling, {name}", batches * protocol.num_steps) for name in ("model's guidance", "no guidance")
        )
        guided = measure_samples(pipe, classifier, real, protocol, on_step=lambda: guided_bar(1))
        unguided = guided
        if any(guided.guidance_scales):
            unguided = measure_samples(
                pipe, classifier, real, protocol, guidance_scale=0.0, on_step=lambda: plain_bar(1)
            )
        _write_pictures(pipe, data, guided, protocol, out.parent)
    report = as_report(
        pipe, data, protocol, reconstruction=rebuilt, classifier=classifier, real=real, guided=guided, unguided=unguided
    )
    save_report(report, out)
    Console().print(as_table(report))
    print(f"{out}: the numbers; samples.png, reconstructions.png and decoding.gif beside it")


def _trained_on(home: Path) -> Path:
    """The data folder that stands in the run's own configuration.

    Raises:
        FileNotFoundError: There is none.
    """
    for stage in ("transformer", "tokenizer"):
        file = home / stage / "config.yaml"
        if file.is_file():
            import yaml

            path = (yaml.safe_load(file.read_text()) or {}).get("data", {}).get("path")
            if path:
                return Path(path)
    raise FileNotFoundError(f"run {home}: it does not say what data it was trained on; name them with --data")


def _data(path: Path, pipe: MaskGIT) -> ShardData:
    from maskgit_pl.data import ShardData

    data = ShardData(
        str(path),
        image_size=pipe.tokenizer.image_size,
        in_channels=pipe.tokenizer.network.config.in_channels,
        validation_batch=200,
    )
    data.setup()
    return data


def _counted(data: ShardData, advance: Callable[[int], object]) -> Iterator[Batch]:
    for batch in data.val_dataloader():
        yield batch
        advance(int(batch.valid.sum()))


def _write_pictures(pipe: MaskGIT, data: ShardData, samples: Samples, protocol: Protocol, folder: Path) -> None:
    import torch

    from maskgit_pl.data import to_unit_range
    from maskgit_pl.training.pictures import decode_images, image_grid, reconstruction_grid, save_png

    classes = [number * data.num_classes // _SHOWN_CLASSES for number in range(_SHOWN_CLASSES)]
    classes = sorted(set(classes))
    rows = [samples.images[samples.labels == label][:_SHOWN_OF_A_CLASS] for label in classes]
    names = [pipe.class_names[label] for label in classes]
    save_png(image_grid(torch.cat(rows), columns=len(rows[0]), row_captions=names), folder / "samples.png")

    batch = next(iter(data.val_dataloader()))
    originals = batch.content[batch.valid][:_SHOWN_PAIRS]
    with torch.inference_mode():
        tokens = pipe.tokenizer.network.encode(to_unit_range(originals.to(pipe.device)))
    save_png(reconstruction_grid(originals, decode_images(pipe.tokenizer, tokens)), folder / "reconstructions.png")

    shown = classes[:_ANIMATED]
    seeds = [protocol.seed + number for number in range(len(shown))]
    write_animation(pipe, shown, seeds, folder / "decoding.gif", num_steps=protocol.num_steps)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], Any]]]:
    """Yields what makes a bar of a title and a total, and gives the function that advances it."""
    from rich.progress import Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as progress:

        def bar(title: str, total: int) -> Callable[[int], Any]:
            task = progress.add_task(title, total=total)
            return lambda count: progress.advance(task, count)

        yield bar
