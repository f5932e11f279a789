"""Builds module, data and Trainer of a run from its recipes, fits it, and exports it as a pretrained folder."""

from __future__ import annotations

import json
import logging
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from maskgit_pl.autoregressive import AutoregressiveModel
from maskgit_pl.cli.leaving import leaving_together
from maskgit_pl.cli.recipes import Plan, Stage, fitting_layer, is_causal, recipe_value
from maskgit_pl.cli.stage_cli import StageCLI
from maskgit_pl.data import ShardData, split_batch
from maskgit_pl.files import write_atomically
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.card import write_card
from maskgit_pl.pretrained import fingerprint, load_weights, read_config
from maskgit_pl.shards.manifest import read_manifest_summary
from maskgit_pl.token_model import TokenModel
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO, SavedTensor, newest_complete, step_of
from maskgit_pl.training.environment import describe_environment

__all__ = ["build", "export", "fit", "module_and_layers"]

log = logging.getLogger(__name__)

_EXPORTED = "exported.json"  # in the stage's folder: the step whose weights the run's pretrained folder has
_OPEN_FILES = 1 << 16

# What Lightning and torch say on every run of ours and nobody can act on.
_EXPECTED_WARNINGS = (
    "LightningCLI's args parameter is intended to run from within Python",  # the console script has read argv
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the averaged copies
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    "The '.*_dataloader' does not have many workers",  # num_workers is the recipe's choice
    "The number of training batches .* is smaller than the logging interval",  # ours counts steps, over epochs
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
)


def build(plan: Plan) -> StageCLI:
    """Module, data and Trainer of a run, with its global batch shared out over the devices; nothing is trained.

    Raises:
        ValueError: A recipe that cannot be, data or a tokenizer that do not fit, or a run that would become another.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    torch.manual_seed(0)  # initial weights; every other chance is a function of the recipe's seed
    module_type, recipes = module_and_layers(plan)
    layers = [json.dumps(_found_values(plan)), *recipes]
    if plan.pretrained is not None:
        layers.append(json.dumps(_pretrained_values(plan.stage, plan.pretrained)))
    words = [word for layer in layers for word in ("--config", layer)]
    cli = StageCLI(plan.stage, module_type, plan.stage_folder, [*words, *plan.overrides])
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps: at least 1 is needed, where the run ends, got {trainer.max_steps}")
    _, accumulation = split_batch(data.global_batch, data.max_batch_per_device, trainer.world_size)
    if isinstance(module, TokenModel):
        trainer.accumulate_grad_batches = accumulation
        _check_classes(module, data)
        data.require_tokenizer(module.tokenizer.fingerprint)  # reading it refuses one that does not fit
    else:
        module.accumulation = accumulation
    if isinstance(trainer.val_check_interval, int):  # steps for us, micro-batches for Lightning
        trainer.val_check_interval *= accumulation
    return cli


def fit(plan: Plan) -> int:
    """Trains a stage and exports it; a finished run is left as it is.

    Returns:
        0.
    """
    _allow_open_files()
    cli = build(plan)
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    newest = newest_complete(plan.checkpoints)
    if newest is not None and step_of(newest) >= trainer.max_steps and _is_exported(plan, step_of(newest)):
        if trainer.is_global_zero:
            log.info("%s: finished at %s; nothing to do", plan.stage_folder, newest.name)
        return 0
    if plan.pretrained is not None and newest is None:
        assert isinstance(module, Tokenizer | TokenModel)
        module.start_from(plan.pretrained)
    if trainer.is_global_zero:
        _write_papers(cli, plan)
        _introduce(cli, plan, newest)
    cli.checkpoints.begins_from = newest
    with leaving_together(trainer), cli.watchdog.staying(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=newest)
        _export(module, data, plan, plan.folder / "pretrained", step=trainer.global_step)
        trainer.strategy.barrier("exported")  # who starts the ranks soon ends those that are left behind another
    return 0


def _allow_open_files() -> None:
    """As many as the system lets a process have, up to what any run needs.

    The first rank holds two connections to each other one, and a shell often allows 1024 files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def export(plan: Plan, checkpoint: Path, out: Path) -> None:
    """Writes the averaged weights of a checkpoint as training does at its end.

    Args:
        plan: Of one process.
        checkpoint: Of the run, by any number of ranks.
        out: Pretrained folder.

    Raises:
        ValueError: The checkpoint is not whole.
    """
    cli = build(plan)
    module = cli.model

    def weights_alone(key: str, saved: SavedTensor) -> Tensor:
        return saved.whole() if key.startswith("/state_dict/") else torch.empty(0)

    load_weights(module, FolderCheckpointIO().load_pieces(checkpoint, weights_alone)["state_dict"], checkpoint)
    log.info("%s: %s", plan.stage_folder, checkpoint.name)
    _export(module, cli.datamodule, plan, out, step=step_of(checkpoint))


def _introduce(cli: StageCLI, plan: Plan, newest: Path | None) -> None:
    """Says what begins, and what of the recipes has no meaning in it."""
    if plan.pretrained is not None and newest is None:
        log.info("%s: begins from the weights of %s", plan.stage_folder, plan.pretrained)
    for file, keys in _left_out(plan).items():
        log.info("%s: causal attention has no use for %s", file, ", ".join(keys))
    data, ranks = cli.datamodule, cli.trainer.world_size
    per_device, accumulation = split_batch(data.global_batch, data.max_batch_per_device, ranks)
    log.info(
        "%s: global batch %d = %d ranks x %d accumulated x %d a device%s",
        plan.stage_folder, data.global_batch, ranks, accumulation, per_device,
        f"; going on from {newest.name}" if newest else "",
    )  # fmt: skip


def module_and_layers(plan: Plan) -> tuple[type[LightningModule], list[str]]:
    """What the recipes train, and the layers of its configuration that they are."""
    if plan.stage == "tokenizer":
        return Tokenizer, [str(file) for file in plan.files]
    if is_causal(plan.files, plan.overrides):
        return AutoregressiveModel, [json.dumps(fitting_layer(file)[0]) for file in plan.files]
    return MaskedTokenModel, [str(file) for file in plan.files]


def _left_out(plan: Plan) -> dict[Path, list[str]]:
    """Keys of each recipe that have no meaning under causal attention."""
    if plan.stage == "tokenizer" or not is_causal(plan.files, plan.overrides):
        return {}
    return {file: keys for file in plan.files if (keys := fitting_layer(file)[1])}


def _found_values(plan: Plan) -> dict[str, Any]:
    """What a recipe need not say, since the data and the tokenizer at hand say it."""
    if plan.tokenizer is None:
        return {"data": {"path": str(plan.shards)}}
    config = read_config(plan.tokenizer, "tokenizer")
    grid = VQGANConfig(**config["network"]).grid(config["image_size"])
    data: dict[str, Any] = {
        "path": str(plan.shards),
        "image_size": config["image_size"],
        "in_channels": config["network"]["in_channels"],
        "token_store": str(plan.folder / "tokens"),
    }
    network = {
        "num_codes": config["network"]["num_codes"],
        "num_classes": _num_classes(plan),
        "grid": list(grid),
    }
    return {"data": data, "model": {"tokenizer": str(plan.tokenizer), "network": network}}


def _num_classes(plan: Plan) -> int:
    """Of the stream, if it says; else of the data folder."""
    if recipe_value(plan.files, plan.overrides, "data.source") == "stream":
        classes = recipe_value(plan.files, plan.overrides, "data.stream.classes")
        if classes is not None:
            return classes if isinstance(classes, int) else len(classes)
    return read_manifest_summary(plan.shards).num_classes


def _pretrained_values(stage: Stage, pretrained: Path) -> dict[str, Any]:
    """What a run takes from the weights that it begins from: their sizes lie above the recipes'."""
    config = read_config(pretrained, stage)
    if stage == "tokenizer":
        network = dict(config["network"])
        data = {"image_size": config["image_size"], "in_channels": network.pop("in_channels")}
        return {"data": data, "model": {"network": network}}
    network = {name: config["network"][name] for name in ("width", "depth", "num_heads", "mlp_width")}
    return {"model": {"network": network}}


def _check_classes(module: TokenModel, data: ShardData) -> None:
    if module.config.num_classes != data.num_classes:
        raise ValueError(
            f"model.network.num_classes: {data.path} has {data.num_classes} classes, got {module.config.num_classes}; "
            "leave the key out or name other data"
        )


def _is_exported(plan: Plan, step: int) -> bool:
    """Whether the run's own pretrained folder has the weights of a step, and not of one before it."""
    try:
        said: object = json.loads((plan.stage_folder / _EXPORTED).read_text())
        return said == {"step": step, "sha256": fingerprint(plan.folder / "pretrained" / plan.stage)}
    except (OSError, ValueError):
        return False


def _export(module: LightningModule, data: ShardData, plan: Plan, folder: Path, *, step: int) -> None:
    """Writes the averaged weights; called on every rank."""
    if isinstance(module, Tokenizer):
        module.export(folder)
    elif isinstance(module, TokenModel):
        module.export(folder, class_names=data.class_names)
        if module.global_rank == 0:
            _describe(folder)
    if module.global_rank == 0 and folder == plan.folder / "pretrained":
        said = {"step": step, "sha256": fingerprint(folder / plan.stage)}
        with write_atomically(plan.stage_folder / _EXPORTED) as stream:
            stream.write(json.dumps(said).encode())
    if module.global_rank == 0:
        log.info("exported %s", folder)


def _describe(folder: Path) -> None:
    """Writes the model card beside both stages; the weights are exported, and no fault of a text may end the run."""
    try:
        write_card(folder)
    except Exception as error:
        log.warning("%s: no model card (%s: %s)", folder, type(error).__name__, error)


def _write_papers(cli: StageCLI, plan: Plan) -> None:
    """The resolved configuration and where it ran, so that a run can be told and repeated."""
    folder = plan.stage_folder
    folder.mkdir(parents=True, exist_ok=True)
    cli.parser.save(cli.config, folder / "config.yaml", overwrite=True, skip_validation=True)
    environment = {"command": sys.argv, **describe_environment(), "world_size": cli.trainer.world_size}
    if plan.pretrained is not None:
        environment["pretrained"] = {"folder": str(plan.pretrained), "sha256": fingerprint(plan.pretrained)}
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
