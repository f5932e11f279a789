"""Resolves all values of a run: those of its recipe, of data and tokenizer, and the defaults of all other keys.

1. Values are merged, later over earlier: data and tokenizer, recipe files, sizes of pretrained weights, flags.
2. Missing keys get their defaults.
3. Derived keys are set from the keys that determine them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from lightning.pytorch import LightningModule

from maskgit_pl.autoregressive import AutoregressiveConfig, AutoregressiveModel
from maskgit_pl.data import ShardDataConfig
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.image_format import plain_size
from maskgit_pl.mvtm import MaskedTokenConfig, MaskedTokenModel
from maskgit_pl.networks.backbone import DEFAULT_BACKBONE, BackboneConfig, config_class
from maskgit_pl.networks.discriminator import DiscriminatorConfig
from maskgit_pl.networks.discriminators import with_defaults
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.runs.layers import merge, value_at
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe_schema import Parameter, TrainerSettings, parameters_of, run_settings
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.tokenizer_losses import TokenizerConfig

__all__ = ["MODULES", "config_text", "config_text_of", "dataclass_in", "merge_recipe_values", "merge_values", "resolve"]

MODULES: dict[str, tuple[type[Any], type[LightningModule]]] = {
    "tokenizer": (TokenizerConfig, Tokenizer),
    "transformer": (MaskedTokenConfig, MaskedTokenModel),
    "autoregressive": (AutoregressiveConfig, AutoregressiveModel),
}
"""The configuration and the module of each kind of recipe."""


def merge_values(plan: Plan) -> dict[str, Any]:
    """Merges all values of a run (step 1 of the module); ``resolve`` adds the rest."""
    base = merge([_values_of_data_and_tokenizer(plan), plan.recipe.base, _values_of_pretrained(plan)])
    return merge([base, _limit_passes(plan, base), *plan.recipe.flags])


def merge_recipe_values(plan: Plan) -> dict[str, Any]:
    """Merges the values of a run that do not need its data and its tokenizer, which may be missing."""
    return merge([plan.recipe.base, _values_of_pretrained(plan), *plan.recipe.flags])


def _limit_passes(plan: Plan, base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the lower ``trainer.max_steps``, and the steps between validations, that ``max_passes`` asks for.

    The recipe's flags override both.
    """
    passes, batch = plan.recipe.get("max_passes"), plan.recipe.get("data.global_batch")
    is_stream = plan.recipe.get("data.source") == "stream"  # of which the number of images is unknown
    steps, every = (value_at(base, f"trainer.{key}") for key in ("max_steps", "val_check_interval"))
    if passes is None or batch is None or steps is None or is_stream:
        return {}
    images = read_manifest_summary(plan.shards).samples["train"]
    limit = max(1, passes * images // batch)
    if limit >= steps:
        return {}
    return {"trainer": {"max_steps": limit, **({"val_check_interval": min(every, limit)} if every else {})}}


def _values_of_data_and_tokenizer(plan: Plan) -> dict[str, Any]:
    """Returns the values that data and tokenizer determine."""
    if plan.tokenizer is None:
        return {"data": {"path": str(plan.shards)}}
    config = read_config(plan.tokenizer, "tokenizer")
    sizes = VQGANConfig(**config["network"])
    grid = sizes.grid(config["image_size"])
    data: dict[str, Any] = {
        "path": str(plan.shards),
        "image_size": config["image_size"],
        "in_channels": sizes.in_channels,
        "token_store": str(plan.folder / "tokens"),
    }
    network = {
        "codebook_size": sizes.codebook_size,
        "num_classes": _num_classes(plan),
        "grid": list(grid),
    }
    if plan.recipe.get("data.vectors"):  # without vectors, ``ShardData`` reports it
        kind = read_manifest_summary(plan.shards).vectors
        network |= {} if kind is None else {"condition_dim": kind.dim}
    return {"data": data, "model": {"tokenizer": str(plan.tokenizer), "network": network}}


def _num_classes(plan: Plan) -> int:
    """Returns the number of classes of the stream, if the recipe gives it, else of the data folder."""
    if plan.recipe.get("data.source") == "stream":
        classes = plan.recipe.get("data.stream.classes")
        if classes is not None:
            return classes if isinstance(classes, int) else len(classes)
    return read_manifest_summary(plan.shards).num_classes


def _values_of_pretrained(plan: Plan) -> dict[str, Any]:
    """Returns the sizes of the initial weights of a run, if it has any. They override those of recipe files."""
    if plan.pretrained is None:
        return {}
    config = read_config(plan.pretrained, plan.stage)
    if plan.stage == "tokenizer":
        network = dict(config["network"])
        data = {"image_size": config["image_size"], "in_channels": network.pop("in_channels")}
        return {"data": data, "model": {"network": network}}
    # Not those that tokenizer and data determine, nor those of training. The attention selects the kind of recipe.
    own = {*BackboneConfig.transferable, "codebook_size", "attention"}
    network = {name: value for name, value in config["network"].items() if name not in own}
    return {"model": {"network": {"backbone": DEFAULT_BACKBONE, **network}}}


def resolve(kind: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Adds defaults and derived keys to a tree (steps 2 and 3 of the module).

    Args:
        kind: Kind of recipe, a key of ``MODULES``.
        tree: Checked values of a recipe.

    Returns:
        Groups ``data``, ``model`` and ``trainer``, and the keys of ``run_settings``.
    """
    groups = {"data": parameters_of(ShardDataConfig), "model": parameters_of(MODULES[kind][0])}
    config = {name: _resolve_group(known, tree.get(name, {})) for name, known in groups.items()}
    config["trainer"] = {**asdict(TrainerSettings()), **tree.get("trainer", {})}
    config |= _resolve_group(parameters_of(run_settings(kind)), tree)
    config["data"]["image_size"] = plain_size(config["data"]["image_size"])
    # Derived keys.
    config["model"]["seed"] = config["data"]["seed"]
    if kind == "transformer":
        config["model"]["global_batch"] = config["data"]["global_batch"]
    if kind == "tokenizer":
        config["model"]["image_size"] = config["data"]["image_size"]
        config["model"]["network"]["in_channels"] = config["data"]["in_channels"]
    return config


def _resolve_group(known: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in known.items():
        value = given.get(name, parameter.default)
        kind = dataclass_in(parameter.annotation)
        if value is MISSING and kind is None:  # a required key: building the dataclass will report it
            continue
        if kind is BackboneConfig:
            value = _resolve_network({} if value is MISSING else value)
        elif kind is DiscriminatorConfig:
            value = with_defaults(value)
        elif kind is not None and value is not None:
            value = _resolve_group(parameters_of(kind), {} if value is MISSING else value)
        found[name] = value
    return found


def _resolve_network(given: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the defaults of the backbone that ``given`` names. Unknown keys stay, for ``build_config`` to report."""
    kind = config_class(given.get("backbone", DEFAULT_BACKBONE))
    return {**_resolve_group(parameters_of(kind), given), **given}


def _drop_derived_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree without the derived keys."""
    model = {key: value for key, value in config["model"].items() if key not in ("seed", "image_size", "global_batch")}
    if "in_channels" in model["network"]:
        model["network"] = {key: value for key, value in model["network"].items() if key != "in_channels"}
    return {**config, "model": model}


def dataclass_in(annotation: Any) -> type[Any] | None:
    """Returns the dataclass in an annotation, which may be optional, or None."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = [each for each in options if isinstance(each, type) and is_dataclass(each)]
    return found[0] if found else None


def config_text(plan: Plan) -> str:
    """Returns the complete recipe of a run as YAML, with all defaults, without building anything."""
    return config_text_of(resolve(plan.recipe.kind, merge_values(plan)))


def config_text_of(config: Mapping[str, Any]) -> str:
    """Returns a resolved tree as the text of ``config.yaml``, which is again a valid recipe."""
    head = "# The complete recipe of a run. To repeat it: maskgit train STAGE --config THIS_FILE --run NAME\n"
    return head + str(yaml.safe_dump(_plain(_drop_derived_keys(config)), sort_keys=False))


def _plain(value: Any) -> Any:
    """Returns a tree with lists instead of tuples, as in YAML."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
