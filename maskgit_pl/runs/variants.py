"""The variants of an ablation and their trainings: for each variant and seed, a run.

A variant differs from the base in recipe keys or in recipe files. Each training is a process of its own, so
that an error or a full memory ends only that one, and a run that was stopped resumes. ``evaluation.ablation``
measures the runs. Imports no torch.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from maskgit_pl import processes
from maskgit_pl.checks import check_integer
from maskgit_pl.errors import INTERNAL_ERROR, PreemptedError, RunError
from maskgit_pl.files import parse_yaml
from maskgit_pl.runs.recipe import (
    DEFAULT_DATASET,
    Layer,
    Overrides,
    Recipe,
    Stage,
    flag_words,
    split_flags,
    split_values,
    value_at,
)
from maskgit_pl.text import shorten

log = logging.getLogger(__name__)

FOLDER = "ablation"  # of the runs, in the folder of all runs

_SECONDS_BETWEEN_POLLS = 0.2
_DECODING = "model.decoding"
_GROUPS = ("model", "network", "optimizer", "data", "trainer", "decoding")  # left out of the names of variants
_SHARED = ("data.image_size", "data.in_channels", "data.augmentations")  # of all variants: the same images


@dataclass(frozen=True)
class Factor:
    """A recipe key with the values to compare.

    Args:
        key: Dotted key, such as ``model.network.depth``; a key of a group takes mappings.
        values: Values in YAML.
    """

    key: str
    values: tuple[str, ...]

    @property
    def changes(self) -> list[tuple[str, str]]:
        """The label of each value in tables, such as ``depth=2``, and its flag."""
        return [(f"{_short_name(self.key)}={value}", f"--{self.key}={value}") for value in self.values]


def parse_factor(flag: str, text: str) -> Factor:
    """Parses a factor such as ``model.network.depth=2,4`` or ``model.network={depth: 2, embed_dim: 192},{depth: 4}``.

    ``decoding.KEY`` is short for ``model.decoding.KEY``.
    """
    key, _, values = text.partition("=")
    key = key.strip().removeprefix("--")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not split_values(values):
        raise ValueError(f"{flag} must be KEY=VALUE,VALUE,... such as model.network.depth=2,4, got {shorten(text)}")
    return Factor(re.sub(r"^decoding(?=\.|$)", _DECODING, key), tuple(split_values(values)))


@dataclass(frozen=True)
class AblationConfig:
    """An ablation: what differs, and what all variants share.

    The base is a recipe, which is trained with each seed, or the run ``of`` with the decoding of its model.

    Args:
        vary: Recipe key with the values to compare; repeat the flag for further keys. decoding.KEY needs no training.
        at: Another key with its values: every variant and the base are measured at each of them.
        recipes: Sets of recipes to compare, separated by semicolons; the first one is the base (default: that
            of --recipe).
        recipe: Recipes of all variants; several in quotes.
        of: Run that is trained, or pretrained folder: its decoding is varied, and nothing is trained.
        num_steps: Numbers of decoding steps T to try: each variant is measured with the T of its lowest FID, by other
            noise than that of the choice (default: the T of its decoding).
        seeds: Training seeds of each variant, which also determine the noise of its images.
        name: Name of the page (default: ablation-KEY).
        stage: Stage to train.
        stage_2: With --stage tokenizer: train a transformer on each tokenizer, and measure its images, too;
            flags in quotes override its recipe, such as --stage-2='--trainer.max_steps 200'.
        dataset: Name of the data set.
        cluster: Machines: a file of recipes/cluster.
        runs_folder: Folder of all runs; those of variants are in its folder ablation.
        tokenizer: Pretrained tokenizer (default: the only one of the data set).
        overrides: Values of all variants, on top of their recipes; ``trainer.max_steps`` is their budget.

    Raises:
        ValueError: if nothing is varied, an option has no meaning with another one, or a seed is wrong.
    """

    vary: Sequence[Factor] = ()
    at: Factor | None = None
    recipes: Sequence[str] = ("",)
    recipe: str = ""
    of: Path | None = None
    num_steps: Sequence[int] = ()
    seeds: Sequence[int] = (0, 1)
    name: str = ""
    stage: Stage = "transformer"
    stage_2: Overrides | None = None
    dataset: str = DEFAULT_DATASET
    cluster: str = "single"
    runs_folder: Path = Path("runs")
    tokenizer: Path | None = None
    overrides: Overrides = ()

    def __post_init__(self) -> None:
        if not (self.vary or self.at or self.num_steps or len(self.recipes) > 1):
            raise ValueError(
                "--vary must name a recipe key with the values to compare, such as model.network.depth=2,4, or another "
                "one of --recipes, --at and --num-steps must be given, got none"
            )
        if self.at is not None and self.at.key in (factor.key for factor in self.vary):
            raise ValueError(f"--at must name another key than --vary, got {self.at.key}; choose one of the two")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must be different numbers such as 0,1, got {list(self.seeds)}")
        for seed in self.seeds:
            check_integer("--seeds", seed, "[0, 1000000]")
        if self.stage_2 is not None and self.stage != "tokenizer":
            raise ValueError("--stage-2 must come with --stage tokenizer: it trains a transformer on each tokenizer")
        if self.num_steps and self.stage == "tokenizer" and self.stage_2 is None:
            raise ValueError("--num-steps must come with images of a transformer, got --stage tokenizer; add --stage-2")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", self.page_name):
            raise ValueError(f"--name must be letters, digits and ._- only, got {shorten(self.page_name)}")
        keys = [*(factor.key for factor in self.factors), *(key for key, _ in split_flags(flag_words(self.overrides)))]
        if "data.seed" in keys:
            raise ValueError("data.seed must not be set in an ablation: each variant is trained with every --seeds")
        if self.of is not None:
            self._check_trained(keys)

    def _check_trained(self, keys: Sequence[str]) -> None:
        for name in ("recipes", "recipe", "stage", "tokenizer"):
            if getattr(self, name) != getattr(AblationConfig, name):
                raise ValueError(f"--{name} must not be given with --of, whose run is trained; choose one of the two")
        for key in keys:
            if not f"{key}.".startswith(f"{_DECODING}."):
                raise ValueError(
                    "--vary, --at and other keys must be of the decoding with --of, such as decoding.num_steps, got "
                    f"{key}; leave out --of to train variants"
                )

    @property
    def factors(self) -> list[Factor]:
        """All keys with their values."""
        return [*self.vary, *([] if self.at is None else [self.at])]

    @property
    def recipe_sets(self) -> list[str]:
        """The recipes of the base and of each variant of ``recipes``, separated by spaces."""
        return [" ".join(f"{self.recipe} {names}".split()) for names in self.recipes]

    @property
    def page_name(self) -> str:
        """The name of the page; by default what is varied, such as ``ablation-depth``."""
        words = [*(["tokenizer"] if self.stage == "tokenizer" else []), *(["recipes"] if len(self.recipes) > 1 else [])]
        keys = (factor.key.rpartition(".")[2] for factor in self.factors)
        return self.name or "-".join(["ablation", *words, *keys])


@dataclass(frozen=True)
class Variant:
    """A recipe to compare.

    Args:
        label: Name in tables, such as ``depth=2``; ``base`` for the base.
        recipe: The recipe to train, without the change of the decoding.
        decoding: Change of the decoding, as flags, which needs no training.
    """

    label: str
    recipe: Recipe
    decoding: Sequence[str] = ()


def plan_variants(config: AblationConfig, decoding: Mapping[str, Any] | None = None) -> list[Variant]:
    """Reads the recipes of all variants; the base comes first. Each other one differs in its recipe files or one value.

    With ``at``, they are repeated for each of its values.

    Args:
        config: The ablation.
        decoding: Decoding of the model of ``config.of`` in plain values, which is then all that the recipes have.
    """
    first, *others = config.recipe_sets
    changes: list[tuple[str, str, Sequence[str]]] = [("base", first, ())]
    changes += [(f"recipe {names}", names, ()) for names in others]
    changes += [(label, first, (flag,)) for factor in config.vary for label, flag in factor.changes]
    if config.at is not None:
        changes = [
            (f"{label}, {value}", names, (*flags, flag))
            for value, flag in config.at.changes
            for label, names, flags in changes
        ]
    variants = [_read_variant(config, decoding, *change) for change in changes]
    for variant in variants:
        for key in _SHARED:
            if variant.recipe.get(key) != variants[0].recipe.get(key):
                raise ValueError(f"variant {variant.label}: {key} must be that of the base: all have the same images")
    return variants


def _read_variant(
    config: AblationConfig, decoding: Mapping[str, Any] | None, label: str, names: str, change: Sequence[str]
) -> Variant:
    # base.yaml is part of every recipe; named again, it would override the file of the data set.
    files = " ".join(name for name in names.split() if name != "base")
    of_decoding = [flag for flag in change if flag.startswith(f"--{_DECODING}")]
    words = [*flag_words(config.overrides), *(flag for flag in change if flag not in of_decoding)]
    try:
        if decoding is None:
            recipe = Recipe.read(
                config.stage, names=files, dataset=config.dataset, cluster=config.cluster, overrides=words
            )
        else:
            layer = Layer(f"model {config.of}", {"model": {"decoding": decoding}})
            recipe = Recipe.from_layers("transformer", [layer], words)
        recipe.with_overrides(of_decoding)  # which checks them
    except ValueError as error:
        raise ValueError(f"variant {label}: {error}") from error
    return Variant(label, in_float32(recipe), of_decoding)


def in_float32(recipe: Recipe) -> Recipe:
    """Returns a recipe with ``32-true`` in place of ``auto``, which would choose by width and by device.

    All variants are then trained in the same way, and are the same on each device.
    """
    is_auto = recipe.get("trainer.precision") == "auto"
    return recipe.with_overrides(["--trainer.precision=32-true"]) if is_auto else recipe


def base_values(config: AblationConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that the base has for the varied keys, from its complete recipe, and its recipe files."""
    recipe = {"recipe": config.recipe_sets[0]} if len(config.recipes) > 1 else {}
    keys = dict.fromkeys(key for factor in config.vary for value in factor.values for key in _keys(factor.key, value))
    return recipe | {_short_name(key): value_at(tree, key) for key in keys}


def _keys(key: str, text: str) -> list[str]:
    """Returns a key, or the keys inside its value if that is a mapping of a group in YAML."""
    value = parse_yaml(text) if text.startswith("{") else None
    # A mapping with a name specifies a registered object, which is one value.
    if not isinstance(value, dict) or "name" in value:
        return [key]
    return [inner for name, item in value.items() for inner in _keys(f"{key}.{name}", str(item))]


def _short_name(key: str) -> str:
    """Returns a recipe key without its groups: ``guidance.scale`` for ``model.decoding.guidance.scale``."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in _GROUPS:
        parts = parts[1:]
    return ".".join(parts)


class TrainingError(RunError):
    """The end of a training with an error, the exit code of its process and a reason for the user."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def train(recipe: Recipe, folder: Path, *, data: Path | None = None, tokenizer: Path | None = None) -> None:
    """Trains a stage of a run in a process of its own; after the tokens, if it is stage 2.

    The output goes to ``train-STAGE.log`` of the run. A finished run is not trained again. See ``plan.Folders`` for the
    defaults of data and tokenizer.
    """
    words = ["--recipe", " ".join(recipe.names), "--dataset", recipe.dataset]
    words += ["--run", folder.name, "--runs-folder", str(folder.parent)]
    words += [] if data is None else ["--data", str(data)]
    words += [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    words += recipe.words
    commands = [["tokenize", *words]] if recipe.stage == "transformer" else []
    commands.append(["train", recipe.stage, "--cluster", recipe.cluster, *words])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"train-{recipe.stage}.log"
    log.info("training %s; output: %s", folder, file)
    for command in commands:
        with file.open("ab") as output:
            code, is_stopped = run_maskgit(command, output)
        if is_stopped or code == PreemptedError.exit_code:
            raise PreemptedError(f"run {folder}: stopped by a signal; repeat the command to resume")
        if code != 0:
            lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
            reason = lines[-1] if lines else f"`maskgit {command[0]}` exited with {code}"
            raise TrainingError(code if code > 0 else INTERNAL_ERROR, f"{reason}; log: {file}")


def run_maskgit(words: Sequence[str], output: IO[bytes]) -> tuple[int, bool]:
    """Runs ``maskgit``. A stop signal to this process is passed on, so that a training saves and ends.

    Returns:
        The exit code, and True if this process received a stop signal.
    """
    with processes.catch_stop_signals():
        command = [sys.executable, "-m", "maskgit_pl", *words]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        is_told = False
        try:
            while True:
                try:
                    return process.wait(timeout=_SECONDS_BETWEEN_POLLS), processes.is_requested()
                except subprocess.TimeoutExpired:
                    if processes.is_requested() and not is_told:
                        process.terminate()
                        is_told = True
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
