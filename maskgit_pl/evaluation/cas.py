"""The classification accuracy score (CAS): train a classifier on generated images, test it on real ones.

The score is low for a model whose images look good but cover only a part of each class. The same network, trained on
the same number of real images, gives the upper limit. ``Evaluator.measure_cas`` uses it.

Source: Ravuri and Vinyals, arXiv:1905.10887; paper, Table 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from maskgit_pl.checks import height_width
from maskgit_pl.data import ShardData
from maskgit_pl.distributed import find_device, on_all_ranks, rank_and_world
from maskgit_pl.evaluation.classifier import Accuracy, TrainingImages, fit_classifier, measure_accuracy
from maskgit_pl.evaluation.options import CASConfig
from maskgit_pl.networks.feature_networks import check_model

__all__ = ["check_cas", "classification_accuracy"]


def check_cas(config: CASConfig | None) -> None:
    """Checks that the network of the score exists, before anything is generated. None leaves the score out.

    Raises:
        ValueError: if timm does not know the network.
    """
    if config is not None and config.model != "auto":
        check_model(config.model)


def classification_accuracy(
    source: TrainingImages | Tensor,
    data: ShardData,
    config: CASConfig,
    *,
    on_step: Callable[[], object] = lambda: None,
    device: str | None = None,
) -> Accuracy:
    """Trains a classifier on some images and measures its accuracy on the real val split.

    On the same machine, the result depends only on the images, their order, the data and ``config``. With several
    ranks, the first one trains and all get its result. Images are read on demand, so that memory does not grow with
    their number.

    Args:
        source: Generated images with the size and channels of the data; or (n,) int64 indices of real images in the
            train split.
        data: The real images.
        config: Network and training.
        on_step: Called after each training step.
        device: See ``fit_classifier``.

    Returns:
        Accuracy on all images of the val split.

    Raises:
        ValueError: if generated images have another size or other channels than the data, or the network is unknown.
    """
    images = source if isinstance(source, TrainingImages) else None
    expected = (data.config.in_channels, *height_width(data.config.image_size))
    if images is not None and images.shape != expected:
        raise ValueError(f"CAS images must have the shape of the data, {expected}, got {images.shape}")

    # Training is not distributed: the first rank trains, and an error on it is raised on all ranks.
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
        return measure_accuracy(classifier.to(find_device(device)), data)

    accuracy = on_all_ranks(measure)[0]
    assert accuracy is not None  # the result of the first rank
    return accuracy
