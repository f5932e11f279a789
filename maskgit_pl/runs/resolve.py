"""The values of a run, built and checked once from its recipe, its data, its tokenizer and its initial weights.

1. Values are merged, later over earlier: data and tokenizer, recipe files, sizes of pretrained weights, flags.
2. Derived keys are set from the keys that determine them.
3. ``ResolvedRun`` is built from the tree: its dataclasses own the names, types, ranges and defaults of all keys.

A checkpoint carries all settings that affect the training result (``fixed_settings``). A run that resumes
compares them with its own before it trains. Everything else may change: steps, logging, validation, devices,
workers, micro-batch size, precision, and the execution of blocks and optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import yaml

from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.devices import default_device, has_bfloat16
from maskgit_pl.files import read_yaml
from maskgit_pl.networks.backbone import DEFAULT_BACKBONE, BackboneConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pretrained.networks import read_config, read_decoding
from maskgit_pl.runs.layers import DERIVED_KEYS, merge, value_at, without_keys
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe, Stage
from maskgit_pl.runs.settings import Precision, ResolvedRun, TrainerSettings
from maskgit_pl.training.checkpoints import newest_checkpoint

AUTO = "auto"

# Stage 2 of few images: fewer steps leave it untrained, and with one view of each image its validation loss rises
# from the tenth pass on (docs/own-images.md).
_LEAST_STEPS = 400
_PASSES_OF_A_VIEW = 10
_VIEWS = {"augmentations": [{"name": "random_resized_crop", "scale": [0.8, 1.0]}], "views": 8}

_PAPER_SIZES = {"codebook_size": 1024, "num_classes": 1000, "grid": [16, 16]}  # in place of those of data

# The smallest widths that gain from bf16-mixed (docs/speed.md): a step of stage 1 takes 0.75 of its time with
# 64 base channels and 0.98 with 32; a step of stage 2 takes 0.59 to 0.71 of its time with 256 dimensions.
_WIDE: dict[Stage, tuple[str, int]] = {"tokenizer": ("base_channels", 64), "transformer": ("embed_dim", 256)}

# Settings that must not change: the clipping of gradients, these of data, and all of the model but _FREE_MODEL.
_DATA = ("image_size", "in_channels", "augmentations", "global_batch", "seed")
_FREE_MODEL = {
    "model.activation_checkpointing",
    "model.compiled",
    "model.decoding",  # affects only pictures and exports
    "model.global_batch",  # data.global_batch
    "model.optimizer.learning_rate.decay",
    "model.optimizer.learning_rate.final_fraction",
    "model.optimizer.learning_rate.warmup_steps",
    "model.seed",  # data.seed
    "model.teacher",  # a path; the content of the folder is compared instead
    "model.tokenizer",  # a path; the content of the folder is compared instead
}


def merge_values(plan: Plan) -> dict[str, Any]:
    """Merges all values of a run (step 1 of the module); ``resolve`` adds the rest."""
    files = adapt_to_few_images(plan.recipe, plan.shards).base
    return merge([_values_of_data_and_tokenizer(plan), files, _values_of_pretrained(plan), *plan.recipe.flags])


def adapt_to_few_images(recipe: Recipe, shards: Path) -> Recipe:
    """Returns the recipe with fewer steps and more views, as ``max_passes`` demands for the number of images.

    ``trainer.max_steps`` is lowered to ``max_passes`` passes over the images, but not below ``_LEAST_STEPS``. The
    warm-up takes at most a fifth of the steps, and a validation takes place. If more than ``_PASSES_OF_A_VIEW`` passes
    remain, the token store gets several views of an image, unless the recipe says how it is cropped. Flags override
    all of this.
    """
    passes, batch, source = (recipe.get(key) for key in ("max_passes", "data.global_batch", "data.source"))
    steps = value_at(recipe.base, "trainer.max_steps")
    if passes is None or batch is None or steps is None or source == "stream":  # streams do not count their images
        return recipe
    images = read_manifest_summary(shards).samples["train"]
    limit = min(steps, max(_LEAST_STEPS, passes * images // batch))
    lower: dict[str, Any] = {"trainer": {"max_steps": limit}}
    if every := value_at(recipe.base, "trainer.val_check_interval"):
        lower["trainer"]["val_check_interval"] = min(every, limit)
    if warmup := value_at(recipe.base, "model.optimizer.learning_rate.warmup_steps"):
        lower["model"] = {"optimizer": {"learning_rate": {"warmup_steps": min(warmup, limit // 5)}}}
    is_cropped = any(recipe.get(f"data.{key}") is not None for key in ("augmentations", "views"))
    if source == "tokens" and limit * batch > _PASSES_OF_A_VIEW * images and not is_cropped:
        lower["data"] = _VIEWS
    return replace(recipe, base=merge([recipe.base, lower]))


def merge_recipe_values(plan: Plan) -> dict[str, Any]:
    """Merges the values of a run that do not need its data and its tokenizer, which may be missing."""
    return merge([plan.recipe.base, _values_of_pretrained(plan), *plan.recipe.flags])


def values_without_data(stage: Stage, *, path: str = "", token_store: str = "", tokenizer: str = "") -> dict[str, Any]:
    """Returns values in place of those that data and tokenizer give; the sizes are those of the paper."""
    values: dict[str, Any] = {"data": {"path": path, "token_store": token_store}}
    if stage == "transformer":
        values["model"] = {"tokenizer": tokenizer, "network": dict(_PAPER_SIZES)}
    return values


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
        "num_classes": read_manifest_summary(plan.shards).num_classes,
        "grid": list(grid),
    }
    if plan.recipe.get("data.vectors"):  # without vectors, ``ShardData`` reports it
        kind = read_manifest_summary(plan.shards).vectors
        network |= {} if kind is None else {"condition_dim": kind.dim}
    return {"data": data, "model": {"tokenizer": str(plan.tokenizer), "network": network}}


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
    excluded = {*BackboneConfig.transferable, "codebook_size", "attention"}
    network = {name: value for name, value in config["network"].items() if name not in excluded}
    values: dict[str, Any] = {"network": {"backbone": DEFAULT_BACKBONE, **network}}
    if plan.recipe.kind == "distillation":
        tuned = read_decoding(plan.pretrained.parent)
        decoding = config["decoding"] if tuned is None else asdict(tuned)
        values |= {
            "teacher": str(plan.pretrained),
            "mask_schedule": config["mask_schedule"],
            "teacher_decoding": decoding,
        }
    return {"model": values}


def choose_precision(
    trainer: TrainerSettings, network: object, stage: Stage, folder: Path, *, on_gpu: bool = False
) -> Precision:
    """Returns the precision of a run, which is that of its recipe unless it is ``auto``.

    1. A run that has a checkpoint keeps the precision of its last start, so that it continues as it began.
    2. A wide network trains with ``bf16-mixed`` on GPUs, or on one CPU, that have instructions for bfloat16.
    3. Any other run trains with ``32-true``: the CPUs of several ranks could choose differently.

    Args:
        trainer: Settings of the Trainer.
        network: Configuration of the network.
        stage: Stage to train.
        folder: Stage folder.
        on_gpu: True for a run on a GPU with the instructions, which this machine may lack.
    """
    if trainer.precision != AUTO:
        return trainer.precision
    if newest_checkpoint(folder / "checkpoints") is not None:  # 1.
        return cast(Precision, value_at(read_yaml(folder / "config.yaml"), "trainer.precision"))
    key, width = _WIDE[stage]
    size = getattr(network, key, None)
    is_wide = isinstance(size, int) and size >= width  # the keys of plug-ins are theirs
    device = "cpu" if trainer.accelerator == "cpu" else default_device()
    is_one_choice = trainer.strategy == "auto" or device != "cpu"
    is_fast = on_gpu or (is_one_choice and has_bfloat16(device))
    return "bf16-mixed" if is_wide and is_fast else "32-true"  # 2. and 3.


def fixed_settings(tree: Mapping[str, Any], *, data: str, **weights: str) -> dict[str, Any]:
    """Returns the settings that must not change, as plain values by dotted key; ``{name: ...}`` is a single value.

    They include betas, weight decay and the peak of the learning rate: the optimizer state restores these, so
    a change would have no effect.

    Args:
        tree: All values of the run, ``ResolvedRun.tree``.
        data: Fingerprint of the data folder.
        weights: Fingerprint of the tokenizer, for stage 2, and of the teacher, for a distillation.
    """
    settings = {"data": data, **_flat(tree["model"], "model")}
    settings |= {f"data.{key}": tree["data"].get(key) for key in _DATA}
    return settings | {"trainer.gradient_clip_val": tree["trainer"].get("gradient_clip_val"), **weights}


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lists the changed settings as ``key: old -> new``, sorted by key; hashes are cut to 12 digits."""
    pairs = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    return [f"{key}: {_short(key, was)} -> {_short(key, now)}" for key, was, now in pairs if was != now]


def _flat(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{path}.{name}"
        if key in _FREE_MODEL:
            continue
        # A specification {name: ...} is compared as a whole.
        if isinstance(value, Mapping) and "name" not in value:
            leaves |= _flat(value, key)
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


def config_text(run: ResolvedRun) -> str:
    """Returns the text of ``config.yaml``: the complete recipe of a run, which is again a valid recipe."""
    head = "# The complete recipe of a run. To repeat it: maskgit train STAGE --config THIS_FILE --run NAME\n"
    return head + str(yaml.safe_dump(without_keys(run.tree, DERIVED_KEYS), sort_keys=False))
