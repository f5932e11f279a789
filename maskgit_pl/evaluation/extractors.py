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
from maskgit_pl.networks.features import ClassifierSpec, FeatureNetworkSpec, parse_feature_network
from maskgit_pl.progress import Bars, no_bars
from maskgit_pl.text import printable

__all__ = ["check_features", "open_extractors"]


def open_extractors(
    classifier: Path,
    data: ShardData,
    *,
    features: Sequence[str | dict[str, Any]],
    device: torch.device | str,
    bars: Bars = no_bars,
    replaces: bool = False,
) -> list[Extractor]:
    """Opens feature networks, and trains the classifier of the data if it is missing.

    Args:
        classifier: Folder of the classifier that ``classifier`` stands for.
        data: The images that it is trained on.
        features: Feature networks: names or mappings.
        device: Device of the networks.
        bars: Progress bars.
        replaces: True to replace a classifier of other data in the folder.

    Raises:
        FileExistsError: if the folder of the classifier holds something else.
        TypeError: if a network does not accept its arguments.
        ValueError: if a network is unknown, its weights are missing, or their SHA-256 does not match.
    """
    # "classifier" without a folder stands for the classifier of the data at hand.
    judge = ClassifierSpec(str(classifier))
    # Its training takes minutes: all other networks are opened before.
    others = {place: Extractor.create(spec, device=device) for place, spec in _other_networks(features)}
    if CLASSIFIER in features:
        train = bars("classifier: training", SMALL_TRAINING.max_steps)
        classifier_training.provide_classifier(classifier, data, replaces=replaces, on_step=lambda: train(1))
    return [
        others[place] if place in others else Extractor.create(judge, device=device) for place in range(len(features))
    ]


def check_features(
    features: Sequence[str | dict[str, Any]], reference: Path | None = None, *, classifier: Path | None = None
) -> None:
    """Checks the networks and the reference file of a measurement that comes after hours of training.

    Args:
        features: Feature networks: names or mappings. The classifier of the data may be missing.
        reference: File in the layout of ADM to compare with; None for the val split.
        classifier: Folder of the data's classifier; None for the one that all runs of the data share.

    Raises:
        FileExistsError: if the folder of the classifier holds something else.
        FileNotFoundError: if there is no such file.
        TypeError: if a network does not accept its arguments.
        ValueError: if a network is unknown, its weights are missing, or their SHA-256 does not match.
    """
    for _, spec in _other_networks(features):
        Extractor.create(spec)
    if classifier is not None and CLASSIFIER in features:
        classifier_training.check_named_classifier(classifier)
    if reference is not None and not reference.is_file():
        raise FileNotFoundError(f"reference {printable(reference)}: no such file; name another one")


def _other_networks(features: Sequence[str | dict[str, Any]]) -> list[tuple[int, FeatureNetworkSpec]]:
    """Returns the place and the network of all features except the classifier of the data at hand."""
    return [(place, parse_feature_network(spec)) for place, spec in enumerate(features) if spec != CLASSIFIER]
