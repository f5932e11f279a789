"""``runs.tokenize``: makes the token store that stage 2 of a run reads. Imports torch when there is something to do.

Runs with the same tokenizer and the same data share a store: it lies in ``runs/tokens/KEY``, KEY being a hash of what
the store is made of, and ``runs/RUN/tokens`` is a link to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from maskgit_pl.locks import hold_lock
from maskgit_pl.runs.plan import SHARED_TOKENS, find_data, find_tokenizer, run_folder
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.shards.parallel import available_cores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from maskgit_pl.pretrained import PretrainedTokenizer
    from maskgit_pl.shards.tokens import StoreDescription

__all__ = ["OnRows", "ProcessRank", "TokenizeOptions", "find_process_rank", "tokenize"]

log = logging.getLogger(__name__)

_MOST_WORKERS = 8
_VIEWS = ("crops", "flip", "precision")
OnRows = Callable[[Literal["train", "val"], int, int], object]


class ProcessRank(NamedTuple):
    """Which of the processes that share the work this is.

    Attributes:
        rank: Its number, from 0.
        world_size: Number of processes.
        local_rank: Its number among those on its machine.
    """

    rank: int
    world_size: int
    local_rank: int


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of making a token store.

    Args:
        crops: Crops of each training image, the central one first. None: as in the tokens that the run has, else 1.
        flip: Whether each training image is there mirrored too. None: as in the tokens that the run has, else not.
        precision: Of the tokenizer. None: as in the tokens that the run has, else ``"float32"``.
        device: ``"cpu"``, ``"cuda:1"``, ...; ``"auto"`` takes what there is.
        batch_size: Images at a time.
        num_workers: Processes that decode. None: none where the CPU encodes, at most 8 beside a GPU.
        part_size: Images that are put on disk at a time: what a kill costs.
        unreadable_budget: Fraction of unreadable images that is allowed, in [0, 1].
    """

    crops: int | None = None
    flip: bool | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    device: str = "auto"
    batch_size: int = 256
    num_workers: int | None = None
    part_size: int = 1024
    unreadable_budget: float = 1e-4


def tokenize(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
    options: TokenizeOptions | None = None,
    process: ProcessRank | None = None,
    on_rows: OnRows = lambda split, rows, total: None,
) -> Path | None:
    """Makes the token store of a run, if its recipe reads tokens; resumes an interrupted one.

    Args:
        recipe: Of stage 2.
        run: A name in ``runs/``, or a folder; see ``fit``.
        data: Data folder; see ``fit``.
        tokenizer: Pretrained tokenizer folder; see ``fit``.
        pretrained: Pretrained folder of both stages that has the tokenizer, if ``tokenizer`` names none.
        options: Options of making it.
        process: Which of the processes that share the work this is. Default: ``find_process_rank()``.
        on_rows: Called with the split, how many more rows are done (first those of an earlier run) and how many this
            process has to do of that split.

    Returns:
        The folder of the store; None if the recipe does not read tokens.

    Raises:
        FileNotFoundError: if data or tokenizer are not there.
        ValueError: if an option is out of range, or another process of the same rank makes the store.
        DataBudgetError: if too many images cannot be read.
    """
    source = recipe.get("data.source")
    if source != "tokens":
        log.info("data.source %s: stage 2 reads no tokens; nothing to do", source)
        return None
    process = find_process_rank() if process is None else process
    shards, folder = find_data(recipe, data), run_folder(recipe, run)
    found = find_tokenizer(recipe, folder=folder, shards=shards, tokenizer=tokenizer, pretrained=pretrained)
    from maskgit_pl.pretrained import load_tokenizer  # torch takes seconds to import

    options = options or TokenizeOptions()
    device, loaded = _device(options.device, process.local_rank), load_tokenizer(found)
    description = _describe(options, folder, shards, loaded)
    store = _store_of(folder, description)
    with hold_lock(store, hint="name another run (--run)", rank=process.rank):
        _make(shards, store, loaded, description, options, process, device, on_rows)
    return store


def find_process_rank(rank: int | None = None, world_size: int | None = None) -> ProcessRank:
    """Finds the process of this process: the one that is given, else that of torchrun, else of srun, else a single one.

    Raises:
        ValueError: if one of the two numbers is given without the other, or there is no such rank.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"--rank and --world-size must be given together, got {rank} and {world_size}")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise ValueError(f"--rank must be in [0, {world_size - 1}] with --world-size {world_size}, got {rank}")
        return ProcessRank(rank, world_size, rank)
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            return ProcessRank(*(int(os.environ[name]) for name in names))
    return ProcessRank(0, 1, 0)


def _describe(options: TokenizeOptions, folder: Path, shards: Path, tokenizer: PretrainedTokenizer) -> StoreDescription:
    """Describes the store that is wanted. A run that has tokens keeps their views unless options name others."""
    from maskgit_pl.data import describe_store
    from maskgit_pl.shards.tokens import read_description

    def describe(**views: Any) -> StoreDescription:
        return describe_store(
            shards,
            grid=tokenizer.grid,
            codebook_size=tokenizer.network.config.codebook_size,
            tokenizer=tokenizer.fingerprint,
            image_size=tokenizer.image_size,
            **views,
        )

    named = {name: value for name in _VIEWS if (value := getattr(options, name)) is not None}
    with suppress(FileNotFoundError, ValueError):  # none, or one that is made again
        own = read_description(folder / "tokens")
        if not named and own == describe(**{name: getattr(own, name) for name in _VIEWS}):
            return own
    return describe(**named)


def _store_of(folder: Path, description: StoreDescription) -> Path:
    """Returns the folder of a store, and links ``RUN/tokens`` to it.

    A store that lies in the run's own folder, as version 0.1.0 made it, stays there.
    """
    own = folder / "tokens"
    if own.is_dir() and not own.is_symlink():
        return own
    from maskgit_pl.shards.tokens import plain_description  # torch takes seconds to import

    fields = plain_description(description)
    key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    shared = folder.parent / SHARED_TOKENS / key
    shared.mkdir(parents=True, exist_ok=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    link = own.with_name(f".tokens.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(shared, own.parent), target_is_directory=True)
    link.replace(own)  # ranks that come here at once make the same link
    return shared


def _make(
    shards: Path,
    store: Path,
    tokenizer: PretrainedTokenizer,
    description: StoreDescription,
    options: TokenizeOptions,
    process: ProcessRank,
    device: torch.device,
    on_rows: OnRows,
) -> None:
    """Encodes this rank's share of the images, and tells how it went."""
    import torch

    from maskgit_pl.data import TokenizingConfig
    from maskgit_pl.data import tokenize as make_store

    count, begun = _Count(on_rows), time.monotonic()
    with torch.inference_mode():
        outcome = make_store(
            shards,
            store,
            description,
            encode=_encoder(tokenizer, device, description.precision),
            in_channels=tokenizer.network.config.in_channels,
            config=TokenizingConfig(
                batch_size=options.batch_size,
                part_size=options.part_size,
                num_workers=_num_workers(device) if options.num_workers is None else options.num_workers,
                rank=process.rank,
                world_size=process.world_size,
                unreadable_budget=options.unreadable_budget,
            ),
            on_rows=count,
        )
    if outcome == "found":
        log.info("%s: there already, made by this tokenizer from this data", store)
        return
    seconds = max(time.monotonic() - begun, 1e-9)
    name = "" if process.world_size == 1 else f"rank {process.rank} of {process.world_size}: "
    log.info("%s: %s%d images in %.1f s, %.0f images/s", store, name, count.rows, seconds, count.rows / seconds)
    if outcome == "incomplete":
        log.info(
            "%s: the share of rank %d of %d is done; the last rank finishes", store, process.rank, process.world_size
        )


class _Count:
    """Counts the rows that this process encodes; the first call for each split tells of an earlier run."""

    def __init__(self, on_rows: OnRows) -> None:
        self.on_rows, self.splits, self.rows = on_rows, set[str](), 0

    def __call__(self, split: Literal["train", "val"], rows: int, total: int) -> None:
        self.rows += rows if split in self.splits else 0
        self.splits.add(split)
        self.on_rows(split, rows, total)


def _encoder(tokenizer: PretrainedTokenizer, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
    """Returns what turns (B, C, H, W) uint8 images on the CPU into (B, N) int64 tokens on the device."""
    import torch

    from maskgit_pl.imaging import to_unit_range

    network = tokenizer.network.to(device)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network.encode(to_unit_range(images.to(device, non_blocking=True)))

    return encode


def _device(name: str, local_rank: int) -> torch.device:
    """Returns the device of a name; the processes of a machine take its accelerators in turn."""
    import torch

    from maskgit_pl.devices import check_device

    if name != "auto":
        return check_device(name, name="--device")
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, local_rank % torch.accelerator.device_count())


def _num_workers(device: torch.device) -> int:
    """Returns how many processes decode: none where the CPU encodes, which they would slow down."""
    if device.type == "cpu":
        return 0
    return min(_MOST_WORKERS, available_cores())
