"""``load_from_checkpoint`` of the modules of both stages: a folder of a run, or a file of Lightning."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import LightningModule

from maskgit_pl.checks import build_dataclass
from maskgit_pl.data.config import derive_values
from maskgit_pl.files import read_yaml
from maskgit_pl.registry import nearest
from maskgit_pl.text import shorten
from maskgit_pl.training.checkpoints import load_module, newest_checkpoint

_OPTIONS = ("map_location", "hparams_file", "strict", "weights_only")


class RunModule(LightningModule):
    """The base of the modules of both stages, which are loaded from a run.

    Attributes:
        stage: Stage of a run, which names the folders of its checkpoints and of its pretrained network.
        config_class: Dataclass of the argument ``config``.
    """

    stage: ClassVar[Literal["tokenizer", "transformer"]]
    config_class: ClassVar[type[Any]]

    @abstractmethod
    def start_from(self, folder: Path) -> None:
        """Replaces the initial weights by those of a pretrained folder of the stage."""

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is no plain classmethod
        cls,
        checkpoint_path: Path | str,
        map_location: torch.device | str | None = None,
        hparams_file: None = None,
        strict: bool | None = None,  # noqa: FBT001  # the order is Lightning's
        weights_only: bool | None = None,  # noqa: FBT001
        **options: Any,
    ) -> Self:
        """Loads a module, to continue its training with a Trainer: the optimizer and the step start afresh.

        Args:
            checkpoint_path: Checkpoint of a run (``runs/RUN/STAGE/checkpoints/step-00001000``), run folder, for its
                newest checkpoint, or its ``pretrained`` folder, whose averaged weights both networks get; or a file
                of Lightning, which needs ``config``.
            map_location: Device of the module; None for the CPU.
            hparams_file: None: the configuration is that of the run.
            strict: False ignores missing and additional weights of a checkpoint.
            weights_only: Only for a file of Lightning: a folder holds no pickle.
            options: Arguments of the class, such as ``config`` in place of the configuration of the run.

        Raises:
            FileNotFoundError: if the folder holds no checkpoint of this stage, or no run with its configuration.
            TypeError: if there is no such option; the message names the nearest one.
            ValueError: if the run is of another kind, or weights or files are damaged.
        """
        known = inspect.signature(cls).parameters
        for name in options.keys() - known.keys():
            raise TypeError(f"option {name!r}: {nearest(name, (*known, *_OPTIONS))}")
        if not isinstance(checkpoint_path, str | Path) or not Path(checkpoint_path).is_dir():
            load = super().load_from_checkpoint
            return load(checkpoint_path, map_location, hparams_file, strict, weights_only, **options)
        if hparams_file is not None:
            raise ValueError(f"hparams_file must be None for a folder, got {shorten(hparams_file)}; give config")
        if not isinstance(map_location, torch.device | str | None):
            got = type(map_location).__name__
            raise ValueError(f"map_location must be a device for a folder, got a {got}; name one such as 'cpu'")
        run, weights = cls._find_weights(Path(checkpoint_path))
        config = options.pop("config", None) or cls._read_config(run)
        module = cls(config, **options)
        if weights.parent.name == "checkpoints":
            load_module(module, weights, strict=module.strict_loading if strict is None else strict)
        elif strict is False:
            raise ValueError(f"strict must be True for a pretrained folder, got False; load a checkpoint of {run}")
        else:
            module.start_from(weights)
        return module.to(map_location or "cpu")

    @classmethod
    def _find_weights(cls, folder: Path) -> tuple[Path, Path]:
        """Returns the run, and the checkpoint or the pretrained folder of the stage that a path means."""
        folder = folder.resolve()  # its parents tell the run
        if folder.parent.name == "checkpoints":
            if folder.parent.parent.name != cls.stage:
                raise ValueError(f"checkpoint must be one of a {cls.stage}, got {folder}; use the class of that stage")
            return folder.parents[2], folder
        if (folder / cls.stage / "config.json").is_file():
            return folder.parent, folder / cls.stage
        newest = newest_checkpoint(folder / cls.stage / "checkpoints")
        if newest is None:
            raise FileNotFoundError(
                f"{folder} must hold a checkpoint or a pretrained folder of a {cls.stage}, got neither; name "
                "runs/RUN, runs/RUN/pretrained or one of its checkpoints"
            )
        return folder, newest

    @classmethod
    def _read_config(cls, run: Path) -> Any:
        """Returns the configuration of the module in the resolved recipe of a run."""
        file = run / cls.stage / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, which has the configuration of the training; give config=")
        values = derive_values(cls.config_class, read_yaml(file))["model"]
        beside = run / "pretrained" / "tokenizer"  # the tokenizer moves with the run
        if values.get("tokenizer") and not Path(values["tokenizer"]).is_dir() and beside.is_dir():
            values["tokenizer"] = str(beside)
        return build_dataclass(cls.config_class, values, f"{cls.__name__} of {file}: model")
