"""All values of a run: those of its recipe, those that data and tokenizer say, and the default of every other key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from lightning.pytorch import LightningModule

from maskgit_pl.autoregressive import AutoregressiveModel
from maskgit_pl.data import ShardData
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pretrained import read_config
from maskgit_pl.runs.layers import merged
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe_files import Stage
from maskgit_pl.runs.recipe_schema import Parameter, RunSettings, TrainerSettings, parameters_of
from maskgit_pl.shards.manifest import read_manifest_summary
from maskgit_pl.tokenizer import Tokenizer

__all__ = ["MODULES", "config_text", "config_text_of", "dataclass_in", "resolve", "resolved_tree"]

MODULES: dict[str, type[LightningModule]] = {
    "tokenizer": Tokenizer,
    "transformer": MaskedTokenModel,
    "autoregressive": AutoregressiveModel,
}
"""The module that each kind of recipe trains."""


def resolved_tree(plan: Plan) -> dict[str, Any]:
    """Returns all values of a run: what data and tokenizer say, then the recipe's, pretrained sizes and flags."""
    pretrained = {} if plan.pretrained is None else _pretrained_values(plan.stage, plan.pretrained)
    return merged([_found_values(plan), plan.recipe.base, pretrained, *plan.recipe.flags])


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


def resolve(kind: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree with the default of every key that it leaves out, and with the keys that follow others.

    Args:
        kind: Of recipe, a key of ``MODULES``.
        tree: Checked values of a recipe.
    """
    groups = {"data": parameters_of(ShardData), "model": parameters_of(MODULES[kind])}
    config = {name: _resolve_group(known, tree.get(name, {})) for name, known in groups.items()}
    for name, defaults in (("trainer", TrainerSettings()), (None, RunSettings())):
        given = tree.get(name, {}) if name else {key: tree[key] for key in asdict(defaults) if key in tree}
        values = {**asdict(defaults), **given}
        config |= {name: values} if name else values
    if "seed" in config["data"]:
        config["model"]["seed"] = config["data"]["seed"]
    if kind == "tokenizer":
        config["model"]["image_size"] = config["data"]["image_size"]
        config["model"]["network"]["in_channels"] = config["data"]["in_channels"]
    return config


def _resolve_group(known: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in known.items():
        value = given.get(name, parameter.default)
        kind = dataclass_in(parameter.annotation)
        if value is MISSING and kind is None:
            continue
        if kind is not None and value is not None:
            value = _resolve_group(parameters_of(kind), {} if value is MISSING else value)
        found[name] = value
    return found


def _written_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without the keys that follow others."""
    model = {key: value for key, value in config["model"].items() if key not in ("seed", "image_size", "accumulation")}
    if "in_channels" in model["network"]:
        model["network"] = {key: value for key, value in model["network"].items() if key != "in_channels"}
    return {**config, "model": model}


def dataclass_in(annotation: Any) -> type[Any] | None:
    """Returns the dataclass that an annotation names, optional or not."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = [each for each in options if isinstance(each, type) and is_dataclass(each)]
    return found[0] if found else None


def config_text(plan: Plan) -> str:
    """Returns the complete recipe of a run as YAML, with the defaults of all keys; builds and reads nothing more."""
    return config_text_of(resolve(plan.recipe.kind, resolved_tree(plan)))


def config_text_of(config: Mapping[str, Any]) -> str:
    """Returns a resolved tree as the text of ``config.yaml``: a recipe again."""
    head = "# The complete recipe of a run. To repeat it: maskgit train STAGE --config THIS_FILE --run NAME\n"
    return head + str(yaml.safe_dump(_plain(_written_config(config)), sort_keys=False))


def _plain(value: Any) -> Any:
    """A tree with lists in place of tuples, as YAML holds it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
