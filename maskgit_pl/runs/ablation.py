"""The trainings of an ablation: for each variant and seed, a run.

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
from maskgit_pl.runs.layers import Overrides, flag_words, split_flags, split_values, value_at
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Recipe, Stage
from maskgit_pl.text import shorten

log = logging.getLogger(__name__)

FOLDER = "ablation"  # of the runs, in the folder of all runs
PAPER_SCHEDULES = ("cosine", "exp", "cubic", "square", "linear", "sqrt", "log")  # paper, Table 3; its best one first

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

    Args:
        factors: Keys with the values to compare.
        recipes: Sets of recipe files, each a string of names; the first one is the base.
        seeds: Training seeds (``data.seed``), all different.
        stage: Stage to train.
        stage_2: Values of the transformer that is trained on each tokenizer, whose images are judged too, on
            top of the recipes of the base; None trains no transformer.
        dataset: Name of the data set.
        cluster: A file of ``recipes/cluster``.
        overrides: Values of all variants, on top of their recipes; ``trainer.max_steps`` is their budget.
        runs: Folder of all runs; the variants are in its folder ``ablation``.
        data: Data folder; None means that of the data set.
        tokenizer: Pretrained tokenizer of stage 2; None means the only one for these data.

    Raises:
        ValueError: if the seeds are wrong or set in another way, or ``stage_2`` has no tokenizers.
    """

    factors: tuple[Factor, ...] = ()
    recipes: tuple[str, ...] = ("",)
    seeds: tuple[int, ...] = (0, 1)
    stage: Stage = "transformer"
    stage_2: Overrides | None = None
    dataset: str = DEFAULT_DATASET
    cluster: str = "single"
    overrides: Overrides = ()
    runs: Path = Path("runs")
    data: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must be different numbers such as 0,1, got {list(self.seeds)}")
        for seed in self.seeds:
            check_integer("--seeds", seed, "[0, 1000000]")
        if self.stage_2 is not None and self.stage != "tokenizer":
            raise ValueError("--stage-2 must come with --stage tokenizer: it trains a transformer on each tokenizer")
        keys = [*(factor.key for factor in self.factors), *(key for key, _ in split_flags(flag_words(self.overrides)))]
        if "data.seed" in keys:
            raise ValueError("data.seed must not be set in an ablation: each variant is trained with every --seeds")

    @property
    def name(self) -> str:
        """The name of the page: what is varied, such as ``ablation-depth``."""
        words = [*(["tokenizer"] if self.stage == "tokenizer" else []), *(["recipes"] if len(self.recipes) > 1 else [])]
        return "-".join(["ablation", *words, *(factor.key.rpartition(".")[2] for factor in self.factors)])


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


def plan_variants(config: AblationConfig) -> list[Variant]:
    """Reads the recipes of all variants; the base comes first. Each other one differs in its recipe files or one value.

    Raises:
        FileNotFoundError: if a recipe does not exist. The message names the closest one.
        ValueError: if a key is unknown, a value has a wrong type, or the images differ. The message names the key.
    """
    first, *others = config.recipes
    base = _read_variant(config, "base", first)
    variants = [base, *(_read_variant(config, f"recipe {names}", names) for names in others)]
    variants += [
        _read_variant(config, f"{_short_name(factor.key)}={value}", first, f"--{factor.key}={value}")
        for factor in config.factors
        for value in factor.values
    ]
    for variant in variants:
        for key in _SHARED:
            if variant.recipe.get(key) != base.recipe.get(key):
                raise ValueError(f"variant {variant.label}: {key} must be that of the base: all have the same images")
    return variants


def _read_variant(config: AblationConfig, label: str, names: str, *change: str) -> Variant:
    # base.yaml is part of every recipe; named again, it would override the file of the data set.
    files = " ".join(name for name in names.split() if name != "base")
    decoding = [flag for flag in change if flag.startswith(f"--{_DECODING}")]
    words = [*flag_words(config.overrides), *(flag for flag in change if flag not in decoding)]
    try:
        recipe = Recipe.read(config.stage, names=files, dataset=config.dataset, cluster=config.cluster, overrides=words)
        recipe.with_overrides(decoding)  # which checks them
    except ValueError as error:
        raise ValueError(f"variant {label}: {error}") from error
    return Variant(label, in_float32(recipe), decoding)


def in_float32(recipe: Recipe) -> Recipe:
    """Returns a recipe with ``32-true`` in place of ``auto``, which would choose by width and by device.

    All variants are then trained in the same way, and are the same on each device.
    """
    is_auto = recipe.get("trainer.precision") == "auto"
    return recipe.with_overrides(["--trainer.precision=32-true"]) if is_auto else recipe


def base_values(config: AblationConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that the base has for the varied keys, from its complete recipe, and its recipe files."""
    recipe = {"recipe": config.recipes[0]} if len(config.recipes) > 1 else {}
    keys = dict.fromkeys(
        key for factor in config.factors for value in factor.values for key in _keys(factor.key, value)
    )
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

    Raises:
        TrainingError: if the training fails.
        PreemptedError: if it is stopped by a signal.
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
