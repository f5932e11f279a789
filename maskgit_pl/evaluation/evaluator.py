"""The evaluator: it measures models and keeps the results in the ledger, so that nothing is measured twice.

``evaluate``, ``compare``, ``tune``, ``table``, ``figure`` and ``ablation`` use it. The key of a ledger row consists of
everything that determines its values: weights and configuration of the model, the data, weights and reference of the
feature network, the decoding, the number of images and the seed. Commit, date and device are recorded with it, but are
not part of the key.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgit_pl.data import ShardData
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.distributed import describe_environment, device_name
from maskgit_pl.evaluation.classifier import TrainingImages, classification_accuracy
from maskgit_pl.evaluation.distances import Metrics
from maskgit_pl.evaluation.features import digest_of, model_digests, shorten_digest
from maskgit_pl.evaluation.generation import (
    GeneratedImages,
    Task,
    delete_generated,
    edit,
    generate_images,
    hide_pixels,
    num_candidates,
)
from maskgit_pl.evaluation.ledger import REAL, Ledger, Row, read_number
from maskgit_pl.evaluation.likelihood import (
    ImageLikelihood,
    MaskDraws,
    bind_conditions,
    encode_real_images,
    exact_nll,
    masked_nll,
    negative_elbo,
)
from maskgit_pl.evaluation.metric_names import NETWORK_METRICS, metric_name
from maskgit_pl.evaluation.metrics import FeatureMetrics
from maskgit_pl.evaluation.options import CASConfig, decoding_key
from maskgit_pl.evaluation.reference import ReferenceOrigin, draw_order, read_real_vectors
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.processes import Bars, no_bars

__all__ = [
    "EvaluatedModel",
    "Evaluator",
    "collect_numbers",
]

_READ_BATCH = 200  # real images per read
_OWN_COLUMNS = ("model", "max_steps", "seed")  # fields of ``CASConfig`` that have a column of their own
# Columns of a row of real images, in place of those of a model and a decoding.
_NO_MODEL = {"model": REAL, "run": "", "mask_schedule": "", "parameters": None, "tokenizer": "", "transformer": ""}
_NO_DECODING: dict[str, Any] = {"num_steps": None, "decoding": None}
_DEVIATIONS = ("kid_deviation", "is_deviation")
_OF_IMAGES = ("class_agreement", "diversity", "steps_taken", "seconds_per_image")  # values that belong to no network
_EDITED, _UNEDITED, _MASKED = "MaskGIT", "unedited", "masked"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to measure, with what identifies its images in the ledger.

    Args:
        run: Name of the run.
        pipe: The model.
        pretrained: Folder that the model was read from.
        folder: Folder of the generated images, such as ``RUN/evaluation``.
        acceptance: Rejection sampling of the generated images; None for all images. Edited images are not rejected.
    """

    run: str
    pipe: MaskGIT
    pretrained: Path
    folder: Path
    acceptance: Acceptance | None = None

    @property
    def kind(self) -> str:
        """The kind of the model in tables: "MaskGIT" or "autoregressive"."""
        return "MaskGIT" if self.pipe.transformer.mask_schedule is not None else "autoregressive"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The ledger columns that identify the model."""
        pipe = self.pipe
        networks: tuple[nn.Module, ...] = (pipe.tokenizer.network, pipe.transformer.network)
        return {
            "model": self.kind,
            "run": self.run,
            "mask_schedule": "" if pipe.transformer.mask_schedule is None else repr(pipe.transformer.mask_schedule),
            "parameters": sum(each.numel() for network in networks for each in network.parameters()),
            **{name: shorten_digest(digest) for name, digest in model_digests(pipe, self.pretrained).items()},
        }

    def decoding_key(self, decoding: DecodingConfig) -> dict[str, Any]:
        """Returns the ledger key of images: that of the decoding, and the negative model and acceptance if any."""
        key, negative = decoding_key(decoding), self.pipe.negative_model
        if self.acceptance is not None:
            key |= {"accept_rate": self.acceptance.rate, "classifier": shorten_digest(self.acceptance.digest)}
        if self.pipe.vector_pool is not None:
            key["vectors"] = shorten_digest(self.pipe.vector_pool.digest)
        if negative is not None and any(decoding.scales()):  # without guidance it changes nothing
            key["negative_model"] = shorten_digest(negative.digest)
        return key

    def samples_file(self, decoding: DecodingConfig, *, num_images: int, seed: int) -> Path:
        """Returns the file of generated images, whose name is a hash of everything that determines them."""
        digests = {name: self.identity[name] for name in ("tokenizer", "transformer", "config")}
        key = [digests, self.decoding_key(decoding), num_images, seed]
        return self.folder / f"samples-{shorten_digest(digest_of(key))}.npz"


class Evaluator:
    """An evaluator of models on the same data with the same networks.

    Each ``measure_*`` method returns the row of the ledger if it exists, else it measures and adds the row.

    Args:
        data: The real images.
        dataset: Name of the data, for tables.
        networks: Feature networks by label.
        ledger: Ledger of the measurements.
        bars: Progress bars.
        batch_size: Images per batch of generation; it does not change results.
        device: Device of the networks and of the training of the CAS classifier.

    Attributes:
        num_measured: Number of new measurements, without those that the ledger already held.
    """

    def __init__(
        self,
        data: ShardData,
        *,
        dataset: str,
        networks: Mapping[str, FeatureMetrics],
        ledger: Ledger,
        bars: Bars = no_bars,
        batch_size: int = 100,
        device: torch.device | str = "cpu",
    ) -> None:
        self.data, self.dataset, self.networks, self.ledger = data, dataset, networks, ledger
        self.bars, self.batch_size, self.device = bars, batch_size, torch.device(device)
        self.num_measured = 0
        # The commit of the running code; the user may commit other code before the measurement ends.
        self._commit = describe_environment()["commit"]

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
        """Measures generated images in the features of each network.

        Args:
            model: The model.
            decoding: Decoding of the images.
            num_images: Number of images of all classes.
            seed: Seed of the first image.
            networks: Labels of the feature networks; None is all.
            metrics: See ``distances``; a row with all metrics also serves a request for the fast ones.
            keep: True to keep the file of generated images for the next measurement.
            purpose: Remark in a new row; it is not part of the key.

        Returns:
            Rows by label of the network.
        """
        keys = self._key_columns(model, num_images, seed, decoding)
        rows = self._find_rows("samples", keys, networks, metrics)
        missing = [label for label, row in rows.items() if row is None]
        # The images are generated once for all networks, and not at all if every network has a row.
        if missing:
            title = f"{model.run}: {num_images} images, T = {decoding.num_steps}"
            generated = self.generate(model, decoding, num_images=num_images, seed=seed, title=title)
            taken = {"steps_taken": generated.steps_taken, "seconds_per_image": generated.seconds_per_image}
            remark = {} if purpose is None else {"purpose": purpose}
            for label in missing:
                rows[label] = self._measure(
                    "samples", keys | remark | taken, label, generated.read, generated.labels, metrics
                )
            if not keep:
                delete_generated(model.samples_file(decoding, num_images=num_images, seed=seed))
        return {label: row for label, row in rows.items() if row is not None}

    def generate(
        self, model: EvaluatedModel, decoding: DecodingConfig, *, num_images: int, seed: int, title: str
    ) -> GeneratedImages:
        """Generates the images of a measurement into a file, which exists until ``delete_generated``."""
        return generate_images(
            model.pipe,
            model.samples_file(decoding, num_images=num_images, seed=seed),
            decoding,
            num_images=num_images,
            seed=seed,
            batch_size=self.batch_size,
            acceptance=model.acceptance,
            on_images=self.bars(title, num_candidates(model.acceptance, num_images, len(model.pipe.class_names))),
        )

    def measure_real(
        self, *, num_images: int, networks: Sequence[str] | None = None, metrics: Metrics = "all"
    ) -> dict[str, Row]:
        """Measures random images of the train split instead of generated ones.

        Their distances are a floor: the value that perfect samples of this number would have.

        Args:
            num_images: Number of images, at most all of the train split.
            networks: Labels of the feature networks; None is all.
            metrics: See ``distances``.

        Returns:
            Rows by label of the network.
        """
        count = min(num_images, self.data.summary.samples["train"])
        keys = self._key_columns(None, count, 0, None)
        rows = self._find_rows("samples", keys, networks, metrics)
        for label, row in rows.items():
            if row is None:
                images, labels = self.read_real_images("train", count)
                rows[label] = self._measure("samples", keys, label, _make_reader(images), labels, metrics)
        return {label: row for label, row in rows.items() if row is not None}

    # Usually one entry per split: the networks of a measurement use the same images one after another.
    @lru_cache(maxsize=2)  # noqa: B019  # the cache keeps the evaluator alive, which a command needs to its end
    def read_real_images(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Reads random images of a split, the same in every call; see ``draw_order``.

        Args:
            split: ``train`` or ``val``.
            count: Number of images; all of the split if it has fewer.

        Returns:
            (n, C, H, W) uint8 images and (n,) int64 labels.
        """
        samples = self.data.summary.samples[split]
        batches = self.data.batches(split, draw_order(samples, count))  # type: ignore[arg-type]  # train or val
        count = min(count, samples)
        parts = [
            batches.__getitems__(range(first, min(first + _READ_BATCH, count)))
            for first in range(0, count, _READ_BATCH)
        ]
        return torch.cat([part.content for part in parts]), torch.cat([part.labels for part in parts])

    def measure_likelihood(self, model: EvaluatedModel, *, num_images: int, draws: int, seed: int = 0) -> Row:
        """Measures the likelihood of real val images.

        Args:
            model: The model. A MaskGIT gets the masked NLL and the order-agnostic bound, an autoregressive model the
                exact NLL.
            num_images: Number of images, at most all of the val split.
            draws: Number of masks per image.
            seed: Seed of the masks.
        """
        count = min(num_images, self.data.summary.samples["val"])
        keys = {**self._model_columns(model), "num_images": count, "seed": seed, "draws": draws}
        row = self.ledger.find("likelihood", keys)
        return row or self._add("likelihood", {**keys, **self._measure_nll(model, count, draws, seed)})

    def _measure_nll(self, model: EvaluatedModel, count: int, draws: int, seed: int) -> dict[str, float]:
        transformer = model.pipe.transformer
        tokens, labels = encode_real_images(model.pipe, self.data, limit=count, batch_size=self.batch_size)
        bar = self.bars(f"{model.run}: likelihood", (1 if transformer.mask_schedule is None else 2) * count)
        if transformer.mask_schedule is None:
            exact = exact_nll(transformer.network, tokens, labels, batch_size=self.batch_size, on_images=bar)
            return _in_bits("exact", exact)
        options: dict[str, Any] = {"draws": MaskDraws(draws, seed), "batch_size": self.batch_size, "on_images": bar}
        options["mask_token_id"] = transformer.network.config.mask_token_id
        vectors = read_real_vectors(self.data, model.pipe, num_images=count)
        network, conditions = bind_conditions(transformer.network, labels, vectors)
        part = masked_nll(network, tokens, conditions, mask_schedule=transformer.mask_schedule, **options)
        bound = negative_elbo(network, tokens, conditions, **options)
        return {"masked_nll": part.mean, "masked_nll_error": part.standard_error, **_in_bits("elbo", bound)}

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

        Args:
            model: Model that generates the training images; None for real train images.
            decoding: Decoding of the images; None for real ones.
            config: Network and training of the classifier.
            num_images: Number of training images.
            seed: Seed of the first generated image.
        """
        config = config.for_images(self.data.config.image_size)
        # The remaining fields form one column, so that a new field of the configuration needs no new column.
        training = {name: value for name, value in asdict(config).items() if name not in _OWN_COLUMNS}
        keys = {
            **self._key_columns(model, num_images, seed, decoding),
            "classifier": config.model, "training_images": num_images, "training_steps": config.max_steps,
            "classifier_seed": config.seed, "training": training,
        }  # fmt: skip
        row = self.ledger.find("cas", keys)
        if row is not None:
            return row
        name = REAL if model is None else model.run
        source: TrainingImages | Tensor
        if model is None or decoding is None:
            # The same images as ``read_real_images``, by index: training reads them again in each epoch.
            available = self.data.summary.samples["train"]
            source = draw_order(available, num_images)(range(min(num_images, available))).index
        else:
            title = f"{name}: {num_images} images for CAS"
            generated = self.generate(model, decoding, num_images=num_images, seed=seed, title=title)
            source = TrainingImages(generated.read_at, generated.shape, generated.labels, self.data.class_names)
        bar = self.bars(f"CAS: {config.model} on {name}", config.max_steps)
        found = classification_accuracy(source, self.data, config, on_step=lambda: bar(1), device=str(self.device))
        return self._add("cas", {**keys, "top1": found.top1, "top5": found.top5, "real_images": found.images})

    def measure_editing(self, model: EvaluatedModel, task: Task, *, num_images: int, seed: int) -> list[Row]:
        """Measures val images in three versions: edited, with the hidden part grey, and unedited.

        Args:
            model: The model; its own decoding is used.
            task: The editing task.
            num_images: Number of images, at most all of the val split.
            seed: Seed of the first image.

        Returns:
            A row for each version and network.
        """
        decoding, count = model.pipe.decoding, min(num_images, self.data.summary.samples["val"])
        rows: list[Row] = []
        images: dict[str, Tensor] = {}
        # The masked and the unedited images are the worst and the best case, which the edited ones lie between.
        for kind in (_EDITED, _MASKED, _UNEDITED):
            keys = self._key_columns(model, count, seed, decoding) | {"task": task, "model": kind}
            for label, row in self._find_rows("editing", keys).items():
                if row is None:
                    # The three versions are made together, when the first row is missing.
                    images = images or self._edit(model, task, count, seed)
                    labels = self.read_real_images("val", count)[1]
                    row = self._measure("editing", keys, label, _make_reader(images[kind]), labels)
                rows.append(row)
        return rows

    def _edit(self, model: EvaluatedModel, task: Task, count: int, seed: int) -> dict[str, Tensor]:
        originals, labels = self.read_real_images("val", count)
        options: dict[str, Any] = {"batch_size": self.batch_size, "on_images": self.bars(f"{model.run}: {task}", count)}
        vectors = read_real_vectors(self.data, model.pipe, num_images=count)
        edited = edit(task, model.pipe, originals, labels, vectors=vectors, seed=seed, **options)
        return {_EDITED: edited, _MASKED: hide_pixels(task, model.pipe.tokenizer, originals), _UNEDITED: originals}

    def _find_rows(
        self, kind: str, keys: Mapping[str, Any], networks: Sequence[str] | None = None, metrics: Metrics = "all"
    ) -> dict[str, Row | None]:
        """Returns the row of each network in the ledger, or None if it is missing."""
        rows: dict[str, Row | None] = {}
        for label in self.networks if networks is None else networks:
            # A row with the fast metrics must not answer a request for all of them.
            having = self.networks[label].last_metric(keys["num_images"], metrics)
            rows[label] = self.ledger.find(kind, {**keys, **self._network_columns(kind, label)}, having=having)
        return rows

    def _measure(
        self,
        kind: str,
        keys: Mapping[str, Any],
        label: str,
        read: Callable[[range], Tensor],
        labels: Tensor,
        metrics: Metrics = "all",
    ) -> Row:
        bar = self.bars(f"features of {label}", len(labels))
        numbers = self.networks[label](read, len(labels), labels, metrics=metrics, on_images=bar)
        return self._add(kind, {**keys, **self._network_columns(kind, label), **numbers})

    def _add(self, kind: str, row: Mapping[str, Any]) -> Row:
        self.num_measured += 1
        date = datetime.date.today().isoformat()
        return self.ledger.add(kind, {**row, "commit": self._commit, "date": date, "device": device_name(self.device)})

    def _network_columns(self, kind: str, label: str) -> dict[str, Any]:
        """Returns the columns of a network. For samples, the split is that of its reference; a file has none."""
        network = self.networks[label]
        assert network.reference.origin is not None
        split = {"split": network.reference.origin.split} if kind == "samples" else {}
        return {**network.columns, **split}

    def _model_columns(self, model: EvaluatedModel | None) -> dict[str, Any]:
        if model is None:
            # Data, image size and channels determine real images.
            of = {**_NO_MODEL, "config": shorten_digest(ReferenceOrigin.from_split(self.data, "train").digest)}
        else:
            of = model.identity
        return {**of, "dataset": self.dataset, "data": shorten_digest(self.data.summary.fingerprint), "split": "val"}

    def _key_columns(
        self, model: EvaluatedModel | None, num_images: int, seed: int, decoding: DecodingConfig | None
    ) -> dict[str, Any]:
        columns = _NO_DECODING
        if model is not None and decoding is not None:
            columns = {"num_steps": decoding.num_steps, "decoding": model.decoding_key(decoding)}
        return {**self._model_columns(model), "num_images": num_images, "seed": seed, **columns}


def collect_numbers(rows: Mapping[str, Row]) -> dict[str, float]:
    """Returns the values of a measurement by name, such as ``fid/classifier`` and ``diversity``.

    Args:
        rows: Rows by label of the network, see ``Evaluator.measure_samples``.
    """
    found = {}
    for label, row in rows.items():
        for name in (*_OF_IMAGES, *NETWORK_METRICS, *_DEVIATIONS):
            value = read_number(row, name)
            if value is not None:
                found[name if name in _OF_IMAGES else metric_name(name, label)] = value
    return found


def _in_bits(name: str, found: ImageLikelihood) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for unit, estimate in (("bits_per_token", found.bits_per_token), ("bits_per_image", found.bits_per_image)):
        numbers |= {f"{name}_{unit}": estimate.mean, f"{name}_{unit}_error": estimate.standard_error}
    return numbers


def _make_reader(images: Tensor) -> Callable[[range], Tensor]:
    return lambda rows: images[rows.start : rows.stop]
