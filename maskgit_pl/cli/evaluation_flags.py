"""The flags that the commands that measure have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from maskgit_pl.checks import check_number, shorten
from maskgit_pl.cli.model import add_device_argument, check_at_least

__all__ = [
    "FEATURES",
    "add_cas_arguments",
    "add_feature_arguments",
    "add_measuring_arguments",
    "add_run_arguments",
    "add_worker_argument",
    "cas_flags",
    "decoding_spec",
    "decoding_specs",
    "feature_specs",
    "measuring_flags",
    "step_numbers",
]

FEATURES = "classifier,lite0"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run that is measured, and the flags of ``add_measuring_arguments``."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME) or pretrained folder")
    add_measuring_arguments(parser)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what runs are measured on and where."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: what the run was trained on)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i (default: 0)")
    parser.add_argument("--batch", type=int, default=100, metavar="N", help="images at a time (default: 100)")
    add_device_argument(parser)
    parser.add_argument(
        "--classifier", type=Path, metavar="DIR", help="where the judge is kept (default: runs/DATA-classifier/small)"
    )


def measuring_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ``evaluation.MeasuringOptions`` that the flags of ``add_measuring_arguments`` give."""
    return {"seed": args.seed, "batch_size": args.batch, "device": args.device, "classifier": args.classifier}


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


def cas_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ``evaluation.CASConfig`` that the flags of ``add_cas_arguments`` give.

    Raises:
        ValueError: if a number is out of range.
    """
    check_at_least(args, cas_steps=1, cas_batch=2)
    if args.cas_learning_rate is not None:
        check_number("--cas-learning-rate", args.cas_learning_rate, "(0, inf)")
    given = {
        "model": args.cas_model,
        "max_steps": args.cas_steps,
        "batch": args.cas_batch,
        "peak_rate": args.cas_learning_rate,
        "precision": args.cas_precision,
    }
    return {name: value for name, value in given.items() if value is not None}


def add_worker_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the number of processes that read."""
    parser.add_argument("--num-workers", type=int, default=0, metavar="N",
                        help="processes that read real images and those of CAS (default: 0)")  # fmt: skip


def step_numbers(text: str, *, flag: str = "--num-steps") -> tuple[int, ...]:
    """Parses numbers of steps, or others: ``4,8,16``, ``4-16``, or both; each once, in the order given.

    Raises:
        ValueError: if there is none, or something else, a number below 1, or a range that falls.
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


def decoding_specs(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses names and mappings, separated by commas: ``confidence, {name: remdm, eta: 0.4}``.

    Args:
        flag: For the error.
        text: What was written.

    Raises:
        ValueError: if there is none, or one is neither.
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
    """Parses one name, number or mapping; ``{"name": "remdm"}`` and ``{name: remdm}`` are the same.

    Raises:
        ValueError: if it is a mapping that cannot be read.
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


def feature_specs(text: str) -> list[str | dict[str, Any]]:
    """Parses the feature networks of ``--features``; a name, ``NAME=PATH``, ``timm:MODEL=FILE`` or a mapping each.

    Raises:
        ValueError: if there is none, one comes twice, or one is neither.
    """
    specs = decoding_specs("--features", text)
    names = [str(spec if isinstance(spec, str) else spec.get("name")).partition("=")[0] for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--features {text}: each network once is enough, got {', '.join(twice)} twice")
    return specs
