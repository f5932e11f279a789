"""``maskgit sample``: images of classes, as a picture, as files, as an animation of their decoding, or by thousands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.decoding_flags import add_decoding_arguments, check_seed_and_batch, read_decoding_flags
from maskgit_pl.cli.flags import check_at_least, check_outputs, format_flag, make_folder, use_flag_names
from maskgit_pl.cli.model import add_classes_argument, add_model_argument, find_model, open_pipe
from maskgit_pl.cli.outputs import PICTURES, add_output_arguments, record_steps, wants_decoding, write_generated
from maskgit_pl.launcher import launcher_rank, local_rank
from maskgit_pl.locks import hold_lock
from maskgit_pl.progress import progress_bars

if TYPE_CHECKING:
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["add_parser", "run"]

_PER_CLASS = 8
_ANIMATED = 4  # images side by side in an animation
_MAX_CLASSES = 10  # of ``all``, in a picture
_OUT = Path("samples.png")
_BULK = ("num_images", "seed", "part_size", "batch_size", "rank", "world_size")  # flags of ``generate_many``


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("sample", help="generate images of classes")
    add_model_argument(parser)
    add_classes_argument(parser)
    parser.add_argument("--per-class", type=int, metavar="N", help="images of each class (default: 8)")
    add_decoding_arguments(parser)
    parser.add_argument("--negative-class", metavar="NAME", help="what guidance pushes away from (default: no class)")
    add_output_arguments(parser, out="samples.png; FILE.npz with --num-images")
    group = parser.add_argument_group("many images", "into one .npz file, as evaluators read it; a second call resumes")
    group.add_argument("--num-images", type=int, metavar="N", help="spread evenly over the classes (all: all of them)")
    group.add_argument("--part-size", type=int, default=500, metavar="N", help="images of a part (default: 500)")
    group.add_argument("--rank", type=int, metavar="R", help="this process's number (default: of torchrun or Slurm)")
    group.add_argument(
        "--world-size", type=int, metavar="W", help="how many processes share the work (default: of torchrun or Slurm)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates and writes."""
    check_seed_and_batch(args)
    bulk = None if args.num_images is None else _bulk_options(args)
    if bulk is None:
        _check_picture(args)
    folder, outline = find_model(args)
    max_shown = _MAX_CLASSES if bulk is None else len(outline.class_names)
    labels = outline.parse_classes(args.classes, max_shown=max_shown)
    negative = None if args.negative_class is None else outline.parse_class(args.negative_class)
    decoding = read_decoding_flags(args, outline, has_negative_class=negative is not None)
    if bulk is None:
        _generate_picture(open_pipe(folder, args), labels, negative, decoding, args)
        return 0
    from maskgit_pl.devices import default_device

    pipe = open_pipe(folder, args, device=default_device(local_rank=local_rank()))
    _generate_bulk(pipe, args.out, {**bulk, "classes": labels, "negative_class": negative, "decoding": decoding})
    return 0


def _check_picture(args: argparse.Namespace) -> None:
    if args.rank is not None or args.world_size is not None:
        raise ValueError("--rank, --world-size: they go with --num-images only; say how many images")
    if args.out is not None and args.out.suffix == ".npz":
        raise ValueError(f"--out {args.out}: such a file is written with --num-images; say how many images")
    check_at_least(args, per_class=1)
    args.out = args.out or _OUT
    check_outputs(args, **PICTURES)


def _bulk_options(args: argparse.Namespace) -> dict[str, int]:
    """Returns the options of ``generate_many`` that the flags say, checked."""
    for flag in ("per_class", "images", "gif", "filmstrip"):
        if getattr(args, flag) is not None:
            raise ValueError(f"{format_flag(flag)}: it does not go with --num-images; leave one of them out")
    if (args.rank is None) != (args.world_size is None):
        raise ValueError("--rank, --world-size: both are needed, or neither, got one")
    if args.rank is None:
        args.rank, args.world_size = launcher_rank()
    if args.out is None or args.out.suffix != ".npz":
        raise ValueError(f"--out: a file that ends in .npz is needed with --num-images, got {args.out}")
    check_outputs(args, out=".npz")
    from maskgit_pl.pipeline.bulk_plan import BulkOptions

    options = {name: getattr(args, name) for name in _BULK}
    with use_flag_names(args):
        BulkOptions(**options)
    return options


def _generate_bulk(pipe: MaskGIT, out: Path, options: dict[str, Any]) -> None:
    """Generates this process's share, and the file once all are there; says what was done."""
    from maskgit_pl.pipeline.bulk import generate_many

    advance: list[Callable[[int], None]] = []  # of the bar, once it is known how many images there are
    make_folder(out.parent)
    lock = hold_lock(out, hint="name another --out", rank=options["rank"])
    with lock, progress_bars() as bars:
        result = generate_many(
            pipe,
            out,
            on_start=lambda total, found: advance.append(bars("sampling", total, done=found, unit="images")),
            on_images=lambda count: advance[0](count),
            **options,
        )
    count, classes = options["num_images"], len(options["classes"])
    if result.missing_parts:
        who = f"rank {options['rank']} of {options['world_size']}"
        print(f"{out}: {who} has its {result.made + result.found} images; parts to come: {result.missing_parts}")
    elif result.made == 0:
        print(f"{out}: complete with {count} images; nothing was to be made")
    else:
        steps = options["decoding"].num_steps
        print(f"{out}: {count} images of {classes} classes, {steps} steps each; {result.made} made now")


def _generate_picture(
    pipe: MaskGIT, classes: list[int], negative: int | None, decoding: DecodingConfig, args: argparse.Namespace
) -> None:
    """Generates ``--per-class`` images of each class and writes what was asked for."""
    from maskgit_pl.imaging import image_grid

    per_class = args.per_class or _PER_CLASS
    labels = [label for label in classes for _ in range(per_class)]
    total = -(-len(labels) // args.batch_size) * decoding.num_steps
    with record_steps("sampling", is_recording=False, total=total) as (after_step, _):
        images = pipe.generate(
            labels,
            output_type="pt",
            seed=args.seed,
            negative_classes=negative,
            batch_size=args.batch_size,
            callback=after_step,
            decoding=decoding,
        )
    shown = range(0, len(labels), per_class if len(classes) > 1 else 1)[:_ANIMATED]  # the first image of each class
    seeds = [args.seed + row for row in shown]
    steps = (
        list(pipe.steps([labels[row] for row in shown], seed=seeds, negative_classes=negative, decoding=decoding))
        if wants_decoding(args)
        else []
    )
    sheet = image_grid(images, columns=per_class, row_captions=[pipe.class_names[label] for label in classes])
    said = f"{len(images)} images of {len(classes)} classes, {decoding.num_steps} steps each"
    captions = [pipe.class_names[labels[row]] for row in shown]
    write_generated(pipe, images, args, sheet=sheet, said=said, labels=labels, steps=steps, captions=captions)
