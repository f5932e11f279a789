"""JSON Schemas of the recipes: every key with its type, derived from the dataclasses that a recipe builds.

The schemas are files, so that a wrong key is refused without importing torch, and so that editors can check and
complete recipes (``# yaml-language-server: $schema=...``). ``write_schemas`` makes them; a test compares them with the
dataclasses.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.schema import Schema, schema_of

__all__ = [
    "Kind",
    "Parameter",
    "RunSettings",
    "TrainerSettings",
    "build_schema",
    "load_schema",
    "parameters_of",
    "write_schemas",
]

Kind = Literal["tokenizer", "transformer", "autoregressive"]
_KINDS: tuple[Kind, ...] = ("tokenizer", "transformer", "autoregressive")
_FOLDER = Path(__file__).parent / "schemas"
_INT64 = 2**63 - 1


@dataclass(frozen=True)
class TrainerSettings:
    """The arguments of Lightning's Trainer that a recipe sets.

    Args:
        accelerator: ``auto`` takes whatever the machine has.
        strategy: ``auto`` for one device, ``ddp``, or ``fsdp`` (FSDP2; stage 2 only).
        devices: Devices of each node: how many, ``auto`` for all, or their numbers.
        num_nodes: Nodes.
        precision: ``32-true`` or ``bf16-mixed``.
        max_steps: Steps (global batches) at which the run ends.
        val_check_interval: Steps between validations, or a fraction of an epoch.
        limit_val_batches: Validation batches of each rank at most, or their fraction; None takes all.
        num_sanity_val_steps: Validation batches before the first step.
        log_every_n_steps: Steps between log entries.
        gradient_clip_val: Largest gradient norm, or absolute value, in stage 2; None clips nothing.
        gradient_clip_algorithm: What ``gradient_clip_val`` limits; None is the norm.
        deterministic: Whether only deterministic kernels are used.
        benchmark: Whether cuDNN tries its convolutions; None leaves it to Lightning.
        detect_anomaly: Whether autograd looks for NaN in each backward pass, slowly.

    Raises:
        ValueError: if a number is out of range.
    """

    accelerator: str = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    precision: str = "32-true"
    max_steps: int = -1
    val_check_interval: int | float | None = None
    limit_val_batches: int | float | None = None
    num_sanity_val_steps: int | None = None
    log_every_n_steps: int = 50
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
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
        for name in ("val_check_interval", "limit_val_batches"):
            value, least = getattr(self, name), 1 if name == "val_check_interval" else 0
            if isinstance(value, int):
                check_integer(f"trainer.{name}", value, f"[{least}, {_INT64}]")
            elif value is not None:
                check_number(f"trainer.{name}", value, "(0, 1]")


@dataclass(frozen=True)
class RunSettings:
    """Keys of a recipe that belong to neither module, data nor Trainer.

    Args:
        checkpoint_every: Steps between checkpoints.
        keep_last: Newest checkpoints that are kept.
        keep_every: Checkpoints of multiples of so many steps are kept for good; None keeps none.
        hang_seconds: A step may take so long before the watchdog ends the run.
        matmul_precision: Of float32 products and convolutions: ``high`` is TF32 where the device has it.
        cpu_threads: Threads of torch on a CPU; None is torch's choice.

    Raises:
        ValueError: if a number is out of range.
    """

    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int | None = None
    hang_seconds: float = 100.0
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    cpu_threads: int | None = None

    def __post_init__(self) -> None:
        check_integer("checkpoint_every", self.checkpoint_every, f"[1, {_INT64}]")
        check_integer("keep_last", self.keep_last, "[1, 1000000]")
        check_number("hang_seconds", self.hang_seconds, "(0, 1e9]")
        if self.keep_every is not None:
            check_integer("keep_every", self.keep_every, f"[1, {_INT64}]")
        if self.cpu_threads is not None:
            check_integer("cpu_threads", self.cpu_threads, "[1, 4096]")


@dataclass(frozen=True)
class Parameter:
    """A field of a configuration that a recipe sets.

    Args:
        annotation: Type of the field.
        default: Default as plain values; ``dataclasses.MISSING`` where there is none.
    """

    annotation: Any
    default: Any


def parameters_of(kind: type) -> dict[str, Parameter]:
    """Returns the fields of a dataclass by name."""
    hints = get_type_hints(kind)
    return {each.name: Parameter(hints[each.name], _plain(_field_default(each))) for each in fields(kind)}


def _field_default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def build_schema(kind: Kind) -> Schema:
    """Derives the schema of a recipe from the configurations of module, data and settings. Imports torch."""
    from maskgit_pl.autoregressive import AutoregressiveConfig
    from maskgit_pl.data import ShardDataConfig
    from maskgit_pl.mvtm import MaskedTokenConfig
    from maskgit_pl.tokenizer_config import TokenizerConfig

    models = {"tokenizer": TokenizerConfig, "transformer": MaskedTokenConfig, "autoregressive": AutoregressiveConfig}
    groups = {name: _group_of(each) for name, each in (("data", ShardDataConfig), ("model", models[kind]))}
    run = schema_of(RunSettings)
    properties = {**groups, "trainer": schema_of(TrainerSettings), **run["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"maskgit_pl recipe: {kind}",
        **run,
        "properties": properties,
    }


def _group_of(kind: type) -> Schema:
    properties = {name: schema_of(each.annotation) for name, each in parameters_of(kind).items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


@cache
def load_schema(kind: Kind) -> Schema:
    """Reads the schema of a recipe. Imports nothing heavy."""
    content: Schema = json.loads((_FOLDER / f"{kind}.json").read_text())
    return content


def write_schemas() -> None:
    """Writes the schemas of all kinds, after a configuration has changed."""
    _FOLDER.mkdir(exist_ok=True)
    for kind in _KINDS:
        (_FOLDER / f"{kind}.json").write_text(json.dumps(build_schema(kind), indent=1) + "\n")
