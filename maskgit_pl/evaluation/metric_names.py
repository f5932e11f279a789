"""Names of metrics: the names in files and flags, and the titles in tables.

A metric of network features carries the label of the network, as in ``fid/classifier``, because values of different
networks are not comparable. All reports, tables and figures take titles, factors and digits from here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "METRICS",
    "NETWORK_METRICS",
    "Metric",
    "direction",
    "find_metric",
    "format_value",
    "is_better",
    "metric_name",
    "title",
]


@dataclass(frozen=True)
class Metric:
    """The format of a metric in tables.

    Args:
        title: Heading of its column.
        factor: Factor between the stored and the printed value.
        digits: Decimals of the printed value.
        higher_is_better: True if a higher value means better images.
    """

    title: str
    factor: float
    digits: int
    higher_is_better: bool


_OF_A_NETWORK = {
    "fid": Metric("FID", 1, 2, higher_is_better=False),
    "sfid": Metric("sFID", 1, 2, higher_is_better=False),
    "kid": Metric("KID x 1000", 1000, 2, higher_is_better=False),
    "is": Metric("IS", 1, 2, higher_is_better=True),
    "precision": Metric("precision", 1, 3, higher_is_better=True),
    "recall": Metric("recall", 1, 3, higher_is_better=True),
    "density": Metric("density", 1, 3, higher_is_better=True),
    "coverage": Metric("coverage", 1, 3, higher_is_better=True),
}
_OF_IMAGES = {
    "class_agreement": Metric("class agreement %", 100, 1, higher_is_better=True),
    "diversity": Metric("diversity", 1, 2, higher_is_better=True),
    "steps_taken": Metric("steps taken", 1, 1, higher_is_better=False),
    "seconds_per_image": Metric("ms per image", 1000, 1, higher_is_better=False),
}
_OF_RECONSTRUCTIONS = {
    "rfid": Metric("reconstruction FID", 1, 2, higher_is_better=False),
    "rfid_floor": Metric("FID of real halves", 1, 2, higher_is_better=False),
    "rkid": Metric("reconstruction KID x 1000", 1000, 2, higher_is_better=False),
    "rkid_floor": Metric("KID x 1000 of real halves", 1000, 2, higher_is_better=False),
    "lpips": Metric("LPIPS", 1, 2, higher_is_better=False),
    "psnr_db": Metric("PSNR, dB", 1, 2, higher_is_better=True),
    "mean_psnr_db": Metric("mean PSNR, dB", 1, 2, higher_is_better=True),
    "ssim": Metric("SSIM", 1, 3, higher_is_better=True),
    "codebook_usage": Metric("codebook usage %", 100, 1, higher_is_better=True),
    "perplexity": Metric("perplexity of codes", 1, 1, higher_is_better=True),
    "bits_per_pixel": Metric("bits per pixel", 1, 3, higher_is_better=False),
    "coded_bits_per_pixel": Metric("entropy-coded bits per pixel", 1, 3, higher_is_better=False),
    "images_per_second": Metric("images per second", 1, 1, higher_is_better=True),
    "peak_memory_mb": Metric("peak memory, MB", 1, 0, higher_is_better=False),
}
_OF_LIKELIHOODS = {"bits_per_token": Metric("bits per token", 1, 3, higher_is_better=False)}
METRICS = _OF_A_NETWORK | _OF_IMAGES | _OF_RECONSTRUCTIONS | _OF_LIKELIHOODS
NETWORK_METRICS = tuple(_OF_A_NETWORK)


def metric_name(metric: str, network: str) -> str:
    """Returns the name of a metric in a network's features: ``fid/classifier``."""
    return f"{metric}/{network}"


def find_metric(name: str) -> Metric:
    """Returns the metric of a name such as ``fid/classifier`` or ``diversity``."""
    return METRICS[name.partition("/")[0]]


def title(name: str) -> str:
    """Returns the column heading of a name, e.g. ``FID (classifier)`` for ``fid/classifier``."""
    network = name.partition("/")[2]
    return find_metric(name).title + (f" ({network})" if network else "")


def format_value(name: str, value: float, *, more_digits: int = 0) -> str:
    """Returns a value as text for a table.

    Args:
        name: Name of the metric, such as ``kid/classifier``.
        value: The value as it is stored, without the factor.
        more_digits: Decimals beyond those of the metric.
    """
    metric = find_metric(name)
    return f"{value * metric.factor:.{metric.digits + more_digits}f}"


def is_better(name: str, value: float, other: float) -> bool:
    """Returns True if ``value`` is better than ``other``."""
    return value > other if find_metric(name).higher_is_better else value < other


def direction(name: str) -> str:
    """Returns ``higher is better`` or ``lower is better``."""
    return "higher is better" if find_metric(name).higher_is_better else "lower is better"
