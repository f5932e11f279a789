"""The statistics of an ablation: mean and range over seeds, and differences that exceed the spread of the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.metric_names import METRICS, is_better
from maskgit_pl.evaluation.reports.ablation_protocol import AblationProtocol

__all__ = ["Spread", "Summary", "Verdict", "chance_of_separation", "summarize"]

Verdict = Literal["better", "worse", "unclear"]

# Metrics of tables and figures, in their order; those of a network come once per network.
_ORDER = ("rfid", "psnr_db", "ssim", "codebook_usage", "perplexity", "fid", "class_agreement", "diversity", "precision",
          "recall", "bits_per_token", "seconds_per_image")  # fmt: skip
_OF_FIRST = ("precision", "recall")  # shown only for the network that ranks the variants


@dataclass(frozen=True)
class Spread:
    """The values of a metric for all seeds of a variant.

    Args:
        values: Values by seed, at least one.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return sum(self.values.values()) / len(self.values)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values.values())

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values.values())

    def compare(self, name: str, reference: Spread) -> Verdict:
        """Compares with a reference: better or worse only if the ranges of the seeds do not overlap.

        A single seed has no range, so that the verdict is always ``unclear``.

        Args:
            name: Name of the metric.
            reference: Values of the reference.
        """
        if min(len(self.values), len(reference.values)) < 2:
            return "unclear"
        if self.low <= reference.high and reference.low <= self.high:
            return "unclear"
        return "better" if is_better(name, self.mean, reference.mean) else "worse"


@dataclass(frozen=True)
class Summary:
    """The results of an ablation.

    Args:
        protocol: Settings that the variants share.
        rows: Rows of the ledger, sorted by variant and seed.
        metrics: Names of the metrics, in the order of tables and figures.
        spreads: Values by variant and metric; a variant without any result is missing.
        real: Values of real images by metric; empty if no images were generated.
    """

    protocol: AblationProtocol
    rows: Sequence[Row]
    metrics: tuple[str, ...]
    spreads: Mapping[str, Mapping[str, Spread]]
    real: Mapping[str, float]

    @property
    def failures(self) -> list[tuple[str, int, str]]:
        """The variant, seed and reason of each run that failed."""
        return [(str(row["variant"]), int(row["seed"]), str(row["failure"])) for row in self.rows if row.get("failure")]

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The variant and seed of each run that has neither a result nor a reason."""
        found = {(row["variant"], row["seed"]) for row in self.rows}
        protocol = self.protocol
        return [(each, seed) for each in protocol.variants for seed in protocol.seeds if (each, seed) not in found]

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics in which variants are compared.

        Times of a machine with other work are not compared, and bits per token not for tokenizers: a collapsed codebook
        needs the fewest bits.
        """
        is_of_tokenizers = self.protocol.stage == "tokenizer"
        left_out = ("seconds_per_image", *(["bits_per_token"] if is_of_tokenizers else []))
        return tuple(name for name in self.metrics if name not in left_out)

    @property
    def ranking_metric(self) -> str:
        """The metric by which variants are ranked: the first one of the table."""
        return self.metrics[0]


def summarize(rows: Sequence[Row]) -> Summary:
    """Summarizes the rows of an ablation.

    Args:
        rows: Rows of ``select_rows``, at least one.

    Raises:
        ValueError: if a row is not one of an ablation.
    """
    protocol = AblationProtocol.from_row(rows[-1])
    names = {name for row in rows for name in row["numbers"]}
    shown = [name for name in names if _is_shown(name, protocol.first)]
    metrics = tuple(sorted(shown, key=lambda name: _place(name, protocol.first)))
    spreads: dict[str, dict[str, Spread]] = {}
    for label in protocol.variants:
        own = [row for row in rows if row["variant"] == label and not row["numbers"].keys().isdisjoint(metrics)]
        if own:
            spreads[label] = {
                name: Spread({row["seed"]: float(row["numbers"][name]) for row in own if name in row["numbers"]})
                for name in metrics
                if any(name in row["numbers"] for row in own)
            }
    real = rows[-1].get("real") or {}
    return Summary(protocol, rows, metrics, spreads, real)


def _is_shown(name: str, first: str) -> bool:
    metric, _, network = name.partition("/")
    return metric in _ORDER and metric in METRICS and (metric not in _OF_FIRST or network == first)


def _place(name: str, first: str) -> tuple[int, bool, str]:
    metric, _, network = name.partition("/")
    return _ORDER.index(metric), network != first, name


def chance_of_separation(seeds: int) -> float:
    """Returns the probability that the ranges of two equal variants are apart randomly.

    Formula: 2 n! n! / (2 n)! for n seeds each, since all orders of the 2 n values are equally likely.

    Args:
        seeds: Number n of seeds of each variant, >= 1.
    """
    return 2 / comb(2 * seeds, seeds)
