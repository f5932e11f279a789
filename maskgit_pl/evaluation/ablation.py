"""An ablation: trains each variant of a recipe with each seed, measures the runs, and makes the page of the rows.

1. Build all variants, and open data and feature networks. Errors of the command are raised here.
2. For each seed and each variant: train it, unless its run is finished, and measure it, unless the ledger has the rows.
3. Add a row of the ablation to the ledger. An error of a variant becomes a row, too, and the other variants continue.

``runs.ablation`` plans and trains the variants.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.devices import describe_environment, device_name, find_device
from maskgit_pl.errors import PreemptedError, describe_error, exit_code_of
from maskgit_pl.evaluation.ablation_page import make_ablation_page
from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.evaluator import collect_numbers
from maskgit_pl.evaluation.folders import RunFolders, open_evaluator, open_model, remove_untrained
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row, digest_of
from maskgit_pl.evaluation.options import ReportOptions, TokenizerOptions, describe_decoding, round_to_classes
from maskgit_pl.evaluation.pages import Page
from maskgit_pl.evaluation.reconstruction import OpenedTokenizer, measure_tokenizer_once
from maskgit_pl.files import check_writable
from maskgit_pl.pretrained.networks import fingerprint, load_tokenizer
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.runs.ablation import FOLDER, AblationConfig, Variant, base_values, in_float32, plan_variants, train
from maskgit_pl.runs.build import build_without_weights
from maskgit_pl.runs.plan import Plan, find_data, find_tokenizer
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import merge_values
from maskgit_pl.runs.settings import ResolvedRun, resolve
from maskgit_pl.text import shorten
from maskgit_pl.training.speed import read_training_time
from maskgit_pl.transformer.autoregressive import AutoregressiveConfig
from maskgit_pl.transformer.token_model import TokenModel

log = logging.getLogger(__name__)

_OF_TOKENIZER = ("rfid", "psnr_db", "ssim", "codebook_usage", "perplexity")


def run_ablation(
    config: AblationConfig, options: ReportOptions | None = None, *, name: str | None = None, bars: Bars = no_bars
) -> Page:
    """Runs an ablation: trains variants of a recipe with several seeds, measures and compares them.

    Finished runs, and the measurements that the ledger holds, are reused.

    Args:
        config: The ablation.
        options: Number of images, networks, folders and other options; None for the defaults. The data folder
            is that of ``config``.
        name: Name of the ablation, and of the files of its page; None for ``config.name``.
        bars: Progress bars.

    Returns:
        The page. Its rows of failed runs have the columns ``failure`` and ``exit_code``.

    Raises:
        FileNotFoundError: if a recipe, the data or the tokenizer do not exist.
        ValueError: if a value of a variant or an option is wrong.
        PreemptedError: if a training is stopped by a signal. The same call resumes.
    """
    options, name = options or ReportOptions(), name or config.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise ValueError(f"name must be letters, digits and ._- only, got {shorten(name)}")
    check_writable("results", options.results, is_folder=True)
    ablation = _Ablation(config, options, name, bars)  # 1.
    # All variants have their first seed before any has its second one.
    rows = [ablation.measure(built, seed) for seed in config.seeds for built in ablation.runs.variants]
    return replace(make_ablation_page(name, rows), folder=options.results / ablation.evaluator.dataset)


@dataclass(frozen=True)
class BuiltVariant:
    """A variant whose module could be built."""

    variant: Variant
    values: ResolvedRun
    digest: str  # SHA-256 in hex of everything that determines its weights, except the seed
    decoding: DecodingConfig | None  # that of the base with its own changes; None if it has no images
    parameters: int  # that are trained, without averages


class AblationRuns:
    """The variants of an ablation and their runs. All variants are built before any of them is trained.

    The first variant is the base, which the others are compared with; ``base`` holds its values of the varied keys.
    """

    def __init__(self, config: AblationConfig) -> None:
        planned = plan_variants(config)
        base = planned[0].recipe
        self.config, self.shards = config, find_data(base, config.data)
        self.tokenizer: Path | None = None
        self.stage_2: Recipe | None = None
        if config.stage == "transformer":
            folder = config.runs / str(base.run_name)
            self.tokenizer = find_tokenizer(base, folder=folder, shards=self.shards, tokenizer=config.tokenizer)
        if config.stage_2 is not None:
            recipe = Recipe.read("transformer", names=base.names, dataset=config.dataset, cluster=config.cluster,
                                 overrides=config.stage_2)  # fmt: skip
            self.stage_2 = in_float32(recipe)
        shared = {
            "data": read_manifest_summary(self.shards).fingerprint,
            "tokenizer": self.tokenizer and fingerprint(self.tokenizer),
            "stage_2": self.stage_2 and self.stage_2.tree,
        }
        run = config.runs / FOLDER / "variant"
        self.variants = [
            _build(variant_plan, base, Plan(variant_plan.recipe, self.shards, run, self.tokenizer), shared)
            for variant_plan in planned
        ]
        self.base = base_values(config, self.variants[0].values.tree)

    def train(self, built: BuiltVariant, seed: int) -> Path:
        """Trains a variant with one seed, and after a tokenizer also its transformer, and returns the run folder.

        Finished runs are not repeated. See ``runs.ablation.train`` for errors.
        """
        folder = self.folder_of(built, seed)
        recipes = [built.variant.recipe, *([] if self.stage_2 is None else [self.stage_2])]
        for recipe in recipes:
            # Written at the end of a training; the name of the folder says that it had the same settings.
            if not (folder / recipe.stage / "exported.json").is_file():
                recipe = recipe.with_overrides([f"--data.seed={seed}"])
                train(recipe, folder, data=self.shards, tokenizer=self.tokenizer)
        return folder

    def folder_of(self, built: BuiltVariant, seed: int) -> Path:
        """Returns the folder of a run; its name contains a hash of everything that determines the weights."""
        runs = self.config.runs / FOLDER
        ending = f"seed{seed}-{digest_of([built.digest, seed])[:12]}"
        # Another ablation may have trained the same run under another label.
        folder = next(iter(sorted(runs.glob(f"*-{ending}"))), None)
        label = next(each.variant.label for each in self.variants if each.digest == built.digest)
        words = re.sub(r"[^A-Za-z0-9_.]+", "-", label).strip("-")[:60]
        return folder or runs / f"{self.config.dataset}-{words}-{ending}"


def _build(variant: Variant, base: Recipe, plan: Plan, shared: Mapping[str, Any]) -> BuiltVariant:
    """Builds the module of a variant with weights of zero, which checks its values and those of its decoding."""
    try:
        run = build_without_weights(plan)
        decoding = None  # a transformer of stage 2 exports its own
        if isinstance(run.model, TokenModel):
            # The decoding of the base with the changes of the variant; another kind of model has its own.
            recipe = base if variant.recipe.kind == base.kind else variant.recipe
            recipe = recipe.with_overrides(variant.decoding)
            model = resolve(recipe.kind, merge_values(replace(plan, recipe=recipe))).model
            network = run.model.config.network
            is_causal = isinstance(model, AutoregressiveConfig)
            decoding = model.decoding.to_config(network.num_tokens) if is_causal else model.decoding
            has_null = network.null_label is not None
            decoding.check(network.num_tokens, is_autoregressive=is_causal, has_negative_class=has_null)
    except (TypeError, ValueError) as error:
        raise ValueError(f"variant {variant.label}: {error}") from error
    tree = remove_untrained(run.values.tree)
    parameters = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    return BuiltVariant(variant, run.values, digest_of([tree, shared]), decoding, parameters)


class _Ablation:
    """The measurements of an ablation: its runs and its evaluator."""

    def __init__(self, config: AblationConfig, options: ReportOptions, name: str, bars: Bars) -> None:
        device = find_device(options.device)
        self.runs = runs = AblationRuns(config)
        self.options, self.name = options, name
        self.has_images = runs.config.stage == "transformer" or runs.stage_2 is not None
        data = runs.variants[0].values.data
        images = open_images(runs.shards, data.image_size, data.in_channels, num_workers=options.num_workers)
        self.num_images = round_to_classes(options.num_images, images.num_classes)
        self.evaluator = open_evaluator(
            self._folders(runs.config.runs),
            images,
            Ledger(options.results / FILE_NAME),
            device=device,
            batch_size=options.batch_size,
            features=options.features,
            reference=options.reference,
            bars=bars,
        )
        real = self.evaluator.measure_real(num_images=self.num_images) if self.has_images else {}
        self.shared = {"protocol": self._describe(), "real": collect_numbers(real), "dataset": self.evaluator.dataset}

    def _folders(self, run: Path) -> RunFolders:
        # All runs of the data share its classifier, not only those of ablations.
        real = self.runs.config.runs / f"{self.runs.shards.absolute().name}-classifier"
        return RunFolders(run / "pretrained", run, self.runs.shards, real)

    def _describe(self) -> dict[str, Any]:
        """Returns the column ``protocol`` of the rows: everything that the variants share, in plain values."""
        config, base = self.runs.config, self.runs.variants[0]
        first, network = next(iter(self.evaluator.networks.items()))
        count = network.columns["real_images"]
        of = network.reference.file or f"the {network.reference.split} split"
        facts = [(name, fact) for name, fact in describe_environment().items() if fact]
        return {
            "dataset": self.evaluator.dataset,
            "stage": config.stage,
            "variants": [built.variant.label for built in self.runs.variants],
            "base": dict(self.runs.base),
            "seeds": list(config.seeds),
            "num_images": self.num_images,
            "first": first,
            "compared": f"{count} real images of {of}" if count else f"the statistics of {of}",
            "decoding": "" if base.decoding is None else describe_decoding(base.decoding),
            "machine": ", ".join([device_name(self.evaluator.device), *(f"{name} {fact}" for name, fact in facts)]),
        }

    def measure(self, built: BuiltVariant, seed: int) -> Row:
        """Trains and measures a variant with one seed, and adds the row to the ledger, also that of an error."""
        row: Row = {"ablation": self.name, "variant": built.variant.label, "seed": seed, **self.shared}
        try:  # 2.
            row |= self._train_and_measure(built, seed)
        except PreemptedError:
            raise
        except Exception as error:  # a variant must not lose the others
            log.error("%s", describe_error(error, f"ablation: variant {built.variant.label}").rstrip())
            failure = str(error) or type(error).__name__
            row |= {"numbers": {}, "failure": failure, "exit_code": exit_code_of(error)}
        return self.evaluator.ledger.add("ablation", row)  # 3.

    def _train_and_measure(self, built: BuiltVariant, seed: int) -> dict[str, Any]:
        folder, stage = self.runs.train(built, seed), self.runs.config.stage
        numbers = self._measure_tokenizer(folder) if stage == "tokenizer" else {}
        if self.has_images:
            numbers |= self._measure_samples(folder, built, seed)
        time = read_training_time(folder / stage)
        return {
            "run": folder.name,
            "numbers": numbers,
            "parameters": built.parameters,
            "max_steps": built.values.trainer.max_steps,
            "global_batch": str(built.values.data.global_batch),
            "training_seconds": time and time.cost,
        }

    def _measure_samples(self, run: Path, built: BuiltVariant, seed: int) -> dict[str, float]:
        """Measures generated images and the likelihood of real ones, with noise that differs between seeds."""
        model = open_model(self._folders(run), str(self.evaluator.device))
        first = self.options.seed + seed * self.num_images
        decoding = built.decoding or model.pipe.decoding
        rows = self.evaluator.measure_samples(model, decoding, num_images=self.num_images, seed=first)
        likelihood = self.evaluator.measure_likelihood(model, num_images=2 * self.num_images, seed=seed)
        kind = "exact" if model.pipe.transformer.mask_schedule is None else "elbo"
        return {**collect_numbers(rows), "bits_per_token": float(likelihood[f"{kind}_bits_per_token"])}

    def _measure_tokenizer(self, run: Path) -> dict[str, float]:
        """Measures the reconstructions of the val split."""
        folders = self._folders(run)
        tokenizer = load_tokenizer(folders.pretrained / "tokenizer")
        tokenizer.network.to(self.evaluator.device)
        extractors = [network.extractor for network in self.evaluator.networks.values()]
        options = TokenizerOptions(batch_size=self.options.batch_size)
        opened = OpenedTokenizer(folders, options, tokenizer, self.evaluator.data, extractors)
        numbers = measure_tokenizer_once(self.evaluator.ledger, opened, self.evaluator.bars)["numbers"]
        return {name: value for name, value in numbers.items() if name.partition("/")[0] in _OF_TOKENIZER}
