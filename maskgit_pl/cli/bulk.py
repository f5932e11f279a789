"""``maskgit sample --num-images``: thousands of images into one .npz file, by one process or several."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.model import check_at_least
from maskgit_pl.cli.outputs import made_folder
from maskgit_pl.locks import locked

if TYPE_CHECKING:
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["add_bulk_arguments", "check_bulk", "device_of_rank", "generate_bulk"]

_SEEDS = 2**32
_SECONDS_BETWEEN_LINES = 30
# Who started several processes says so in these: torchrun, srun.
_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")


def add_bulk_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of generating many images."""
    group = parser.add_argument_group(
        "many images", "into one .npz file, as evaluators read it; goes on where it ended"
    )
    group.add_argument("--num-images", type=int, metavar="N", help="spread evenly over the classes (all: all of them)")
    group.add_argument("--part-size", type=int, default=500, metavar="N", help="images of a part (default: 500)")
    group.add_argument("--rank", type=int, metavar="R", help="this process's number (default: of torchrun or Slurm)")
    group.add_argument(
        "--world-size", type=int, metavar="W", help="how many processes share the work (default: likewise)"
    )


def check_bulk(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Refuses what can be refused before torch is imported.

    Returns:
        This process's rank and the number of processes; None without ``--num-images``.

    Raises:
        ValueError: A number out of range, or flags that do not go together.
    """
    if args.num_images is None:
        if args.rank is not None or args.world_size is not None:
            raise ValueError("--rank, --world-size: they go with --num-images alone; say how many images")
        if args.out is not None and args.out.suffix == ".npz":
            raise ValueError(f"--out {args.out}: such a file is written with --num-images; say how many images")
        return None
    for flag in ("per_class", "images", "gif", "filmstrip"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')}: it does not go with --num-images; leave one of them out")
    check_at_least(args, num_images=1, part_size=1)
    if args.out is None or args.out.suffix != ".npz":
        raise ValueError(f"--out: a file that ends in .npz is needed with --num-images, got {args.out}")
    if args.seed + args.num_images > _SEEDS:
        raise ValueError(f"--seed: the last image has seed + N - 1, which must be below 2**32, got {args.seed}")
    return _rank(args, environment)


def _rank(args: argparse.Namespace, environment: Mapping[str, str]) -> tuple[int, int]:
    if (args.rank is None) != (args.world_size is None):
        raise ValueError("--rank, --world-size: both are needed, or neither, got one")
    rank, world_size = args.rank, args.world_size
    if rank is None:
        found = next((names for names in _RANKS if all(name in environment for name in names)), None)
        if found is None:
            return 0, 1
        rank, world_size = (_number(name, environment) for name in found)
    if world_size < 1:
        raise ValueError(f"--world-size: at least 1 is needed, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank: a number in [0, {world_size}) is needed, the world's size, got {rank}")
    return rank, world_size


def _number(name: str, environment: Mapping[str, str]) -> int:
    if not environment[name].isdecimal():
        raise ValueError(f"{name}: a whole number is needed, got {environment[name]!r}; name --rank and --world-size")
    return int(environment[name])


def device_of_rank(environment: Mapping[str, str] = os.environ) -> str:
    """A GPU of this process's own, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    local = next((_number(name, environment) for name in _LOCAL_RANKS if name in environment), 0)
    return f"cuda:{local % torch.cuda.device_count()}"


def generate_bulk(
    pipe: MaskGIT,
    classes: list[int],
    args: argparse.Namespace,
    settings: dict[str, Any],
    *,
    rank: int,
    world_size: int,
) -> None:
    """Generates this process's share, and the file once all are there; says what was done.

    Args:
        pipe: The model.
        classes: Labels.
        args: The flags, checked.
        settings: Of decoding; ``negative_classes`` may be among them.
        rank: Of this process.
        world_size: Of all.
    """
    from maskgit_pl.pipeline.bulk import generate_many

    made_folder(args.out.parent)
    of_decoding = {name: value for name, value in settings.items() if name != "negative_classes"}
    lock = locked(args.out, way_out="name another --out", rank=rank)
    with lock, _progress() as (on_start, on_images):
        result = generate_many(
            pipe,
            args.out,
            count=args.num_images,
            classes=classes,
            seed=args.seed,
            negative_class=settings.get("negative_classes"),
            part_size=args.part_size,
            batch_size=args.batch,
            rank=rank,
            world_size=world_size,
            on_start=on_start,
            on_images=on_images,
            **of_decoding,
        )
    if result.missing_parts:
        who = f"rank {rank} of {world_size}"
        print(f"{args.out}: {who} has its {result.made + result.found} images; parts to come: {result.missing_parts}")
    elif result.made == 0:
        print(f"{args.out}: complete with {args.num_images} images; nothing was to be made")
    else:
        steps = pipe.decoding_with(**of_decoding).num_steps
        of = f"{args.num_images} images of {len(classes)} classes, {steps} steps each"
        print(f"{args.out}: {of}; {result.made} made now")


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """A bar on a terminal, now and then a line elsewhere; both with the time left.

    Yields:
        What is to be called with the number of images and those that are there, and with each number made.
    """
    if not sys.stdout.isatty():
        lines = _Lines()
        yield lines.start, lines.advance
        return
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as bars:
        bar = bars.add_task("sampling", total=None)
        yield (
            lambda total, found: bars.update(bar, total=total, completed=found),
            lambda count: bars.advance(bar, count),
        )


class _Lines:
    """Progress in lines, for logs."""

    def start(self, total: int, found: int) -> None:
        self.total, self.found, self.made = total, found, 0
        self.began = self.told = time.monotonic()
        print(f"sampling {total} images, {found} of them are there", flush=True)

    def advance(self, count: int) -> None:
        self.made += count
        now = time.monotonic()
        if now - self.told < _SECONDS_BETWEEN_LINES:
            return
        self.told = now
        rate, done = self.made / (now - self.began), self.found + self.made
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - done) / rate))
        print(f"{done} of {self.total} images, {rate:.2f} a second, {left} left", flush=True)
