"""Opens the parts of a run that a measurement needs: model, data, and the feature networks of the data.

``evaluate``, ``compare``, ``tune`` and the reports use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maskgit_pl.checks import ImageSize
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.distributed import find_device, parse_dtype
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.metrics import FeatureMetrics, open_extractors
from maskgit_pl.evaluation.reference import obtain_references, read_real_labels, read_references
from maskgit_pl.evaluation.run_folders import RunFolders, data_name
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.processes import Bars, no_bars

__all__ = [
    "can_guide",
    "check_data",
    "check_model_decoding",
    "create_evaluated_model",
    "give_val_vectors",
    "open_data",
    "open_evaluator",
    "open_images",
    "open_model",
    "open_networks",
]

_VALIDATION_BATCH = 200  # images


def open_model(
    folders: RunFolders,
    device: str | None = None,
    *,
    dtype: str | None = None,
    negative_model: Path | str | None = None,
) -> MaskGIT:
    """Reads the model of a run.

    Args:
        folders: The run's folders.
        device: See ``options.ModelOptions``, as for the other arguments.
        dtype: Arithmetic of the transformer.
        negative_model: Weaker model.

    Raises:
        FileNotFoundError: if the negative model does not exist.
        ValueError: if the device does not exist, a file is invalid, or the negative model predicts other tokens.
    """
    place = find_device(device)
    pipe = MaskGIT.from_pretrained(folders.pretrained, negative_model=negative_model).to(place)
    models = [pipe.transformer] if pipe.negative_model is None else [pipe.transformer, pipe.negative_model.transformer]
    for model in models:  # the tokenizer stays: reconstructions remain comparable
        model.network.to(dtype=parse_dtype(dtype, place))
    return pipe


def open_data(folders: RunFolders, pipe: MaskGIT, *, num_workers: int = 0) -> ShardData:
    """Opens the real images that a model is compared with.

    Args:
        folders: The run's folders.
        pipe: The model.
        num_workers: Number of processes that read the images.

    Raises:
        ValueError: if the classes of the data are not the model's, or it needs vectors that the data do not have.
    """
    channels = pipe.tokenizer.network.config.in_channels
    data = open_images(folders.data, pipe.tokenizer.image_size, channels, num_workers=num_workers)
    check_data(pipe, data)
    data.warn_if_resized()
    give_val_vectors(pipe, data)
    return data


def give_val_vectors(pipe: MaskGIT, data: ShardData) -> None:
    """Gives a model that needs vectors those of the val images: a generated image takes one of its class.

    Raises:
        ValueError: if the data have no vectors.
    """
    if pipe.transformer.network.config.condition_dim:
        pipe.vector_pool = data.vector_pool("val")


def open_images(folder: Path, image_size: ImageSize, in_channels: int, *, num_workers: int = 0) -> ShardData:
    """Opens a data folder as images of one size.

    Args:
        folder: Data folder.
        image_size: Side of square images, or (height, width), in pixels.
        in_channels: Channels of the images, 1 or 3.
        num_workers: Number of processes that read the images.
    """
    config = ShardDataConfig(
        str(folder),
        image_size=image_size,
        in_channels=in_channels,
        validation_batch=_VALIDATION_BATCH,
        num_workers=num_workers,
    )
    data = ShardData(config)
    data.setup()
    return data


def check_data(pipe: MaskGIT, data: ShardData) -> None:
    """Checks that the classes of the data are those of the model.

    Raises:
        ValueError: if they differ. The message names both.
    """
    if data.class_names != pipe.class_names:
        raise ValueError(
            f"data {data.config.path}: the classes must be the model's {list(pipe.class_names[:10])}, "
            f"got {list(data.class_names[:10])}; choose the data of the training with --data"
        )


def check_model_decoding(pipe: MaskGIT, decoding: DecodingConfig) -> None:
    """Checks that the model can be decoded in this way, before a long measurement begins.

    Raises:
        TypeError: if a selector or schedule does not accept its arguments.
        ValueError: if a name is unknown, a number is out of range, there are more steps than tokens, or there is
            guidance for a model without a null class and without a negative model.
    """
    pipe.check_decoding(decoding)
    if any(decoding.scales()) and not can_guide(pipe):
        raise ValueError(
            f"guidance {decoding.guidance}: the scale must be 0, because this model has no null class (it was trained "
            "with class_dropout 0); for guidance, train with model.network.class_dropout 0.1, or give --negative-model"
        )


def can_guide(pipe: MaskGIT) -> bool:
    """Returns True if guidance has something to move away from: a null class or a negative model."""
    return pipe.transformer.network.config.null_label is not None or pipe.negative_model is not None


def open_evaluator(
    folders: RunFolders,
    pipe: MaskGIT,
    data: ShardData,
    ledger: Ledger,
    *,
    batch_size: int,
    features: Sequence[str | dict[str, Any]] = ("classifier",),
    reference: Path | None = None,
    bars: Bars = no_bars,
) -> Evaluator:
    """Opens the evaluator of the runs of a data set, and trains the classifier of the data if it is missing.

    Args:
        folders: Folders of the first run; they hold the classifier and the features of real images.
        pipe: Model of the first run; the feature networks use its device.
        data: The real images.
        ledger: Ledger of the measurements.
        batch_size: Images per batch of generation; it does not change results.
        features: Feature networks: names or mappings; ``classifier`` is the classifier of ``folders.classifier``.
        reference: File in the layout of ADM to compare with; None for the val split.
        bars: Progress bars.

    Raises:
        TypeError: if a network does not accept its arguments.
        ValueError: if a network is unknown, its weights are missing, or their SHA-256 does not match.
    """
    return Evaluator(
        data,
        dataset=data_name(folders.data),
        networks=open_networks(folders, data, features=features, reference=reference, device=pipe.device, bars=bars),
        ledger=ledger,
        bars=bars,
        batch_size=batch_size,
        device=pipe.device,
    )


def open_networks(
    folders: RunFolders,
    data: ShardData,
    *,
    features: Sequence[str | dict[str, Any]],
    reference: Path | None = None,
    device: torch.device | str,
    bars: Bars = no_bars,
) -> dict[str, FeatureMetrics]:
    """Opens feature networks with the real images that they compare with; see ``open_evaluator``.

    Args:
        folders: Folders of the classifier and of the features of real images.
        data: The real images.
        features: Feature networks: names or mappings.
        reference: File in the layout of ADM to compare with; None for the val split.
        device: Device of the networks.
        bars: Progress bars.

    Returns:
        The networks by label.
    """
    extractors = open_extractors(
        folders.classifier, data, features=features, device=device, bars=bars, replaces=folders.shares_classifier
    )
    on_images = bars(f"real images: {', '.join(each.label for each in extractors)}", data.summary.samples["val"])
    if reference is not None:  # the classes of its images are unknown
        references = read_references(reference, extractors, folder=folders.references, on_images=on_images)
        labels = None
    else:
        references = obtain_references(folders.references, data, extractors, on_images=on_images)
        labels = read_real_labels(data)
    return {each.label: FeatureMetrics(each, references[each.label], labels) for each in extractors}


def create_evaluated_model(folders: RunFolders, pipe: MaskGIT, folder: Path | None = None) -> EvaluatedModel:
    """Returns the model of a run for the evaluator; ``folder`` is for its images, by default ``RUN/evaluation``."""
    return EvaluatedModel(folders.run.name, pipe, folders.pretrained, folder or folders.evaluation)
