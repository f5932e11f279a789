"""The evaluator: it measures models and keeps the results in the ledger, so that nothing is measured twice.

The key of a ledger row consists of everything that determines its values: weights and configuration of the model, the
data, weights and reference of the feature network, the decoding, the number of images and the seed. Commit, date and
device are recorded with it, but are not part of the key.
"""

from __future__ import annotations

import datetime
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskgit_pl.data import ShardData
from maskgit_pl.data.manifest import Split
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.devices import describe_environment, device_name
from maskgit_pl.distributed import barrier, rank_and_world
from maskgit_pl.evaluation.classifier import LabelledImages, classification_accuracy
from maskgit_pl.evaluation.distances import class_agreement
from maskgit_pl.evaluation.extractors import (
    Extractor,
    ImageFeatures,
    extract,
    gather_rows,
    iter_image_batches,
    iter_row_batches,
)
from maskgit_pl.evaluation.ledger import REAL, Ledger, Row, digest_of, shorten_digest
from maskgit_pl.evaluation.likelihood import (
    encode_real_grids,
    encode_real_images,
    exact_nll,
    masked_nll,
    negative_elbo,
)
from maskgit_pl.evaluation.metrics import (
    DEVIATION,
    MOST_GRIDS,
    ComparedImages,
    FeatureMetric,
    Metrics,
    TokenGrids,
    compute_metrics,
    computed_metrics,
    known_metrics,
)
from maskgit_pl.evaluation.options import CLASSIFIER, CASConfig, decoding_key
from maskgit_pl.evaluation.reference import ArrayFile, Reference, draw_images, open_samples, split_digest
from maskgit_pl.masking import MaskSampler
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import BulkOptions, generate_many
from maskgit_pl.pretrained.networks import PretrainedTokenizer, fingerprint
from maskgit_pl.processes import Bars, no_bars

_OWN_COLUMNS = ("model", "max_steps", "seed")  # fields of ``CASConfig`` that have a column of their own
# Columns of a row of real images, in place of those of a model and a decoding.
_NO_MODEL = {"model": REAL, "run": "", "mask_schedule": "", "parameters": None, "tokenizer": "", "transformer": ""}
_NO_DECODING: dict[str, Any] = {"num_steps": None, "decoding": None}
_REMARKS = ("run", "mask_schedule", "parameters", "reference_file", "purpose")  # columns outside of the key


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to measure, with what identifies its images in the ledger.

    Args:
        run: Name of the run.
        pipe: The model.
        pretrained: Folder that the model was read from.
        folder: Folder of the generated images, such as ``RUN/evaluation``.
    """

    run: str
    pipe: MaskGIT
    pretrained: Path
    folder: Path

    @property
    def kind(self) -> str:
        """The kind of the model in tables: "MaskGIT" or "autoregressive"."""
        return "MaskGIT" if self.pipe.transformer.mask_schedule is not None else "autoregressive"

    @property
    def tokenizer(self) -> PretrainedTokenizer | None:
        """The tokenizer; None for a model of tokens of another tokenizer."""
        return None if self.pipe.transformer.tokenizer_fingerprint is None else self.pipe.tokenizer

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The ledger columns that identify the model, with digests of all that determines its images."""
        tokenizer, transformer = self.tokenizer, self.pipe.transformer
        mask_schedule = transformer.mask_schedule
        # The same weights can be read with another configuration, e.g. another mask schedule, and give other images.
        config = {
            "tokenizer": None if tokenizer is None else asdict(tokenizer.network.config),
            "image_size": None if tokenizer is None else tokenizer.image_size,
            "transformer": asdict(transformer.network.config),
            "mask_schedule": repr(mask_schedule),
            "class_names": list(transformer.class_names),
            "dtype": str(next(transformer.network.parameters()).dtype),
        }
        networks: list[nn.Module] = [*([] if tokenizer is None else [tokenizer.network]), transformer.network]
        return {
            "model": self.kind,
            "run": self.run,
            "mask_schedule": "" if mask_schedule is None else repr(mask_schedule),
            "parameters": sum(parameter.numel() for network in networks for parameter in network.parameters()),
            "tokenizer": None if tokenizer is None else shorten_digest(tokenizer.fingerprint),
            "transformer": shorten_digest(fingerprint(self.pretrained / "transformer")),
            "config": shorten_digest(digest_of(config)),
        }

    def decoding_key(self, decoding: DecodingConfig) -> dict[str, Any]:
        """Returns the ledger key of images: that of the decoding, with the negative model if any."""
        key, negative = decoding_key(decoding), self.pipe.negative_model
        if negative is not None and any(decoding.scales()):  # without guidance it changes nothing
            key["negative_model"] = shorten_digest(negative.digest)
        return key

    def samples_file(self, decoding: DecodingConfig, *, num_images: int, seed: int) -> Path:
        """Returns the file of generated images, whose name is a hash of everything that determines them."""
        digests = {name: self.identity[name] for name in ("tokenizer", "transformer", "config")}
        key = [digests, self.decoding_key(decoding), num_images, seed, "tokens"]  # which older files lack
        return self.folder / f"samples-{shorten_digest(digest_of(key))}.npz"


@dataclass(frozen=True)
class FeatureMetrics:
    """A feature network with the real images that it compares with."""

    extractor: Extractor
    reference: Reference
    labels: Tensor | None = None  # (m,) int64: classes of the real images; None if unknown

    @property
    def columns(self) -> dict[str, Any]:
        """The ledger columns that identify the network and its reference."""
        features = self.reference.features
        return {
            "network": self.extractor.label,
            "judge": shorten_digest(self.extractor.digest),
            "knows_classes": self.extractor.knows_classes,
            "real_images": None if features is None else len(features),
            "reference_file": self.reference.file,
            "reference": shorten_digest(self.reference.digest),
        }

    @property
    def accuracy(self) -> float | None:
        """The accuracy of the data's classifier on the real val images; None for other networks and for a file."""
        features = self.reference.features
        if features is None or features.logits is None or self.labels is None or self.extractor.label != CLASSIFIER:
            return None
        return class_agreement(features.logits.argmax(1), self.labels)

    def choose(self, amount: Metrics = "all", *, also: Sequence[str] = ()) -> dict[str, FeatureMetric]:
        """Returns the metrics that can be computed, by name; ``"fast"`` leaves out the slow ones.

        ``also`` are inputs beside features, such as ``tokens``, if this network is the one that computes their metrics.
        """
        available = {
            "tokens": "tokens" in also,
            "pixels": "pixels" in also,
            "features": True,
            "labels": True,
            "logits": self.extractor.knows_classes,
            "spatial": self.reference.spatial is not None,
            "real_features": self.reference.features is not None,
            "real_labels": self.labels is not None,
        }
        return {
            name: metric
            for name, metric in computed_metrics().items()
            if all(available[need] for need in metric.needs)
            and (metric.of_network or self.extractor.label == CLASSIFIER or {*metric.needs} & {*also})
            and (metric.is_fast or amount == "all")
        }


def compare_images(
    read: Callable[[range], Tensor],
    labels: Tensor,
    network: FeatureMetrics,
    *,
    pixels: FeatureMetrics | None = None,
    tokens: TokenGrids | None = None,
    on_images: Callable[[int], object] = lambda count: None,
) -> ComparedImages:
    """Extracts the features of images in one pass, for their metrics; the ranks share the work.

    Args:
        read: Function that returns the (b, C, H, W) uint8 images of a range of rows.
        labels: (n,) int64: requested classes.
        network: The feature network.
        pixels: The pixel network; None if no metric needs it.
        tokens: The tokens of the images; None if no metric needs them.
        on_images: Called after each batch with its number of images.
    """
    judges = [network] if pixels is None else [network, pixels]
    batches = iter_image_batches(read, len(labels))
    features = extract([judge.extractor for judge in judges], batches, on_images=on_images).values()
    compared, *in_pixels = (
        ComparedImages(of_images, judge.reference, labels, judge.labels)
        for of_images, judge in zip(features, judges, strict=True)
    )
    return replace(compared, tokens=tokens, pixels=in_pixels[0] if in_pixels else None)


@dataclass(eq=False)
class Evaluator:
    """An evaluator of models on the same data with the same networks.

    Each ``measure_*`` method returns the row of the ledger if it exists, else it measures and adds the row.

    Args:
        data: The real images.
        dataset: Name of the data, for tables.
        networks: Feature networks by label; none for tokens of another tokenizer.
        ledger: Ledger of the measurements.
        bars: Progress bars.
        batch_size: Images per batch of generation; it does not change results.
        device: Device of the networks and of the training of the CAS classifier.
        pixels: The pixel network with the val split; None leaves out the metrics of pixels.
    """

    data: ShardData
    dataset: str
    networks: Mapping[str, FeatureMetrics]
    ledger: Ledger
    bars: Bars = no_bars
    batch_size: int = 100
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pixels: FeatureMetrics | None = None
    # That of the running code; the user may commit other code before the measurement ends.
    _commit: str | None = field(default_factory=lambda: describe_environment()["commit"], init=False)

    def measure_samples(
        self,
        model: EvaluatedModel,
        decoding: DecodingConfig,
        *,
        num_images: int,
        seed: int,
        networks: Sequence[str] | None = None,
        metrics: Metrics = "all",
        keep: bool = False,
        purpose: str | None = None,
    ) -> dict[str, Row]:
        """Measures generated images of all classes in the features of each network, and returns rows by its label.

        Args:
            model: The model.
            decoding: Decoding of the images.
            num_images: Number of images.
            seed: Seed of the first image; image i has ``seed + i``.
            networks: Labels of the feature networks; None is all.
            metrics: ``"fast"`` leaves out the slow ones; a row with all metrics also serves a request for the fast.
            keep: True to keep the file of generated images for the next measurement.
            purpose: Remark in a new row; it is not part of the key.
        """
        is_new = False

        def generate() -> LabelledImages:
            nonlocal is_new
            is_new = True
            title = f"{model.run}: {num_images} images, T = {decoding.num_steps}"
            return self.generate(model, decoding, num_images=num_images, seed=seed, title=title)

        columns = self._columns(model, num_images, seed, decoding)
        columns |= {} if purpose is None else {"purpose": purpose}
        rows = self._measure("samples", columns, generate, networks, metrics, model.tokenizer)
        if is_new and not keep:
            delete_generated(model.samples_file(decoding, num_images=num_images, seed=seed))
        return rows

    def generate(
        self, model: EvaluatedModel, decoding: DecodingConfig, *, num_images: int, seed: int, title: str
    ) -> LabelledImages:
        """Generates images of all classes, evenly distributed, into a file, which exists until ``delete_generated``.

        The ranks share the work. Images in the file are kept.

        Returns:
            The images, sorted by class. The remark ``seconds_per_image``, for tokens and pixels, is that of this rank,
            and None if the images already existed.
        """
        if model.tokenizer is None:
            return self._generate_tokens(model, decoding, num_samples=num_images, seed=seed, title=title)
        rank, world_size = rank_and_world()
        file = model.samples_file(decoding, num_images=num_images, seed=seed)
        options = BulkOptions(
            num_images=num_images,
            seed=seed,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            decoding=decoding,
            keep_tokens=True,
        )
        start = time.perf_counter()
        result = generate_many(model.pipe, file, options, on_images=self.bars(title, num_images))
        seconds = time.perf_counter() - start
        barrier()  # the last rank to finish has assembled the file from the parts
        arrays = ArrayFile(file, thing="samples")
        samples = open_samples(arrays, channels=model.pipe.tokenizer.channels)
        assert samples.labels is not None  # generate_many writes them
        tokens = torch.from_numpy(arrays.read("tokens", (num_images, None), np.integer).astype(np.int64))
        remarks = {"seconds_per_image": seconds / result.made if result.made else None}
        return LabelledImages(samples.read, samples.labels, remarks, tokens)

    def _generate_tokens(
        self, model: EvaluatedModel, decoding: DecodingConfig, *, num_samples: int, seed: int, title: str
    ) -> LabelledImages:
        labels = torch.arange(num_samples) * self.data.num_classes // num_samples  # as those of ``generate_many``
        bar, batches = self.bars(title, num_samples), []
        for rows in iter_row_batches(num_samples, batch_size=self.batch_size):
            index = torch.arange(rows.start, rows.stop)
            tokens = model.pipe.generate_tokens(labels[index].tolist(), seed=seed + rows.start, decoding=decoding)
            batches.append({"index": index, "tokens": tokens.flatten(1)})
            bar(len(index))
        tokens = gather_rows(batches)["tokens"]
        return replace(_in_memory(tokens, labels), tokens=tokens)

    def measure_real(
        self,
        *,
        num_images: int,
        model: EvaluatedModel | None = None,
        networks: Sequence[str] | None = None,
        metrics: Metrics = "all",
    ) -> dict[str, Row]:
        """Measures random images of the train split instead of generated ones; see ``measure_samples``.

        Their distances are a floor: the value that perfect samples of this number would have. If the split
        has fewer than ``num_images``, all are measured. The class agreement is the accuracy of the classifier on
        the val images, which it has not been trained on. The metrics of tokens need a model, whose tokenizer makes
        them.
        """
        count = min(num_images, self.data.summary.samples["train"])
        columns = self._columns(None, count, 0, None)
        tokenizer = None if model is None else model.tokenizer
        if tokenizer is not None:
            columns["tokenizer"] = shorten_digest(tokenizer.fingerprint)

        def read() -> LabelledImages:
            images, labels = self.read_real_images("train", count)
            tokens = None if self.networks else images[:MOST_GRIDS]  # without networks, the data are tokens
            if tokenizer is not None:
                tokens = tokenizer.encode(images[:MOST_GRIDS], batch_size=self.batch_size)
            return replace(_in_memory(images, labels), tokens=tokens)

        return self._measure("samples", columns, read, networks, metrics, tokenizer)

    # Usually one entry per split: the networks of a measurement use the same images one after another.
    @lru_cache(maxsize=2)  # noqa: B019  # the cache keeps the evaluator alive, which a command needs to its end
    def read_real_images(self, split: Split, count: int) -> tuple[Tensor, Tensor]:
        """Reads random images of a split, the same in every call, at most all of it; see ``draw_images``.

        Returns:
            (n, C, H, W) uint8 images and (n,) int64 labels.
        """
        order, count = draw_images(self.data, split, count)
        batch = self.data.batches(split, order).__getitems__(range(count))
        return batch.content, batch.labels

    def measure_likelihood(self, model: EvaluatedModel, *, num_images: int, draws: int = 4, seed: int = 0) -> Row:
        """Measures the likelihood of real val images, at most all of the split.

        A MaskGIT gets the masked NLL and the order-agnostic bound, from ``draws`` masks per image that follow
        from ``seed``; an autoregressive model gets the exact NLL.
        """
        count = min(num_images, self.data.summary.samples["val"])
        columns = {**self._model_columns(model), "num_images": count, "seed": seed, "draws": draws}
        return self._once("likelihood", columns, lambda: self._measure_nll(model, count, draws, seed))

    def _measure_nll(self, model: EvaluatedModel, count: int, draws: int, seed: int) -> dict[str, float]:
        transformer = model.pipe.transformer
        real = encode_real_images(model.tokenizer, self.data, limit=count, batch_size=self.batch_size)
        tokens, labels = (tensor.to(model.pipe.device) for tensor in real)
        bar = self.bars(f"{model.run}: likelihood", (1 if transformer.mask_schedule is None else 2) * count)
        options: dict[str, Any] = {"batch_size": self.batch_size, "on_images": bar}
        bits = 1 / (math.log(2) * tokens.shape[1])  # per token, of the nats of an image
        if transformer.mask_schedule is None:
            return _estimate("exact_bits_per_token", exact_nll(transformer.network, tokens, labels, **options), bits)
        options["draws"] = draws
        sampler = MaskSampler(transformer.mask_schedule, seed)
        part = masked_nll(transformer.network, tokens, labels, sampler=sampler, **options)
        bound = negative_elbo(transformer.network, tokens, labels, seed=seed, **options)
        return {**_estimate("masked_nll", part), **_estimate("elbo_bits_per_token", bound, bits)}

    def measure_cas(
        self,
        model: EvaluatedModel | None,
        decoding: DecodingConfig | None,
        config: CASConfig,
        *,
        num_images: int,
        seed: int,
    ) -> Row:
        """Measures the classification accuracy score (CAS): a classifier trained on images, tested on real val images.

        It is trained on ``num_images`` generated images or, without model and decoding, real train images.
        """
        config = config.for_images(self.data.config.image_size)

        def measure() -> dict[str, Any]:
            source: LabelledImages | Tensor
            if model is None or decoding is None:
                # The same images as ``read_real_images``, by index: training reads them again in each epoch.
                order, count = draw_images(self.data, "train", num_images)
                source = order(range(count)).index
            else:
                title = f"{model.run}: {num_images} images for CAS"
                source = self.generate(model, decoding, num_images=num_images, seed=seed, title=title)
            bar = self.bars(f"CAS: {config.model}", config.max_steps)
            accuracy = classification_accuracy(
                source, self.data, config, on_step=lambda: bar(1), device=str(self.device)
            )
            return {"top1": accuracy.top1, "top5": accuracy.top5, "real_images": accuracy.images}

        # The remaining fields form one column, so that a new field of the configuration needs no new column.
        training = {name: value for name, value in asdict(config).items() if name not in _OWN_COLUMNS}
        columns = {
            **self._columns(model, num_images, seed, decoding),
            "classifier": config.model, "training_images": num_images, "training_steps": config.max_steps,
            "classifier_seed": config.seed, "training": training,
        }  # fmt: skip
        return self._once("cas", columns, measure)

    def measure_images(
        self,
        kind: str,
        model: EvaluatedModel,
        make: Callable[[], tuple[Tensor, Tensor]],
        *,
        num_images: int,
        seed: int,
        columns: Mapping[str, Any],
    ) -> dict[str, Row]:
        """Measures images that are made with a model in another way, such as edited ones; returns rows by network.

        Args:
            kind: Kind of the measurement in the ledger.
            model: The model; its own decoding is part of the key.
            make: Function that returns (n, C, H, W) uint8 images and (n,) int64 labels, called if a row is missing.
            num_images: Number of images.
            seed: Seed of the first image.
            columns: Further columns of the key, and columns that replace those of the model.
        """

        def read() -> LabelledImages:
            images, labels = make()
            return _in_memory(images, labels)

        return self._measure(kind, {**self._columns(model, num_images, seed, model.pipe.decoding), **columns}, read)

    def _measure(
        self,
        kind: str,
        columns: Mapping[str, Any],
        make: Callable[[], LabelledImages],
        networks: Sequence[str] | None = None,
        amount: Metrics = "all",
        tokenizer: PretrainedTokenizer | None = None,
    ) -> dict[str, Row]:
        """Returns the row of each network, and measures the missing ones on the same images, which ``make`` makes.

        ``tokenizer`` is that of the tokens of the images; None if they have none.
        """
        if not self.networks:
            return {"tokens": self._measure_tokens(kind, columns, make)}
        images: LabelledImages | None = None
        rows: dict[str, Row] = {}
        first = CLASSIFIER if CLASSIFIER in self.networks else next(iter(self.networks))
        for label in self.networks if networks is None else networks:
            network = self.networks[label]
            row_columns = {**columns, **network.columns}
            if kind == "samples":  # the split is that of the reference; a file has none
                row_columns["split"] = network.reference.split
            inputs = {"tokens": tokenizer, "pixels": self.pixels} if label == first else {}
            chosen = network.choose(amount, also=[name for name, owner in inputs.items() if owner is not None])
            row = self._find(kind, row_columns, chosen)
            if row is None:
                images = images or make()
                needs = {need for metric in chosen.values() for need in metric.needs}
                tokens = None
                if tokenizer is not None and "tokens" in needs:
                    assert images.tokens is not None
                    tokens = self._real_grids(tokenizer).with_sampled(images.tokens)
                compared = compare_images(
                    images.read,
                    images.labels,
                    network,
                    pixels=self.pixels if "pixels" in needs else None,
                    tokens=tokens,
                    on_images=self.bars(f"features of {label}", len(images.labels)),
                )
                numbers = compute_metrics(chosen, compared)
                if columns["model"] == REAL and "class_agreement" in numbers:
                    # A classifier may know its training images by heart.
                    numbers["class_agreement"] = network.accuracy
                row = self._add(kind, {**columns, **images.remarks, **row_columns, **numbers})
            rows[label] = row
        return rows

    def _measure_tokens(self, kind: str, columns: Mapping[str, Any], make: Callable[[], LabelledImages]) -> Row:
        """Returns the row of the metrics that read nothing but tokens and classes."""
        known, most = computed_metrics(), {"tokens", "labels"}
        chosen = {name: metric for name, metric in known.items() if {"tokens"} <= {*metric.needs} <= most}
        row = self._find(kind, columns, chosen)
        if row is None:
            made = make()
            assert made.tokens is not None
            nothing = ImageFeatures("tokens", torch.zeros(len(made.labels), 0))
            grids = self._real_grids(None).with_sampled(made.tokens)
            compared = ComparedImages(nothing, Reference.from_features(nothing), made.labels, tokens=grids)
            row = self._add(kind, {**columns, **compute_metrics(chosen, compared)})
        return row

    @lru_cache(maxsize=1)  # noqa: B019  # see ``read_real_images``
    def _real_grids(self, tokenizer: PretrainedTokenizer | None) -> TokenGrids:
        return encode_real_grids(tokenizer, self.data, batch_size=self.batch_size)

    def _once(self, kind: str, columns: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> Row:
        return self._find(kind, columns) or self._add(kind, {**columns, **measure()})

    def _find(self, kind: str, columns: Mapping[str, Any], having: Collection[str] = ()) -> Row | None:
        key = {name: value for name, value in columns.items() if name not in _REMARKS}
        return self.ledger.find(kind, key, having=having)

    def _add(self, kind: str, row: Mapping[str, Any]) -> Row:
        date = datetime.date.today().isoformat()
        return self.ledger.add(kind, {**row, "commit": self._commit, "date": date, "device": device_name(self.device)})

    def _model_columns(self, model: EvaluatedModel | None) -> dict[str, Any]:
        if model is None:
            # Data, image size and channels determine real images.
            of = {**_NO_MODEL, "config": shorten_digest(split_digest(self.data, "train"))}
        else:
            of = model.identity
        return {**of, "dataset": self.dataset, "data": shorten_digest(self.data.summary.fingerprint), "split": "val"}

    def _columns(
        self, model: EvaluatedModel | None, num_images: int, seed: int, decoding: DecodingConfig | None
    ) -> dict[str, Any]:
        columns = _NO_DECODING
        if model is not None and decoding is not None:
            columns = {"num_steps": decoding.num_steps, "decoding": model.decoding_key(decoding)}
        return {**self._model_columns(model), "num_images": num_images, "seed": seed, **columns}


def collect_numbers(rows: Mapping[str, Row]) -> dict[str, float]:
    """Returns the values of rows by name, such as ``fid/classifier`` and ``diversity``."""
    # Values of images come before those of networks, and deviations last.
    metrics = sorted(known_metrics().items(), key=lambda item: item[1].of_network)
    return {
        f"{name}{suffix}/{label}" if metric.of_network else f"{name}{suffix}": row[f"{name}{suffix}"]
        for label, row in rows.items()
        for suffix in ("", DEVIATION)
        for name, metric in metrics
        if row.get(f"{name}{suffix}") is not None
    }


def _estimate(name: str, values: Tensor, factor: float = 1) -> dict[str, float]:
    """Returns the mean of (n,) float64 values of images, n >= 2, and its standard error, times a factor."""
    error = float(values.std()) / math.sqrt(len(values))
    return {name: factor * float(values.mean()), f"{name}_error": factor * error}


def _in_memory(images: Tensor, labels: Tensor) -> LabelledImages:
    return LabelledImages(lambda rows: images[rows.start : rows.stop], labels)


def delete_generated(file: Path) -> None:
    """Deletes generated images, with the parts that a killed process has left of them."""
    if rank_and_world()[0] == 0:
        file.unlink(missing_ok=True)
        shutil.rmtree(file.with_name(f"{file.name}.parts"), ignore_errors=True)
    barrier()
