"""Builds module, data and Trainer of a run from its recipes, fits it, and exports it as a pretrained folder."""

from __future__ import annotations

import json
import logging
import resource
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor

from maskgit_pl.runs.process_exit import leaving_together
from maskgit_pl.runs.recipe import Plan, Stage, merged
from maskgit_pl.runs.build import StageRun, resolve, written_config
from maskgit_pl.data import ShardData, split_batch
from maskgit_pl.files import write_atomically
from maskgit_pl.locks import locked
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.card import write_card
from maskgit_pl.pretrained import fingerprint, load_weights, read_config
from maskgit_pl.shards.manifest import read_manifest_summary
from maskgit_pl.token_model import TokenModel
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO, SavedTensor, newest_complete, step_of
from maskgit_pl.provenance import describe_environment

__all__ = ["build", "config_text", "export", "fit", "resolved_tree"]

log = logging.getLogger(__name__)

_EXPORTED = "exported.json"  # in the stage's folder: the step whose weights the run's pretrained folder has
_OPEN_FILES = 1 << 16

# What Lightning and torch say on every run of ours and nobody can act on.
_EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the averaged copies
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    "The '.*_dataloader' does not have many workers",  # num_workers is the recipe's choice
    "The number of training batches .* is smaller than the logging interval",  # ours counts steps, over epochs
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
)


def build(plan: Plan) -> StageRun:
    """Builds module, data and Trainer of a run, its global batch divided among the devices. Nothing is trained.

    Raises:
        ValueError: if the recipe is wrong, data or tokenizer do not fit, or the run would resume with other settings.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    torch.manual_seed(0)  # initial weights; every other random number is a function of the recipe's seed
    run = StageRun(plan.recipe, resolved_tree(plan), plan.stage_folder)
    run.add_trainer()
    module, data, trainer = run.model, run.datamodule, run.trainer
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps must be >= 1, got {trainer.max_steps}; it is where the run ends")
    _, accumulation = split_batch(data.global_batch, data.max_batch_per_device, trainer.world_size)
    if isinstance(module, TokenModel):
        trainer.accumulate_grad_batches = accumulation
        _check_classes(module, data)
        tokenizer = module.tokenizer  # reading it refuses one that does not fit
        data.require_tokenizer(tokenizer.fingerprint, grid=tokenizer.grid, num_codes=tokenizer.network.config.num_codes)
    else:
        assert isinstance(module, Tokenizer)
        module.accumulation = accumulation
    if isinstance(trainer.val_check_interval, int):  # steps for us, micro-batches for Lightning
        trainer.val_check_interval *= accumulation
    return run


def resolved_tree(plan: Plan) -> dict[str, Any]:
    """Returns all values of a run: what data and tokenizer say, then the recipe's, pretrained sizes and flags."""
    pretrained = {} if plan.pretrained is None else _pretrained_values(plan.stage, plan.pretrained)
    files = [layer.tree for layer in plan.recipe.files]
    return merged([_found_values(plan), *files, pretrained, *(layer.tree for layer in plan.recipe.flags)])


def fit(plan: Plan) -> int:
    """Trains a stage and exports it; a finished run is left as it is.

    Returns:
        0.
    """
    _allow_open_files()
    run = build(plan)
    trainer = run.trainer
    newest = newest_complete(plan.checkpoints)
    if newest is not None and step_of(newest) >= trainer.max_steps and _is_exported(plan, step_of(newest)):
        if trainer.is_global_zero:
            log.info("%s: finished at %s; nothing to do", plan.stage_folder, newest.name)
        return 0
    with locked(plan.stage_folder, way_out="train another run (--run)") if trainer.is_global_zero else nullcontext():
        _fit(run, plan)
    return 0


def _fit(run: StageRun, plan: Plan) -> None:
    """Trains on from the newest checkpoint, and exports; rank 0 holds the lock of the stage's folder."""
    module, data, trainer = run.model, run.datamodule, run.trainer
    newest = newest_complete(plan.checkpoints)
    if plan.pretrained is not None and newest is None:
        assert isinstance(module, Tokenizer | TokenModel)
        module.start_from(plan.pretrained)
    if trainer.is_global_zero:
        _write_records(run, plan)
        _introduce(run, plan, newest)
    run.checkpoints.begins_from = newest
    with leaving_together(trainer), run.watchdog.watching_past_fit(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=newest)
        _export(module, data, plan, plan.folder / "pretrained", step=trainer.global_step)
        trainer.strategy.barrier("exported")  # who starts the ranks soon ends those that are left behind another


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
    run = build(plan)
    module = run.model

    def weights_alone(key: str, saved: SavedTensor) -> Tensor:
        return saved.whole() if key.startswith("/state_dict/") else torch.empty(0)

    load_weights(module, FolderCheckpointIO().load_pieces(checkpoint, weights_alone)["state_dict"], checkpoint)
    log.info("%s: %s", plan.stage_folder, checkpoint.name)
    _export(module, run.datamodule, plan, out, step=step_of(checkpoint))


def _introduce(run: StageRun, plan: Plan, newest: Path | None) -> None:
    """Says what begins, and what of the recipes has no meaning in it."""
    if plan.pretrained is not None and newest is None:
        log.info("%s: begins from the weights of %s", plan.stage_folder, plan.pretrained)
    for origin, keys in plan.recipe.left_out.items():
        log.info("%s: causal attention has no use for %s", origin, ", ".join(keys))
    data, ranks = run.datamodule, run.trainer.world_size
    per_device, accumulation = split_batch(data.global_batch, data.max_batch_per_device, ranks)
    log.info(
        "%s: global batch %d = %d ranks x %d accumulated x %d a device%s",
        plan.stage_folder, data.global_batch, ranks, accumulation, per_device,
        f"; going on from {newest.name}" if newest else "",
    )  # fmt: skip


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
    if plan.recipe.get("data.source") == "stream":
        classes = plan.recipe.get("data.stream.classes")
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


def _write_records(run: StageRun, plan: Plan) -> None:
    """Writes the resolved recipe and where it ran, so that a run can be understood and repeated."""
    folder = plan.stage_folder
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "config.yaml") as stream:
        stream.write(_config_text(run.config).encode())
    environment = {"command": sys.argv, **describe_environment(), "world_size": run.trainer.world_size}
    if plan.pretrained is not None:
        environment["pretrained"] = {"folder": str(plan.pretrained), "sha256": fingerprint(plan.pretrained)}
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def config_text(plan: Plan) -> str:
    """Returns the complete recipe of a run as YAML, with the defaults of all keys; builds and reads nothing more."""
    return _config_text(resolve(plan.recipe.kind, resolved_tree(plan)))


def _config_text(config: dict[str, Any]) -> str:
    head = "# The complete recipe of a run. To repeat it: maskgit train STAGE --config THIS_FILE --run NAME\n"
    return head + str(yaml.safe_dump(_plain(written_config(config)), sort_keys=False))


def _plain(value: Any) -> Any:
    """A tree with lists in place of tuples, as YAML holds it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
