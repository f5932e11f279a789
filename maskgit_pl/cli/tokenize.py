"""``maskgit tokenize``: turns the images of a data set into a token store for stage 2."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from maskgit_pl.cli.train import add_run_arguments, find_tokenizer, run_folder

__all__ = ["add_parser", "run"]

log = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("tokenize", help="turn images into tokens, once", allow_abbrev=False)
    add_run_arguments(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: what there is)")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time (default: 256)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes ``runs/RUN/tokens``; an interrupted one is gone on with, a finished one left alone."""
    folder = find_tokenizer(args)
    shards = args.data or Path("data/shards") / args.dataset
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from maskgit_pl.data import to_unit_range, tokenize
    from maskgit_pl.pretrained import load_tokenizer
    from maskgit_pl.shards.manifest import read_manifest_summary

    tokenizer = load_tokenizer(folder)
    network = tokenizer.network
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(accelerator or "cpu") if args.device == "auto" else torch.device(args.device)
    network.to(device)
    samples = read_manifest_summary(shards).samples
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.monotonic()
    with Progress(*columns) as progress, torch.inference_mode():
        tasks = {split: progress.add_task(f"tokens of {split}", total=count) for split, count in samples.items()}
        made = tokenize(
            shards,
            run_folder(args) / "tokens",
            encode=lambda images: network.encode(to_unit_range(images.to(device))),
            grid=tokenizer.grid,
            num_codes=network.config.num_codes,
            tokenizer=tokenizer.fingerprint,
            image_size=tokenizer.image_size,
            in_channels=network.config.in_channels,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            on_rows=lambda split, rows: progress.advance(tasks[split], rows),
        )
    store = run_folder(args) / "tokens"
    if made:
        seconds = time.monotonic() - start
        log.info(
            "%s: %d images in %.1f s, %.0f images/s",
            store,
            sum(samples.values()),
            seconds,
            sum(samples.values()) / seconds,
        )
    else:
        log.info("%s: there already, made by this tokenizer from this data", store)
    return 0
