"""Collects the facts in the top-level ``config.json`` of a pretrained folder from its files and from its run.

The model card (``card``) shows them. Used by ``MaskGIT`` and by training when it exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from maskgit_pl.checks import shorten
from maskgit_pl.files import parse_any_json
from maskgit_pl.networks.backbone import build_config
from maskgit_pl.networks.backbone_contract import create_network
from maskgit_pl.networks.skeleton import skeletons
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.decoding_file import read_decoding
from maskgit_pl.pipeline.pretrained import fingerprint, read_config

__all__ = [
    "SETTINGS",
    "STAGES",
    "VERSIONS",
    "RunOrigin",
    "check_run",
    "check_run_facts",
    "describe_folder",
    "describe_run",
    "fingerprints",
    "run_of",
]

STAGES = ("tokenizer", "transformer")
# Keys of the recipe that a card shows. config.yaml of the run has all of them.
SETTINGS = (
    "trainer.max_steps",
    "trainer.precision",
    "data.path",
    "data.global_batch",
    "data.augmentations",
    "data.crop",
    "data.seed",
    "model.optimizer.learning_rate",
    "model.optimizer.weight_decay",
    "model.ema_decay",
    "model.flip_probability",
    "model.reconstruction_loss",
    "model.mask_schedule",
    "model.label_smoothing",
)
VERSIONS = ("maskgit_pl", "commit", "python", "torch", "lightning", "accelerators", "world_size")
_PROTOCOL = ("num_images", "num_steps", "seed", "split", "reference")
_NOT_FIGURES = ("protocol", "model", "environment")  # sections of evaluation.json that hold no metrics


@dataclass(frozen=True)
class RunOrigin:
    """The folder that a pipeline was loaded from, whose facts go to the folder that it is saved to.

    Args:
        folder: Pretrained folder; None for a pipeline that was built from networks.
        known: Content of its ``config.json``; empty if there is none.
        tuned: Record of the search in its ``decoding.json``; empty if there is none.
    """

    folder: Path | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, *, tuned: bool) -> RunOrigin:
        """Reads the facts of a pretrained folder, which may have no ``config.json``.

        Args:
            folder: Pretrained folder.
            tuned: True if the pipeline uses the settings of its ``decoding.json``.

        Raises:
            ValueError: if a file has another format.
        """
        known = read_config(folder, "pipeline") if (folder / "config.json").is_file() else {}
        return cls(folder, known, (_json(folder / "decoding.json").get("tuned") or {}) if tuned else {})

    @property
    def name(self) -> str:
        """The name of the run or of the folder; empty if there is none."""
        if self.folder is None:
            return ""
        return self.folder.parent.name if self.folder.name == "pretrained" else self.folder.name

    def weights(self) -> dict[str, str]:
        """Returns the ``fingerprints`` of the folder; empty if there is no folder any more."""
        there = self.folder is not None and all((self.folder / stage).is_dir() for stage in STAGES)
        return fingerprints(self.folder) if self.folder is not None and there else {}

    def facts(self, weights: Mapping[str, str]) -> Mapping[str, Any]:
        """Returns the content of ``config.json`` if it describes exactly these weights, else an empty mapping."""
        return self.known if self.known.get("fingerprints") == weights else {}

    def run(self) -> Path | None:
        """Returns the run folder above the folder, or None."""
        return None if self.folder is None else run_of(self.folder)


def fingerprints(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the weights of each stage, in hex."""
    return {stage: fingerprint(folder / stage) for stage in STAGES}


def run_of(folder: Path) -> Path | None:
    """Returns the run folder of ``RUN/pretrained``; None for any other pretrained folder."""
    return folder.parent if (folder.parent / "transformer" / "config.yaml").is_file() else None


def describe_folder(folder: Path) -> dict[str, Any]:
    """Describes a pretrained folder with both stages in plain values.

    Raises:
        FileNotFoundError: if a stage is missing.
        ValueError: if a file has another format.
    """
    # Only the JSON files are read: the description needs no weights in memory.
    tokenizer, transformer = (read_config(folder / stage, stage) for stage in ("tokenizer", "transformer"))
    sizes, network = VQGANConfig(**tokenizer["network"]), build_config(transformer["network"], f"{folder}: network")
    tuned = read_decoding(folder)
    return {
        "format": "maskgit_pl.pipeline",
        "version": 1,
        "image_size": tokenizer["image_size"],
        "in_channels": sizes.in_channels,
        "grid": list(sizes.grid(tokenizer["image_size"])),
        "codebook_size": sizes.codebook_size,
        "num_classes": network.num_classes,
        "class_dropout": network.class_dropout,
        "parameters": {
            "tokenizer": _parameters(lambda: VQGAN(sizes)),
            "transformer": _parameters(lambda: create_network(network)),
        },
        "backbone": network.backbone,
        "attention": network.attention,
        "mask_schedule": transformer["mask_schedule"],
        "decoding": transformer["decoding"] if tuned is None else asdict(tuned),
        "decoding_is_tuned": tuned is not None,
        "fingerprints": fingerprints(folder),
    }


def _parameters(build: Callable[[], nn.Module]) -> int:
    with skeletons():  # parameters with shapes only, without memory
        network = build()
    return sum(parameter.numel() for parameter in network.parameters())


def check_run(run: Path) -> None:
    """Checks that a run exists, before weights are written.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"run {run}: no such folder; name a run folder that training wrote, or leave it out")


def describe_run(run: Path, *, weights: Mapping[str, str]) -> dict[str, Any]:
    """Describes the training and the evaluation of a run, from those of its files that exist.

    Args:
        run: Run folder, ``runs/RUN``.
        weights: ``fingerprints`` of the pretrained folder. Metrics of other weights are left out.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    check_run(run)
    stages = {stage: _stage(run / stage) for stage in STAGES}
    return {"name": run.resolve().name, **stages, "measured": _read_figures(run / "evaluation.json", weights)}


def check_run_facts(run: Any) -> Mapping[str, Any] | None:
    """Checks the entry ``run`` of an older ``config.json`` and returns it.

    Raises:
        ValueError: if ``describe_run`` could not have written it.
    """

    def has(tree: Any, **kinds: type) -> bool:
        return isinstance(tree, Mapping) and all(isinstance(tree.get(key), kind) for key, kind in kinds.items())

    if run is None:
        return None
    good = has(run, name=str) and all(has(run.get(s), recipe=list, settings=dict, environment=dict) for s in STAGES)
    if not good or (run.get("measured") is not None and not has(run["measured"], protocol=dict, figures=dict)):
        raise ValueError(f"config.json: run must be an entry that save_pretrained wrote, got {shorten(run)}; delete it")
    return {**run, "measured": run.get("measured")}


def _stage(folder: Path) -> dict[str, Any]:
    """Returns the recipe names, settings and versions of a stage of a run."""
    from maskgit_pl.safe_yaml import read_yaml  # loading a model without a run does not need yaml

    file = folder / "config.yaml"
    recipe = read_yaml(file) if file.is_file() else {}
    # Settings that a stage does not have are None here and left out below.
    values = {key: _value(recipe, key) for key in SETTINGS}
    if values["data.path"] is not None:  # a card must not publish paths of the machine
        values["data.path"] = Path(str(values["data.path"])).name
    environment = _json(folder / "environment.json")
    command = environment.get("command")
    return {
        "recipe": _words_after("--recipe", list(map(str, command)) if isinstance(command, list) else []),
        "settings": {key: value for key, value in values.items() if value is not None},
        "environment": {key: environment[key] for key in VERSIONS if environment.get(key)},
    }


def _read_figures(file: Path, weights: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns protocol, device and metrics of ``evaluation.json``; None if it was measured with other weights."""
    metrics = _json(file)
    if _value(metrics, "model.tokenizer_fingerprint") != weights["tokenizer"]:
        return None
    digest = _value(metrics, "model.transformer_digest")  # the first digits
    if not digest or not weights["transformer"].startswith(str(digest)):
        return None
    # What remains after the sections about the protocol are metrics.
    figures = {key: value for key, value in metrics.items() if key not in _NOT_FIGURES}
    protocol = _value(metrics, "protocol")
    return {
        "protocol": {key: protocol[key] for key in _PROTOCOL if isinstance(protocol, Mapping) and key in protocol},
        "device": _value(metrics, "environment.device"),
        "figures": dict(_figures(figures)),
    }


def _figures(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Yields every number of a tree with its dotted path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{path}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{path}{key}", value


def _value(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _json(file: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file; an empty one if there is no file."""
    content = parse_any_json(file.read_bytes(), str(file)) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _words_after(flag: str, command: list[str]) -> list[str]:
    """Returns the arguments of a flag in a command line, up to the next flag."""
    # --flag=a and --flag a are the same.
    command = [part for word in command for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    words = command[command.index(flag) + 1 :] if flag in command else []
    until = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:until]
