"""``runs.tokenize``: makes the token store that stage 2 of a run reads.

Runs with the same tokenizer and the same data share a store in ``runs/tokens/KEY``, where KEY is a hash of
its description. ``runs/RUN/tokens`` is a symbolic link to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from maskgit_pl import data
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.data.token_store import (
    StoreDescription,
    TokenizeOptions,
    augmentations_text,
    plain_description,
    read_description,
)
from maskgit_pl.devices import check_device, default_device
from maskgit_pl.folders import hold_lock
from maskgit_pl.networks.vqgan import to_unit_range
from maskgit_pl.pretrained.networks import PretrainedTokenizer, load_tokenizer
from maskgit_pl.processes import Bars, available_cores, launcher_rank, local_rank, no_bars
from maskgit_pl.runs.plan import SHARED_TOKENS, Folders, adapt_to_few_images, plan_run
from maskgit_pl.runs.recipe import Recipe

log = logging.getLogger(__name__)

_MOST_WORKERS = 8
_VIEWS = ("crops", "flip", "precision", "augmentations")


def tokenize(
    recipe: Recipe,
    *,
    options: TokenizeOptions | None = None,
    bars: Bars = no_bars,
    **folders: Unpack[Folders],
) -> Path | None:
    """Makes the token store of a run if its recipe, of stage 2, reads tokens. Resumes an interrupted store.

    Returns:
        The folder of the store; None if the recipe does not read tokens.

    Raises:
        FileNotFoundError: if data or tokenizer do not exist.
        ValueError: if an option is out of range, or another process of the same rank makes the store.
        DataBudgetError: if too many images are unreadable.
    """
    if (source := recipe.get("data.source")) != "tokens":
        log.info("data.source %s: stage 2 reads no tokens; nothing to do", source)
        return None
    options = options or TokenizeOptions()
    rank, world_size = launcher_rank()  # of torchrun or srun, whose processes share the work
    plan = plan_run(recipe, **folders)
    if plan.tokenizer is None:
        log.info("data %s: a token store; nothing to do", plan.shards)
        return None
    loaded = load_tokenizer(plan.tokenizer)
    is_auto = options.device == "auto"  # the processes of a machine take its accelerators in turn
    device = check_device(default_device(local_rank=local_rank()) if is_auto else options.device, name="--device")
    if options.num_workers is None:  # on a CPU, decoding processes would slow down the encoder
        options = replace(options, num_workers=0 if device.type == "cpu" else min(_MOST_WORKERS, available_cores()))
    views = _views(adapt_to_few_images(recipe, read_manifest_summary(plan.shards)), options)
    description = _describe(views, plan.folder, plan.shards, loaded)
    store = _store_of(plan.folder, description)
    with hold_lock(store, hint="name another run (--run)", rank=rank), torch.inference_mode():
        data.tokenize(
            plan.shards,
            store,
            description,
            encode=_encoder(loaded, device, description.precision),
            in_channels=loaded.network.config.in_channels,
            config=options,
            ranks=(rank, world_size),
            bars=bars,
        )
    return store


def _views(recipe: Recipe, options: TokenizeOptions) -> dict[str, Any]:
    """Returns what recipe and options say about the views of an image and the precision, without what neither says."""
    listed, crops = recipe.get("data.augmentations"), options.crops
    values = {
        "crops": recipe.get("data.views") if crops is None else crops,
        "flip": options.flip,
        "precision": options.precision,
        "augmentations": None if listed is None else augmentations_text(listed),
    }
    return {name: value for name, value in values.items() if value is not None}


def _describe(named: dict[str, Any], folder: Path, shards: Path, tokenizer: PretrainedTokenizer) -> StoreDescription:
    """Describes the wanted store. A run with a store keeps its views and its precision if ``named`` is empty."""

    def describe(**views: Any) -> StoreDescription:
        return data.describe_store(
            shards,
            grid=tokenizer.grid,
            codebook_size=tokenizer.network.config.codebook_size,
            tokenizer=tokenizer.fingerprint,
            image_size=tokenizer.image_size,
            **views,
        )

    with suppress(FileNotFoundError, ValueError):  # no store, or one that will be replaced
        stored = read_description(folder / "tokens")
        if not named and stored == describe(**{name: getattr(stored, name) for name in _VIEWS}):
            return stored
    return describe(**named)


def _store_of(folder: Path, description: StoreDescription) -> Path:
    """Returns the folder of a store, and links ``RUN/tokens`` to it."""
    store = folder / "tokens"
    text = json.dumps(plain_description(description), sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    shared = folder.parent / SHARED_TOKENS / key
    shared.mkdir(parents=True, exist_ok=True)
    store.parent.mkdir(parents=True, exist_ok=True)
    link = store.with_name(f".tokens.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(shared, store.parent), target_is_directory=True)
    link.replace(store)  # atomic: ranks may do this at the same time, with the same target
    return shared


def _encoder(tokenizer: PretrainedTokenizer, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
    """Returns a function from (B, C, H, W) uint8 images on the CPU to (B, N) int64 tokens on the device."""
    network = tokenizer.network.to(device)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network.encode(to_unit_range(images.to(device, non_blocking=True)))

    return encode
