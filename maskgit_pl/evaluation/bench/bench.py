"""What every model of a table is measured with: the data, the networks that judge, and the ledger that remembers.

A number is measured once. What decides it is the key of its row: the model's weights and configuration, the data, the
weights of the network that judges, the reference it compares with, the decoding, how many images and which seed; the
commit, the date and the device stand beside it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgit_pl.data import OnceThrough, ShardData, ShuffledStream
from maskgit_pl.data.order import Order
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.distributed import rank_and_world
from maskgit_pl.evaluation.bench.generation import Generated, forget, generate
from maskgit_pl.evaluation.bench.held_out import Task, edit, masked
from maskgit_pl.evaluation.bench.ledger import REAL, Ledger, Row
from maskgit_pl.evaluation.cas import CASConfig, classification_accuracy
from maskgit_pl.evaluation.classifier import TrainingImages
from maskgit_pl.evaluation.decodings import as_key
from maskgit_pl.evaluation.digests import digest_of, model_digests, short
from maskgit_pl.evaluation.distances import distances
from maskgit_pl.evaluation.features import Extractor, ImageFeatures, extract, own_image_batches
from maskgit_pl.evaluation.likelihood import ImageLikelihood, exact_nll, masked_nll, negative_elbo, real_tokens
from maskgit_pl.evaluation.metrics import class_agreement, diversity
from maskgit_pl.evaluation.reference import Origin, Reference
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.provenance import describe_environment, device_name

__all__ = ["CLASSIFIER", "Bars", "Bench", "Judge", "Subject"]

Bars = Callable[[str, int], Callable[[int], Any]]

_MODEL = ("dataset", "data", "split", "tokenizer", "transformer")  # what a number is of
_FLOOR_BATCH = 200
CLASSIFIER = "classifier"
EDITED, UNEDITED, MASKED = "MaskGIT", "unedited", "masked"


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Args:
        run: Name of its run.
        pipe: The model.
        pretrained: Where it was read from.
        folder: ``RUN/evaluation``: where its images are kept.
    """

    run: str
    pipe: MaskGIT
    pretrained: Path
    folder: Path

    @property
    def kind(self) -> str:
        """What tables call it."""
        return "MaskGIT" if self.pipe.transformer.mask_schedule is not None else "sequential"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The columns that say which model a row is of."""
        pipe = self.pipe
        networks: tuple[nn.Module, ...] = (pipe.tokenizer.network, pipe.transformer.network)
        return {
            "model": self.kind,
            "run": self.run,
            "mask_schedule": "" if pipe.transformer.mask_schedule is None else repr(pipe.transformer.mask_schedule),
            "parameters": sum(each.numel() for network in networks for each in network.parameters()),
            **{name: short(digest) for name, digest in model_digests(pipe, self.pretrained).items()},
        }


_NOTHING = {"model": REAL, "run": "", "mask_schedule": "", "parameters": None, "tokenizer": "", "transformer": ""}
_OWN_COLUMNS = ("model", "max_steps", "seed")  # of the classifier of CAS
_SAYS = ("fid", "num_images")  # what a network says of images, at least


@dataclass(frozen=True)
class Judge:
    """A feature network and what it says of the real images.

    Args:
        extractor: The network, on the device where it works.
        reference: The val split, or what stands in its place.
        labels: (m,) int64: its classes; None where they are not known.

    Raises:
        ValueError: if the reference does not say what it was made from.
    """

    extractor: Extractor
    reference: Reference
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.reference.origin is None:
            raise ValueError(f"reference of {self.extractor.label}: must have an origin, which its rows are found by")

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that say which network judged and what it compared with."""
        features, origin = self.reference.features, self.reference.origin
        assert origin is not None
        return {
            "network": self.extractor.label,
            "judge": short(self.extractor.digest),
            "knows_classes": self.extractor.knows_classes,
            "real_images": "" if features is None else len(features),
            "reference_file": origin.file,
            "reference": short(origin.digest),
        }

    @property
    def accuracy(self) -> float | None:
        """How often a classifier of the data is right on the real images; None of another network."""
        features = self.reference.features
        if features is None or features.logits is None or self.labels is None or self.extractor.label != CLASSIFIER:
            return None
        return class_agreement(features.logits.argmax(1), self.labels)

    def __call__(
        self,
        read: Callable[[range], Tensor],
        count: int,
        labels: Tensor | None = None,
        *,
        on_images: Callable[[int], object] = lambda count: None,
    ) -> dict[str, float]:
        """What it says of other images, in plain numbers; the ranks share the work.

        Args:
            read: Gives some of the images: (b, C, H, W) uint8.
            count: How many there are.
            labels: (n,) int64: the classes asked for, where the network knows the data's own.
            on_images: Told how many more are done.
        """
        extractor = self.extractor
        features = extract([extractor], own_image_batches(read, count), on_images=on_images)[extractor.label]
        numbers = distances(features, self.reference)
        if labels is not None and extractor.label == CLASSIFIER and features.logits is not None:
            numbers["class_agreement"] = class_agreement(features.logits.argmax(1), labels)
            numbers |= self._diversity(features, labels)
        return numbers

    def _diversity(self, features: ImageFeatures, labels: Tensor) -> dict[str, float]:
        """Beside the real images; nothing where too few images of a class are there."""
        real = self.reference.features
        if real is None or self.labels is None or int(labels.bincount().max()) < 2:
            return {}
        return {"diversity": diversity(features.pooled, labels, real.pooled, self.labels)}


class Bench:
    """Measures, and remembers.

    Args:
        data: The real images.
        dataset: Name of the data, for people.
        judges: By label.
        results: Where the ledger is: ``samples.csv``, ``likelihood.csv``, ``cas.csv``, ``editing.csv``.
        bars: Progress.
        batch_size: Images at a time; changes the time alone.
        device: Where the judges are, and where the classifier of CAS is trained.
    """

    def __init__(
        self,
        data: ShardData,
        *,
        dataset: str,
        judges: Mapping[str, Judge],
        results: Path,
        bars: Bars,
        batch_size: int = 100,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.data, self.dataset, self.judges, self.bars, self.batch_size = data, dataset, judges, bars, batch_size
        self._commit = describe_environment()["commit"]  # of the code that runs, not of what is committed later
        first = rank_and_world()[0] == 0
        on, how = (*_MODEL, "num_images", "seed"), ("num_steps", "decoding")

        def ledger(kind: str, key: Sequence[str], digests: tuple[str, ...], numbers: tuple[str, ...]) -> Ledger:
            file = results / f"{kind}.csv"
            return Ledger(file, tuple(key), digests=("config", *digests), results=numbers, writes=first)

        judged, by = ("network", "real_images"), ("judge", "knows_classes", "reference")
        self._samples = ledger("samples", (*on, *how, *judged), by, _SAYS)
        self._editing = ledger("editing", (*on, *how, "task", "model", *judged), by, _SAYS)
        self._likelihood = ledger("likelihood", (*on, "draws"), (), ())
        trained = ("classifier", "training_images", "training_steps", "classifier_seed")
        self._cas = ledger("cas", (*on, *how, *trained), ("training",), ("top1", "top5"))

    def samples(
        self,
        subject: Subject,
        decoding: DecodingConfig,
        *,
        num_images: int,
        seed: int,
        networks: Sequence[str],
        keep: bool = False,
    ) -> dict[str, Row]:
        """What networks say of generated images.

        Args:
            subject: The model.
            decoding: How it decodes.
            num_images: How many, over all classes.
            seed: Of the first.
            networks: Labels of the judges.
            keep: Whether the images stay, for what is measured on them next.

        Returns:
            A row for each network.
        """
        keys = self._of(subject, num_images, seed, decoding)
        rows = {label: self._samples.find(**keys | self._judged(label)) for label in networks}
        missing = [label for label, row in rows.items() if row is None]
        if missing:
            title = f"{subject.run}: {num_images} images, T = {decoding.num_steps}"
            made = self.generated(subject, decoding, num_images=num_images, seed=seed, title=title)
            for label in missing:
                numbers = self._say(label, made.read, made.labels)
                seconds = {"seconds_per_image": made.seconds_per_image}
                row = {**keys, **self._judged(label), **numbers, **seconds, **self._measured()}
                rows[label] = self._samples.add(row)
            if not keep:
                forget(self._file(subject, decoding, num_images, seed))
        return {label: row for label, row in rows.items() if row is not None}

    def generated(
        self, subject: Subject, decoding: DecodingConfig, *, num_images: int, seed: int, title: str
    ) -> Generated:
        """The images of a measurement, in a file of their own until ``forget``."""
        return generate(
            subject.pipe,
            self._file(subject, decoding, num_images, seed),
            decoding,
            num_images=num_images,
            seed=seed,
            batch_size=self.batch_size,
            on_images=self.bars(title, num_images),
        )

    def _file(self, subject: Subject, decoding: DecodingConfig, num_images: int, seed: int) -> Path:
        model = {name: subject.identity[name] for name in ("tokenizer", "transformer", "config")}
        return subject.folder / f"samples-{short(digest_of([model, as_key(decoding), num_images, seed]))}.npz"

    def real(self, *, num_images: int, networks: Sequence[str]) -> dict[str, Row]:
        """What networks say of as many real train images, drawn at random: the floor of every distance."""
        count = min(num_images, self.data.summary.samples["train"])
        keys = {**self._on(None), "num_images": count, "seed": 0, "num_steps": "", "decoding": ""}
        rows = {label: self._samples.find(**keys | self._judged(label)) for label in networks}
        missing = [label for label, row in rows.items() if row is None]
        if missing:
            images, labels = self.real_images("train", count)
            for label in missing:
                numbers = self._say(label, _reader(images), labels)
                rows[label] = self._samples.add({**keys, **self._judged(label), **numbers, **self._measured()})
        return {label: row for label, row in rows.items() if row is not None}

    @lru_cache(maxsize=2)  # noqa: B019  # a bench lives as long as its command
    def real_images(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """So many images of a split, drawn at random, always the same ones: (n, C, H, W) uint8 and labels (n,)."""
        samples = self.data.summary.samples[split]
        batches = self.data.batches(split, self._order(split, count))  # type: ignore[arg-type]  # train or val
        count = min(count, samples)
        parts = [
            batches.__getitems__(range(first, min(first + _FLOOR_BATCH, count)))
            for first in range(0, count, _FLOOR_BATCH)
        ]
        return torch.cat([part.content for part in parts]), torch.cat([part.labels for part in parts])

    def _order(self, split: str, count: int) -> Order:
        samples = self.data.summary.samples[split]
        return OnceThrough(samples) if count >= samples else ShuffledStream(samples, seed=0)

    def _drawn(self, split: str, count: int) -> Tensor:
        """The numbers (count,) int64 of ``real_images`` in their split."""
        return self._order(split, count)(range(min(count, self.data.summary.samples[split]))).index

    def likelihood(self, subject: Subject, *, num_images: int, draws: int, seed: int = 0) -> Row:
        """Masked negative log-likelihood and the order-agnostic bound; the exact one of a sequential model."""
        count = min(num_images, self.data.summary.samples["val"])
        keys = {**self._on(subject), "num_images": count, "seed": seed, "draws": draws}
        row = self._likelihood.find(**keys)
        return row or self._likelihood.add({**keys, **self._nll(subject, count, draws, seed), **self._measured()})

    def _nll(self, subject: Subject, count: int, draws: int, seed: int) -> dict[str, float]:
        transformer = subject.pipe.transformer
        tokens, labels = real_tokens(subject.pipe, self.data, limit=count, batch_size=self.batch_size)
        bar = self.bars(f"{subject.run}: likelihood", (1 if transformer.mask_schedule is None else 2) * count)
        if transformer.mask_schedule is None:
            exact = exact_nll(transformer.network, tokens, labels, batch_size=self.batch_size, on_images=bar)
            return _bits("exact", exact)
        how: dict[str, Any] = {
            "mask_token_id": transformer.network.config.mask_token_id,
            "draws": draws,
            "seed": seed,
            "batch_size": self.batch_size,
            "on_images": bar,
        }
        schedule = transformer.mask_schedule
        part = masked_nll(transformer.network.forward_masked, tokens, labels, mask_schedule=schedule, **how)
        bound = negative_elbo(transformer.network.forward_masked, tokens, labels, **how)
        return {"masked_nll": part.mean, "masked_nll_error": part.standard_error, **_bits("elbo", bound)}

    def cas(
        self, subject: Subject | None, decoding: DecodingConfig | None, config: CASConfig, *, num_images: int, seed: int
    ) -> Row:
        """Classification accuracy score; of real train images where there is no model."""
        of = self._on(subject) | {"num_images": num_images, "seed": seed, "num_steps": "", "decoding": ""}
        training = {name: value for name, value in asdict(config).items() if name not in _OWN_COLUMNS}
        keys = {
            **(of if subject is None or decoding is None else self._of(subject, num_images, seed, decoding)),
            "classifier": config.model, "training_images": num_images, "training_steps": config.max_steps,
            "classifier_seed": config.seed, "training": json.dumps(training, sort_keys=True),
        }  # fmt: skip
        row = self._cas.find(**keys)
        if row is not None:
            return row
        name = REAL if subject is None else subject.run
        source: TrainingImages | Tensor
        if subject is None or decoding is None:
            source = self._drawn("train", num_images)
        else:
            made = self.generated(
                subject, decoding, num_images=num_images, seed=seed, title=f"{name}: {num_images} images for CAS"
            )
            source = TrainingImages(made.take, made.shape, made.labels, self.data.class_names)
        bar = self.bars(f"CAS: {config.model} on {name}", config.max_steps)
        found = classification_accuracy(source, self.data, config, on_step=lambda: bar(1), device=str(self.device))
        numbers = {"top1": found.top1, "top5": found.top5, "real_images": found.images}
        return self._cas.add({**keys, **numbers, **self._measured()})

    def editing(
        self, subject: Subject, task: Task, *, num_images: int, seed: int, networks: Sequence[str]
    ) -> list[Row]:
        """Held-out images edited, as they are, and with grey in place of what is hidden: a row a network each."""
        decoding, count = subject.pipe.decoding, min(num_images, self.data.summary.samples["val"])
        rows: list[Row] = []
        images: dict[str, Tensor] = {}
        for kind in (EDITED, MASKED, UNEDITED):
            keys = self._of(subject, count, seed, decoding) | {"task": task, "model": kind}
            for label in networks:
                row = self._editing.find(**keys, **self.judges[label].columns)
                if row is None:
                    images = images or self._edited(subject, task, count, seed)
                    numbers = self._say(label, _reader(images[kind]), self.real_images("val", count)[1])
                    row = self._editing.add({**keys, **self.judges[label].columns, **numbers, **self._measured()})
                rows.append(row)
        return rows

    def _edited(self, subject: Subject, task: Task, count: int, seed: int) -> dict[str, Tensor]:
        originals, labels = self.real_images("val", count)
        bar = self.bars(f"{subject.run}: {task}", count)
        edited = edit(task, subject.pipe, originals, labels, seed=seed, batch_size=self.batch_size, on_images=bar)
        return {EDITED: edited, MASKED: masked(task, subject.pipe.tokenizer, originals), UNEDITED: originals}

    def _say(self, label: str, read: Callable[[range], Tensor], labels: Tensor) -> dict[str, float]:
        bar = self.bars(f"features of {label}", len(labels))
        return self.judges[label](read, len(labels), labels, on_images=bar)

    def _measured(self) -> dict[str, Any]:
        date = datetime.date.today().isoformat()
        return {"commit": self._commit, "date": date, "device": device_name(self.device)}

    def _judged(self, label: str) -> dict[str, Any]:
        """The judge's columns, and the split that it compares with, which a file stands in place of."""
        origin = self.judges[label].reference.origin
        assert origin is not None
        return {**self.judges[label].columns, "split": origin.split}

    def _on(self, subject: Subject | None) -> dict[str, Any]:
        if subject is None:  # real images are decided by their size alone
            of = {**_NOTHING, "config": short(Origin.of_split(self.data, "train").digest)}
        else:
            of = subject.identity
        return {**of, "dataset": self.dataset, "data": short(self.data.summary.fingerprint), "split": "val"}

    def _of(self, subject: Subject, num_images: int, seed: int, decoding: DecodingConfig) -> dict[str, Any]:
        said = {"num_steps": decoding.num_steps, "decoding": as_key(decoding)}
        return {**self._on(subject), "num_images": num_images, "seed": seed, **said}


def _bits(name: str, found: ImageLikelihood) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for unit, estimate in (("bits_per_token", found.bits_per_token), ("bits_per_image", found.bits_per_image)):
        numbers |= {f"{name}_{unit}": estimate.mean, f"{name}_{unit}_error": estimate.standard_error}
    return numbers


def _reader(images: Tensor) -> Callable[[range], Tensor]:
    return lambda rows: images[rows.start : rows.stop]
