"""The classification accuracy score: what a classifier learns from generated images alone, tested on real ones.

A model that leaves out a part of a class, or makes its images too alike, teaches little, however good each image looks.
The same network trained on as many real images says what could be reached.

Source: Ravuri and Vinyals, arXiv:1905.10887; paper, Table 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskgit_pl.data import ShardData
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.evaluation.classifier import Accuracy
from maskgit_pl.evaluation.classifier_config import CASConfig
from maskgit_pl.evaluation.classifier_training import TrainingImages, fit_classifier, measure_accuracy

__all__ = ["classification_accuracy"]


def classification_accuracy(
    source: TrainingImages | Tensor,
    data: ShardData,
    config: CASConfig,
    *,
    on_step: Callable[[], object] = lambda: None,
    device: str | None = None,
) -> Accuracy:
    """Trains a classifier on some images and tests it on the real val split.

    A function of the images, their order, the data and ``config`` on the same machine; of several ranks the first one
    trains, and all get its numbers. Images are read as they are needed: memory does not grow with their number.

    Args:
        source: Images of the data's size and channels, those generated with the classes asked for; or (n,) int64, the
            numbers of real ones in the train split.
        data: The real images.
        config: Network and training.
        on_step: Called after each training step.
        device: See ``fit_classifier``.

    Returns:
        On all images of the val split.

    Raises:
        ValueError: if images have another size or colour, or the network is unknown.
    """
    images = source if isinstance(source, TrainingImages) else None
    expected = (data.config.in_channels, data.config.image_size, data.config.image_size)
    if images is not None and images.shape != expected:
        raise ValueError(f"CAS images must be those of the data, {expected}, got {images.shape}")

    def measure() -> Accuracy | None:
        if rank_and_world()[0] != 0:
            return None
        classifier = fit_classifier(
            images or data,
            chosen=source if isinstance(source, Tensor) else None,
            num_workers=data.config.num_workers,
            config=config,
            on_step=on_step,
            device=device,
        )
        return measure_accuracy(classifier.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), data)

    accuracy = on_all_ranks(measure)[0]
    assert accuracy is not None  # the first rank measured it
    return accuracy
