"""LightningCLI for a stage of a run: recipes and flags become module, data and Trainer."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.profilers import PassThroughProfiler

from maskgit_pl.cli.recipes import Stage
from maskgit_pl.data import ShardData, StreamConfig
from maskgit_pl.data.stream import check_stream
from maskgit_pl.pretrained import fingerprint
from maskgit_pl.shards.manifest import read_manifest_summary
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO, newest_complete, settings_of
from maskgit_pl.training.checkpoints import Checkpoints
from maskgit_pl.training.faults import UnreadableReport
from maskgit_pl.training.guards import Guard
from maskgit_pl.training.logs import RunLogger
from maskgit_pl.training.pictures import ReconstructionPictures, SamplePictures
from maskgit_pl.training.progress import ProgressLines
from maskgit_pl.training.recipe import changes, fixed_settings
from maskgit_pl.training.strategies import build_strategy, check_accelerator, check_precision, check_strategy
from maskgit_pl.training.watchdog import Watchdog

__all__ = ["StageCLI"]

log = logging.getLogger(__name__)


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
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="of float32 products and convolutions: high is TF32 where the device has it",
        )
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
            values = parser.get_defaults(skip_validation=True)
            keys = [key for key in values.keys() if "." in key]  # noqa: SIM118  # a Namespace has nested keys here alone
            name = unknown.group(1) or unknown.group(2)
            close = difflib.get_close_matches(name, keys, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"recipes/{self.stage}/base.yaml shows the keys"
            raise ValueError(f"key {name!r}: no recipe has it; {hint}") from error

    def before_instantiate_classes(self) -> None:
        """Sets what must be set before anything computes.

        Raises:
            ValueError: A run that is to go on as another one.
        """
        threads = self.config["cpu_threads"]
        if threads is not None:
            if threads < 1:
                raise ValueError(
                    f"cpu_threads: at least 1 is needed, or null for as many as torch takes, got {threads}"
                )
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(self.config["matmul_precision"])
        torch.backends.cudnn.allow_tf32 = self.config["matmul_precision"] != "highest"  # of convolutions
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
        """The Trainer of the recipe, with our callbacks, checkpoint format and strategies.

        Raises:
            ValueError: A strategy or precision in which the stage does not train, or devices that are not there.
        """
        config = self._get(self.config_init, "trainer", default={})
        check_accelerator(config["accelerator"])
        check_precision(
            str(config["precision"])
        )  # as it is written: on a processor, Lightning reads float16 as bfloat16
        ours = {
            "strategy": build_strategy(config["strategy"]),
            "profiler": _NoProfiler(),
            "logger": RunLogger(self.folder, name="", version=""),
            "plugins": [FolderCheckpointIO()],
            "default_root_dir": self.folder,
            "use_distributed_sampler": False,  # the data module shares out the global order itself
            "enable_model_summary": False,
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "enable_checkpointing": True,
        }
        try:
            trainer = self._instantiate_trainer({**config, **ours, **kwargs}, self._our_callbacks())
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:  # Lightning's own
            raise ValueError(_cannot_be_had(config, error)) from error
        check_strategy(config["strategy"], stage=self.stage, ranks=trainer.world_size)
        # Lightning's handler of SIGTERM talks to other ranks, and each micro-batch begins with a question to the first
        # one, for which the device is waited for. Signals set a flag here; ranks vote once a step (training.guards).
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]  # its own
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]  # its own
        return trainer

    def _our_callbacks(self) -> list[Callback]:
        config = self.config_init
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            every_n_steps=config["checkpoint_every"],
            keep_last=config["keep_last"],
            keep_every=config["keep_every"],
            settings=self.settings,
        )
        self.watchdog = Watchdog(self.folder, seconds=config["hang_seconds"])
        progress: Callback = RichProgressBar() if sys.stdout.isatty() else ProgressLines()
        pictures: Callback
        if self.stage == "tokenizer":
            pictures = ReconstructionPictures(self.folder)
        else:
            pictures = SamplePictures(self.folder, class_names=self.datamodule.class_names)
        guard, unreadable = Guard(self.folder, self.checkpoints), UnreadableReport(self.folder)
        return [guard, self.watchdog, self.checkpoints, progress, pictures, unreadable]


def _cannot_be_had(config: Any, error: Exception) -> str:
    said = " ".join(str(error).split()).rstrip(".")
    return (
        f"trainer: accelerator {config['accelerator']!r} with devices {config['devices']!r} cannot be had here, got: "
        f"{said}; name others by --trainer.accelerator (auto: whichever there is) and --trainer.devices, or go where "
        "there are such devices and a torch that is built for them"
    )


def _nothing() -> None:
    pass


class _NoProfiler(PassThroughProfiler):
    """Lightning's own enters a generator at each of some 50 places of a step."""

    _NOTHING = nullcontext()

    def profile(self, action_name: str) -> Any:
        """A context that does nothing, always the same one."""
        return self._NOTHING
