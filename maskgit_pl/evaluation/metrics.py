"""Metrics: the registry, the interface of a metric that is computed from features, and the formats of values.

A metric of network features carries the label of the network, as in ``fid/classifier``, because values of different
networks are not comparable. All pages take their columns, titles and digits from the registry, so that a metric is one
class in one file. ``distances`` holds the built-in ones.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.evaluation.options import CLASSIFIER
from maskgit_pl.registry import Registry
from maskgit_pl.text import printable, shorten

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.evaluation.extractors import ImageFeatures
    from maskgit_pl.evaluation.reference import Reference

_INPUTS = ("features", "labels", "logits", "spatial", "real_features", "real_labels", "tokens", "pixels")
MOST_GRIDS = 2000  # of real images, which are encoded for the metrics of tokens
Metrics: TypeAlias = Literal["all", "fast"]
DEVIATION = "_deviation"  # suffix of the column of a standard deviation
Value: TypeAlias = float | tuple[float, float] | None
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class Metric:
    """A metric: the format of its values in tables.

    Attributes:
        title: Heading of its column.
        factor: Factor between the stored and the printed value.
        digits: Decimals of the printed value.
        higher_is_better: True if a higher value means better images.
        of_network: True if the values depend on the feature network, so that its label is part of the column's name.
    """

    title: str
    factor: float = 1
    digits: int = 2
    higher_is_better: bool = False
    of_network: bool = False


class FeatureMetric(Metric, ABC):
    """A metric of generated images that is computed from their features. Plug-ins derive from it.

    Attributes:
        of_network: False for a metric that only the classifier of the data computes, because it predicts the
            classes that were requested, or that is computed once, because it reads ``tokens`` or ``pixels``.
        needs: Names of the attributes of ``ComparedImages`` that ``compute`` reads: ``features``, ``logits``,
            ``spatial``, ``labels``, ``real_features``, ``real_labels``, ``tokens`` and ``pixels``. The metric is left
            out where one of them is unknown, such as ``real_features`` for a reference file with statistics only.
        is_fast: False for a metric that takes much longer than the Frechet distance; a search leaves it out.
    """

    of_network: bool = True
    needs: ClassVar[Sequence[str]] = ()
    is_fast: ClassVar[bool] = True

    @abstractmethod
    def compute(self, images: ComparedImages) -> Value:
        """Computes the metric. Every rank calls it with the same images, and must get the same result.

        Args:
            images: Generated and real images in the features of one network.

        Returns:
            The value, or the value and its standard deviation, which the column ``NAME_deviation`` records;
            None if the images do not suffice.
        """


def _check_metric(name: str, metric: Metric) -> None:
    if not isinstance(metric, Metric) or not isinstance(getattr(metric, "title", None), str):
        raise ValueError(f"metric {name!r} must derive from FeatureMetric and have a title, got {shorten(metric)}")
    if "/" in name:
        raise ValueError(f"metric {name!r} must have a name without '/', which separates it from a feature network")
    check_integer(f"metric {name!r}: digits", metric.digits, "[0, 20]")
    check_number(f"metric {name!r}: factor", metric.factor, "(-inf, inf)")
    for need in getattr(metric, "needs", ()):
        check_choice(f"metric {name!r}: needs", need, _INPUTS)


metrics: Registry[Metric] = Registry(
    "metric",
    "maskgit_pl.metrics",
    check=_check_metric,
    modules=("maskgit_pl.evaluation.distances", "maskgit_pl.evaluation.pixels"),
)


def _record(name: str, title: str, **attributes: float) -> None:
    """Registers the format of a column that a measurement records itself, such as the PSNR of reconstructions."""
    doc = f"The column {title!r}, which a measurement records itself."
    metrics.register(name)(type(name, (Metric,), {"__doc__": doc, "title": title, **attributes}))


# Of generated images.
_record("seconds_per_image", "ms per image", factor=1000, digits=1)
# Of reconstructions and tokens.
_record("rfid", "reconstruction FID")
_record("rfid_floor", "FID of real halves")
_record("rkid", "reconstruction KID x 1000", factor=1000)
_record("rkid_floor", "KID x 1000 of real halves", factor=1000)
_record("psnr_db", "PSNR, dB", higher_is_better=True)
_record("mean_psnr_db", "mean PSNR, dB", higher_is_better=True)
_record("ssim", "SSIM", digits=3, higher_is_better=True)
_record("lpips", "LPIPS", digits=3)
_record("codebook_usage", "codebook usage %", factor=100, digits=1, higher_is_better=True)
_record("perplexity", "perplexity of codes", digits=1, higher_is_better=True)
_record("bits_per_pixel", "bits per pixel", digits=3)
_record("coded_bits_per_pixel", "entropy-coded bits per pixel", digits=3)
_record("images_per_second", "images per second", digits=1, higher_is_better=True)
_record("bits_per_token", "bits per token", digits=3)


@dataclass(frozen=True, eq=False)
class TokenGrids:
    """Token grids of generated and of real images: what stage 2 makes, without the decoder of the tokenizer.

    Args:
        sampled: (k, *grid) int64 in [0, K): grids of the first k generated images.
        real: (m, *grid) int64: grids of random images of the val split, at most ``MOST_GRIDS``.
        real_labels: (m,) int64: their classes.
        codes: (K, D) float32: the code vectors of the tokenizer; None if they are unknown.
    """

    sampled: Tensor
    real: Tensor
    real_labels: Tensor
    codes: Tensor | None

    def with_sampled(self, tokens: Tensor) -> TokenGrids:
        """Returns the same real grids, the same tensors, with others of generated images, (k, N) int64."""
        return replace(self, sampled=tokens.cpu().reshape(len(tokens), *self.real.shape[1:]))


@dataclass(frozen=True)
class ComparedImages:
    """Generated and real images in the features of one network, on the CPU: the input of a metric.

    Args:
        generated: Features of n generated images.
        reference: Features or statistics of m real images, from the same network.
        labels: (n,) int64: requested classes.
        real_labels: (m,) int64: classes of the real images; None if unknown.
        tokens: Their tokens; None if they are unknown, or no metric needs them.
        pixels: The same images in the features of ``PixelNetwork``; None if no metric needs them.
    """

    generated: ImageFeatures
    reference: Reference
    labels: Tensor
    real_labels: Tensor | None = None
    tokens: TokenGrids | None = None
    pixels: ComparedImages | None = None
    _results: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def features(self) -> Tensor:
        """The pooled features of the generated images, (n, D) float64."""
        return self.generated.pooled.double()

    @property
    def logits(self) -> Tensor:
        """The logits of the generated images, (n, K) float32."""
        assert self.generated.logits is not None
        return self.generated.logits

    @property
    def spatial(self) -> Tensor:
        """The spatial features of the generated images, (n, S) float32."""
        assert self.generated.spatial is not None
        return self.generated.spatial

    @cached_property
    def real_features(self) -> Tensor:
        """The pooled features of the real images, (m, D) float64."""
        assert self.reference.features is not None
        return self.reference.features.pooled.double()

    def once(self, compute: Callable[..., _Result], *arguments: object) -> _Result:
        """Returns ``compute(*arguments)``, which is called once for all metrics that come from it."""
        if compute not in self._results:
            self._results[compute] = compute(*arguments)
        return self._results[compute]  # type: ignore[no-any-return]  # the results have several types


def known_metrics() -> dict[str, Metric]:
    """Returns all metrics by name in the order of tables: the built-in ones, then plug-ins. Warns of broken ones."""
    return metrics.build_all()


def computed_metrics() -> dict[str, FeatureMetric]:
    """Returns the metrics that are computed from features, by name in the order of tables."""
    return {name: metric for name, metric in known_metrics().items() if isinstance(metric, FeatureMetric)}


def compute_metrics(chosen: Mapping[str, FeatureMetric], images: ComparedImages) -> dict[str, float | None]:
    """Computes values and deviations by name, such as ``kid`` and ``kid_deviation``.

    A value is None if the images do not suffice or it is non-finite. A metric of a plug-in that raises an error, or
    exits, is left out.
    """
    numbers: dict[str, float | None] = {}
    for name, metric in chosen.items():
        try:
            computed = metric.compute(images)
            value, deviation = computed if isinstance(computed, tuple) else (computed, None)
            values = [None if number is None else float(number) for number in (value, deviation)]
        except (Exception, SystemExit) as error:
            if type(metric).__module__.startswith("maskgit_pl."):
                raise
            # A plug-in must not lose the values of the others, which may have taken hours. A row without its
            # column is measured again.
            _log.warning("metric %s raised %s: %s; it is left out", name, type(error).__name__, printable(error))
            continue
        for column, number in zip((name, f"{name}{DEVIATION}"), values, strict=True):
            if number is not None and not math.isfinite(number):
                _log.warning("%s in the features of %s is %s; it is left out", column, images.generated.label, number)
                number = None
            if number is not None or column == name:
                numbers[column] = number
    return numbers


def tuning_column(metric: str) -> str:
    """Returns the column of a metric in the features of the data's classifier, such as ``fid/classifier``."""
    computed = computed_metrics()
    check_choice("metric", metric, list(computed))
    return f"{metric}/{CLASSIFIER}" if computed[metric].of_network else metric


def find_metric(name: str) -> Metric:
    """Returns the metric of a name such as ``fid/classifier`` or ``diversity``."""
    return metrics.build(name.partition("/")[0])


def title(name: str) -> str:
    """Returns the column heading of a name, e.g. ``FID (classifier)`` for ``fid/classifier``."""
    network = name.partition("/")[2]
    return find_metric(name).title + (f" ({network})" if network else "")


def format_value(name: str, value: float, *, more_digits: int = 0) -> str:
    """Returns a stored value as text for a table, times its factor, with more digits than usual if needed."""
    metric = find_metric(name)
    return f"{value * metric.factor:.{metric.digits + more_digits}f}"


def is_better(name: str, value: float, other: float) -> bool:
    """Returns True if ``value`` is better than ``other``."""
    return value > other if find_metric(name).higher_is_better else value < other


def direction(name: str) -> str:
    """Returns ``higher is better`` or ``lower is better``."""
    return "higher is better" if find_metric(name).higher_is_better else "lower is better"
