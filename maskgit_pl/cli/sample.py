"""``maskgit sample``: generates images as a picture, as files, as an animation, or thousands in one ``.npz`` file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import check_integer, count_text
from maskgit_pl.cli.flags import check_outputs, format_flag, make_folder, use_flag_names
from maskgit_pl.cli.generation_flags import (
    add_acceptance_arguments,
    add_classes_argument,
    add_decoding_arguments,
    add_model_argument,
    add_vectors_argument,
    check_acceptance_flags,
    check_seed_and_batch,
    choose_accepted,
    describe_acceptance,
    find_model,
    give_vectors,
    open_acceptance,
    open_pipe,
    read_decoding_flags,
    read_vectors_flag,
)
from maskgit_pl.cli.outputs import (
    PICTURES,
    add_output_arguments,
    record_steps,
    recording_of,
    wants_decoding,
    write_generated,
)
from maskgit_pl.data.folders import hold_lock
from maskgit_pl.processes import launcher_rank, local_rank, progress_bars

if TYPE_CHECKING:
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.acceptance import Acceptance

__all__ = ["add_sample_parser"]

_PER_CLASS = 8
_ANIMATED = 4  # number of images side by side in an animation
_MAX_CLASSES = 10  # number of classes that ``--classes all`` shows in a picture
_OUT = Path("samples.png")
# Options of ``generate_many`` that are flags.
_BULK = (
    "num_images",
    "seed",
    "part_size",
    "batch_size",
    "rank",
    "world_size",
)


def add_sample_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "sample",
        help="generate images of classes",
        description="Generate images of classes and write them as one picture, as single files, as an animation of the "
        "decoding, or with --num-images as one .npz file.",
        epilog="Example: maskgit sample runs/fashion-mnist-adaln --classes Sneaker,Bag --num-steps 8 --gif bags.gif",
    )
    add_model_argument(parser)
    add_classes_argument(parser)
    parser.add_argument("--per-class", type=int, metavar="N", help="number of images of each class (default: 8)")
    add_decoding_arguments(parser)
    parser.add_argument(
        "--negative-class", metavar="NAME", help="class that guidance moves away from (default: no class)"
    )
    add_acceptance_arguments(parser)
    add_vectors_argument(parser)
    add_output_arguments(parser, out="samples.png; FILE.npz with --num-images")
    group = parser.add_argument_group(
        "many images", "One .npz file, as evaluators read it. The same command resumes after a stop."
    )
    group.add_argument("--num-images", type=int, metavar="N", help="number of images, spread evenly over the classes")
    group.add_argument(
        "--part-size", type=int, default=500, metavar="N", help="images written to disk at a time (default: 500)"
    )
    group.add_argument(
        "--rank", type=int, metavar="R", help="index of this process, from 0 (default: from torchrun or Slurm)"
    )
    group.add_argument(
        "--world-size",
        type=int,
        metavar="W",
        help="number of processes that share the work (default: from torchrun or Slurm)",
    )
    parser.set_defaults(run=_run_sample)


def _run_sample(args: argparse.Namespace) -> int:
    """Generates the images and writes them."""
    check_seed_and_batch(args)
    check_acceptance_flags(args)
    bulk = None if args.num_images is None else _bulk_options(args)
    if bulk is None:
        _check_picture(args)
    # The checks below read JSON files only. open_pipe, after them, loads torch and the weights.
    folder, outline = find_model(args)
    max_shown = _MAX_CLASSES if bulk is None else len(outline.class_names)
    labels = outline.parse_classes(args.classes, max_shown=max_shown)
    negative = None if args.negative_class is None else outline.parse_class(args.negative_class)
    decoding = read_decoding_flags(args, outline, has_negative_class=negative is not None)
    if args.accept_rate is not None and bulk is not None and bulk["num_images"] % len(labels):
        raise ValueError(
            f"--num-images must be a multiple of {len(labels)}, the number of classes, with --accept-rate, got "
            f"{bulk['num_images']}"
        )
    vectors = read_vectors_flag(args, outline)
    if args.accept_rate is not None and vectors is not None and len(vectors) > 1:
        # The best candidates of a class may all have the same vector.
        raise ValueError(
            f"--vectors {args.vectors} must hold 1 vector with --accept-rate, which chooses among all images of a "
            f"class, got {len(vectors)}; give them one at a time"
        )
    if bulk is None:
        pipe = open_pipe(folder, args)
        give_vectors(pipe, vectors, seed=args.seed)
        # One image for each vector.
        args.per_class = args.per_class or (_PER_CLASS if vectors is None else len(vectors))
        _generate_picture(pipe, labels, negative, decoding, args)
        return 0
    from maskgit_pl.distributed import default_device

    # Each process of a node uses the GPU of its local rank.
    pipe = open_pipe(folder, args, device=default_device(local_rank=local_rank()))
    give_vectors(pipe, vectors, seed=args.seed)
    options = {**bulk, "classes": labels, "negative_class": negative, "decoding": decoding}
    _generate_bulk(pipe, args.out, options, open_acceptance(pipe, args))
    return 0


def _check_picture(args: argparse.Namespace) -> None:
    if args.rank is not None or args.world_size is not None:
        raise ValueError("--rank and --world-size must be given with --num-images")
    if args.out is not None and args.out.suffix == ".npz":
        raise ValueError(f"--out must end in .png without --num-images, got {args.out}")
    if args.per_class is not None:
        from maskgit_pl.pipeline.options import MAX_RESULTS

        check_integer("--per-class", args.per_class, f"[1, {MAX_RESULTS}]")
    args.out = args.out or _OUT
    check_outputs(args, **PICTURES)


def _bulk_options(args: argparse.Namespace) -> dict[str, int]:
    """Returns the options of ``generate_many`` from the flags, after checks."""
    for flag in ("per_class", "images", "gif", "filmstrip"):
        if getattr(args, flag) is not None:
            raise ValueError(f"{format_flag(flag)} must not be given with --num-images")
    if (args.rank is None) != (args.world_size is None):
        raise ValueError("--rank and --world-size must be given together, got only one")
    # torchrun and Slurm set the ranks in the environment.
    if args.rank is None:
        args.rank, args.world_size = launcher_rank()
    if args.out is None or args.out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz with --num-images, got {args.out}")
    check_outputs(args, out=".npz")
    from maskgit_pl.pipeline.bulk import BulkOptions

    options = {name: getattr(args, name) for name in _BULK}
    with use_flag_names(args):
        BulkOptions(**options)
    return options


def _generate_bulk(pipe: MaskGIT, out: Path, options: dict[str, Any], acceptance: Acceptance | None) -> None:
    """Generates the images of this process, writes the file when all parts are complete, and prints a summary."""
    from maskgit_pl.evaluation.generation import generate_accepted, num_candidates
    from maskgit_pl.pipeline.bulk import generate_many

    make = generate_many if acceptance is None else partial(generate_accepted, acceptance=acceptance)

    advance: list[Callable[[int], None]] = []  # set by on_start, which knows the number of images
    make_folder(out.parent)
    lock = hold_lock(out, hint="give another --out", rank=options["rank"])
    with lock, progress_bars() as bars:
        result = make(
            pipe,
            out,
            on_start=lambda total, found: advance.append(bars("sampling", total, done=found, unit="images")),
            on_images=lambda count: advance[0](count),
            **options,
        )
    count, classes = options["num_images"], len(options["classes"])
    if result.missing_parts:
        who = f"rank {options['rank']} of {options['world_size']}"
        done = result.made + result.found
        print(f"{out}: {who} finished its {done} images; other ranks have {result.missing_parts} parts left")
    elif result.made == 0:
        print(f"{out}: already complete with {count_text(count, 'image')}")
    else:
        steps = options["decoding"].num_steps
        summary = f"{count_text(count, 'image')} of {count_text(classes, 'class')} in {count_text(steps, 'step')}"
        print(f"{out}: {summary}; {result.made} generated by this process")
    if acceptance is not None and not result.missing_parts:
        print(describe_acceptance(acceptance, count, num_candidates(acceptance, count, classes)))


def _generate_picture(
    pipe: MaskGIT, classes: list[int], negative: int | None, decoding: DecodingConfig, args: argparse.Namespace
) -> None:
    """Generates ``--per-class`` images of each class and writes the requested files."""
    from maskgit_pl.pipeline.grids import image_grid

    per_class: int = args.per_class
    # One row of the picture for each class.
    labels = [label for label in classes for _ in range(per_class)]
    # The bar counts decoding steps of all batches.
    total = -(-len(labels) // args.batch_size) * decoding.num_steps
    chosen = choose_accepted(pipe, labels, args, negative_classes=negative, decoding=decoding)
    seeds = [args.seed + row for row in range(len(labels))] if chosen is None else chosen.seeds
    with record_steps("sampling", is_recording=False, total=total) as (after_step, _):
        images = pipe.generate(
            labels,
            output_type="pt",
            seed=seeds,
            negative_classes=negative,
            batch_size=args.batch_size,
            callback=after_step,
            decoding=decoding,
        )
    shown = range(0, len(labels), per_class if len(classes) > 1 else 1)[:_ANIMATED]  # the first image of each class
    # The first images of the classes lie in different batches, so they are decoded again for the animation.
    steps = (
        list(
            pipe.steps(
                [labels[row] for row in shown],
                seed=[seeds[row] for row in shown],
                negative_classes=negative,
                decoding=decoding,
            )
        )
        if wants_decoding(args)
        else []
    )
    sheet = image_grid(images, columns=per_class, row_captions=[pipe.class_names[label] for label in classes])
    summary = (
        f"{count_text(len(images), 'image')} of {count_text(len(classes), 'class')} in "
        f"{count_text(decoding.num_steps, 'step')}"
    )
    captions = [pipe.class_names[labels[row]] for row in shown]
    args.seed = seeds  # names of the files of --images
    first = [seeds[row] for row in shown]
    recording = recording_of(steps, pipe, images, decoding=decoding, captions=captions, seeds=first)
    write_generated(images, args, sheet=sheet, summary=summary, labels=labels, recording=recording)
