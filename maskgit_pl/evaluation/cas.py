"""The classification accuracy score: what a classifier learns from generated images alone, tested on real ones.

A model that leaves out a part of a class, or makes its images too alike, teaches little, however good each image looks.
The same network trained on as many real images says what could be reached.

Source: Ravuri and Vinyals, arXiv:1905.10887; paper, Table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.data import ShardData
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.evaluation.classifier import Accuracy
from maskgit_pl.evaluation.classifier_config import ClassifierConfig
from maskgit_pl.evaluation.classifier_training import TrainingImages, fit_classifier, measure_accuracy

__all__ = ["CASConfig", "classification_accuracy", "default_config"]

_SMALL_IMAGES = 64  # pixels; below, a network of 18 layers has seen all there is


@dataclass(frozen=True)
class CASConfig(ClassifierConfig):
    """Network and training, the same for generated and for real images; arguments as of ``ClassifierConfig``.

    The network is the paper's, the training a short one for thousands of images, with AdamW and one cycle of the
    learning rate: two minutes of one processor core with resnet18 and grey images of 28 pixels. For the paper's 1.2
    million images set ``max_steps`` to some 90 epochs (450,000 steps of 256), ``batch`` to 256 and ``precision`` to
    bf16-mixed.
    """

    model: str = "resnet50"
    max_steps: int = 500
    batch: int = 64
    peak_rate: float = 1e-3
    weight_decay: float = 0.05


def default_config(image_size: int, *, model: str | None = None, seed: int = 0, **given: Any) -> CASConfig:
    """Returns the network and training for images of a size.

    Args:
        image_size: Edge in pixels.
        model: In place of resnet50, and of resnet18 for images below 64 pixels.
        seed: Of weights and order.
        given: Fields of ``CASConfig`` in place of its defaults; those that are None keep them.
    """
    model = model or ("resnet18" if image_size < _SMALL_IMAGES else "resnet50")
    return CASConfig(model=model, seed=seed, **{name: value for name, value in given.items() if value is not None})


def classification_accuracy(
    source: TrainingImages | Tensor,
    data: ShardData,
    config: CASConfig = CASConfig(),  # frozen
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

    def measured() -> Accuracy | None:
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

    accuracy = on_all_ranks(measured)[0]
    assert accuracy is not None  # the first rank measured it
    return accuracy
