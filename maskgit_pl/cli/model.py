"""What the commands that use a trained model have in common.

Where it is, how it is opened, what its classes are, and numbers that are refused before torch is imported.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskgit_pl.pipeline import MaskGIT

__all__ = [
    "add_model_argument",
    "check_at_least",
    "class_of",
    "class_words",
    "default_device",
    "model_source",
    "open_pipe",
    "pretrained_folder",
]


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that names the model."""
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="run folder (runs/NAME), pretrained folder, or owner/name on the Hub"
    )


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Refuses numbers that are too small, or not finite; None is a flag that was left out.

    Args:
        args: The flags.
        least: By the name of the flag, such as ``num_steps=1`` for ``--num-steps``.

    Raises:
        ValueError: With the first of them.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: at least {bound} is needed, got {value}")


def model_source(folder: Path) -> Path:
    """What ``MaskGIT.from_pretrained`` takes: a folder that holds a model, or the words ``owner/name``.

    Raises:
        FileNotFoundError: As of ``pretrained_folder``.
    """
    reads_as_hub_id = len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.is_dir()
    return folder if reads_as_hub_id else pretrained_folder(folder)


def pretrained_folder(folder: Path) -> Path:
    """The folder with ``tokenizer/`` and ``transformer/``: ``RUN/pretrained``, or the folder itself.

    Raises:
        FileNotFoundError: Neither holds both; the text says what is missing and what makes it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder}: no such folder; train one with `make demo`, or name another")
    found = folder / "pretrained" if (folder / "pretrained").is_dir() else folder
    for part in ("tokenizer", "transformer"):
        if not (found / part / "config.json").is_file():
            raise FileNotFoundError(
                f"run {folder}: no {part} in {found}; `maskgit train {part}` makes it when it has finished"
            )
    return found


def open_pipe(source: Path, args: argparse.Namespace, *, device: str | None = None) -> MaskGIT:
    """The model on the device that ``--device`` names, with a transformer of 8 bits where ``--int8`` asks for it.

    Args:
        source: As of ``model_source``.
        args: The flags of ``decoding.add_decoding_arguments``.
        device: In place of the usual one, where ``--device`` does not say.
    """
    from maskgit_pl.pipeline import MaskGIT

    usual = "cpu" if args.int8 else device or default_device()
    pipe = MaskGIT.from_pretrained(source).to(args.device or usual)
    return pipe.quantized() if args.int8 else pipe


def default_device() -> str:
    """A GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def class_of(word: str, names: Sequence[str]) -> int | str:
    """The class that a word of the command line names: by its name if there is such a one, else by its number."""
    return int(word) if word not in names and word.lstrip("-").isdigit() else word


def class_words(text: str, names: Sequence[str]) -> list[int | str]:
    """What ``--classes`` names: a word is a class's name if there is one, else a number."""
    if text == "all" and text not in names:
        shown = min(len(names), 10)
        return [number * len(names) // shown for number in range(shown)]
    return [class_of(word, names) for word in map(str.strip, text.split(",")) if word]
