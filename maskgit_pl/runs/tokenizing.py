"""``runs.tokenize``: makes the token store that stage 2 of a run reads. Imports torch only if there is work to do.

Runs with the same tokenizer and the same data share a store in ``runs/tokens/KEY``, where KEY is a hash of its
description. ``runs/RUN/tokens`` is a symbolic link to it.
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

from maskgit_pl.data.folders import hold_lock
from maskgit_pl.processes import Bars, available_cores, no_bars
from maskgit_pl.runs.plan import SHARED_TOKENS, find_data, find_tokenizer, run_folder
from maskgit_pl.runs.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from maskgit_pl.data.token_store import StoreDescription
    from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer

__all__ = ["ProcessRank", "TokenizeOptions", "find_process_rank", "tokenize"]

log = logging.getLogger(__name__)

_MOST_WORKERS = 8
_VIEWS = ("crops", "flip", "precision", "augmentations")


class ProcessRank(NamedTuple):
    """The rank of this process among the processes that share the work.

    Attributes:
        rank: Index of this process, in [0, world_size).
        world_size: Number of processes.
        local_rank: Index of this process among those on its machine, from 0.
    """

    rank: int
    world_size: int
    local_rank: int


@dataclass(frozen=True)
class TokenizeOptions:
    """The options of a token store.

    If ``crops``, ``flip`` and ``precision`` are all None, and the recipe sets neither ``data.views`` nor
    ``data.augmentations``, an existing store of the run keeps its own.

    Args:
        crops: Crops per training image, beginning with the central crop. Default: ``data.views`` of the recipe, or 1.
        flip: True adds the mirrored training images. Default: False.
        precision: Precision of the tokenizer. Default: ``"float32"``.
        device: ``"cpu"``, ``"cuda:1"``, ...; ``"auto"`` takes a GPU if there is one.
        batch_size: Images per batch of the tokenizer.
        num_workers: Processes that decode images. None: 0 on a CPU, up to 8 with a GPU.
        part_size: Images per part that is written at a time; a kill loses at most one part.
        unreadable_budget: Allowed fraction of unreadable images, in [0, 1].
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
    bars: Bars = no_bars,
) -> Path | None:
    """Makes the token store of a run if its recipe reads tokens. Resumes an interrupted store.

    Args:
        recipe: Recipe of stage 2.
        run: A name in ``runs/``, or a folder; see ``fit``.
        data: Data folder; see ``fit``.
        tokenizer: Pretrained tokenizer folder; see ``fit``.
        pretrained: Pretrained folder of both stages with the tokenizer, if ``tokenizer`` is None.
        options: Options of the store.
        process: Rank of this process. Default: ``find_process_rank()``.
        bars: Shows the progress of each split.

    Returns:
        The folder of the store; None if the recipe does not read tokens.

    Raises:
        FileNotFoundError: if data or tokenizer do not exist.
        ValueError: if an option is out of range, or another process of the same rank makes the store.
        DataBudgetError: if too many images are unreadable.
    """
    source = recipe.get("data.source")
    if source != "tokens":
        log.info("data.source %s: stage 2 reads no tokens; nothing to do", source)
        return None
    process = find_process_rank() if process is None else process
    shards, folder = find_data(recipe, data), run_folder(recipe, run)
    found = find_tokenizer(recipe, folder=folder, shards=shards, tokenizer=tokenizer, pretrained=pretrained)
    from maskgit_pl.pipeline.pretrained import load_tokenizer  # torch takes seconds to import

    options = options or TokenizeOptions()
    device, loaded = _device(options.device, process.local_rank), load_tokenizer(found)
    views = _views(recipe, options)
    description = _describe(views, folder, shards, loaded)
    store = _store_of(folder, description)
    with hold_lock(store, hint="name another run (--run)", rank=process.rank):
        _make(shards, store, loaded, description, options, process, device, bars)
    return store


def find_process_rank(rank: int | None = None, world_size: int | None = None) -> ProcessRank:
    """Finds the rank of this process: the given one, else that of torchrun or srun, else that of a single process.

    Raises:
        ValueError: if only one of the two numbers is given, or the rank is out of range.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"--rank and --world-size must be given together, got {rank} and {world_size}")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise ValueError(f"--rank must be in [0, {world_size - 1}] with --world-size {world_size}, got {rank}")
        return ProcessRank(rank, world_size, rank)
    # torchrun comes first, since it may run inside a Slurm job.
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            return ProcessRank(*(int(os.environ[name]) for name in names))
    return ProcessRank(0, 1, 0)


def _views(recipe: Recipe, options: TokenizeOptions) -> dict[str, Any]:
    """Returns what recipe and options say about the views of an image and the precision, without what neither says."""
    from maskgit_pl.data import ShardDataConfig  # torch takes seconds to import
    from maskgit_pl.data.token_store import augmentations_text

    listed, crops = recipe.get("data.augmentations"), options.crops
    if listed is not None:
        ShardDataConfig("", augmentations=listed)  # raises if a name or a value is wrong
    values = {
        "crops": recipe.get("data.views") if crops is None else crops,
        "flip": options.flip,
        "precision": options.precision,
        "augmentations": None if listed is None else augmentations_text(listed),
    }
    return {name: value for name, value in values.items() if value is not None}


def _describe(named: dict[str, Any], folder: Path, shards: Path, tokenizer: PretrainedTokenizer) -> StoreDescription:
    """Describes the wanted store. A run with a store keeps its views and its precision if ``named`` is empty."""
    from maskgit_pl.data import describe_store
    from maskgit_pl.data.token_store import read_description

    def describe(**views: Any) -> StoreDescription:
        return describe_store(
            shards,
            grid=tokenizer.grid,
            codebook_size=tokenizer.network.config.codebook_size,
            tokenizer=tokenizer.fingerprint,
            image_size=tokenizer.image_size,
            **views,
        )

    with suppress(FileNotFoundError, ValueError):  # no store, or one that will be replaced
        own = read_description(folder / "tokens")
        if not named and own == describe(**{name: getattr(own, name) for name in _VIEWS}):
            return own
    return describe(**named)


def _store_of(folder: Path, description: StoreDescription) -> Path:
    """Returns the folder of a store, and links ``RUN/tokens`` to it."""
    own = folder / "tokens"
    from maskgit_pl.data.token_store import plain_description  # torch takes seconds to import

    fields = plain_description(description)
    key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    shared = folder.parent / SHARED_TOKENS / key
    shared.mkdir(parents=True, exist_ok=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    if own.is_dir() and not own.is_symlink():
        raise ValueError(f"{own} must be a link to a store in {shared.parent}, got a folder; remove it")
    # A new link replaces the old one in one step, which is safe if other ranks do the same.
    link = own.with_name(f".tokens.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(shared, own.parent), target_is_directory=True)
    link.replace(own)  # atomic: ranks may do this at the same time, with the same target
    return shared


def _make(
    shards: Path,
    store: Path,
    tokenizer: PretrainedTokenizer,
    description: StoreDescription,
    options: TokenizeOptions,
    process: ProcessRank,
    device: torch.device,
    bars: Bars,
) -> None:
    """Encodes this rank's share of the images, and logs the outcome."""
    import torch

    from maskgit_pl.data import TokenizingConfig
    from maskgit_pl.data import tokenize as make_store

    name = "" if process.world_size == 1 else f"rank {process.rank} of {process.world_size}: "
    count, begun = _Count(bars, name), time.monotonic()
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
        log.info("%s exists already, made by this tokenizer from these data", store)
        return
    seconds = max(time.monotonic() - begun, 1e-9)
    log.info("%s: %s%d images in %.1f s, %.0f images/s", store, name, count.rows, seconds, count.rows / seconds)
    if outcome == "incomplete":
        log.info(
            "%s: the share of rank %d of %d is done; the last rank finishes", store, process.rank, process.world_size
        )


class _Count:
    """A callback that shows the progress of each split, and counts newly encoded rows.

    The first call for a split reports the rows of an earlier run, and the number of rows.
    """

    def __init__(self, bars: Bars, name: str) -> None:
        self.bars, self.name, self.rows = bars, name, 0
        self._advance: dict[str, Callable[[int], None]] = {}

    def __call__(self, split: Literal["train", "val"], rows: int, total: int) -> None:
        if split in self._advance:
            self.rows += rows
            self._advance[split](rows)
        else:
            self._advance[split] = self.bars(f"{self.name}tokens of {split}", total, done=rows, unit="images")


def _encoder(tokenizer: PretrainedTokenizer, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
    """Returns a function from (B, C, H, W) uint8 images on the CPU to (B, N) int64 tokens on the device."""
    import torch

    from maskgit_pl.pipeline.grids import to_unit_range

    network = tokenizer.network.to(device)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network.encode(to_unit_range(images.to(device, non_blocking=True)))

    return encode


def _device(name: str, local_rank: int) -> torch.device:
    """Returns a device by name; for ``auto``, the processes of a machine take its accelerators in turn."""
    from maskgit_pl.distributed import check_device, default_device

    return check_device(default_device(local_rank=local_rank) if name == "auto" else name, name="--device")


def _num_workers(device: torch.device) -> int:
    """Returns the number of decoding processes: none if the CPU also encodes, since they would slow it down."""
    if device.type == "cpu":
        return 0
    return min(_MOST_WORKERS, available_cores())
