"""The plan of a run: finds the folders that it reads and writes, and merges the values that it is built from.

1. ``plan_run`` finds the folders, from names and from the recipe. It needs no torch, so that wrong names are rejected
   immediately.
2. ``read_inputs`` reads what data, tokenizer and initial weights say about the run, and opens each file once.
3. ``merge_values`` merges values, later over earlier: data and tokenizer, recipe files, sizes of pretrained weights,
   flags. ``resolve`` builds the typed values from the tree.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from maskgit_pl.checks import ImageSize, as_image_size, check_integer
from maskgit_pl.data.manifest import DataSummary, is_store
from maskgit_pl.data.sources.public import how_to_get
from maskgit_pl.data.token_store import read_data_summary
from maskgit_pl.files import read_yaml
from maskgit_pl.runs.recipe import Recipe, Stage, merge, value_at
from maskgit_pl.text import parse_size

if TYPE_CHECKING:
    from maskgit_pl.networks.vqgan import VQGANConfig

log = logging.getLogger(__name__)

_RUNS = Path("runs")
_SHARDS = Path("data/shards")
SHARED_TOKENS = "tokens"
"""Name of the folder beside the runs that holds their token stores."""

# Stage 2 of few images: fewer steps leave it untrained, and with one view of each image its validation loss rises
# from the tenth pass on (docs/own-images.md).
_LEAST_STEPS = 400
_PASSES_OF_A_VIEW = 10
_VIEWS = {"augmentations": [{"name": "random_resized_crop", "scale": [0.8, 1.0]}], "views": 8}

_PAPER_SIZES = {"codebook_size": 1024, "num_classes": 1000, "grid": [16, 16]}  # in place of those of data


@dataclass(frozen=True)
class Plan:
    """A stage of a run with the folders that it reads and writes. Made by ``plan_run``.

    Args:
        recipe: Values of the run, and the stage.
        shards: Data folder; for stage 2 also a token store, which needs no tokenizer.
        folder: Run folder, ``runs/RUN``; it contains the stage folder.
        tokenizer: Pretrained tokenizer folder, for stage 2.
        pretrained: Pretrained folder of this stage, with the initial weights and the sizes of a new run.
    """

    recipe: Recipe
    shards: Path
    folder: Path
    tokenizer: Path | None = None
    pretrained: Path | None = None

    @property
    def stage(self) -> Stage:
        """The stage to train."""
        return self.recipe.stage

    @property
    def stage_folder(self) -> Path:
        """The stage folder ``runs/RUN/STAGE``, with checkpoints, logs and records."""
        return self.folder / self.stage

    @property
    def checkpoints(self) -> Path:
        """The folder ``runs/RUN/STAGE/checkpoints``."""
        return self.stage_folder / "checkpoints"


class Folders(TypedDict, total=False):
    """The folders of a run, which ``fit``, ``tokenize``, ``preflight`` and ``plan_submission`` take.

    Attributes:
        run: A name in ``runs/``, or a folder: a ``Path`` or a string with a slash. Default: ``DATASET-RECIPE``.
        data: Data folder, or a token store for stage 2. Default: ``data/shards/DATASET``.
        tokenizer: Pretrained tokenizer folder, for stage 2. Default: the run's own, or the only one for these data.
        pretrained: Pretrained folder with the initial weights of a new run.
    """

    run: str | Path | None
    data: str | Path | None
    tokenizer: str | Path | None
    pretrained: str | Path | None


@dataclass(frozen=True)
class Machines:
    """The machines of a planned run, as far as they are known.

    Args:
        nodes: Number of nodes (default: the recipe's).
        devices: Devices of each node (default: the recipe's).
        device_memory: Memory of a GPU, such as 80GB or 24GiB (default: that of the GPU of this machine).

    Raises:
        ValueError: if a number or the memory is out of range.
    """

    nodes: int | None = None
    devices: int | None = None
    device_memory: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "devices"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), "[1, inf)")
        if self.device_memory is not None:
            try:
                parse_size(self.device_memory)
            except ValueError as error:
                raise ValueError(f"device_memory {error}") from error


def plan_run(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> Plan:
    """Finds the folders of a run. See ``Folders`` for the arguments.

    Raises:
        ValueError: if the run has no name, or several tokenizers match.
        FileNotFoundError: if data or tokenizer are not named and do not exist.
    """
    shards, folder, found = find_data(recipe, data), run_folder(recipe, run), None
    if recipe.stage == "transformer":
        found = find_tokenizer(recipe, folder=folder, shards=shards, tokenizer=tokenizer, pretrained=pretrained)
    weights = None if pretrained is None else Path(pretrained) / recipe.stage
    return Plan(recipe, shards, folder, found, weights)


def run_folder(recipe: Recipe, run: str | Path | None = None) -> Path:
    """Finds the folder of a run, which need not exist; its default name is ``DATASET-RECIPE``. See ``folder_of``."""
    named = recipe.run_name if run is None else run
    if named is None:
        raise ValueError("a run with --config must have its own name; set it with --run")
    return folder_of(named)


def folder_of(run: str | Path) -> Path:
    """Returns the folder of a run: ``runs/NAME`` for a name; a ``Path`` or a string with a slash is the folder."""
    return Path(run) if isinstance(run, Path) or os.sep in run else _RUNS / run


def find_data(recipe: Recipe, data: str | Path | None = None) -> Path:
    """Finds the data folder of a run: the named one, else that of the repeated run, else that of the data set."""
    return find_data_folder(recipe.dataset, data or recipe.paths.get("data.path"))


def find_data_folder(dataset: str, data: str | Path | None = None) -> Path:
    """Finds a data folder: the named one, else that of the data set."""
    shards = Path(data or _SHARDS / dataset)
    if not shards.is_dir():
        raise FileNotFoundError(
            f"data {shards}: no such folder; {how_to_get(dataset, shards)}, or name another with --data"
        )
    return shards


def find_tokenizer(
    recipe: Recipe,
    *,
    folder: Path,
    shards: Path,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> Path | None:
    """Finds the tokenizer of stage 2; None if ``shards`` is a token store.

    The first that exists of: the named one; that of the repeated run; the run's own; that of ``pretrained``;
    the only tokenizer that other runs have trained on the data folder ``shards``.
    """
    if is_store(shards):
        if tokenizer is not None:
            raise ValueError(f"tokenizer must be left out for data {shards}, which are tokens already, got {tokenizer}")
        return None
    # In the order of the docstring.
    if named := tokenizer or recipe.paths.get("model.tokenizer"):
        return Path(named)
    exported = folder / "pretrained" / "tokenizer"
    if (exported / "config.json").is_file():
        return exported
    if pretrained is not None and (Path(pretrained) / "tokenizer" / "config.json").is_file():
        return Path(pretrained) / "tokenizer"
    tokenizers = _tokenizers_of(shards, folder.parent)
    if len(tokenizers) != 1:
        several = f", and there are several others for these data: {', '.join(map(str, tokenizers))}"
        raise (ValueError if tokenizers else FileNotFoundError)(
            f"tokenizer {exported}: no such folder{several if tokenizers else ''}; train one with `maskgit train "
            "tokenizer`, or name another with --tokenizer"
        )
    log.info("tokenizer: %s, the only one trained on %s", tokenizers[0], shards)
    return tokenizers[0]


def _tokenizers_of(shards: Path, runs: Path) -> list[Path]:
    """Returns the tokenizers that runs have trained on a data folder."""
    tokenizers = []
    for config in sorted(runs.glob("*/tokenizer/config.yaml")):
        exported = config.parents[1] / "pretrained" / "tokenizer"
        # The data that the run was trained on, by its own record: names of runs say nothing about it.
        data = value_at(read_yaml(config), "data.path")
        if (exported / "config.json").is_file() and Path(data).resolve() == shards.resolve():
            tokenizers.append(exported)
    return tokenizers


@dataclass(frozen=True)
class Inputs:
    """The configurations of data, tokenizer and initial weights that a run reads at its start.

    ``read_inputs`` makes it, and opens each file once.

    Args:
        data: Summary of the data folder; None if ``doctor`` finds none.
        tokenizer: Sizes of the tokenizer of stage 2, and of its images in pixels.
        pretrained: Configuration of the initial weights, if there are any.
    """

    data: DataSummary | None = None
    tokenizer: tuple[VQGANConfig, ImageSize] | None = None
    pretrained: Mapping[str, Any] | None = None


def read_inputs(plan: Plan) -> Inputs:
    """Reads the inputs of a run (step 2 of the module)."""
    tokenizer = None if plan.tokenizer is None else read_tokenizer_sizes(plan.tokenizer)
    return Inputs(read_data_summary(plan.shards), tokenizer, read_pretrained(plan))


def read_tokenizer_sizes(folder: Path) -> tuple[VQGANConfig, ImageSize]:
    """Reads the sizes of a pretrained tokenizer and of its images in pixels."""
    from maskgit_pl.networks.vqgan import VQGANConfig  # torch takes seconds to import
    from maskgit_pl.pretrained.networks import read_config

    config = read_config(folder, "tokenizer")
    return VQGANConfig(**config["network"]), as_image_size(config["image_size"])


def read_pretrained(plan: Plan) -> dict[str, Any] | None:
    """Reads the configuration of the initial weights of a run; None if it has none.

    That of a teacher has the decoding that was tuned for it, if there is one.
    """
    if plan.pretrained is None:
        return None
    from maskgit_pl.pretrained.networks import read_config, read_decoding  # torch takes seconds to import

    config = read_config(plan.pretrained, plan.stage)
    if plan.recipe.kind == "distillation" and (tuned := read_decoding(plan.pretrained.parent)) is not None:
        config["decoding"] = asdict(tuned)
    return config


def merge_values(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Merges all values of a run (step 3 of the module). Without data, those of data are left out."""
    recipe = plan.recipe if inputs.data is None else adapt_to_few_images(plan.recipe, inputs.data)
    pretrained = {} if inputs.pretrained is None else _values_of_pretrained(plan, inputs.pretrained)
    return merge([_values_of_data_and_tokenizer(plan, inputs), recipe.base, pretrained, *recipe.flags])


def adapt_to_few_images(recipe: Recipe, data: DataSummary) -> Recipe:
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
    images = data.samples["train"]
    limit = min(steps, max(_LEAST_STEPS, passes * images // batch))
    lower: dict[str, Any] = {"trainer": {"max_steps": limit}}
    if every := value_at(recipe.base, "trainer.val_check_interval"):
        lower["trainer"]["val_check_interval"] = min(every, limit)
    if warmup := value_at(recipe.base, "model.optimizer.learning_rate.warmup_steps"):
        lower["model"] = {"optimizer": {"learning_rate": {"warmup_steps": min(warmup, limit // 5)}}}
    is_cropped = any(recipe.get(f"data.{key}") is not None for key in ("augmentations", "views"))
    if source == "tokens" and data.images is not None and limit * batch > _PASSES_OF_A_VIEW * images and not is_cropped:
        lower["data"] = _VIEWS
    return replace(recipe, base=merge([recipe.base, lower]))


def values_without_data(stage: Stage, *, path: str = "", token_store: str = "", tokenizer: str = "") -> dict[str, Any]:
    """Returns values in place of those that data and tokenizer give; the sizes are those of the paper."""
    values: dict[str, Any] = {"data": {"path": path, "token_store": token_store}}
    if stage == "transformer":
        values["model"] = {"tokenizer": tokenizer, "network": dict(_PAPER_SIZES)}
    return values


def _values_of_data_and_tokenizer(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Returns the values that data and tokenizer determine."""
    if inputs.data is None:
        return {}
    if inputs.data.tokens is not None:
        return _values_of_store(plan, inputs.data, *inputs.data.tokens)
    if inputs.tokenizer is None:
        return {"data": {"path": str(plan.shards)}}
    sizes, image_size = inputs.tokenizer
    data: dict[str, Any] = {
        "path": str(plan.shards),
        "image_size": image_size,
        "in_channels": sizes.in_channels,
        "token_store": str(plan.folder / "tokens"),
    }
    network = {
        "codebook_size": sizes.codebook_size,
        "num_classes": inputs.data.num_classes,
        "grid": list(sizes.grid(image_size)),
    }
    return {"data": data, "model": {"tokenizer": str(plan.tokenizer), "network": network}}


def _values_of_store(plan: Plan, data: DataSummary, grid: tuple[int, ...], codebook_size: int) -> dict[str, Any]:
    """Returns the values that a token store determines."""
    if plan.recipe.get("data.source") != "tokens":
        raise ValueError(
            f"data {plan.shards} must be a data folder with images, got a token store, which only stage 2 reads, with "
            "data.source: tokens"
        )
    network = {"codebook_size": codebook_size, "num_classes": data.num_classes, "grid": list(grid)}
    paths = {"path": str(plan.shards), "token_store": str(plan.shards)}
    return {"data": paths, "model": {"tokenizer": None, "network": network}}


def _values_of_pretrained(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sizes of the initial weights of a run. They override those of recipe files."""
    if plan.stage == "tokenizer":
        network = dict(config["network"])
        data = {"image_size": config["image_size"], "in_channels": network.pop("in_channels")}
        return {"data": data, "model": {"network": network}}
    from maskgit_pl.networks.backbone import DEFAULT_BACKBONE, BackboneConfig  # torch takes seconds to import

    # Not those that tokenizer and data determine, nor those of training. The attention selects the kind of recipe.
    excluded = {*BackboneConfig.transferable, "codebook_size", "attention"}
    network = {name: value for name, value in config["network"].items() if name not in excluded}
    values: dict[str, Any] = {"network": {"backbone": DEFAULT_BACKBONE, **network}}
    if plan.recipe.kind == "distillation":
        values |= {
            "teacher": str(plan.pretrained),
            "mask_schedule": config["mask_schedule"],
            "teacher_decoding": config["decoding"],
        }
    return {"model": values}
