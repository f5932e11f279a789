"""The values of a run: ``ResolvedRun``, built and checked once from the tree of its merged values.

1. Values are merged by ``plan.merge_values``.
2. Derived keys are set from the keys that determine them.
3. ``ResolvedRun`` is built from the tree: its dataclasses own the names, types, ranges and defaults of all keys.
   pydantic compares the types and the ranges in annotations, and each dataclass checks the others. No value can name
   code: a registered part is a name with arguments, which its registry builds.

A checkpoint carries all settings that affect the training result (``fixed_settings``). A run that resumes
compares them with its own before it trains. Everything else may change: steps, logging, validation, devices,
workers, micro-batch size, precision, and the execution of blocks and optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import Field

from maskgit_pl.checks import WrongValue, describe_wrong_values, type_adapter, validate
from maskgit_pl.data.config import ShardDataConfig, derive_values
from maskgit_pl.networks.backbone import BUILT_IN, DEFAULT_BACKBONE, BackboneConfig, config_class
from maskgit_pl.tokenizer.config import TokenizerConfig
from maskgit_pl.transformer.config import AutoregressiveConfig, MaskedTokenConfig
from maskgit_pl.transformer.distillation import DistillationConfig

# These settings of data must not change; the fields of a model say themselves which may (``MAY_CHANGE``).
_DATA = ("image_size", "in_channels", "augmentations", "global_batch", "seed")
Precision = Literal["32-true", "bf16-mixed", "auto"]
# Lightning and torch can store no larger counts.
Count = Annotated[int, Field(ge=1, lt=2**63)]
CountOrAll = Annotated[int, Field(ge=-1, lt=2**63)]  # -1 stands for all, or for no limit


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
        limit_val_batches: Maximum number of validation batches per rank; None uses all.
        num_sanity_val_steps: Number of validation batches before the first step.
        log_every_n_steps: Steps between log entries.
        gradient_clip_val: Maximum gradient norm in stage 2; None disables clipping. Stage 1: ``model.gradient_clip``.
        deterministic: True allows only deterministic kernels.
        benchmark: True lets cuDNN benchmark its convolutions; None leaves it to Lightning.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    devices: Annotated[int, Field(ge=-1, le=1024)] | Literal["auto"] | list[int] = "auto"
    num_nodes: Count = 1
    precision: Precision = "32-true"
    max_steps: CountOrAll = -1
    val_check_interval: Count | None = None
    limit_val_batches: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    num_sanity_val_steps: CountOrAll | None = None
    log_every_n_steps: Count = 50
    gradient_clip_val: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None


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
        max_passes: Maximum number of passes over the training images. For small data sets, which a model would learn by
            heart, it lowers ``trainer.max_steps`` of the recipe files (not below 400) and their warm-up, and a token
            store gets eight views of each image; flags override each of these. None, or a stream: no limit.
        loggers: Trackers that get metrics and pictures: names or mappings of registered loggers.
        callbacks: Further callbacks: names or mappings of registered callbacks.
        profiler: ``simple``: seconds of each part of Lightning's loop, in ``fit-profile.txt`` of the stage folder;
            ``pytorch``: operations and kernels, with a trace for Chrome. None for none.
    """

    checkpoint_every: Count = 500
    keep_last: Count = 2
    keep_every: Count | None = None
    hang_seconds: Annotated[float, Field(gt=0, le=1e9)] = 100.0
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    cpu_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_passes: Count | None = None
    loggers: list[str | dict[str, Any]] = field(default_factory=lambda: ["tensorboard"])
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    profiler: Literal["simple", "pytorch"] | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRun(RunSettings):
    """All values of a run, built and checked once. Each kind of recipe has a class.

    Args:
        data: Data and batches.
        model: Configuration of the module.
        trainer: Settings of the Trainer.
    """

    data: ShardDataConfig
    model: Any
    trainer: TrainerSettings = TrainerSettings()  # frozen

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The values as a tree of plain values and lists, which begins with ``data``, ``model`` and ``trainer``."""
        tree: dict[str, Any] = _plain(asdict(self))
        return {**{group: tree[group] for group in ("data", "model", "trainer")}, **tree}


@dataclass(frozen=True, kw_only=True)
class TokenizerRun(ResolvedRun):
    """All values of a run of stage 1."""

    model: TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class MaskedRun(ResolvedRun):
    """All values of a run of stage 2 with masked tokens."""

    model: MaskedTokenConfig


@dataclass(frozen=True, kw_only=True)
class AutoregressiveRun(ResolvedRun):
    """All values of a run of stage 2 with causal attention."""

    model: AutoregressiveConfig


@dataclass(frozen=True, kw_only=True)
class DistillationRun(ResolvedRun):
    """All values of a distillation, the third kind of stage 2."""

    model: DistillationConfig


RUNS: dict[str, type[ResolvedRun]] = {
    "tokenizer": TokenizerRun,
    "transformer": MaskedRun,
    "autoregressive": AutoregressiveRun,
    "distillation": DistillationRun,
}


def resolve(kind: str, tree: Mapping[str, Any]) -> ResolvedRun:
    """Builds all values of a run of a ``Kind`` of recipe from a tree, with derived keys and defaults."""
    run = _build(kind, tree)
    if isinstance(run, ResolvedRun):
        return run
    first = min(run, key=lambda fault: fault.kind == "missing")  # what is there comes first
    raise ValueError(f"{'.'.join(first.key)} must be set by the recipe" if first.kind == "missing" else first.text)


def find_faults(kind: str, tree: Mapping[str, Any]) -> list[WrongValue]:
    """Returns the wrong values of a tree, which may miss values."""
    run = _build(kind, tree)
    return [] if isinstance(run, ResolvedRun) else [fault for fault in run if fault.kind != "missing"]


def _build(kind: str, tree: Mapping[str, Any]) -> ResolvedRun | list[WrongValue]:
    """Builds all values, or returns what is wrong."""
    tree = derive_values(get_type_hints(RUNS[kind])["model"], tree)
    try:
        return validate(RUNS[kind], tree)
    except ValueError as error:
        return describe_wrong_values(error, tree, "", keys=known_keys(kind, tree["model"]["network"]))


def fixed_settings(tree: Mapping[str, Any], *, free: Collection[str], data: str, **weights: str) -> dict[str, Any]:
    """Returns the settings that must not change, as plain values by dotted key; ``{name: ...}`` is a single value.

    They include betas, weight decay and the peak of the learning rate: the optimizer state restores these, so
    a change would have no effect.

    Args:
        tree: All values of the run, ``ResolvedRun.tree``.
        free: Keys of the model that may change; see ``free_keys``.
        data: Fingerprint of the data folder.
        weights: Fingerprint of the tokenizer, for stage 2, and of the teacher, for a distillation.
    """
    settings = {"data": data, **_flat(tree["model"], "model", free)}
    settings |= {f"data.{key}": tree["data"].get(key) for key in _DATA}
    return settings | {"trainer.gradient_clip_val": tree["trainer"].get("gradient_clip_val"), **weights}


def free_keys(config: Any, path: str = "model") -> set[str]:
    """Returns the dotted keys of a model's configuration that may change when a run resumes."""
    free = set[str]()
    for each in fields(config):
        key, value = f"{path}.{each.name}", getattr(config, each.name)
        if each.metadata.get("may_change"):
            free.add(key)
        elif is_dataclass(value):
            free |= free_keys(value, key)
    return free


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists the changed settings as ``key: old -> new``, sorted by key; hashes are cut to 12 digits."""
    pairs = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    return [f"{key}: {_short(key, was)} -> {_short(key, now)}" for key, was, now in pairs if was != now]


def _flat(node: Mapping[str, Any], path: str, free: Collection[str]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{path}.{name}"
        if key in free:
            continue
        # A specification {name: ...} is compared as a whole.
        if isinstance(value, Mapping) and "name" not in value:
            leaves |= _flat(value, key, free)
        else:
            leaves[key] = _without_weights(value)
    return leaves


def _without_weights(value: Any) -> Any:
    """Returns a value as JSON restores it, without the paths of weight files, which may move."""
    if isinstance(value, Mapping):
        return {name: _without_weights(item) for name, item in value.items() if name != "weights"}
    return [_without_weights(item) for item in value] if isinstance(value, list | tuple) else value


def _short(key: str, value: Any) -> Any:
    return str(value)[:12] if key in ("data", "tokenizer", "teacher") else value


def known_keys(kind: str, network: object = None) -> Mapping[str, bool | None]:
    """Returns the dotted keys of a recipe: None for a value, and True or False for a group that may be null or not.

    Args:
        kind: Kind of recipe.
        network: Values of ``model.network``, which may name the backbone.
    """
    name = network.get("backbone") if kind != "tokenizer" and isinstance(network, Mapping) else None
    try:
        backbone = config_class(name if isinstance(name, str) else DEFAULT_BACKBONE)
    except ValueError as error:
        raise ValueError(f"model.network.backbone: {error}") from error
    return _keys(RUNS[kind], backbone)  # type: ignore[arg-type]  # mypy takes no class for hashable


@cache
def _keys(kind: type, backbone: type[BackboneConfig], path: str = "") -> Mapping[str, bool | None]:
    """Returns the dotted keys of a dataclass, in which ``BackboneConfig`` stands for the class of a backbone."""
    try:
        hints = get_type_hints(kind)
    except (NameError, SyntaxError):  # a plug-in imports the names for type checkers
        hints = {}
    keys: dict[str, bool | None] = {}
    for name in (each.name for each in fields(kind) if each.init):
        annotation, key = hints.get(name, Any), f"{path}{name}"
        options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        groups = [option for option in options if isinstance(option, type) and is_dataclass(option)]
        if not groups or len(options) > 2:  # a registered part checks its own keys
            keys[key] = None
        else:
            group = backbone if groups == [BackboneConfig] else groups[0]
            keys |= {key: type(None) in options, **_keys(group, backbone, f"{key}.")}
    return keys


def json_schema(kind: str) -> dict[str, Any]:
    """Returns the JSON Schema of a recipe, with which editors check and complete its files.

    ``model.network`` may have the keys of any backbone of this package; those of plug-ins are not known to it.
    """
    definitions = _definitions(RUNS[kind])
    if kind != "tokenizer":
        networks = [config_class(name) for name in BUILT_IN]
        for network in networks:
            definitions |= _definitions(network)
        choices = [{"$ref": f"#/$defs/{network.__name__}"} for network in networks]
        definitions[get_type_hints(RUNS[kind])["model"].__name__]["properties"]["network"] = {"anyOf": choices}
    root = definitions.pop(RUNS[kind].__name__)
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"maskgit_pl recipe: {kind}"}
    return {**root, **title, "$defs": definitions}


def _definitions(kind: type) -> dict[str, Any]:
    """Returns the schemas of a dataclass and of those inside it by name. A file of a recipe needs none of the keys."""
    definitions: dict[str, Any] = type_adapter(kind).json_schema()["$defs"]
    for definition in definitions.values():
        definition.pop("required", None)
        definition["additionalProperties"] = False  # pydantic before 2.14 leaves it out of inner dataclasses
    return definitions


def _plain(value: Any) -> Any:
    """Returns a copy of a tree with lists instead of tuples, as in YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
