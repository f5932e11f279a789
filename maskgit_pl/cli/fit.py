"""Builds module, data and Trainer from recipe files through LightningCLI, fits, and exports the pretrained folder."""

from __future__ import annotations

import difflib
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from maskgit_pl.autoregressive import AutoregressiveModel
from maskgit_pl.cli.leaving import leaving_together
from maskgit_pl.cli.recipes import Stage, fitting_layer, is_causal, recipe_value
from maskgit_pl.data import ShardData, StreamConfig, split_batch
from maskgit_pl.data.stream import check_stream
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.card import write_card
from maskgit_pl.pretrained import fingerprint, read_config
from maskgit_pl.shards.manifest import read_manifest_summary
from maskgit_pl.token_model import TokenModel
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO, newest_complete, settings_of
from maskgit_pl.training.checkpoints import Checkpoints
from maskgit_pl.training.environment import describe_environment
from maskgit_pl.training.faults import UnreadableReport
from maskgit_pl.training.guards import Guard
from maskgit_pl.training.pictures import ReconstructionPictures, SamplePictures
from maskgit_pl.training.progress import ProgressLines
from maskgit_pl.training.recipe import changes, fixed_settings
from maskgit_pl.training.strategies import build_strategy
from maskgit_pl.training.watchdog import Watchdog

__all__ = ["StageCLI", "fit"]

log = logging.getLogger(__name__)

# What Lightning and torch say on every run of ours and nobody can act on.
_EXPECTED_WARNINGS = (
    "LightningCLI's args parameter is intended to run from within Python",  # the console script has read argv
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the averaged copies
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    "The `srun` command is available on your system",  # a laptop may have Slurm's client
    "The '.*_dataloader' does not have many workers",  # num_workers is the recipe's choice
    "The number of training batches .* is smaller than the logging interval",  # ours counts steps, over epochs
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
)


class StageCLI(LightningCLI):
    """LightningCLI for one stage of one run: callbacks, logger and strategy come from code, values from recipes.

    Args:
        stage: Which stage.
        module: What is trained.
        folder: ``runs/RUN/STAGE``.
        args: Words for the parser: ``--config`` files and flags.
    """

    def __init__(self, stage: Stage, module: type[LightningModule], folder: Path, args: Sequence[str]) -> None:
        self.stage = stage
        self.folder = folder
        super().__init__(
            module,
            ShardData,
            run=False,
            args=list(args),
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=False,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False, "prog": f"maskgit train {stage}"},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a stage needs beyond module, data and Trainer, and which values are one value."""
        parser.add_argument("--checkpoint_every", type=int, default=500, help="steps between checkpoints")
        parser.add_argument("--keep_last", type=int, default=2, help="newest checkpoints that stay")
        parser.add_argument("--keep_every", type=int | None, default=None, help="steps whose checkpoints stay for good")
        parser.add_argument("--hang_seconds", type=float, default=100.0, help="a step may take so long; see Watchdog")
        parser.add_argument("--cpu_threads", type=int | None, default=None, help="threads on a processor")
        parser.link_arguments("data.seed", "model.seed")
        if self.stage == "tokenizer":
            parser.link_arguments("data.image_size", "model.image_size")
            parser.link_arguments("data.in_channels", "model.network.in_channels")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads recipes and flags.

        Raises:
            ValueError: An unknown key, answered with the nearest, or a value of the wrong type.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            text = " ".join(str(error).split())
            unknown = re.search(r"unrecognized arguments: --([\w.]+)|[Kk]ey \"?'?([\w.]+)\"?'? is not expected", text)
            if unknown is None:
                raise ValueError(text) from error
            keys = [key for key in parser.get_defaults(skip_validation=True).keys() if "." in key]  # noqa: SIM118  # no dict
            name = unknown.group(1) or unknown.group(2)
            close = difflib.get_close_matches(name, keys, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"recipes/{self.stage}/base.yaml shows the keys"
            raise ValueError(f"key {name!r}: no recipe has it; {hint}") from error

    def before_instantiate_classes(self) -> None:
        """Refuses what a stage cannot do, and sets what must be set before anything computes.

        Raises:
            ValueError: FSDP for stage 1, whose two networks train under DDP, or a run that is to go on as another one.
        """
        if self.stage == "tokenizer" and self.config["trainer"]["strategy"] == "fsdp":
            raise ValueError("trainer.strategy 'fsdp': the tokenizer trains under 'ddp' or 'auto'; use CLUSTER=ddp")
        if self.config["cpu_threads"] is not None:
            torch.set_num_threads(self.config["cpu_threads"])
        self.settings = self._settings(self.config)
        newest = newest_complete(self.folder / "checkpoints")
        if newest is not None:
            self._check_goes_on(newest)

    def _settings(self, config: Any) -> dict[str, Any]:
        if config["data"]["source"] == "stream":
            values = config["data"]["stream"]
            stream = None if values is None else StreamConfig(**values)
            data = check_stream(stream, config["data"]["validation_samples"]).fingerprint
        else:
            data = read_manifest_summary(config["data"]["path"]).fingerprint
        tokenizer = fingerprint(Path(config["model"]["tokenizer"])) if self.stage == "transformer" else None
        return fixed_settings(config.as_dict(), data=data, tokenizer=tokenizer)

    def _check_goes_on(self, checkpoint: Path) -> None:
        """Refuses to go on from a checkpoint with settings that would make it another run."""
        known = settings_of(checkpoint)
        if known is None:
            log.warning("%s: it does not say with which settings it was made; they are not compared", checkpoint)
            return
        defaults = self.parser.get_defaults(skip_validation=True).as_dict()
        changed = changes(known, self.settings, fixed_settings(defaults, data="", tokenizer=""))
        if changed:
            raise ValueError(
                f"run {self.folder}: it goes on from {checkpoint.name} and keeps its settings, got "
                f"{', '.join(changed)}; set them back, or train another run (--run, make: RUN=), which may begin from "
                "weights that are there (--pretrained, make: PRETRAINED=)"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer of the recipe, with our callbacks, checkpoint format and strategies."""
        config = self._get(self.config_init, "trainer", default={})
        ours = {
            "strategy": build_strategy(config["strategy"]),
            "logger": TensorBoardLogger(self.folder, name="", version=""),
            "plugins": [FolderCheckpointIO()],
            "default_root_dir": self.folder,
            "use_distributed_sampler": False,  # the data module shares out the global order itself
            "enable_model_summary": False,
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "enable_checkpointing": True,
        }
        trainer = self._instantiate_trainer({**config, **ours, **kwargs}, self._our_callbacks())
        # Lightning's handler of SIGTERM talks to other ranks, and before each micro-batch it asks the first one and waits
        # for the device. Signals set a flag here, and the ranks vote once a step (training.guards).
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        return trainer

    def _our_callbacks(self) -> list[Callback]:
        config = self.config_init
        checkpoints = Checkpoints(
            self.folder / "checkpoints",
            every_n_steps=config["checkpoint_every"],
            keep_last=config["keep_last"],
            keep_every=config["keep_every"],
            settings=self.settings,
        )
        guards = [Guard(self.folder, checkpoints), Watchdog(self.folder, seconds=config["hang_seconds"])]
        progress: Callback = RichProgressBar() if sys.stdout.isatty() else ProgressLines()
        pictures: Callback
        if self.stage == "tokenizer":
            pictures = ReconstructionPictures(self.folder)
        else:
            pictures = SamplePictures(self.folder, class_names=self.datamodule.class_names)
        return [*guards, checkpoints, progress, pictures, UnreadableReport(self.folder)]


def _nothing() -> None:
    pass


def fit(
    stage: Stage,
    *,
    files: Sequence[Path],
    overrides: Sequence[str],
    shards: Path,
    folder: Path,
    tokenizer: Path | None,
    pretrained: Path | None = None,
) -> int:
    """Trains a stage and exports it; a finished run is left as it is.

    Args:
        stage: Which.
        files: Recipe files in merge order.
        overrides: Flags.
        shards: Data folder.
        folder: ``runs/RUN``.
        tokenizer: Pretrained tokenizer folder, for stage 2.
        pretrained: Pretrained folder of this stage whose weights a new run begins from, and whose sizes it takes.

    Returns:
        0.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    found: dict[str, Any] = {"data": {"path": str(shards)}}
    if tokenizer is not None:
        found = _tokenizer_values(shards, tokenizer, folder, num_classes=_num_classes(shards, files, overrides))
    module_type, own, left_out = _module_and_layers(stage, files, overrides)
    layers = [json.dumps(found), *own]
    if pretrained is not None:
        layers.append(json.dumps(_pretrained_values(stage, pretrained)))
    words = [word for layer in layers for word in ("--config", layer)]
    torch.manual_seed(0)  # initial weights; every other chance is a function of the recipe's seed
    cli = StageCLI(stage, module_type, folder / stage, [*words, *overrides])
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    newest = newest_complete(folder / stage / "checkpoints")
    if newest is not None and int(newest.name.removeprefix("step-")) >= trainer.max_steps and _exported(folder, stage):
        log.info("%s: finished at %s; nothing to do", folder / stage, newest.name)
        return 0
    per_device, accumulation = split_batch(data.global_batch, data.max_batch_per_device, trainer.world_size)
    if isinstance(module, TokenModel):
        trainer.accumulate_grad_batches = accumulation
        _check_classes(module, data)
        data.require_tokenizer(module.tokenizer.fingerprint)  # reading it refuses one that does not fit
    else:
        module.accumulation = accumulation
    if isinstance(trainer.val_check_interval, int):  # steps for us, micro-batches for Lightning
        trainer.val_check_interval *= accumulation
    if pretrained is not None and newest is None:
        assert isinstance(module, Tokenizer | TokenModel)
        module.start_from(pretrained)
        log.info("%s: begins from the weights of %s", folder / stage, pretrained)
    if trainer.is_global_zero:
        _write_papers(cli, folder / stage, pretrained)
        for line in left_out:
            log.info("%s", line)
        log.info(
            "%s: global batch %d = %d ranks x %d accumulated x %d a device%s",
            folder / stage, data.global_batch, trainer.world_size, accumulation, per_device,
            f"; going on from {newest.name}" if newest else "",
        )  # fmt: skip
    with leaving_together(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=newest)
    _export(module, data, folder / "pretrained", tokenizer)
    return 0


def _module_and_layers(
    stage: Stage, files: Sequence[Path], overrides: Sequence[str]
) -> tuple[type[LightningModule], list[str], list[str]]:
    """What the recipes train, the layers of its configuration that they are, and a line for each that is cut."""
    if stage == "tokenizer" or not is_causal(files, overrides):
        return Tokenizer if stage == "tokenizer" else MaskedTokenModel, [str(file) for file in files], []
    fitting = {file: fitting_layer(file) for file in files}
    left_out = [
        f"{file}: causal attention has no use for {', '.join(keys)}" for file, (_, keys) in fitting.items() if keys
    ]
    return AutoregressiveModel, [json.dumps(layer) for layer, _ in fitting.values()], left_out


def _num_classes(shards: Path, files: Sequence[Path], overrides: Sequence[str]) -> int:
    """Of the stream, if it says; else of the data folder."""
    if recipe_value(files, overrides, "data.source") == "stream":
        classes = recipe_value(files, overrides, "data.stream.classes")
        if classes is not None:
            return classes if isinstance(classes, int) else len(classes)
    return read_manifest_summary(shards).num_classes


def _tokenizer_values(shards: Path, tokenizer: Path, folder: Path, *, num_classes: int) -> dict[str, Any]:
    """What stage 2 need not be told: it stands in the tokenizer's and the data's own files."""
    config = read_config(tokenizer, "tokenizer")
    grid = VQGANConfig(**config["network"]).grid(config["image_size"])
    data: dict[str, Any] = {
        "path": str(shards),
        "image_size": config["image_size"],
        "in_channels": config["network"]["in_channels"],
        "token_store": str(folder / "tokens"),
    }
    network = {
        "num_codes": config["network"]["num_codes"],
        "num_classes": num_classes,
        "grid": list(grid),
    }
    return {"data": data, "model": {"tokenizer": str(tokenizer), "network": network}}


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


def _exported(folder: Path, stage: Stage) -> bool:
    return (folder / "pretrained" / stage / "config.json").is_file()


def _export(module: LightningModule, data: ShardData, folder: Path, tokenizer: Path | None) -> None:
    if isinstance(module, Tokenizer):
        module.export(folder)
    elif isinstance(module, TokenModel):
        module.export(folder, class_names=data.class_names)
        own = folder / "tokenizer"
        if module.global_rank == 0 and tokenizer is not None and tokenizer.resolve() != own.resolve():
            shutil.copytree(tokenizer, own, dirs_exist_ok=True)  # a run's folder stands alone
        if module.global_rank == 0:
            _describe(folder)
    if module.global_rank == 0:
        log.info("exported %s", folder)


def _describe(folder: Path) -> None:
    """Writes the model card beside both stages; the weights are exported, and no fault of a text may end the run."""
    try:
        write_card(folder)
    except Exception as error:
        log.warning("%s: no model card (%s: %s)", folder, type(error).__name__, error)


def _write_papers(cli: StageCLI, folder: Path, pretrained: Path | None) -> None:
    """The resolved configuration and where it ran, so that a run can be told and repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    cli.parser.save(cli.config, folder / "config.yaml", overwrite=True, skip_validation=True)
    environment = {"command": sys.argv, **describe_environment(), "world_size": cli.trainer.world_size}
    if pretrained is not None:
        environment["pretrained"] = {"folder": str(pretrained), "sha256": fingerprint(pretrained)}
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
