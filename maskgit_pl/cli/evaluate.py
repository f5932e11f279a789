"""``maskgit evaluate``: numbers and pictures of a trained model, beside real images."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.measuring import (
    RunFolders,
    add_cas_arguments,
    add_feature_arguments,
    add_run_arguments,
    add_worker_argument,
    cas_config,
    check_cas_arguments,
    feature_specs,
    find_run,
    open_data,
    open_judges,
    open_model,
    progress_bars,
)
from maskgit_pl.cli.model import check_at_least, naming_flags, read_outline
from maskgit_pl.cli.outputs import check_outputs
from maskgit_pl.launcher import local_rank

if TYPE_CHECKING:
    from maskgit_pl.cli.measuring import Bars
    from maskgit_pl.data import ShardData
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.evaluation.bench.bench import Bench, Judge, Subject
    from maskgit_pl.evaluation.bench.generation import Generated
    from maskgit_pl.evaluation.lpips import LPIPS
    from maskgit_pl.evaluation.metrics import Reconstruction
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["add_parser", "run"]

_SHOWN_CLASSES, _SHOWN_OF_A_CLASS, _SHOWN_PAIRS, _ANIMATED = 10, 8, 16, 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained model on the val split",
        description="Measure reconstruction, generated images in the features of several networks, likelihood and "
        "speed; write evaluation.json and pictures. Several processes that torchrun starts share the work.",
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--num-samples", "--num-images", type=int, default=1000, metavar="N", help="images generated (default: 1000)"
    )
    parser.add_argument(
        "--num-steps", "--steps", type=int, metavar="T", help="decoding steps (default: the model's own)"
    )
    add_feature_arguments(parser)
    parser.add_argument("--lpips", metavar="vgg=FILE", help="also LPIPS of the reconstructions; the backbone is vgg, "
                        "alex or squeeze")  # fmt: skip
    parser.add_argument("--likelihood-samples", type=int, default=2000, metavar="N",
                        help="real images whose likelihood is measured (default: 2000)")  # fmt: skip
    parser.add_argument("--cas", action="store_true", help="also measure the classification accuracy score")
    add_cas_arguments(parser)
    add_worker_argument(parser)
    parser.add_argument("--resume", action="store_true", help="keep what a stopped evaluation has measured")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="the numbers; pictures go beside it (default: RUN/evaluation.json)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, writes, and prints a table.

    Raises:
        FileNotFoundError: No such run or data.
        ValueError: The data are not the model's, an unknown network, or a number out of range.
    """
    check_at_least(args, num_samples=1, likelihood_samples=2, batch=1, num_workers=0)
    check_outputs(args, out=".json")
    check_cas_arguments(args)
    specs = feature_specs(args.features)
    folders = find_run(args)
    with naming_flags(args):
        outline = read_outline(folders.pretrained)
        outline.check_decoding(outline.decoding_with(num_steps=args.num_steps))
    from maskgit_pl.devices import default_device
    from maskgit_pl.distributed import process_group
    from maskgit_pl.evaluation.protocol import Protocol, check_decoding

    with process_group() as several:
        if several and args.device is None:
            args.device = default_device(local_rank=local_rank())
        pipe = open_model(folders, args)
        decoding = pipe.decoding_with(num_steps=args.num_steps)
        check_decoding(pipe, decoding)
        data = open_data(folders, pipe, num_workers=args.num_workers)
        Protocol(args.num_samples).labels(data.num_classes)  # refuses too few images before the classifier is trained
        _evaluate(folders, pipe, data, decoding, specs, args)
    return 0


def _evaluate(
    folders: RunFolders,
    pipe: MaskGIT,
    data: ShardData,
    decoding: DecodingConfig,
    specs: list[str | dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    from rich.console import Console

    from maskgit_pl.distributed import barrier, rank_and_world
    from maskgit_pl.evaluation.bench.bench import Bench, Subject
    from maskgit_pl.evaluation.bench.report import as_table, save_report
    from maskgit_pl.evaluation.lpips import load_lpips
    from maskgit_pl.pipeline.card import refresh_card

    lpips = None if args.lpips is None else load_lpips(args.lpips, device=pipe.device)
    first = rank_and_world()[0] == 0
    if first and not args.resume:
        _begin_anew(folders.evaluation)
    barrier()
    with progress_bars(shown=first) as bars:
        judges = open_judges(specs, data, folders, reference=args.reference, device=pipe.device, bars=bars)
        rebuilt = _reconstruction(pipe, data, judges if args.reference is None else {}, lpips, bars)
        bench = Bench(
            data,
            dataset=folders.data.name,
            judges=judges,
            results=folders.evaluation,
            bars=bars,
            batch_size=args.batch,
            device=pipe.device,
        )
        barrier()  # all have read the ledger before one of them writes to it
        subject = Subject(folders.home.name, pipe, folders.pretrained, folders.evaluation)
        report = _measure(bench, subject, decoding, rebuilt, args)
        made = bench.generated(subject, decoding, num_images=args.num_samples, seed=args.seed, title="pictures")
    if not first:
        return
    out = args.out or folders.home / "evaluation.json"
    _write_pictures(bench, subject, decoding, made, args.seed, out.parent)
    save_report(report, out)
    refresh_card(folders.pretrained)
    Console().print(as_table(report))
    print(f"{out}: the numbers; samples.png, reconstructions.png and decoding.gif beside it")


def _measure(
    bench: Bench, subject: Subject, decoding: DecodingConfig, rebuilt: Reconstruction, args: argparse.Namespace
) -> dict[str, Any]:
    """What is measured on generated images and on the transformer, with all else that ``evaluation.json`` holds."""
    from maskgit_pl.evaluation.bench.report import as_report

    ways = {"exported_guidance": decoding}
    if any(decoding.scales()):
        ways["without_guidance"] = subject.pipe.decoding_with(decoding=decoding, guidance_scale=0)
    how = {"num_images": args.num_samples, "networks": list(bench.judges)}
    return as_report(
        subject,
        bench.data,
        decoding=decoding,
        num_images=args.num_samples,
        seed=args.seed,
        judges=bench.judges,
        samples={name: bench.samples(subject, way, seed=args.seed, keep=True, **how) for name, way in ways.items()},
        floor=bench.real(**how),
        reconstruction=rebuilt,
        likelihood=bench.likelihood(subject, num_images=args.likelihood_samples, draws=4),
        cas=_accuracies(bench, subject, decoding, args) if args.cas and args.cas_model != "none" else {},
    )


def _begin_anew(folder: Path) -> None:
    """Takes away what an earlier evaluation has measured and generated."""
    for path in (*folder.glob("*.csv"), *folder.glob("samples-*.npz")):
        path.unlink()
    for path in folder.glob("samples-*.npz.parts"):
        shutil.rmtree(path)


def _reconstruction(
    pipe: MaskGIT, data: ShardData, judges: dict[str, Judge], lpips: LPIPS | None, bars: Bars
) -> Reconstruction:
    from maskgit_pl.evaluation.metrics import reconstruction
    from maskgit_pl.evaluation.reference import own_real_batches

    return reconstruction(
        pipe.tokenizer,
        own_real_batches(data, "val"),
        extractors=[judge.extractor for judge in judges.values()],
        references={label: judge.reference for label, judge in judges.items()},
        lpips=lpips,
        on_images=bars("reconstructing", data.summary.samples["val"]),
    )


def _accuracies(bench: Bench, subject: Subject, decoding: DecodingConfig, args: argparse.Namespace) -> dict[str, Any]:
    config = cas_config(bench.data.image_size, args)
    how = {"num_images": args.num_samples, "seed": args.seed}
    return {
        "generated_images": bench.cas(subject, decoding, config, **how),
        "real_images": bench.cas(None, None, config, **how),
    }


def _write_pictures(
    bench: Bench, subject: Subject, decoding: DecodingConfig, made: Generated, seed: int, folder: Path
) -> None:
    import torch

    from maskgit_pl.imaging import image_grid, reconstruction_grid, save_animation, save_png

    data, pipe = bench.data, subject.pipe
    classes = sorted({number * data.num_classes // _SHOWN_CLASSES for number in range(_SHOWN_CLASSES)})
    rows = []
    for label in classes:
        start = int((made.labels == label).nonzero()[0])
        rows.append(made.read(range(start, min(start + _SHOWN_OF_A_CLASS, start + int((made.labels == label).sum())))))
    least = min(len(row) for row in rows)
    names = [pipe.class_names[label] for label in classes]
    grid = image_grid(torch.cat([row[:least] for row in rows]), columns=least, row_captions=names)
    save_png(grid, folder / "samples.png")

    originals = bench.real_images("val", _SHOWN_PAIRS)[0]
    reconstructions = pipe.tokenizer.decode(pipe.tokenizer.encode(originals))
    save_png(reconstruction_grid(originals, reconstructions), folder / "reconstructions.png")

    shown = classes[:_ANIMATED]
    seeds = [seed + number for number in range(len(shown))]
    steps = list(pipe.steps(shown, seed=seeds, decoding=decoding))
    captions = [pipe.class_names[label] for label in shown]
    save_animation(steps, pipe.tokenizer.decode, folder / "decoding.gif", grid=pipe.tokenizer.grid, captions=captions)
