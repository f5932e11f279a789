"""Opens the model of a run to measure, its data, and the feature networks of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from maskgit_pl.checks import pixels_text
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.manifest import DataSummary
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.guidance import check_guidance
from maskgit_pl.devices import find_device, parse_dtype
from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, FeatureMetrics
from maskgit_pl.evaluation.extractors import open_extractors
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.options import CLASSIFIER, ReportOptions, Spec, round_to_classes
from maskgit_pl.evaluation.pixels import pixel_extractor
from maskgit_pl.evaluation.reference import ArrayFile, obtain_references, read_real_labels, read_references
from maskgit_pl.evaluation.run_folders import RunFolders, data_name, find_run
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.processes import Bars, no_bars


def describe_held_out(summary: DataSummary) -> str:
    """Describes the val split of a data folder in a sentence."""
    count, things = summary.samples["val"], "images" if summary.tokens is None else "samples"
    return f"Held out: {count:,} {things} of the val split ({count / sum(summary.samples.values()):.0%} of the data)."


def open_model(
    folders: RunFolders,
    device: str | None = None,
    *,
    dtype: str | None = None,
    negative_model: Path | str | None = None,
    out: Path | None = None,
) -> EvaluatedModel:
    """Reads the model of a run; see ``options.ModelOptions`` for the arguments.

    ``out`` is the folder of its images; None for ``RUN/evaluation``.
    """
    target = find_device(device)
    pipe = MaskGIT.from_pretrained(folders.pretrained, negative_model=negative_model).to(target)
    models = [pipe.transformer] if pipe.negative_model is None else [pipe.transformer, pipe.negative_model]
    for model in models:  # the tokenizer stays: reconstructions remain comparable
        model.network.to(dtype=parse_dtype(dtype, target))
    return EvaluatedModel(folders.run.name, pipe, folders.pretrained, out or folders.run / "evaluation")


def open_models(
    runs: Sequence[Path | str], options: ReportOptions, bars: Bars = no_bars
) -> tuple[Evaluator, Sequence[EvaluatedModel]]:
    """Opens the models of runs, and their evaluator with the data of the first run and the ledger of the results.

    Args:
        runs: Run folders or pretrained folders of models with the same classes and the same image size.
        options: Data, networks, device, folder of the ledger and other options.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if a run, the data or the classifier of the data do not exist.
        ValueError: if there is no run, the runs have other classes or image sizes than the first, or there are fewer
            than 2 images per class.
    """
    if not runs:
        raise ValueError("runs must have at least one run, such as runs/fashion-mnist-adaln, got none")
    folders = [find_run(run, data=options.data) for run in runs]
    models = [open_model(folder, options.device) for folder in folders]
    data = open_data(folders[0], models[0].pipe, num_workers=options.num_workers)
    for model in models:  # all of images, too
        check_data(model.pipe, data)
        if model.pipe.tokenizer.image_size != data.config.image_size:
            raise ValueError(
                f"run {model.run}: the image size must be that of the first run, {pixels_text(data.config.image_size)} "
                f"pixels, got {pixels_text(model.pipe.tokenizer.image_size)}; measure it in a separate call"
            )
    round_to_classes(options.num_images, data.num_classes)
    evaluator = open_evaluator(
        folders[0],
        data,
        Ledger(options.results / FILE_NAME),
        device=models[0].pipe.device,
        batch_size=options.batch_size,
        features=options.features,
        reference=options.reference,
        bars=bars,
    )
    return evaluator, models


def open_data(folders: RunFolders, pipe: MaskGIT, *, num_workers: int = 0) -> ShardData:
    """Opens the real images, or tokens of another tokenizer, that a model is compared with; see ``check_data``."""
    if pipe.transformer.tokenizer_fingerprint is None:
        network, store = pipe.transformer.network.config, str(folders.data)
        data = ShardData(ShardDataConfig(store, "tokens", store, num_workers=num_workers))
        data.require_tokenizer(None, grid=network.grid, codebook_size=network.codebook_size)
        check_data(pipe, data)
        return data
    channels = pipe.tokenizer.channels
    data = open_images(folders.data, pipe.tokenizer.image_size, channels, num_workers=num_workers)
    check_data(pipe, data)
    data.warn_if_enlarged()
    return data


def check_data(pipe: MaskGIT, data: ShardData) -> None:
    """Checks that the data have the classes of a model, and that it generates from classes only."""
    if data.class_names != pipe.class_names:
        raise ValueError(
            f"data {data.config.path}: the classes must be the model's {list(pipe.class_names[:10])}, "
            f"got {list(data.class_names[:10])}; choose the data of the training with --data"
        )
    if pipe.transformer.network.config.condition_dim:
        raise ValueError(
            "the model must generate from classes only, since data folders have no vectors, got one that needs a "
            "vector for each image; measure what MaskGIT.generate(vectors=...) returns"
        )


def check_model_decoding(pipe: MaskGIT, decoding: DecodingConfig) -> None:
    """Checks that the model can be decoded in this way, before a long measurement begins."""
    pipe.check_decoding(decoding)
    check_guidance(decoding.scales(), has_negative_class=can_guide(pipe))


def can_guide(pipe: MaskGIT) -> bool:
    """Returns True if guidance has something to move away from: a null class or a negative model."""
    return pipe.transformer.network.config.null_label is not None or pipe.negative_model is not None


def open_evaluator(
    folders: RunFolders,
    data: ShardData,
    ledger: Ledger,
    *,
    device: torch.device | str,
    batch_size: int,
    features: Sequence[Spec] = (CLASSIFIER,),
    reference: Path | None = None,
    bars: Bars = no_bars,
) -> Evaluator:
    """Opens the evaluator of the runs of a data set.

    ``folders`` are those of the first run. ``reference`` is a file in the layout of ADM to compare with; None for the
    val split. Tokens of another tokenizer have no images, and so no networks.
    """
    name, device = data_name(folders.data), torch.device(device)
    if data.summary.tokens is not None:
        return Evaluator(data, name, {}, ledger, bars, batch_size, device)
    if reference is not None:
        ArrayFile(reference, thing="reference")  # a wrong file is refused before networks are read
    extractors = open_extractors(folders.classifier, data, features, device=device)
    on_images = bars(f"real images: {', '.join(each.label for each in extractors)}", data.summary.samples["val"])
    of_pixels, of_val = pixel_extractor(), extractors if reference is None else []
    references = obtain_references(folders.references, data, [*of_val, of_pixels], on_images=on_images)
    labels = read_real_labels(data)
    pixels = FeatureMetrics(of_pixels, references[of_pixels.label], labels)
    if reference is not None:  # the classes of its images are unknown
        references = read_references(reference, extractors, folder=folders.references, on_images=on_images)
    networks = {
        each.label: FeatureMetrics(each, references[each.label], labels if reference is None else None)
        for each in extractors
    }
    return Evaluator(data, name, networks, ledger, bars, batch_size, device, pixels)
