"""Runs an ablation: measures the time of a step, trains each variant with each seed, and measures the models.

``api`` makes the page of the rows. Every result is a row of the ledger, so that an ablation that was killed continues
where it was, and its page can be made again without training.

1. Resolve all variants, and open data and feature networks. Errors of the command are raised here.
2. If the budget is in seconds, train each variant for a few steps, and divide the budget by the seconds of a step.
3. For each seed and each variant: train it, unless its run is finished, and measure it, unless the ledger has the rows.
4. Add a row of the ablation. An error of a variant becomes a row, too, and the other variants continue.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskgit_pl.checks import ImageSize, as_image_size
from maskgit_pl.distributed import default_device, describe_environment, device_name, find_device
from maskgit_pl.errors import PreemptedError, describe_error, exit_code_of
from maskgit_pl.evaluation.cache import digest_of, shorten_digest
from maskgit_pl.evaluation.evaluator import Evaluator, collect_numbers
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.metrics import metric_name
from maskgit_pl.evaluation.opening import create_evaluated_model, open_images, open_model, open_networks
from maskgit_pl.evaluation.options import describe_decoding, round_to_classes
from maskgit_pl.evaluation.reconstruction import measure_reconstruction
from maskgit_pl.evaluation.reference import iter_real_batches
from maskgit_pl.evaluation.reports.options import AblationProtocol, ReportOptions
from maskgit_pl.evaluation.run_folders import RunFolders, data_name
from maskgit_pl.pipeline.pretrained import fingerprint, load_tokenizer, read_config
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.runs.ablation_plan import AblationConfig
from maskgit_pl.runs.ablation_runs import AblationRuns, ResolvedVariant, TrainedRun
from maskgit_pl.training.speed import TrainingTime

__all__ = ["Failure", "run_ablation"]

log = logging.getLogger(__name__)

_MOST_LARGER = 4  # ratio of parameters that gives a warning
_DRAWS = 4  # masks per image for likelihoods
_OF_SAMPLES = ("fid", "kid", "precision", "recall", "class_agreement", "diversity", "seconds_per_image")
_OF_TOKENIZER = ("rfid", "psnr_db", "ssim", "codebook_usage", "perplexity")


@dataclass(frozen=True)
class Failure:
    """A variant that could not be trained or measured.

    Args:
        label: Name of the variant.
        seed: Training seed; None for the training that measures the time of a step.
        text: Reason, for the user.
        exit_code: Exit code of the error.
    """

    label: str
    seed: int | None
    text: str
    exit_code: int

    def __str__(self) -> str:
        where = "pilot" if self.seed is None else f"seed {self.seed}"
        return f"{self.label}, {where}: {self.text}"


def run_ablation(
    config: AblationConfig, options: ReportOptions, *, name: str, command: str, bars: Bars = no_bars
) -> list[Failure]:
    """Trains and measures what the ledger lacks.

    Args:
        config: The ablation.
        options: Number of images, networks, folders and other options.
        name: Name of the ablation.
        command: Command that repeats it, for the page.
        bars: Progress bars.

    Returns:
        The variants that failed.

    Raises:
        FileNotFoundError: if a recipe, the data or the tokenizer do not exist.
        ValueError: if a value of a variant or an option is wrong.
        PreemptedError: if a training is stopped by a signal. The same call resumes.
    """
    runs = AblationRuns.open(config)  # 1.
    _log_plan(runs)
    ablation = _Ablation(runs, options, name, bars)
    protocol = ablation.describe(command)
    failures: list[Failure] = []
    steps = ablation.measure_budgets(failures)  # 2.
    for seed in config.seeds:  # 3.
        for place, variant in enumerate(runs.variants):
            if variant.label not in steps:
                continue
            row: dict[str, Any] = {"place": place, "variant": variant.label, "seed": seed}
            try:
                row |= ablation.measure(variant, seed, steps[variant.label])
            except (PreemptedError, KeyboardInterrupt):
                raise
            except Exception as error:  # a variant must not lose the others
                failures.append(_failure_of(error, variant.label, seed))
                row |= {"numbers": {}, "failure": failures[-1].text}
            ablation.record(row, protocol)  # 4.
    return failures


def _log_plan(runs: AblationRuns) -> None:
    """Logs the variants, and warns of one that is much larger or smaller than the reference."""
    reference = runs.variants[runs.reference]
    log.info("%d variants, %d seeds, %d trainings", len(runs.variants), len(runs.config.seeds), runs.num_trainings)
    for each in runs.variants:
        log.info("%s: %.2fM parameters", each.label, each.parameters / 1e6)
        if not 1 / _MOST_LARGER < each.parameters / reference.parameters < _MOST_LARGER:
            log.warning(
                "variant %s has %.2fM parameters and %s %.2fM: another backbone starts from its own default sizes; set "
                "them with a mapping, such as --vary 'model.network={backbone: adaln, embed_dim: 128, depth: 4}', or a "
                "recipe",
                each.label, each.parameters / 1e6, reference.label, reference.parameters / 1e6,
            )  # fmt: skip


def _failure_of(error: Exception, label: str, seed: int | None) -> Failure:
    code = exit_code_of(error)
    log.error("%s", describe_error(error, f"ablation: variant {label}").rstrip())
    return Failure(label, seed, f"{error}" if str(error) else type(error).__name__, code)


class _Ablation:
    """The state of an ablation: its runs, its evaluator and its ledger."""

    def __init__(self, runs: AblationRuns, options: ReportOptions, name: str, bars: Bars) -> None:
        self.runs, self.options, self.name, self.bars = runs, options, name, bars
        if self.stage == "tokenizer" and options.reference is not None:
            raise ValueError("--reference must not be given with --stage tokenizer, which compares with the val split")
        self.device = find_device(options.device)
        self.ledger = Ledger(options.results / FILE_NAME)
        self.evaluator = self._open_evaluator()
        self.num_images = round_to_classes(options.num_images, self.evaluator.data.num_classes)
        last = options.seed + (max(runs.config.seeds) + 1) * self.num_images
        if last > 2**32:
            raise ValueError(
                f"--seeds must be small enough for an image seed below 2**32 (seed x --num-images), got {last}"
            )

    @property
    def stage(self) -> str:
        """The stage that the ablation trains."""
        return self.runs.config.stage

    def _open_evaluator(self) -> Evaluator:
        size, channels = self._image_format()
        # All runs of the data share its classifier, not only those of ablations.
        folders = self._folders(self.runs.config.runs)
        data = open_images(self.runs.shards, size, channels, num_workers=self.options.num_workers)
        round_to_classes(self.options.num_images, data.num_classes)
        networks = open_networks(
            folders,
            data,
            features=self.options.features,
            reference=self.options.reference,
            device=self.device,
            bars=self.bars,
        )
        return Evaluator(
            data,
            dataset=data_name(self.runs.shards),
            networks=networks,
            ledger=self.ledger,
            bars=self.bars,
            batch_size=self.options.batch_size,
            device=self.device,
        )

    def _image_format(self) -> tuple[ImageSize, int]:
        """Returns size and channels of the images."""
        if self.runs.tokenizer is not None:
            config = read_config(self.runs.tokenizer, "tokenizer")
            return as_image_size(config["image_size"]), config["network"]["in_channels"]
        data = self.runs.variants[self.runs.reference].recipe["data"]
        return as_image_size(data["image_size"]), data["in_channels"]

    def _folders(self, run: Path) -> RunFolders:
        real = self.runs.config.runs / f"{self.runs.shards.absolute().name}-classifier"
        judge = self.options.classifier or real / "small"
        return RunFolders(run / "pretrained", run, self.runs.shards, judge, real)

    def describe(self, command: str) -> AblationProtocol:
        """Returns the protocol of the rows."""
        config, variants = self.runs.config, self.runs.variants
        reference = variants[self.runs.reference]
        first, network = next(iter(self.evaluator.networks.items()))
        origin = network.reference.origin
        assert origin is not None
        count = network.columns["real_images"]
        of = origin.file or f"the {origin.split} split"
        return AblationProtocol(
            command=command,
            dataset=self.evaluator.dataset,
            stage=self.stage,
            variants=tuple(each.label for each in variants),
            reference=reference.label,
            base=dict(self.runs.base),
            seeds=config.seeds,
            budget=str(config.budget),
            threads=self.runs.threads,
            num_images=self.num_images,
            first=first,
            compared=f"{count} real images of {of}" if count else f"the statistics of {of}",
            decoding="" if reference.decoding is None else describe_decoding(reference.decoding),
            machine=_describe_machine(self.device),
        )

    def measure_budgets(self, failures: list[Failure]) -> dict[str, int]:
        """Returns the number of steps of each variant by label, without those whose pilot fails."""
        config = self.runs.config
        found: dict[str, int] = {}
        for variant in self.runs.variants:
            if config.budget.unit == "steps":
                found[variant.label] = variant.max_steps
                continue
            try:
                per_step = self._seconds_per_step(variant)
            except (PreemptedError, KeyboardInterrupt):
                raise
            except Exception as error:  # a variant must not lose the others
                failures.append(_failure_of(error, variant.label, None))
                continue
            found[variant.label] = config.budget.steps(per_step)
            log.info("%s: %.4f s per step, %d steps", variant.label, per_step, found[variant.label])
        return found

    def _seconds_per_step(self, variant: ResolvedVariant) -> float:
        """Returns the seconds of a step, measured now or recorded on the same kind of device."""
        device = self._training_device(variant)
        recipe = shorten_digest(digest_of([variant.digest, self.runs.threads]))
        key = {"recipe": recipe, "device": device, "steps": self.runs.config.pilot_steps}
        row = self.ledger.find("pilot", key)
        if row is None:
            log.info("pilot of %s: %d steps", variant.label, self.runs.config.pilot_steps)
            time = self.runs.pilot(variant)
            assert time.cost_per_step is not None  # a pilot is longer than the warm-up
            row = self.ledger.add("pilot", {**key, "seconds_per_step": time.cost_per_step, "variant": variant.label})
        return float(row["seconds_per_step"])

    def _training_device(self, variant: ResolvedVariant) -> str:
        accelerator = variant.recipe["trainer"]["accelerator"]
        device = torch.device("cpu" if accelerator == "cpu" else default_device())
        return device_name(device)

    def measure(self, variant: ResolvedVariant, seed: int, max_steps: int) -> dict[str, Any]:
        """Trains a variant with one seed, and returns the columns of its row."""
        run = self.runs.train(variant, seed, max_steps)
        numbers: dict[str, float] = {}
        if self.stage == "tokenizer":
            numbers |= self._measure_tokenizer(run)
        if self.stage == "transformer" or self.runs.stage_2 is not None:
            numbers |= self._measure_samples(run, variant, seed)
        columns: dict[str, Any] = {"run": run.folder.name, "numbers": numbers, "parameters": variant.parameters}
        columns |= {"max_steps": max_steps, "global_batch": str(variant.recipe["data"]["global_batch"])}
        if run.time is not None:
            columns |= _describe_time(run.time)
        if self.runs.config.budget.unit == "seconds":
            columns["seconds_per_step"] = self._seconds_per_step(variant)
            columns["planned_seconds"] = columns["seconds_per_step"] * max_steps
        return columns

    def _measure_samples(self, run: TrainedRun, variant: ResolvedVariant, seed: int) -> dict[str, float]:
        """Measures generated images and the likelihood of real ones, with noise that differs between seeds."""
        folders = self._folders(run.folder)
        model = create_evaluated_model(folders, open_model(folders, self.device))
        decoding = variant.decoding or model.pipe.decoding
        first = self.options.seed + seed * self.num_images
        rows = self.evaluator.measure_samples(model, decoding, num_images=self.num_images, seed=first)
        found = {name: value for name, value in collect_numbers(rows).items() if name.partition("/")[0] in _OF_SAMPLES}
        likelihood = self.evaluator.measure_likelihood(model, num_images=2 * self.num_images, draws=_DRAWS, seed=seed)
        kind = "exact" if model.pipe.transformer.mask_schedule is None else "elbo"
        return {**found, "bits_per_token": float(likelihood[f"{kind}_bits_per_token"])}

    def _measure_tokenizer(self, run: TrainedRun) -> dict[str, float]:
        """Measures the reconstructions of the val split, with a ledger row for each network."""
        evaluator, folder = self.evaluator, run.pretrained / "tokenizer"
        data = evaluator.data
        keys = {
            "dataset": evaluator.dataset, "data": shorten_digest(data.summary.fingerprint), "split": "val",
            "tokenizer": fingerprint(folder), "config": shorten_digest(digest_of(read_config(folder, "tokenizer"))),
            "num_images": data.summary.samples["val"],
        }  # fmt: skip
        rows = {
            label: self.ledger.find("reconstruction", {**keys, **network.columns})
            for label, network in evaluator.networks.items()
        }
        if any(row is None for row in rows.values()):
            tokenizer = load_tokenizer(folder)
            tokenizer.network.to(self.device)
            measured = measure_reconstruction(
                tokenizer,
                iter_real_batches(data, "val"),
                extractors=[network.extractor for network in evaluator.networks.values()],
                references={label: network.reference for label, network in evaluator.networks.items()},
                on_images=self.bars(f"{run.folder.name}: reconstructing", data.summary.samples["val"]),
            )
            numbers = {name: value for name, value in measured.items() if name in _OF_TOKENIZER}
            for label, network in evaluator.networks.items():
                row = {
                    **keys,
                    **network.columns,
                    **numbers,
                    "rfid": measured[metric_name("rfid", label)],
                    "run": run.folder.name,
                }
                rows[label] = self.ledger.add("reconstruction", row)
        return _collect_reconstruction({label: row for label, row in rows.items() if row is not None})

    def record(self, row: Mapping[str, Any], protocol: AblationProtocol) -> None:
        """Adds a row of the ablation to the ledger, unless its last row is the same."""
        plan = shorten_digest(digest_of(protocol.key))
        real: dict[str, float] = {}
        if self.stage == "transformer" or self.runs.stage_2 is not None:
            real = collect_numbers(self.evaluator.measure_real(num_images=self.num_images))
        made = {
            **row, "ablation": self.name, "plan": plan, "real": real, "protocol": protocol.to_row(),
            "dataset": self.evaluator.dataset,
        }  # fmt: skip
        last = self.ledger.find("ablation", {name: made[name] for name in ("ablation", "plan", "variant", "seed")})
        if last is None or any(last.get(name) != value for name, value in made.items() if name in ("numbers", "run")):
            self.ledger.add("ablation", made)


def _collect_reconstruction(rows: Mapping[str, Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for label, row in rows.items():
        found |= {
            metric_name(name, label) if name == "rfid" else name: float(row[name])
            for name in _OF_TOKENIZER
            if row.get(name) is not None
        }
    return found


def _describe_time(time: TrainingTime) -> dict[str, Any]:
    kind = "CPU" if time.is_cpu else "device"
    return {"training_seconds": time.cost, "steps": time.steps, "kind": kind, "device": time.device}


def _describe_machine(device: str) -> str:
    found = describe_environment()
    names = [device_name(torch.device(device)), str(found["machine"]), f"{found['cpus']} CPUs"]
    versions = [f"{name} {found[name]}" for name in ("maskgit_pl", "torch", "lightning", "python")]
    commit = found["commit"]
    return ", ".join([*names, *versions, *([f"commit {commit[:12]}"] if commit else [])])
