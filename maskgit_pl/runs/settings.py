"""The values of a run: ``ResolvedRun``, built and checked once from the tree of its recipe.

Its dataclasses own the names, types, ranges and defaults of all keys: pydantic compares the types and the ranges in
annotations, and each dataclass checks the others. No value can name code: a registered part is a name with arguments,
which its registry builds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import Field

from maskgit_pl.checks import WrongValue, describe_wrong_values, type_adapter, validate
from maskgit_pl.data import ShardDataConfig
from maskgit_pl.networks.backbone import BUILT_IN, DEFAULT_BACKBONE, BackboneConfig, config_class
from maskgit_pl.runs.layers import DERIVED_KEYS, Kind, Layer, merge, value_at, without_keys
from maskgit_pl.text import shorten
from maskgit_pl.tokenizer.losses import TokenizerConfig
from maskgit_pl.tokenizer.module import Tokenizer
from maskgit_pl.transformer.autoregressive import AutoregressiveConfig, AutoregressiveModel
from maskgit_pl.transformer.distillation import DistillationConfig, DistilledModel
from maskgit_pl.transformer.mvtm import MaskedTokenConfig, MaskedTokenModel

_HABITS = {"epochs": "max_steps", "max_epochs": "max_steps", "lr": "peak", "batch_size": "global_batch"}  # here
_COMMAND_PATHS = {"data": {"path": "", "token_store": ""}}  # in place of the paths that a command sets
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

    module: ClassVar[type[Tokenizer] | type[MaskedTokenModel] | type[AutoregressiveModel]]

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The values as a tree of plain values and lists, which begins with ``data``, ``model`` and ``trainer``."""
        tree: dict[str, Any] = _plain(asdict(self))
        return {**{group: tree[group] for group in ("data", "model", "trainer")}, **tree}


@dataclass(frozen=True, kw_only=True)
class TokenizerRun(ResolvedRun):
    """All values of a run of stage 1."""

    model: TokenizerConfig
    module = Tokenizer


@dataclass(frozen=True, kw_only=True)
class MaskedRun(ResolvedRun):
    """All values of a run of stage 2 with masked tokens."""

    model: MaskedTokenConfig
    module = MaskedTokenModel


@dataclass(frozen=True, kw_only=True)
class AutoregressiveRun(ResolvedRun):
    """All values of a run of stage 2 with causal attention."""

    model: AutoregressiveConfig
    module = AutoregressiveModel


@dataclass(frozen=True, kw_only=True)
class DistillationRun(ResolvedRun):
    """All values of a distillation, the third kind of stage 2."""

    model: DistillationConfig
    module = DistilledModel


RUNS: dict[Kind, type[ResolvedRun]] = {
    "tokenizer": TokenizerRun,
    "transformer": MaskedRun,
    "autoregressive": AutoregressiveRun,
    "distillation": DistillationRun,
}


def resolve(kind: Kind, tree: Mapping[str, Any]) -> ResolvedRun:
    """Builds all values of a run from a tree, with derived keys and defaults.

    Raises:
        ValueError: if a value is missing, out of range or unknown. The message names the key.
    """
    run, faults = _build(kind, tree)
    if run is not None:
        return run
    first = faults[0]
    raise ValueError(f"{'.'.join(first.key)} must be set by the recipe" if first.kind == "missing" else first.text)


def _build(kind: Kind, tree: Mapping[str, Any]) -> tuple[ResolvedRun | None, list[WrongValue]]:
    """Builds all values, or returns what is wrong: first what is there, then what is missing."""
    tree = _derive(kind, tree)
    try:
        return validate(RUNS[kind], tree), []
    except ValueError as error:
        faults = describe_wrong_values(error, tree, "", keys=known_keys(kind, tree))
        return None, sorted(faults, key=lambda fault: fault.kind == "missing")


def _derive(kind: Kind, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a tree with the keys of ``DERIVED_KEYS`` that the module takes."""
    tree = merge([{"data": {}, "model": {"network": {}}}, tree])
    data, model = tree["data"], tree["model"]
    model["seed"] = data.get("seed", ShardDataConfig.seed)
    if kind in ("transformer", "distillation"):
        model["global_batch"] = data.get("global_batch", ShardDataConfig.global_batch)
    if kind == "tokenizer":
        model["image_size"] = data.get("image_size", ShardDataConfig.image_size)
        model["network"]["in_channels"] = data.get("in_channels", ShardDataConfig.in_channels)
    return tree


def check_layers(kind: Kind, files: Sequence[Layer], flags: Sequence[Layer]) -> Sequence[Layer]:
    """Checks the layers of a recipe, in merge order. Returns those of the files.

    Values that data and tokenizer determine may be missing. Ranges of the model are then checked when the run is built.
    Files are shared with masked models: those of an autoregressive model lose the keys of masking, which flags must
    not have.

    Raises:
        ValueError: if a key is unknown or cannot be set, or a value is of a wrong type or out of range. The
            message names the file or the flag, the key, and the closest known key.
    """
    if kind == "autoregressive":
        of_masking = known_keys("transformer", {}).keys() - known_keys(kind, {}).keys()
        files = [Layer(file.origin, without_keys(file.tree, of_masking)) for file in files]
    layers = [*files, *flags]
    for number, layer in enumerate(layers, start=1):
        with _named(layer.origin):
            _check_names(layer.tree, known_keys(kind, merge(part.tree for part in layers[:number])))
    # The types of the files first: a flag must not hide a wrong one, because their values are used without flags, too.
    for part, kinds in ((files, ("type",)), (layers, ("type", "value"))):
        wrong = next((fault for fault in _faults(kind, part) if fault.kind in kinds), None)
        if wrong is not None:
            # The layer from which on the merged layers have the fault.
            culprit = max(n for n in range(len(part)) if wrong not in _faults(kind, part[:n]))
            with _named(part[culprit].origin):
                raise ValueError(wrong.text)
    return files


def _faults(kind: Kind, layers: Sequence[Layer]) -> list[WrongValue]:
    """Returns the wrong values of merged layers, which may miss values."""
    tree = merge([_COMMAND_PATHS, *(layer.tree for layer in layers)])
    _, faults = _build(kind, tree)
    return [fault for fault in faults if fault.kind != "missing"]


@contextmanager
def _named(origin: str) -> Iterator[None]:
    """Puts the file or the flag in front of the message of an error; a flag is named once."""
    try:
        yield
    except ValueError as error:
        key = origin.removeprefix("flag --")
        text = f"flag --{error}" if key != origin and str(error).startswith(key) else f"{origin}: {error}"
        raise ValueError(text) from error


def _check_names(node: Mapping[str, Any], keys: Mapping[str, bool | None], path: str = "") -> None:
    """Checks the keys of a part of a tree; see ``known_keys``."""
    for name, value in node.items():
        key = f"{path}{name}"
        if key in DERIVED_KEYS or key not in keys or "." in str(name):
            raise ValueError(_explain_unknown_key(key, [known for known in keys if known not in DERIVED_KEYS]))
        is_optional = keys[key]
        if is_optional is None or (value is None and is_optional):
            continue
        if not isinstance(value, Mapping):  # else a later layer would hide that the group has lost its values
            inner = next(known for known in keys if known.startswith(f"{key}."))
            raise ValueError(f"{key} must be a mapping, got {shorten(value)}; set a key of it, such as {inner}")
        _check_names(value, keys, f"{key}.")


def _explain_unknown_key(key: str, names: Sequence[str]) -> str:
    """Returns the message for a key that no recipe has; ``names`` are those that it can have."""
    if key in DERIVED_KEYS:
        return f"{key} cannot be set: it follows {DERIVED_KEYS[key]}"
    group, _, leaf = key.rpartition(".")
    leaf = _HABITS.get(leaf, leaf)
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == group}
    # The same name in another group, or a similar name in the same group.
    close = [name for name in names if name.rpartition(".")[2] == leaf]
    close += [beside[similar] for similar in get_close_matches(leaf, beside, n=1)]
    if key in close:  # written with dots in a file
        return f"unknown key {key!r}: keys of a file are nested; dots are for flags"
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {key!r}: {hint}keys of {group or 'a recipe'}: {', '.join(sorted(beside))}"


def known_keys(kind: Kind, tree: Mapping[str, Any]) -> Mapping[str, bool | None]:
    """Returns the dotted keys of a recipe: None for a value, and True or False for a group that may be null or not.

    Args:
        kind: Kind of recipe.
        tree: Its values, which name the backbone.

    Raises:
        ValueError: if there is no such backbone.
    """
    network = value_at(tree, "model.network")
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


def json_schema(kind: Kind) -> dict[str, Any]:
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
