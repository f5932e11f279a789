"""JSON Schemas of the recipes: the type of every key, derived from the dataclasses that a recipe builds.

The schemas are files, so that wrong keys are rejected without importing torch, and so that editors can check and
complete recipes (``# yaml-language-server: $schema=...``). ``write_schemas`` writes them; a test compares them with the
dataclasses.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from maskgit_pl.checks import Schema, check_choice, check_integer, check_number, schema_of, shorten
from maskgit_pl.registry import nearest, plugin_names
from maskgit_pl.training.health_rules import HealthConfig

__all__ = [
    "Kind",
    "Parameter",
    "RunSettings",
    "TokenizerRunSettings",
    "TrainerSettings",
    "build_schema",
    "load_backbone_schema",
    "load_schema",
    "parameters_of",
    "run_settings",
    "write_schemas",
]

Kind = Literal["tokenizer", "transformer", "autoregressive"]
_KINDS: tuple[Kind, ...] = ("tokenizer", "transformer", "autoregressive")
_FOLDER = Path(__file__).parent / "schemas"
_BACKBONES = "maskgit_pl.backbones"  # entry point group of networks.backbone
_INT64 = 2**63 - 1  # largest count that Lightning and torch can store


@dataclass(frozen=True)
class TrainerSettings:
    """The arguments of Lightning's Trainer that a recipe can set.

    Args:
        accelerator: ``auto`` uses a GPU if there is one, else the CPU.
        strategy: ``auto`` for one device, ``ddp``, or ``fsdp`` (FSDP2; stage 2 only).
        devices: Devices per node: their number, ``auto`` for all, or a list of indices.
        num_nodes: Number of nodes.
        precision: ``32-true``, ``bf16-mixed`` or ``auto``: ``bf16-mixed`` on one device with instructions for
            bfloat16 if the network is wide, else ``32-true``. A run that resumes with ``auto`` keeps its precision.
        max_steps: Number of steps (global batches) of the run.
        val_check_interval: Steps between validations.
        limit_val_batches: Maximum number of validation batches per rank, or a fraction of all; None uses all.
        num_sanity_val_steps: Number of validation batches before the first step.
        log_every_n_steps: Steps between log entries.
        gradient_clip_val: Maximum gradient norm in stage 2; None disables clipping. Stage 1: ``model.gradient_clip``.
        gradient_clip_algorithm: ``norm`` or None, which means the norm. Lightning's ``value`` is not offered.
        deterministic: True allows only deterministic kernels.
        benchmark: True lets cuDNN benchmark its convolutions; None leaves it to Lightning.
        detect_anomaly: True lets autograd check each backward pass for NaN, which is slow.

    Raises:
        ValueError: if a number is out of range.
    """

    accelerator: str = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    precision: str = "32-true"
    max_steps: int = -1
    val_check_interval: int | None = None
    limit_val_batches: int | float | None = None
    num_sanity_val_steps: int | None = None
    log_every_n_steps: int = 50
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm"] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    detect_anomaly: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.devices, str):
            check_choice("trainer.devices", self.devices, ("auto",))
        elif isinstance(self.devices, int):
            check_integer("trainer.devices", self.devices, "[-1, 1024]")
        check_integer("trainer.num_nodes", self.num_nodes, "[1, 100000]")
        check_integer("trainer.max_steps", self.max_steps, f"[-1, {_INT64}]")
        check_integer("trainer.log_every_n_steps", self.log_every_n_steps, f"[1, {_INT64}]")
        if self.num_sanity_val_steps is not None:
            check_integer("trainer.num_sanity_val_steps", self.num_sanity_val_steps, f"[-1, {_INT64}]")
        if self.gradient_clip_val is not None:
            check_number("trainer.gradient_clip_val", self.gradient_clip_val, "(0, inf)")
        if self.val_check_interval is not None:
            check_integer("trainer.val_check_interval", self.val_check_interval, f"[1, {_INT64}]")
        if isinstance(self.limit_val_batches, int):  # a number of batches; a float is a fraction
            check_integer("trainer.limit_val_batches", self.limit_val_batches, f"[0, {_INT64}]")
        elif self.limit_val_batches is not None:
            check_number("trainer.limit_val_batches", self.limit_val_batches, "(0, 1]")


@dataclass(frozen=True)
class RunSettings:
    """The keys of a recipe that belong to neither module, data nor Trainer.

    Args:
        checkpoint_every: Steps between checkpoints.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Checkpoints of multiples of this step are never removed; None keeps only the newest.
        hang_seconds: Shortest time without progress, in seconds, after which the watchdog ends the run.
        matmul_precision: Precision of float32 products and convolutions; ``high`` is TF32 if the device supports it.
        cpu_threads: Number of CPU threads of torch; None leaves it to torch.
        max_passes: Maximum number of passes over the training images: lowers ``trainer.max_steps`` of the recipe files
            for small data sets, which a model would learn by heart. A flag ``--trainer.max_steps`` overrides it.
            None does not limit the steps, nor does a stream, of which the number of images is unknown.
        loggers: Trackers that get metrics and pictures: names or mappings of registered loggers.
        callbacks: Further callbacks: names or mappings of registered callbacks.
        profiler: Name or mapping of a registered profiler; None for none.

    Raises:
        ValueError: if a number is out of range, or a logger is listed twice.
    """

    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int | None = None
    hang_seconds: float = 100.0
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    cpu_threads: int | None = None
    max_passes: int | None = None
    loggers: list[str | dict[str, Any]] = field(default_factory=lambda: ["tensorboard"])
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    profiler: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_integer("checkpoint_every", self.checkpoint_every, f"[1, {_INT64}]")
        check_integer("keep_last", self.keep_last, "[1, 1000000]")
        check_number("hang_seconds", self.hang_seconds, "(0, 1e9]")
        if self.keep_every is not None:
            check_integer("keep_every", self.keep_every, f"[1, {_INT64}]")
        if self.cpu_threads is not None:
            check_integer("cpu_threads", self.cpu_threads, "[1, 4096]")
        if self.max_passes is not None:
            check_integer("max_passes", self.max_passes, f"[1, {_INT64}]")
        names = [each if isinstance(each, str) else each.get("name") for each in self.loggers]
        if len(set(names)) < len(names):
            raise ValueError(f"loggers must be different, got {shorten(names)}")


@dataclass(frozen=True)
class TokenizerRunSettings(RunSettings):
    """The keys of a recipe of stage 1 that belong to neither module, data nor Trainer.

    Args:
        health: Healthy ranges of the training; values outside of them are reported. None for no reports.
    """

    health: HealthConfig | None = field(default_factory=HealthConfig)


def run_settings(kind: str) -> type[RunSettings]:
    """Returns the class of the settings of a kind of recipe."""
    return TokenizerRunSettings if kind == "tokenizer" else RunSettings


@dataclass(frozen=True)
class Parameter:
    """A field of a configuration that a recipe can set.

    Args:
        annotation: Type of the field.
        default: Default as plain values; ``dataclasses.MISSING`` if there is none.
    """

    annotation: Any
    default: Any


def parameters_of(kind: type) -> dict[str, Parameter]:
    """Returns the fields of a dataclass by name."""
    hints = get_type_hints(kind)
    return {each.name: Parameter(hints[each.name], _plain(_field_default(each))) for each in fields(kind)}


def _field_default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def build_schema(kind: Kind) -> Schema:
    """Derives the schema of a recipe from the dataclasses of module, data and settings. Imports torch."""
    from maskgit_pl.autoregressive import AutoregressiveConfig
    from maskgit_pl.data import ShardDataConfig
    from maskgit_pl.mvtm import MaskedTokenConfig
    from maskgit_pl.training.tokenizer_losses import TokenizerConfig

    models = {"tokenizer": TokenizerConfig, "transformer": MaskedTokenConfig, "autoregressive": AutoregressiveConfig}
    groups = {name: schema_of(each) for name, each in (("data", ShardDataConfig), ("model", models[kind]))}
    if kind != "tokenizer":
        groups["model"]["properties"]["network"] = _network_schema()
    run = schema_of(run_settings(kind))
    properties = {**groups, "trainer": schema_of(TrainerSettings), **run["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"maskgit_pl recipe: {kind}",
        **run,
        "properties": properties,
    }


def _network_schema() -> Schema:
    """Returns the schema of ``model.network``, whose keys depend on the backbone.

    ``$defs`` has the keys of each built-in backbone. A file that names none may have the keys of any of them.
    """
    from maskgit_pl.networks.backbone import BUILT_IN, config_class

    names = sorted(BUILT_IN)
    known = {name: {"title": f"backbone {name}", **schema_of(config_class(name))} for name in names}
    for name, each in known.items():
        each["properties"]["backbone"] = {"enum": [name]}
    every: dict[str, list[Schema]] = {}
    for each in known.values():
        for key, schema in each["properties"].items():
            if schema not in every.setdefault(key, []):
                every[key].append(schema)
    properties = {key: found[0] if len(found) == 1 else {"anyOf": found} for key, found in every.items()}
    properties["backbone"] = {"type": "string", "examples": names}
    choices = [
        {
            "if": {"properties": {"backbone": {"const": name}}, "required": ["backbone"]},
            "then": {"$ref": f"#/properties/model/properties/network/$defs/{name}"},
        }
        for name in names
    ]
    # Other packages' backbones have other keys, so unknown keys are left to the checks of a run.
    return {"type": "object", "properties": properties, "allOf": choices, "$defs": known}


@cache
def load_schema(kind: Kind) -> Schema:
    """Reads the schema of a recipe from its file, without importing torch."""
    content: Schema = json.loads((_FOLDER / f"{kind}.json").read_text())
    return content


@cache
def load_backbone_schema(kind: Kind, backbone: str) -> Schema:
    """Reads the schema of a recipe, with the keys of one backbone only. Imports neither torch nor a plug-in.

    The keys of a plug-in are not known here; building its configuration checks them.

    Raises:
        ValueError: if no backbone has this name.
    """
    schema = load_schema(kind)
    if kind == "tokenizer":
        return schema
    network = schema["properties"]["model"]["properties"]["network"]
    built_in = network["$defs"]
    if backbone in built_in:
        own = built_in[backbone]
    else:
        known = [*built_in, *plugin_names(_BACKBONES)]
        if backbone not in known:
            raise ValueError(f"unknown backbone {shorten(backbone)}: {nearest(backbone, known)}")
        common = set.intersection(*(set(each["properties"]) for each in built_in.values()))
        own = {"type": "object", "properties": {key: network["properties"][key] for key in common}}
        own["additionalProperties"] = True
    model = schema["properties"]["model"]
    model = {**model, "properties": {**model["properties"], "network": own}}
    return {**schema, "properties": {**schema["properties"], "model": model}}


def write_schemas() -> None:
    """Writes the schemas of all kinds. Must be called after a configuration has changed."""
    _FOLDER.mkdir(exist_ok=True)
    for kind in _KINDS:
        (_FOLDER / f"{kind}.json").write_text(json.dumps(build_schema(kind), indent=1) + "\n")
