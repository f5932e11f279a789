"""An ablation: measures variants of a recipe, or of the decoding of a run, and makes the page that compares them.

1. Build all variants, and open data and feature networks. Errors of the command are raised here.
2. For each seed and each variant: train it, unless its run is finished, and measure it, unless the ledger has the rows.
3. Add a row of the ablation to the ledger. An error of a variant becomes a row, too, and the other variants continue.
4. Make the page from these rows.

``runs.variants`` plans and trains the variants, and ``ablation_page`` makes the page.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from maskgit_pl.data import ShardData
from maskgit_pl.data.manifest import is_store
from maskgit_pl.data.token_store import read_data_summary
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.devices import describe_environment, device_name, find_device
from maskgit_pl.errors import PreemptedError, describe_error, exit_code_of
from maskgit_pl.evaluation.ablation_page import make_ablation_page
from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.evaluator import collect_numbers
from maskgit_pl.evaluation.folders import check_model_decoding, open_data, open_evaluator, open_model
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row, digest_of
from maskgit_pl.evaluation.options import (
    ReportOptions,
    TokenizerOptions,
    describe_decoding,
    refuse_options_of_images,
    round_to_classes,
    with_steps,
)
from maskgit_pl.evaluation.pages import Page
from maskgit_pl.evaluation.reconstruction import OpenedTokenizer, measure_tokenizer_once
from maskgit_pl.evaluation.run_folders import RunFolders, find_run, remove_untrained
from maskgit_pl.files import check_writable
from maskgit_pl.pretrained.networks import fingerprint, load_tokenizer
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.runs.fitting import build_without_weights, resolve_run
from maskgit_pl.runs.plan import Plan, find_data, find_tokenizer, read_inputs
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.variants import FOLDER, AblationConfig, Variant, base_values, in_float32, plan_variants, train
from maskgit_pl.training.speed import read_training_time
from maskgit_pl.transformer.config import AutoregressiveConfig
from maskgit_pl.transformer.token_model import TokenModel

log = logging.getLogger(__name__)

_OF_TOKENIZER = ("rfid", "psnr_db", "ssim", "codebook_usage", "perplexity")


def run_ablation(config: AblationConfig, options: ReportOptions | None = None, *, bars: Bars = no_bars) -> Page:
    """Runs an ablation: trains variants of a recipe with several seeds, or decodes a run in several ways, and compares.

    Finished runs, and the measurements that the ledger holds, are reused.

    With ``config.num_steps``, T is chosen for each variant, as in Table 3 of the paper: by the lowest FID in the first
    network, from ``num_images`` images. The variant is then measured at this T with as many images of other noise,
    since the lowest of several FIDs is too low on average.

    Args:
        config: The ablation.
        options: Number of images, networks, folders and other options; None for the defaults.
        bars: Progress bars.

    Returns:
        The page. Its rows of failed runs have the columns ``failure`` and ``exit_code``.

    Raises:
        FileNotFoundError: if a recipe, the data, the tokenizer or the run ``config.of`` do not exist.
        ValueError: if a value of a variant or an option is wrong.
        PreemptedError: if a training is stopped by a signal. The same call resumes.
    """
    options = options or ReportOptions()
    check_writable("results", options.results, is_folder=True)
    ablation = _Ablation(config, options, bars)  # 1.
    # All variants have their first seed before any has its second one.
    rows = [ablation.measure(built, seed) for seed in config.seeds for built in ablation.runs.variants]
    return replace(make_ablation_page(config.page_name, rows), folder=options.results / ablation.evaluator.dataset)


@dataclass(frozen=True)
class BuiltVariant:
    """A variant whose module could be built."""

    variant: Variant
    digest: str  # SHA-256 in hex of everything that determines its weights, except the seed
    decoding: DecodingConfig | None  # that of the base with its own changes; None if it has no images
    columns: Mapping[str, Any]  # of its rows: the trained parameters, without averages, and the budget


class AblationRuns:
    """The variants of an ablation and their runs. All variants are built before any of them is trained.

    The first variant is the base, which the others are compared with; ``base`` holds its values of the varied keys.
    """

    def __init__(self, config: AblationConfig, data: Path | None = None) -> None:
        planned = plan_variants(config)
        base = planned[0].recipe
        self.config, self.shards = config, find_data(base, data)
        self.tokenizer: Path | None = None
        self.stage_2: Recipe | None = None
        if config.stage == "transformer":
            folder = config.runs_folder / str(base.run_name)
            self.tokenizer = find_tokenizer(base, folder=folder, shards=self.shards, tokenizer=config.tokenizer)
        if config.stage_2 is not None:
            recipe = Recipe.read("transformer", names=base.names, dataset=config.dataset, cluster=config.cluster,
                                 overrides=config.stage_2)  # fmt: skip
            self.stage_2 = in_float32(recipe)
        shared = {
            "data": read_data_summary(self.shards).fingerprint,
            "tokenizer": self.tokenizer and fingerprint(self.tokenizer),
            "stage_2": self.stage_2 and self.stage_2.tree,
        }
        run = config.runs_folder / FOLDER / "variant"
        plans = [Plan(variant.recipe, self.shards, run, self.tokenizer) for variant in planned]
        self.variants = [
            _build(variant, base, plan, shared, config.num_steps) for variant, plan in zip(planned, plans, strict=True)
        ]
        self._values = resolve_run(plans[0], read_inputs(plans[0]))
        self.base = base_values(config, self._values.tree)

    def open_images(self, num_workers: int) -> ShardData:
        """Opens the real images, or tokens of another tokenizer, which are the same for all variants."""
        data = self._values.data
        if is_store(self.shards):
            return ShardData(replace(data, num_workers=num_workers))
        return open_images(self.shards, data.image_size, data.in_channels, num_workers=num_workers)

    def folders(self, run: Path) -> RunFolders:
        """Returns the folders of a run. All runs of the data share its classifier, not only those of ablations."""
        references = self.config.runs_folder / f"{self.shards.absolute().name}-classifier"
        return RunFolders(run / "pretrained", run, self.shards, references)

    def train(self, built: BuiltVariant, seed: int) -> RunFolders:
        """Trains a variant with one seed, and after a tokenizer also its transformer, and returns its folders.

        Finished runs are not repeated. See ``runs.variants.train`` for errors.
        """
        folder = self.folder_of(built, seed)
        recipes = [built.variant.recipe, *([] if self.stage_2 is None else [self.stage_2])]
        for recipe in recipes:
            # Written at the end of a training; the name of the folder says that it had the same settings.
            if not (folder / recipe.stage / "exported.json").is_file():
                recipe = recipe.with_overrides([f"--data.seed={seed}"])
                train(recipe, folder, data=self.shards, tokenizer=self.tokenizer)
        return self.folders(folder)

    def folder_of(self, built: BuiltVariant, seed: int) -> Path:
        """Returns the folder of a run; its name contains a hash of everything that determines the weights."""
        runs = self.config.runs_folder / FOLDER
        ending = f"seed{seed}-{digest_of([built.digest, seed])[:12]}"
        # Another ablation may have trained the same run under another label.
        folder = next(iter(sorted(runs.glob(f"*-{ending}"))), None)
        label = next(each.variant.label for each in self.variants if each.digest == built.digest)
        words = re.sub(r"[^A-Za-z0-9_.]+", "-", label).strip("-")[:60]
        return folder or runs / f"{self.config.dataset}-{words}-{ending}"


def _build(
    variant: Variant, base: Recipe, plan: Plan, shared: Mapping[str, Any], num_steps: Sequence[int]
) -> BuiltVariant:
    """Builds the module of a variant with weights of zero, which checks its values and those of its decoding."""
    try:
        values, module = build_without_weights(plan)
        decoding = None  # a transformer of stage 2 exports its own
        if isinstance(module, TokenModel):
            # The decoding of the base with the changes of the variant; another kind of model has its own.
            recipe = base if variant.recipe.kind == base.kind else variant.recipe
            recipe = recipe.with_overrides(variant.decoding)
            model = resolve_run(replace(plan, recipe=recipe), read_inputs(plan)).model
            network = module.config.network
            is_causal = isinstance(model, AutoregressiveConfig)
            decoding = model.decoding.to_config(network.num_tokens) if is_causal else model.decoding
            has_null = network.null_label is not None
            for each in (decoding, *(with_steps(decoding, number) for number in num_steps)):
                each.check(network.num_tokens, is_autoregressive=is_causal, has_negative_class=has_null)
    except (TypeError, ValueError) as error:
        raise ValueError(f"variant {variant.label}: {error}") from error
    columns = {
        "parameters": sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
        "max_steps": values.trainer.max_steps,
        "global_batch": str(values.data.global_batch),
    }
    return BuiltVariant(variant, digest_of([remove_untrained(values.tree), shared]), decoding, columns)


class TrainedRun:
    """A run that is trained, and the variants of the decoding of its model; see ``AblationRuns``."""

    def __init__(self, config: AblationConfig, data: Path | None = None) -> None:
        assert config.of is not None
        self.config, self._folders = config, find_run(config.of, data=data)
        self._pipe = open_model(self._folders, "cpu").pipe
        planned = plan_variants(config, asdict(self._pipe.decoding))
        self.variants = [self._build(variant) for variant in planned]
        self.base = base_values(config, planned[0].recipe.tree)

    def open_images(self, num_workers: int) -> ShardData:
        """Opens the real images, whose classes must be those of the model."""
        return open_data(self._folders, self._pipe, num_workers=num_workers)

    def folders(self, _: Path) -> RunFolders:
        """Returns the folders of the run."""
        return self._folders

    def train(self, built: BuiltVariant, seed: int) -> RunFolders:
        """Returns the folders of the run, which is trained."""
        return self._folders

    def _build(self, variant: Variant) -> BuiltVariant:
        """Checks that the model can be decoded in the way of a variant."""
        try:
            decoding = DecodingConfig(**variant.recipe.with_overrides(variant.decoding).tree["model"]["decoding"])
            for each in (decoding, *(with_steps(decoding, number) for number in self.config.num_steps)):
                check_model_decoding(self._pipe, each)
        except (TypeError, ValueError) as error:
            raise ValueError(f"variant {variant.label}: {error}") from error
        return BuiltVariant(variant, "", decoding, {})


class _Ablation:
    """The measurements of an ablation: its runs and its evaluator."""

    def __init__(self, config: AblationConfig, options: ReportOptions, bars: Bars) -> None:
        device = find_device(options.device)
        self.config, self.options = config, options
        data = options.data
        self.runs = AblationRuns(config, data) if config.of is None else TrainedRun(config, data)
        self.has_images = config.stage == "transformer" or config.stage_2 is not None
        images = self.runs.open_images(options.num_workers)
        if images.summary.tokens is not None:
            refuse_options_of_images(options)
            if config.num_steps:
                raise ValueError(f"num_steps must be left out for tokens, which have no FID, got {config.num_steps}")
        self.num_images = round_to_classes(options.num_images, images.num_classes)
        self.evaluator = open_evaluator(
            self.runs.folders(config.runs_folder),
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

    def _describe(self) -> dict[str, Any]:
        """Returns the column ``protocol`` of the rows: everything that the variants share, in plain values."""
        config, base = self.config, self.runs.variants[0]
        first, network = next(iter(self.evaluator.networks.items()), ("", None))
        compared = "samples of the val split"
        if network is not None:
            count = network.columns["real_images"]
            of = network.reference.file or f"the {network.reference.split} split"
            compared = f"{count} real images of {of}" if count else f"the statistics of {of}"
        facts = [(name, fact) for name, fact in describe_environment().items() if fact]
        return {
            "dataset": self.evaluator.dataset,
            "stage": config.stage,
            "of": config.of and self.runs.folders(config.of).run.name,
            "variants": [built.variant.label for built in self.runs.variants],
            "at": [] if config.at is None else [label for label, _ in config.at.changes],
            "base": dict(self.runs.base),
            "seeds": list(config.seeds),
            "num_images": self.num_images,
            "first": first,
            "compared": compared,
            "decoding": "" if base.decoding is None else describe_decoding(base.decoding),
            "machine": ", ".join([device_name(self.evaluator.device), *(f"{name} {fact}" for name, fact in facts)]),
        }

    def measure(self, built: BuiltVariant, seed: int) -> Row:
        """Trains and measures a variant with one seed, and adds the row to the ledger, also that of an error."""
        row: Row = {"ablation": self.config.page_name, "variant": built.variant.label, "seed": seed, **self.shared}
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
        folders, stage = self.runs.train(built, seed), self.config.stage
        numbers = self._measure_tokenizer(folders) if stage == "tokenizer" else {}
        choice: dict[str, Any] = {}
        if self.has_images:
            of_images, choice = self._measure_samples(folders, built, seed)
            numbers |= of_images
        time = read_training_time(folders.run / stage)
        training = {**built.columns, "training_seconds": time and time.cost}
        return {"run": folders.run.name, "numbers": numbers, **choice, **training}

    def _measure_samples(
        self, folders: RunFolders, built: BuiltVariant, seed: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Measures generated images and the likelihood of real ones, with noise that differs between seeds.

        If T is chosen, the columns of the choice follow; see ``run_ablation``.
        """
        model = open_model(folders, str(self.evaluator.device))
        count = self.num_images
        choice: dict[str, Any] = {}
        # The choice of T takes noise of its own.
        first = self.options.seed + (2 if self.config.num_steps else 1) * seed * count
        decoding = built.decoding or model.pipe.decoding
        if self.config.num_steps:
            network = next(iter(self.evaluator.networks))
            curve = {}
            for number in sorted({*self.config.num_steps}):
                rows = self.evaluator.measure_samples(
                    model,
                    with_steps(decoding, number),
                    num_images=count,
                    seed=first,
                    networks=[network],
                    metrics="fast",
                )
                curve[number] = rows[network]["fid"]
            best = min(curve, key=lambda number: curve[number])
            choice = {"best_steps": best, "fid_by_steps": {str(number): fid for number, fid in curve.items()}}
            decoding, first = with_steps(decoding, best), first + count
        rows = self.evaluator.measure_samples(model, decoding, num_images=count, seed=first)
        likelihood = self.evaluator.measure_likelihood(model, num_images=2 * count, seed=seed)
        kind = "exact" if model.pipe.transformer.mask_schedule is None else "elbo"
        numbers = {**collect_numbers(rows), "bits_per_token": float(likelihood[f"{kind}_bits_per_token"])}
        return numbers, choice

    def _measure_tokenizer(self, folders: RunFolders) -> dict[str, float]:
        """Measures the reconstructions of the val split."""
        tokenizer = load_tokenizer(folders.pretrained / "tokenizer")
        tokenizer.network.to(self.evaluator.device)
        extractors = [network.extractor for network in self.evaluator.networks.values()]
        options = TokenizerOptions(batch_size=self.options.batch_size)
        opened = OpenedTokenizer(folders, options, tokenizer, self.evaluator.data, extractors)
        numbers = measure_tokenizer_once(self.evaluator.ledger, opened, self.evaluator.bars)["numbers"]
        return {name: value for name, value in numbers.items() if name.partition("/")[0] in _OF_TOKENIZER}
