"""``maskgit sample``: images of classes, as a picture, as files, as an animation of their decoding, or by thousands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.bulk import add_bulk_arguments, check_bulk, device_of_rank, generate_bulk
from maskgit_pl.cli.decoding import add_decoding_arguments, decoding_settings

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

    from maskgit_pl.pipeline import DecodingSettings, MaskGIT

__all__ = [
    "add_decoding_arguments",
    "add_parser",
    "class_of",
    "class_words",
    "decoding_settings",
    "default_device",
    "pretrained_folder",
    "run",
    "write_animation",
    "write_filmstrip",
    "write_images",
]

_PER_CLASS = 8
_ANIMATED = 4  # images side by side in an animation


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("sample", help="generate images of classes", allow_abbrev=False)
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="run folder (runs/NAME), pretrained folder, or owner/name on the Hub"
    )
    parser.add_argument(
        "--classes", default="all", metavar="A,B,...", help="numbers or names, or all (default: all, at most 10)"
    )
    parser.add_argument("--per-class", type=int, metavar="N", help="images of each class (default: 8)")
    add_decoding_arguments(parser)
    parser.add_argument("--negative-class", metavar="NAME", help="what guidance pushes away from (default: no class)")
    parser.add_argument(
        "--int8", action="store_true", help="run the transformer in 8-bit numbers on a processor; approximate"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="all in one picture, or FILE.npz with --num-images (default: samples.png)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="also write each image into a file of its own")
    parser.add_argument("--gif", type=Path, metavar="FILE.gif", help="also write an animation of the decoding")
    parser.add_argument(
        "--filmstrip", type=Path, metavar="FILE.png", help="also write the decoding of the first image, step by step"
    )
    add_bulk_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates and writes.

    Raises:
        FileNotFoundError: No such run.
        ValueError: An unknown class or a number out of range.
    """
    folder = args.folder if _reads_as_hub_id(args.folder) else pretrained_folder(args.folder)
    settings: dict[str, Any] = {**decoding_settings(args)}
    share = check_bulk(args)
    if args.per_class is not None and args.per_class < 1:
        raise ValueError(f"--per-class: at least 1 is needed, got {args.per_class}")
    from maskgit_pl.pipeline import MaskGIT

    usual = "cpu" if args.int8 else device_of_rank() if share else default_device()
    pipe = MaskGIT.from_pretrained(folder).to(args.device or usual)
    if args.int8:
        pipe = pipe.quantized()
    if args.negative_class is not None:
        (settings["negative_classes"],) = pipe.class_ids([class_of(args.negative_class, pipe.class_names)])
    if share is not None:
        everything = args.classes == "all" and "all" not in pipe.class_names
        words = range(len(pipe.class_names)) if everything else class_words(args.classes, pipe.class_names)
        generate_bulk(pipe, pipe.class_ids(words), args, settings, rank=share[0], world_size=share[1])
    else:
        _write(pipe, pipe.class_ids(class_words(args.classes, pipe.class_names)), args, settings)
    return 0


def _write(pipe: MaskGIT, classes: list[int], args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Generates ``--per-class`` images of each class and writes what was asked for."""
    from maskgit_pl.training.pictures import image_grid, save_png

    per_class, out = args.per_class or _PER_CLASS, args.out or Path("samples.png")
    labels = [label for label in classes for _ in range(per_class)]
    images = _generate(pipe, labels, args, settings)
    names = [pipe.class_names[label] for label in classes]
    save_png(image_grid(images, columns=per_class, row_captions=names), out)
    print(f"{out}: {len(images)} images of {len(classes)} classes, {_num_steps(pipe, settings)} steps each")
    if args.images is not None:
        write_images(images, labels, args.images, seed=args.seed)
    if args.gif is not None:
        first_of_class = [number * per_class for number in range(min(_ANIMATED, len(classes)))]
        chosen = first_of_class if len(classes) > 1 else list(range(min(_ANIMATED, per_class)))
        seeds = [args.seed + number for number in chosen]
        write_animation(pipe, [labels[number] for number in chosen], seeds, args.gif, **settings)
        print(f"{args.gif}: how {len(chosen)} of them are decoded")
    if args.filmstrip is not None:
        write_filmstrip(pipe, labels[0], args.seed, args.filmstrip, **settings)
        print(f"{args.filmstrip}: how the first of them is decoded")


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


def _reads_as_hub_id(folder: Path) -> bool:
    """Whether it is no path here and has the two parts of ``owner/name``; ``from_pretrained`` looks closer."""
    return len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.is_dir()


def class_of(word: str, names: Sequence[str]) -> int | str:
    """The class that a word of the command line names: by its name if there is such a one, else by its number."""
    return int(word) if word not in names and word.lstrip("-").isdigit() else word


def default_device() -> str:
    """A GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def write_animation(
    pipe: MaskGIT, labels: Sequence[int], seeds: Sequence[int], path: Path, **settings: Unpack[DecodingSettings]
) -> None:
    """Writes a GIF of how a few images are decoded; settings as of ``MaskGIT.steps``."""
    from maskgit_pl.training.pictures import decode_images, decoding_frames, save_gif

    steps = list(pipe.steps(labels, seed=seeds, **settings))
    images = [decode_images(pipe.tokenizer, step.tokens) for step in steps]
    names = [pipe.class_names[label] for label in labels]
    save_gif(decoding_frames(steps, images, grid=pipe.tokenizer.grid, captions=names), path)


def write_filmstrip(pipe: MaskGIT, label: int, seed: int, path: Path, **settings: Unpack[DecodingSettings]) -> None:
    """Writes one picture of how an image is decoded, a column a step; settings as of ``MaskGIT.steps``."""
    from maskgit_pl.training.pictures import decode_images, decoding_filmstrip, save_png

    steps = list(pipe.steps([label], seed=seed, **settings))
    images = [decode_images(pipe.tokenizer, step.tokens) for step in steps]
    save_png(decoding_filmstrip(steps, images, grid=pipe.tokenizer.grid), path)


def write_images(images: Tensor, labels: Sequence[int | None], folder: Path, *, seed: int) -> None:
    """Writes each image into a file that its class and seed name; arguments as of ``image_grid`` and ``generate``."""
    from maskgit_pl.training.pictures import save_png, to_pil

    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = "no-class" if label is None else f"class-{label:04d}"
        save_png(to_pil(image), folder / f"{name}-seed-{seed + number:06d}.png")
    print(f"{folder}: {len(images)} files")


def _generate(pipe: MaskGIT, labels: list[int], args: argparse.Namespace, settings: dict[str, Any]) -> Tensor:
    from rich.progress import Progress

    batches = -(-len(labels) // args.batch) if args.batch > 0 else 0  # generate refuses a batch below 1
    with Progress(transient=True) as progress:
        bar = progress.add_task("sampling", total=batches * _num_steps(pipe, settings))
        return pipe.generate(
            labels,
            seed=args.seed,
            batch_size=args.batch,
            output_type="pt",
            callback=lambda step: progress.advance(bar),
            **settings,
        )


def _num_steps(pipe: MaskGIT, settings: dict[str, Any]) -> int:
    return pipe.decoding_with(**settings).num_steps


def class_words(text: str, names: Sequence[str]) -> list[int | str]:
    """What ``--classes`` names: a word is a class's name if there is one, else a number."""
    if text == "all" and text not in names:
        shown = min(len(names), 10)
        return [number * len(names) // shown for number in range(shown)]
    return [class_of(word, names) for word in map(str.strip, text.split(",")) if word]
