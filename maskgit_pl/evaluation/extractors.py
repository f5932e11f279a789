"""Opens the feature networks that a command names. ``opening`` and ``tokenizer_evaluation`` use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maskgit_pl.data import ShardData
from maskgit_pl.evaluation import classifier_training
from maskgit_pl.evaluation.classifier_config import SMALL_TRAINING
from maskgit_pl.evaluation.feature_metrics import CLASSIFIER
from maskgit_pl.evaluation.features import Extractor
from maskgit_pl.networks.features import ClassifierSpec, parse_feature_network
from maskgit_pl.progress import Bars, no_bars

__all__ = ["open_extractors"]


def open_extractors(
    classifier: Path,
    data: ShardData,
    *,
    features: Sequence[str | dict[str, Any]],
    device: torch.device | str,
    bars: Bars = no_bars,
) -> list[Extractor]:
    """Opens feature networks, and trains the classifier of the data if it is missing.

    Args:
        classifier: Folder of the classifier that ``classifier`` stands for.
        data: The images that it is trained on.
        features: Feature networks: names or mappings.
        device: Device of the networks.
        bars: Progress bars.

    Raises:
        TypeError: if a network does not accept its arguments.
        ValueError: if a network is unknown, its weights are missing, or their SHA-256 does not match.
    """
    # "classifier" without a folder stands for the classifier of the data at hand.
    judge = ClassifierSpec(str(classifier))
    specs = [judge if spec == CLASSIFIER else parse_feature_network(spec) for spec in features]
    if CLASSIFIER in features:
        train = bars("classifier: training", SMALL_TRAINING.max_steps)
        classifier_training.obtain_classifier(classifier, data, on_step=lambda: train(1))
    return [Extractor.create(spec, device=device) for spec in specs]
