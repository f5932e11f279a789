"""``maskgit evaluate``: numbers and pictures of a trained model, beside real images."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.measuring import (
    RunFolders,
    add_run_arguments,
    find_run,
    open_data,
    open_model,
    progress_bars,
    ready,
)
from maskgit_pl.cli.showing import write_gif

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
        description="Measure reconstruction, class agreement, diversity, distances from real images and speed; "
        "write metrics.json and pictures.",
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument("--num-images", type=int, default=1000, metavar="N", help="images generated (default: 1000)")
    parser.add_argument(
        "--num-steps", "--steps", type=int, metavar="T", help="decoding steps (default: the model's own)"
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
    folders = find_run(args)
    from maskgit_pl.evaluation.protocol import Protocol

    given = {} if args.num_steps is None else {"num_steps": args.num_steps}
    protocol = Protocol(args.num_images, seed=args.seed, batch_size=args.batch, **given)
    pipe = open_model(folders, args)
    if args.num_steps is None:
        protocol = dataclasses.replace(protocol, num_steps=pipe.decoding.num_steps)
    data = open_data(folders, pipe)
    protocol.labels(data.num_classes)  # refuses too few images before the classifier is trained
    _evaluate(folders, pipe, data, protocol, out=args.out or folders.home / "metrics.json")
    return 0


def _evaluate(folders: RunFolders, pipe: MaskGIT, data: ShardData, protocol: Protocol, *, out: Path) -> None:
    from rich.console import Console

    from maskgit_pl.evaluation.metrics import reconstruction
    from maskgit_pl.evaluation.protocol import measure_samples
    from maskgit_pl.evaluation.report import as_report, as_table, save_report
    from maskgit_pl.pipeline.card import refresh_card

    with progress_bars() as bar:
        advance = bar("reconstructing", data.summary.samples["val"])
        rebuilt = reconstruction(pipe.tokenizer, _counted(data, advance))
        count = len(protocol.labels(data.num_classes))
        judge = ready(folders, pipe, data, bar, num_images=count)
        guided_bar, plain_bar = (
            bar(f"sampling, {name}", -(-count // protocol.batch_size) * protocol.num_steps)
            for name in ("model's guidance", "no guidance")
        )
        guided = measure_samples(pipe, judge.classifier, judge.real, protocol, on_step=lambda: guided_bar(1))
        unguided = guided
        if any(guided.guidance_scales):
            unguided = measure_samples(
                pipe, judge.classifier, judge.real, protocol, guidance_scale=0.0, on_step=lambda: plain_bar(1)
            )
        _write_pictures(pipe, data, guided, protocol, out.parent)
    report = as_report(
        pipe,
        data,
        protocol,
        reconstruction=rebuilt,
        classifier=judge.classifier,
        real=judge.real,
        floor=judge.floor,
        guided=guided,
        unguided=unguided,
    )
    save_report(report, out)
    refresh_card(folders.pretrained)
    Console().print(as_table(report))
    print(f"{out}: the numbers; samples.png, reconstructions.png and decoding.gif beside it")


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
    steps = list(pipe.steps(shown, seed=seeds, num_steps=protocol.num_steps))
    captions = [pipe.class_names[label] for label in shown]
    write_gif(pipe, steps, folder / "decoding.gif", captions=captions, grid=pipe.tokenizer.grid)
