"""``--accept-rate`` and ``--classifier`` of ``maskgit sample``: rejection sampling by a classifier."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import check_number

if TYPE_CHECKING:
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.acceptance import Acceptance, AcceptedSeeds

__all__ = [
    "add_acceptance_arguments",
    "check_acceptance_flags",
    "choose_accepted",
    "describe_acceptance",
    "open_acceptance",
]


def add_acceptance_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument(
        "--accept-rate",
        type=float,
        metavar="X",
        help="generate 1 / X times as many images, and keep the fraction X of each class to which a classifier gives "
        "the highest probability of that class",
    )
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="DIR",
        help="classifier of --accept-rate (default: that of the data of the run, runs/DATA-classifier/small)",
    )


def check_acceptance_flags(args: argparse.Namespace) -> None:
    """Checks the flags, and finds the classifier before torch is imported."""
    if args.accept_rate is None:
        if args.classifier is not None:
            raise ValueError(f"--classifier must be given with --accept-rate, got only {args.classifier}")
        return
    check_number("--accept-rate", args.accept_rate, "(0, 1]")
    given = args.classifier is not None
    if not given:
        from maskgit_pl.evaluation.run_folders import find_run

        try:
            args.classifier = find_run(args.folder).classifier
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--accept-rate: {error}; or name a classifier with --classifier") from error
    if not (args.classifier / "config.json").is_file():
        raise FileNotFoundError(
            f"--classifier {args.classifier}: no classifier there; `maskgit train-classifier --data DATA` trains one"
        )


def open_acceptance(pipe: MaskGIT, args: argparse.Namespace) -> Acceptance | None:
    """Reads the classifier of ``--classifier``; returns None without ``--accept-rate``."""
    if args.accept_rate is None:
        return None
    from maskgit_pl.pipeline.acceptance import Acceptance

    acceptance = Acceptance.load(args.classifier, args.accept_rate, device=pipe.device)
    acceptance.check_classes(pipe.class_names)
    return acceptance


def choose_accepted(pipe: MaskGIT, labels: list[int], args: argparse.Namespace, **options: Any) -> AcceptedSeeds | None:
    """Chooses the seeds of accepted images and prints them; returns None without ``--accept-rate``."""
    acceptance = open_acceptance(pipe, args)
    if acceptance is None:
        return None
    from maskgit_pl.pipeline.acceptance import choose_seeds
    from maskgit_pl.progress import progress_bars

    with progress_bars() as bars:
        total = sum(acceptance.num_candidates(labels.count(label)) for label in set(labels))
        on_images = bars("candidates", total, unit="images")
        chosen = choose_seeds(
            pipe, labels, acceptance, seed=args.seed, batch_size=args.batch_size, on_images=on_images, **options
        )
    print(describe_acceptance(acceptance, len(labels), chosen.num_candidates))
    print(f"seeds: {', '.join(map(str, chosen.seeds))}")
    return chosen


def describe_acceptance(acceptance: Acceptance, count: int, num_candidates: int) -> str:
    """Returns the number of accepted images, that of candidates, and the classifier, in one line."""
    return f"accepted {count} of {num_candidates} candidates ({count / num_candidates:.1%}) by {acceptance.name}"
