"""The plan of an ablation: the variants of a recipe to compare, their seeds and their training budget.

A variant differs from the base in recipe keys or in recipe files. ``train_schedules`` compares the mask schedules of
Table 3 and Figure 8 of the paper with the same budget. Each training is a process of its own, which ``run_maskgit``
starts. Imports no torch, so that a wrong key, value or combination is answered immediately.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import IO, Any, Literal

from maskgit_pl import processes
from maskgit_pl.checks import check_integer, check_number, shorten
from maskgit_pl.errors import PreemptedError
from maskgit_pl.files import parse_yaml
from maskgit_pl.runs.flag_values import split_values
from maskgit_pl.runs.layers import Overrides, flag_words, split_flags, value_at
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Recipe, Stage

__all__ = [
    "PAPER_SCHEDULES",
    "AblationConfig",
    "Budget",
    "Factor",
    "Variant",
    "base_values",
    "parse_budget",
    "parse_factor",
    "plan_variants",
    "run_maskgit",
    "train_schedules",
]

log = logging.getLogger(__name__)

PAPER_SCHEDULES = ("exp", "cubic", "square", "cosine", "linear", "sqrt", "log")  # paper, Table 3

_SECONDS_BETWEEN_POLLS = 0.2
_DECODING = "model.decoding"
_GROUPS = ("model", "network", "optimizer", "data", "trainer", "decoding")  # left out of the names of variants
_REFUSED = {  # keys that all variants share -> the reason
    "data.seed": "each variant is trained with every seed of --seeds",
    "data.path": "variants are compared on the same data; use --data",
    "data.token_store": "it follows the tokenizer and the data",
    "data.image_size": "images of another size have other metrics",
    "data.in_channels": "images with other channels have other metrics",
    "data.augmentations": "variants are compared on the same images",
    "data.crop": "variants are compared on the same images",
}
_REFUSED_OF_TOKENS = {  # the same, if all variants read the tokens of one tokenizer
    "model.tokenizer": "use --tokenizer",
    "model.network.codebook_size": "it is that of the tokenizer; vary it with --stage tokenizer --stage-2",
    "model.network.grid": "it is that of the tokenizer",
    "model.network.num_classes": "it is that of the data",
}


@dataclass(frozen=True)
class Factor:
    """A recipe key with the values to compare.

    Args:
        key: Dotted key, such as ``model.network.depth``; a key of a group takes mappings.
        values: Values in YAML.

    Raises:
        ValueError: if there is no value, or a value is given twice.
    """

    key: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"--vary {self.key} must have at least one value, such as {self.key}=A,B, got none")
        twice = sorted({value for value in self.values if self.values.count(value) > 1})
        if twice:
            raise ValueError(f"--vary {self.key} must have different values, got {', '.join(twice)} twice")

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"


@dataclass(frozen=True)
class Budget:
    """The training budget that all variants get.

    Args:
        unit: ``steps``, or ``seconds`` of the training steps: CPU seconds on a CPU, else seconds of the device.
        amount: Number of steps or seconds; None for ``trainer.max_steps`` of each recipe.

    Raises:
        ValueError: if the amount is missing, not positive, or not a whole number of steps.
    """

    unit: Literal["steps", "seconds"] = "steps"
    amount: float | None = None

    def __post_init__(self) -> None:
        if self.amount is not None:
            check_number(f"--budget {self.unit}", self.amount, "[0.1, 1e9]")
        if self.unit == "seconds" and self.amount is None:
            raise ValueError("--budget seconds must have a number, such as --budget seconds=100, got none")
        if self.unit == "steps" and self.amount is not None:
            check_integer(
                "--budget steps", int(self.amount) if self.amount % 1 == 0 else self.amount, "[1, 1000000000]"
            )

    def steps(self, seconds_per_step: float) -> int:
        """Returns the number of steps that fit the seconds of the budget best, at least 1.

        Args:
            seconds_per_step: Measured seconds of a step, > 0.
        """
        assert self.amount is not None
        return max(1, round(self.amount / seconds_per_step))

    def __str__(self) -> str:
        return self.unit if self.amount is None else f"{self.unit}={self.amount:g}"


@dataclass(frozen=True)
class Variant:
    """A recipe to compare.

    Args:
        label: Name in tables, such as ``depth=2``; ``base`` for the base.
        names: Names of its recipe files, separated by spaces.
        changes: Values in YAML by key, on top of the overrides of all variants.
        recipe: The recipe with all changes.
    """

    label: str
    names: str
    changes: Mapping[str, str]
    recipe: Recipe

    @property
    def trained_label(self) -> str:
        """The label without the changes of the decoding."""
        words = [*([f"recipe {self.names}"] if self.names else []), _label_changes(self.trained)]
        return ", ".join(word for word in words if word) or "base"

    @property
    def trained(self) -> dict[str, str]:
        """The changes that need a training."""
        return {key: text for key, text in self.changes.items() if not _is_of_decoding(key)}

    @property
    def decoding(self) -> dict[str, str]:
        """The changes of the decoding."""
        return {key: text for key, text in self.changes.items() if _is_of_decoding(key)}


@dataclass(frozen=True)
class AblationConfig:
    """An ablation: what differs, what all variants share, and how long they are trained.

    Args:
        factors: Keys with the values to compare.
        recipes: Sets of recipe files, each a string of names; the first one is the base.
        grid: True for all combinations; False changes one factor of the base at a time.
        seeds: Training seeds (``data.seed``), all different.
        stage: Stage to train.
        stage_2: Values of the transformer that is trained on each tokenizer, whose images are judged too, on top of the
            recipes of the base; None trains no transformer.
        budget: Training budget of each variant.
        pilot_steps: Steps of the training that measures the seconds of a step.
        dataset: Name of the data set.
        cluster: A file of ``recipes/cluster``.
        overrides: Values of all variants, on top of their recipes.
        runs: Folder of all runs; the variants are in its folder ``ablation``.
        data: Data folder; None means that of the data set.
        tokenizer: Pretrained tokenizer of stage 2; None means the only one for these data.

    Raises:
        ValueError: if nothing is varied, a key is varied twice or is shared by all variants, or a number is out of
            range.
    """

    factors: tuple[Factor, ...] = ()
    recipes: tuple[str, ...] = ("",)
    grid: bool = False
    seeds: tuple[int, ...] = (0, 1)
    stage: Stage = "transformer"
    stage_2: Overrides | None = None
    budget: Budget = field(default_factory=Budget)
    pilot_steps: int = 60
    dataset: str = DEFAULT_DATASET
    cluster: str = "single"
    overrides: Overrides = ()
    runs: Path = Path("runs")
    data: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if not self.factors and len(self.recipes) < 2:
            raise ValueError(
                "an ablation must vary something, such as --vary model.network.depth=2,4 or --recipes 'base;wide', got "
                "nothing"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must be different numbers such as 0,1, got {list(self.seeds)}")
        for seed in self.seeds:
            check_integer("--seeds", seed, "[0, 1000000]")
        check_integer("--pilot-steps", self.pilot_steps, "[20, 1000000]")
        if self.stage_2 is not None and self.stage != "tokenizer":
            raise ValueError("--stage-2 must come with --stage tokenizer: it trains a transformer on each tokenizer")
        if self.stage == "tokenizer" and self.tokenizer is not None:
            raise ValueError("--tokenizer must not be given with --stage tokenizer, which trains the tokenizers")
        if len(set(self.recipes)) < len(self.recipes):
            raise ValueError(f"--recipes must be different sets, got {'; '.join(self.recipes)}")
        self._check_keys()

    @property
    def name(self) -> str:
        """The name of the page: what is varied, such as ``ablation-depth``."""
        words = [*(["tokenizer"] if self.stage == "tokenizer" else []), *(["recipes"] if len(self.recipes) > 1 else [])]
        return "-".join(["ablation", *words, *(factor.key.rpartition(".")[2] for factor in self.factors)])

    def _check_keys(self) -> None:
        keys = [factor.key for factor in self.factors]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"--vary {key} must be given once, with all values: {key}=A,B,C")
        for factor in self.factors:
            for text in factor.values:
                for key in _changed_keys({factor.key: text}):
                    self._check_key(f"--vary {factor.key}", key)
        for key, _ in split_flags(flag_words(self.overrides)):
            if key == "data.seed" or (key == "trainer.max_steps" and self.budget.amount is not None):
                self._check_key(f"--{key}", key)

    def _check_key(self, name: str, key: str) -> None:
        refused = dict(_REFUSED)
        if self.stage == "transformer":
            refused |= _REFUSED_OF_TOKENS
        if self.budget.amount is not None:
            refused["trainer.max_steps"] = f"it follows --budget {self.budget}"
        if key in refused:
            raise ValueError(f"{name} must not be set in an ablation: {refused[key]}")
        if self.stage == "tokenizer" and _is_of_decoding(key):
            raise ValueError(f"{name} must not be set with --stage tokenizer, which decodes nothing")


def parse_factor(flag: str, text: str) -> Factor:
    """Parses a factor such as ``model.network.depth=2,4`` or ``model.network={depth: 2, embed_dim: 192},{depth: 4}``.

    ``decoding.KEY`` is short for ``model.decoding.KEY``.

    Raises:
        ValueError: if the text has another form.
    """
    key, equals, values = text.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ValueError(f"{flag} must be KEY=VALUE,VALUE,... such as model.network.depth=2,4, got {shorten(text)}")
    return Factor(re.sub(r"^decoding(?=\.|$)", _DECODING, key), tuple(split_values(values)))


def parse_budget(flag: str, text: str) -> Budget:
    """Parses a budget: ``steps``, ``steps=2000`` or ``seconds=100``.

    Raises:
        ValueError: if the text has another form, or the number is out of range.
    """
    unit, equals, amount = text.partition("=")
    try:
        number = float(amount) if equals else None
    except ValueError:
        number = float("nan")
    if unit not in ("steps", "seconds") or (number is not None and not number > 0):
        raise ValueError(f"{flag} must be steps, steps=N or seconds=X, got {shorten(text)}")
    return Budget("steps" if unit == "steps" else "seconds", number)


def plan_variants(config: AblationConfig) -> list[Variant]:
    """Reads the recipes of all variants; the base comes first.

    Without ``grid``, each further variant differs from the base in one value or in its recipe files. With ``grid``, the
    variants are all combinations, and the base is the one with its values, if any; see ``resolve_variants``.

    Raises:
        FileNotFoundError: if a recipe does not exist. The message names the closest one.
        ValueError: if a key is unknown, or a value has a wrong type. The message names the closest key.
    """
    base, *others = config.recipes
    made = [_read_variant(config, base, {}, "base")]
    if config.grid:
        axes = [[(factor.key, value) for value in factor.values] for factor in config.factors]
        for names in config.recipes:
            for chosen in product(*axes):
                changes = dict(chosen)
                label = ", ".join([*_label_files(names, config), _label_changes(changes)])
                made.append(_read_variant(config, names, changes, label))
        return made
    made += [_read_variant(config, names, {}, *_label_files(names, config)) for names in others]
    for factor in config.factors:
        for value in factor.values:
            changes = {factor.key: value}
            made.append(_read_variant(config, base, changes, _label_changes(changes)))
    return made


def base_values(config: AblationConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that the base has for the varied keys, from its complete recipe."""
    found: dict[str, Any] = {}
    for factor in config.factors:
        keys = {key for text in factor.values for key in _changed_keys({factor.key: text})}
        found |= {_short_name(key): value_at(tree, key) for key in sorted(keys)}
    return found


def train_schedules(
    schedules: Sequence[str] = PAPER_SCHEDULES,
    *,
    names: str = "",
    dataset: str = DEFAULT_DATASET,
    cluster: str = "single",
    overrides: Overrides = (),
    runs: Path = Path("runs"),
    data: Path | None = None,
    tokenizer: Path | None = None,
) -> list[Path]:
    """Trains a transformer with each mask schedule, one after the other, each in a separate process.

    All recipes are read before the first run starts. Finished runs are not trained again.

    Args:
        schedules: Recipe names, one per schedule.
        names: Recipe names that come before that of the schedule, separated by spaces.
        dataset: Name of the data set.
        cluster: A file of ``recipes/cluster``.
        overrides: Values on top of every recipe; see ``Recipe.read``.
        runs: Folder of the runs.
        data: Data folder; None means that of the data set.
        tokenizer: Pretrained tokenizer folder; None means the only one for these data.

    Returns:
        The run folders, in the order of ``schedules``.

    Raises:
        FileNotFoundError: if a recipe does not exist.
        ValueError: if a recipe is invalid, or a training fails; its process has printed the reason.
        PreemptedError: if a training is stopped by a signal.
    """
    words = flag_words(overrides)
    # Read before the first training, so that a mistake in the last recipe is found now.
    recipes = {
        schedule: Recipe.read(
            "transformer", names=f"{names} {schedule}", dataset=dataset, cluster=cluster, overrides=words
        )
        for schedule in schedules
    }
    folders = ["--runs-folder", str(runs)]
    folders += [] if data is None else ["--data", str(data)]
    folders += [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    trained = []
    for place, (schedule, recipe) in enumerate(recipes.items(), start=1):
        name = str(recipe.run_name)
        log.info("mask schedule %s, %d of %d: run %s", schedule, place, len(recipes), name)
        run = ["--recipe", f"{names} {schedule}".strip(), "--dataset", dataset, "--run", name, *folders]
        _maskgit(schedule, "tokenize", *run, *words)
        _maskgit(schedule, "train", "transformer", *run, "--cluster", cluster, *words)
        trained.append(runs / name)
    return trained


def run_maskgit(words: Sequence[str], output: IO[bytes] | None = None) -> tuple[int, bool]:
    """Runs ``maskgit``. A stop signal to this process is passed on, so that a training saves and ends.

    Args:
        words: Arguments of ``maskgit``.
        output: File for standard output and errors; None leaves them to this process's own.

    Returns:
        The exit code, and True if this process received a stop signal.
    """
    errors = None if output is None else subprocess.STDOUT
    with processes.catch_stop_signals():
        process = subprocess.Popen([sys.executable, "-m", "maskgit_pl", *words], stdout=output, stderr=errors)
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


def _maskgit(schedule: str, command: str, *words: str) -> None:
    code, is_stopped = run_maskgit([command, *words])
    if is_stopped or code == PreemptedError.exit_code:
        raise PreemptedError(f"ablation {schedule}: stopped by a signal; repeat the command to resume")
    if code != 0:
        raise ValueError(f"ablation {schedule}: `maskgit {command}` exited with {code}; repeat the command to resume")


def _read_variant(config: AblationConfig, names: str, changes: Mapping[str, str], label: str) -> Variant:
    words = [*flag_words(config.overrides), *(f"--{key}={text}" for key, text in changes.items())]
    if config.budget.unit == "steps" and config.budget.amount is not None:
        words.append(f"--trainer.max_steps={int(config.budget.amount)}")
    # base.yaml is part of every recipe; named again, it would override the file of the data set.
    files = " ".join(name for name in names.split() if name != "base")
    try:
        recipe = Recipe.read(config.stage, names=files, dataset=config.dataset, cluster=config.cluster, overrides=words)
    except ValueError as error:
        raise ValueError(f"variant {label}: {error}" if label else str(error)) from error
    return Variant(label, files, changes, recipe)


def _label_files(names: str, config: AblationConfig) -> list[str]:
    return [f"recipe {names or 'base'}"] if len(config.recipes) > 1 else []


def _label_changes(changes: Mapping[str, str]) -> str:
    """Returns a name of the changes: ``depth=2``; a mapping of a group becomes ``depth=2, embed_dim=192``."""
    return ", ".join(f"{_short_name(key)}={_label_value(text)}" for key, text in _changed_keys(changes).items())


def _label_value(text: str) -> str:
    """Returns ``fsq(levels=[4, 4])`` for the mapping ``{name: fsq, levels: [4, 4]}``, else the text."""
    value: Any = None
    with suppress(ValueError):  # not YAML, so a string
        value = parse_yaml(text)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return text
    options = [f"{key}={_label_value(str(item))}" for key, item in value.items() if key != "name"]
    return f"{value['name']}({', '.join(options)})" if options else str(value["name"])


def _changed_keys(changes: Mapping[str, str]) -> dict[str, str]:
    """Returns the value in YAML of each key that changes, with the keys inside a mapping of a group one by one."""
    found: dict[str, str] = {}
    for key, text in changes.items():
        value: Any = text
        with suppress(ValueError):  # not YAML, so a string; a wrong one is reported with the recipe
            value = parse_yaml(text)
        found |= dict(_flatten(key, value, text))
    return found


def _flatten(key: str, value: Any, text: str) -> Iterator[tuple[str, str]]:
    # A mapping with a name specifies a registered object, which stays one value.
    if isinstance(value, Mapping) and value and "name" not in value:
        for name, item in value.items():
            yield from _flatten(f"{key}.{name}", item, str(item))
    else:
        yield key, text


def _short_name(key: str) -> str:
    """Returns a recipe key without its groups: ``guidance.scale`` for ``model.decoding.guidance.scale``."""
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in _GROUPS:
        parts = parts[1:]
    return ".".join(parts)


def _is_of_decoding(key: str) -> bool:
    """Returns True if a recipe key affects only the decoding."""
    return key == _DECODING or key.startswith(f"{_DECODING}.")
