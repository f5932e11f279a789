"""``maskgit tokenize``: turns the images of a data set into a token store for stage 2."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from maskgit_pl.cli.run_flags import add_run_arguments, folders_of, read_recipe
from maskgit_pl.locks import locked
from maskgit_pl.runs.plan import SHARED_TOKENS, find_data, find_run, find_tokenizer

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress, TaskID
    from torch import Tensor

    from maskgit_pl.pretrained import PretrainedTokenizer
    from maskgit_pl.shards.tokens import StoreDescription

__all__ = ["add_parser", "run"]

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0
_MOST_WORKERS = 8
_VIEWS = ("crops", "flip", "precision")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "tokenize",
        help="turn images into tokens, once",
        description="Turn images into tokens, once. The same command goes on with what was interrupted. Under torchrun "
        "and srun the processes share the work; elsewhere --rank and --num-ranks say so. Flags that set values of the "
        "recipe are taken as by `maskgit train transformer`.",
        allow_abbrev=False,
    )
    add_run_arguments(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: what there is)")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time (default: 256)")
    parser.add_argument(
        "--num-workers", type=int, help="processes that decode (default: none on a processor, at most 8 beside a GPU)"
    )
    parser.add_argument("--crops", type=int, help="crops of each image, the central one first (default: 1)")
    parser.add_argument("--flip", action="store_true", default=None, help="add a mirrored copy of each training image")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of the tokenizer (default: float32)")
    parser.add_argument(
        "--part-samples", type=int, default=1024, help="images put on disk at a time: what a kill costs (default: 1024)"
    )
    parser.add_argument(
        "--unreadable-budget", type=float, default=1e-4, help="share of unreadable images allowed (default: 1e-4)"
    )
    parser.add_argument("--rank", type=int, help="which of the processes that share the work this is, from 0")
    parser.add_argument("--num-ranks", type=int, help="how many processes share the work")
    parser.set_defaults(run=run, stage="transformer", takes_overrides=True)


class Place(NamedTuple):
    """Which of the processes this is, and which of those on its machine."""

    rank: int
    num_ranks: int
    local_rank: int


def run(args: argparse.Namespace) -> int:
    """Makes the token store of a run, if the recipe reads tokens; resumes an interrupted one."""
    recipe = read_recipe(args)
    source = recipe.get("data.source")
    if source != "tokens":
        log.info("data.source %s: stage 2 reads no tokens; nothing to do", source)
        return 0
    place = find_place(args.rank, args.num_ranks)
    named = folders_of(args, recipe)
    shards, run_folder = find_data(recipe, args.data), find_run(recipe, named["run"])
    folder = find_tokenizer(
        recipe, folder=run_folder, shards=shards, tokenizer=args.tokenizer, pretrained=args.pretrained
    )
    import torch

    device = _device(args.device, place.local_rank)
    from maskgit_pl.data import tokenize
    from maskgit_pl.imaging import to_unit_range
    from maskgit_pl.pretrained import load_tokenizer

    tokenizer = load_tokenizer(folder)
    description = _description(args, run_folder, shards, tokenizer)
    store = _store(run_folder, description)
    network = tokenizer.network.to(device)
    workers = _workers(device) if args.num_workers is None else args.num_workers

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=description.precision == "bfloat16"):
            return network.encode(to_unit_range(images.to(device, non_blocking=True)))

    lock = locked(store, way_out="name another run (--run)", rank=place.rank)
    with lock, _Report(place) as report, torch.inference_mode():
        outcome = tokenize(
            shards,
            store,
            encode=encode,
            grid=tokenizer.grid,
            num_codes=network.config.num_codes,
            tokenizer=tokenizer.fingerprint,
            image_size=tokenizer.image_size,
            in_channels=network.config.in_channels,
            crops=description.crops,
            flip=description.flip,
            precision=description.precision,
            batch_size=args.batch_size,
            part_samples=args.part_samples,
            num_workers=workers,
            rank=place.rank,
            num_ranks=place.num_ranks,
            unreadable_budget=args.unreadable_budget,
            on_rows=report.add,
        )
    if outcome == "found":
        log.info("%s: there already, made by this tokenizer from this data", store)
        return 0
    log.info("%s: %s", store, report.summary())
    if outcome == "others at work":
        log.info("%s: the share of rank %d of %d is done; the last rank finishes", store, place.rank, place.num_ranks)
    return 0


def _description(args: argparse.Namespace, run: Path, shards: Path, tokenizer: PretrainedTokenizer) -> StoreDescription:
    """Describes the store that is wanted. A run that has tokens keeps their crops unless flags name others."""
    from maskgit_pl.data import describe_store
    from maskgit_pl.shards.tokens import read_description

    def described(**views: Any) -> StoreDescription:
        return describe_store(
            shards,
            grid=tokenizer.grid,
            num_codes=tokenizer.network.config.num_codes,
            tokenizer=tokenizer.fingerprint,
            image_size=tokenizer.image_size,
            **views,
        )

    named = {name: getattr(args, name) for name in _VIEWS if getattr(args, name) is not None}
    with suppress(FileNotFoundError, ValueError):  # none, or one that is made again
        own = read_description(run / "tokens")
        if not named and own == described(**{name: getattr(own, name) for name in _VIEWS}):
            return own
    return described(**named)


def _store(run: Path, description: StoreDescription) -> Path:
    """Returns the store's folder: one for all runs with this tokenizer and these data, linked from ``RUN/tokens``.

    A store that lies in the run's own folder, as version 0.1.0 made it, stays there.
    """
    own = run / "tokens"
    if own.is_dir() and not own.is_symlink():
        return own
    fields = asdict(description)
    del fields["sha256"]  # of a finished store, which may be the run's own
    key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    shared = run.parent / SHARED_TOKENS / key
    shared.mkdir(parents=True, exist_ok=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    link = own.with_name(f".tokens.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(shared, own.parent), target_is_directory=True)
    link.replace(own)  # ranks that come here at once make the same link
    return shared


def find_place(rank: int | None, num_ranks: int | None) -> Place:
    """The place of this process: as it was told, else by torchrun's variables, else by srun's, else alone.

    Raises:
        ValueError: One of the two numbers without the other, or a rank that there is not.
    """
    if (rank is None) != (num_ranks is None):
        raise ValueError(f"--rank and --num-ranks: both are needed, or none, got {rank} and {num_ranks}")
    if rank is not None and num_ranks is not None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"--rank: 0 to {num_ranks - 1} is needed with --num-ranks {num_ranks}, got {rank}")
        return Place(rank, num_ranks, rank)
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            return Place(*(int(os.environ[name]) for name in names))
    return Place(0, 1, 0)


def _device(name: str, local_rank: int) -> torch.device:
    """The device by name; the processes of a machine take its accelerators in turn."""
    import torch

    from maskgit_pl.devices import check_device

    if name != "auto":
        return check_device(name, name="--device")
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, local_rank % torch.accelerator.device_count())


def _workers(device: torch.device) -> int:
    """Where the processor encodes, it has nothing left for decoding beside it."""
    if device.type == "cpu":
        return 0
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class _Report:
    """How far the work is: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, place: Place) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.name = "" if place.num_ranks == 1 else f"rank {place.rank} of {place.num_ranks}: "
        speed = TextColumn("{task.fields[speed]:.0f} images/s")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
        console = Console()
        self._bars: Progress | None = Progress(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._encoded = 0  # by this process
        self._start = self._last = time.monotonic()

    def __enter__(self) -> _Report:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def add(self, split: str, rows: int, total: int) -> None:
        """More rows of a split are done; the first call of each tells of an earlier run."""
        if split in self._done:
            self._encoded += rows
        self._done[split] = self._done.get(split, 0) + rows
        if self._bars is not None:
            if split not in self._tasks:
                self._tasks[split] = self._bars.add_task(f"{self.name}tokens of {split}", total=total, speed=0.0)
            self._bars.update(self._tasks[split], advance=rows, speed=self._speed())
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            speed = self._speed()
            left = (total - self._done[split]) / speed if speed else float("inf")
            log.info(
                "%stokens of %s: %d/%d  %.0f images/s  %.0f s left",
                self.name, split, self._done[split], total, speed, left,
            )  # fmt: skip

    def summary(self) -> str:
        """What this process has encoded, and how fast."""
        seconds = time.monotonic() - self._start
        return f"{self.name}{self._encoded} images in {seconds:.1f} s, {self._speed():.0f} images/s"

    def _speed(self) -> float:
        return self._encoded / max(time.monotonic() - self._start, 1e-9)
