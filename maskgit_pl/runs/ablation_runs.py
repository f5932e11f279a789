"""The trainings of an ablation: resolves its variants, measures the time of their steps, and trains them one by one.

Each training is a separate process (``maskgit train``), so that an error or a full memory ends only this variant.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from maskgit_pl.autoregressive import AutoregressiveConfig
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.errors import PreemptedError, RunError
from maskgit_pl.files import read_json, sha256_of
from maskgit_pl.mvtm import MaskedTokenConfig
from maskgit_pl.processes import available_cores
from maskgit_pl.runs.ablation_plan import AblationConfig, Variant, base_values, plan_variants, run_maskgit
from maskgit_pl.runs.build import build_without_weights
from maskgit_pl.runs.layers import Overrides, flag_words, merge, remove_key
from maskgit_pl.runs.plan import Plan, find_data, find_tokenizer
from maskgit_pl.runs.recipe import Recipe, Stage
from maskgit_pl.runs.resolve import AUTO, merge_values
from maskgit_pl.runs.settings import ResolvedRun, resolve
from maskgit_pl.runs.tokenizing import tokenize
from maskgit_pl.training.speed import TrainingTime, read_training_time
from maskgit_pl.training.token_model import TokenModel

__all__ = ["AblationRuns", "ResolvedVariant", "TrainedRun", "TrainingError"]

log = logging.getLogger(__name__)

_FOLDER = "ablation"  # in the folder of all runs
_NO_PART = (  # keys that do not affect the trained weights
    "model.decoding", "data.path", "data.token_store", "model.tokenizer", "checkpoint_every", "keep_last", "keep_every",
    "hang_seconds", "trainer.val_check_interval", "trainer.limit_val_batches", "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps", "data.validation_batch", "data.validation_samples",
)  # fmt: skip
_OF_A_RUN = ("data.seed", "model.seed", "trainer.max_steps")  # differ between the runs of a variant
_PILOT = ("--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0", "--checkpoint_every=1000000")


class TrainingError(RunError):
    """The end of a training with an error.

    Args:
        exit_code: Exit code of its process.
        text: Reason, for the user.
    """

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class ResolvedVariant:
    """A variant with all its values, whose module could be built.

    Args:
        variant: The variant.
        recipe: Complete recipe, without the keys that differ between its runs or do not affect the weights.
        max_steps: Number of steps of the recipe.
        cpu_threads: CPU threads of its recipe; None for torch's choice.
        decoding: Decoding of its images: that of the base with its own changes; None if it has no images.
        parameters: Number of trained parameters, without averages.
    """

    variant: Variant
    recipe: Mapping[str, Any]
    max_steps: int
    cpu_threads: int | None
    decoding: DecodingConfig | None
    parameters: int

    @property
    def label(self) -> str:
        """The name of the variant in tables."""
        return self.variant.label

    @property
    def digest(self) -> str:
        """The SHA-256 in hex of everything that determines the weights, except seed and number of steps."""
        return _digest(self.recipe)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run of a variant.

    Args:
        folder: Run folder.
        max_steps: Number of steps.
        time: Time of its steps; None if the run does not record it.
    """

    folder: Path
    max_steps: int
    time: TrainingTime | None = None

    @property
    def pretrained(self) -> Path:
        """The pretrained folder that the run has exported."""
        return self.folder / "pretrained"


@dataclass(frozen=True)
class AblationRuns:
    """The variants of an ablation and their runs. Made by ``open``.

    Args:
        config: The ablation.
        variants: Variants without duplicates.
        reference: Index of the variant that the others are compared with: the base, if it is one of them.
        base: Values that the base has for the varied keys, by their short name.
        shards: Data folder.
        tokenizer: Pretrained tokenizer folder, if all variants share one.
        stage_2: Recipe of the transformers that are trained on tokenizers.
        threads: CPU threads of every training if the budget is in seconds; None leaves them to the recipes.
    """

    config: AblationConfig
    variants: Sequence[ResolvedVariant]
    reference: int
    base: Mapping[str, Any]
    shards: Path
    tokenizer: Path | None = None
    stage_2: Recipe | None = None
    threads: int | None = None

    @property
    def num_trainings(self) -> int:
        """The number of trainings of all seeds. Variants that differ only in their decoding share one."""
        return len({(each.digest, each.max_steps) for each in self.variants}) * len(self.config.seeds)

    @classmethod
    def open(cls, config: AblationConfig) -> AblationRuns:
        """Resolves all variants, before any of them is trained.

        Raises:
            FileNotFoundError: if a recipe, the data or the tokenizer do not exist.
            ValueError: if a value of a variant is wrong, or all variants are the same. The message names the variant.
        """
        config = _with_precision(config)
        planned = plan_variants(config)
        base = planned[0].recipe
        shards = find_data(base, config.data)
        tokenizer = None
        if config.stage == "transformer":
            folder = config.runs / str(base.run_name)
            tokenizer = find_tokenizer(base, folder=folder, shards=shards, tokenizer=config.tokenizer)
        stage_2 = None
        if config.stage_2 is not None:
            stage_2 = Recipe.read(
                "transformer",
                names=planned[0].names,
                dataset=config.dataset,
                cluster=config.cluster,
                overrides=config.stage_2,
            )
        resolver = _Resolver(base, shards, config.runs / _FOLDER, tokenizer, stage_2)
        variants, reference = _distinct([resolver.resolve(each) for each in planned], is_grid=config.grid)
        threads = None
        if config.budget.unit == "seconds":
            threads = variants[reference].cpu_threads or available_cores()
        values = base_values(config, resolver.values(base).tree)
        return cls(config, variants, reference, values, shards, tokenizer, stage_2, threads)

    def pilot(self, variant: ResolvedVariant) -> TrainingTime:
        """Trains a variant for a few steps to measure their time. The run is deleted afterwards.

        Raises:
            TrainingError: if the training fails.
            PreemptedError: if it is stopped by a signal.
        """
        folder = self._folder / f"pilot-{variant.digest[:16]}"
        shutil.rmtree(folder, ignore_errors=True)
        words = [f"--trainer.max_steps={self.config.pilot_steps}", *_PILOT, *self._thread_words()]
        try:
            self._train(variant, self.config.stage, folder, words)
            time = read_training_time(folder / self.config.stage)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        assert time is not None
        return time

    def train(self, variant: ResolvedVariant, seed: int, max_steps: int) -> TrainedRun:
        """Trains a variant with one seed, and after a tokenizer also its transformer. Finished runs are not repeated.

        Raises:
            TrainingError: if a training fails.
            PreemptedError: if a training is stopped by a signal.
        """
        folder, stage = self.folder_of(variant, seed, max_steps), self.config.stage
        words = [f"--data.seed={seed}", f"--trainer.max_steps={max_steps}", *self._thread_words()]
        if not _is_finished(folder, stage, max_steps):
            log.info("training %s, seed %d, %d steps: %s", variant.label, seed, max_steps, folder)
            self._train(variant, stage, folder, words)
        if self.stage_2 is not None and not _is_finished(folder, "transformer", 1):
            log.info("training the transformer of %s, seed %d: %s", variant.label, seed, folder)
            tokenize(self.stage_2, run=folder, data=self.shards)
            changes = flag_words(self.config.stage_2 or ())
            # The recipes of the base, so that equal transformers judge all tokenizers.
            self._run(folder, "transformer", " ".join(self.stage_2.names), [*changes, f"--data.seed={seed}"])
        return TrainedRun(folder, max_steps, read_training_time(folder / stage))

    def folder_of(self, variant: ResolvedVariant, seed: int, max_steps: int) -> Path:
        """Returns the folder of a run; its name contains a hash of everything that determines the weights."""
        key = {"recipe": variant.digest, "seed": seed, "max_steps": max_steps, "threads": self.threads}
        ending = f"seed{seed}-{_digest(key)[:12]}"
        # Another ablation may have trained the same run under another label.
        found = next(iter(sorted(self._folder.glob(f"*-{ending}"))), None)
        words = re.sub(r"[^A-Za-z0-9_.]+", "-", variant.variant.trained_label).strip("-")[:60]
        return found or self._folder / f"{self.config.dataset}-{words}-{ending}"

    @property
    def _folder(self) -> Path:
        return self.config.runs / _FOLDER

    def _thread_words(self) -> list[str]:
        return [] if self.threads is None else [f"--cpu_threads={self.threads}"]

    def _train(self, variant: ResolvedVariant, stage: Stage, folder: Path, words: Sequence[str]) -> None:
        own = variant.variant
        changes = [f"--{key}={text}" for key, text in own.trained.items()]
        if stage == "transformer":
            tokenize(own.recipe, run=folder, data=self.shards, tokenizer=self.tokenizer)
        self._run(folder, stage, own.names, [*flag_words(self.config.overrides), *changes, *words])

    def _run(self, folder: Path, stage: Stage, names: str, words: Sequence[str]) -> None:
        """Trains a stage in a process of its own, whose output goes to ``train-STAGE.log`` of the run."""
        command = ["train", stage, "--dataset", self.config.dataset, "--cluster", self.config.cluster]
        command += ["--recipe", names, "--run", folder.name, "--runs-folder", str(folder.parent)]
        command += ["--data", str(self.shards)]
        command += [] if self.tokenizer is None else ["--tokenizer", str(self.tokenizer)]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"train-{stage}.log"
        with file.open("ab") as output:
            code, is_stopped = run_maskgit([*command, *words], output)
        if is_stopped or code == PreemptedError.exit_code:
            raise PreemptedError(f"run {folder}: stopped by a signal; repeat the command to resume")
        if code != 0:
            reason = _last_line(file) or f"`maskgit train {stage}` exited with {code}"
            raise TrainingError(code if code > 0 else 70, f"{reason}; log: {file}")


@dataclass(frozen=True)
class _Resolver:
    """Builds the module of each variant, and collects its values."""

    base: Recipe
    shards: Path
    folder: Path
    tokenizer: Path | None
    stage_2: Recipe | None

    def resolve(self, planned: Variant) -> ResolvedVariant:
        try:
            run = build_without_weights(self._plan(planned.recipe))
            decoding = self._decoding(planned)
            if decoding is not None and isinstance(run.model, TokenModel):
                network = run.model.config.network
                decoding.check(
                    network.num_tokens,
                    is_autoregressive=planned.recipe.kind == "autoregressive",
                    has_negative_class=network.null_label is not None,
                )
        except (TypeError, ValueError) as error:
            raise ValueError(f"variant {planned.label}: {error}") from error
        tree = merge([run.values.tree])
        tree["tokenizer"] = None if self.tokenizer is None else sha256_of(self.tokenizer / "model.safetensors")
        tree["stage_2"] = None if self.stage_2 is None else self.stage_2.tree
        for key in (*_NO_PART, *_OF_A_RUN):
            remove_key(tree, key)
        parameters = sum(each.numel() for each in run.model.parameters() if each.requires_grad)
        return ResolvedVariant(
            planned, tree, run.values.trainer.max_steps, run.values.cpu_threads, decoding, parameters
        )

    def values(self, recipe: Recipe) -> ResolvedRun:
        """Returns the complete values of a recipe."""
        return resolve(recipe.kind, merge_values(self._plan(recipe)))

    def _plan(self, recipe: Recipe) -> Plan:
        return Plan(recipe, self.shards, self.folder / "variant", self.tokenizer)

    def _decoding(self, planned: Variant) -> DecodingConfig | None:
        """Returns the decoding of the base with the changes of the variant; an other kind of model has its own."""
        recipe = planned.recipe
        if recipe.stage == "tokenizer":
            return None  # a transformer of ``stage_2`` exports its own
        if recipe.kind == self.base.kind:
            recipe = self.base.with_overrides([f"--{key}={text}" for key, text in planned.decoding.items()])
        config: AutoregressiveConfig | MaskedTokenConfig = self.values(recipe).model
        if isinstance(config, AutoregressiveConfig):
            return config.decoding.to_config(config.network.num_tokens)
        return config.decoding


def _with_precision(config: AblationConfig) -> AblationConfig:
    """Returns the ablation with ``32-true`` in place of ``auto``, which would choose by width and by device.

    All variants are then trained in the same way, and are the same on each device.
    """

    def extended(names: str, stage: Stage, overrides: Overrides) -> Overrides:
        recipe = Recipe.read(stage, names=names, dataset=config.dataset, cluster=config.cluster, overrides=overrides)
        is_auto = recipe.get("trainer.precision") == AUTO
        return [*flag_words(overrides), "--trainer.precision=32-true"] if is_auto else overrides

    base = config.recipes[0]
    stage_2 = None if config.stage_2 is None else extended(base, "transformer", config.stage_2)
    return replace(config, overrides=extended(base, config.stage, config.overrides), stage_2=stage_2)


def _distinct(resolved: Sequence[ResolvedVariant], *, is_grid: bool) -> tuple[list[ResolvedVariant], int]:
    """Returns the variants without duplicates, and the index of the reference.

    The first one is the base. In a grid, it only tells which combination is the base.

    Raises:
        ValueError: if fewer than two variants are left, or two combinations are the same.
    """
    base, *others = resolved
    base_key = _key_of(base)
    found = {} if is_grid else {base_key: base}
    for each in others:
        key = _key_of(each)
        if not is_grid and key == base_key:
            continue  # the value of the base
        if key in found:
            raise ValueError(f"variants must be different, got {found[key].label} and {each.label}, which are the same")
        found[key] = each
    variants = list(found.values())
    if len(variants) < 2:
        raise ValueError(f"an ablation must have at least two variants, got only {variants[0].label}; add a value")
    return variants, list(found).index(base_key) if base_key in found else 0


def _key_of(variant: ResolvedVariant) -> str:
    decoding = None if variant.decoding is None else asdict(variant.decoding)
    return _digest([variant.recipe, variant.max_steps, decoding])


def _is_finished(folder: Path, stage: Stage, max_steps: int) -> bool:
    """Returns True if a run has exported its last step; its name says that it had the same settings."""
    try:
        record = read_json(folder / stage / "exported.json")
        return int(record["step"]) >= max_steps and (folder / "pretrained" / stage / "model.safetensors").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _last_line(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(_canonical(values), sort_keys=True, default=str).encode()).hexdigest()


def _canonical(values: Any) -> Any:
    """Returns plain values in which equal numbers have one form: 1.0 becomes 1."""
    if isinstance(values, Mapping):
        return {key: _canonical(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_canonical(value) for value in values]
    return int(values) if isinstance(values, float) and values.is_integer() else values
