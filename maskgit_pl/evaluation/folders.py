"""Finds the folders of a run to measure, and opens its model, its data, and the feature networks of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskgit_pl.checks import pixels_text
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.manifest import DataSummary
from maskgit_pl.data.sources.public import how_to_get
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
from maskgit_pl.files import read_json, read_yaml
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.sharing import bundled_models, local_folder
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.runs.recipe import value_at, without_keys
from maskgit_pl.runs.variants import FOLDER

_MAX_CONFIG_BYTES = 8_000_000  # of a model that may be a stranger's
_UNTRAINED = (  # keys that do not affect the trained weights, and that of the seed
    "model.decoding", "data.path", "data.token_store", "model.tokenizer", "checkpoint_every", "keep_last", "keep_every",
    "hang_seconds", "trainer.val_check_interval", "trainer.limit_val_batches", "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps", "data.validation_batch", "data.validation_samples", "data.seed", "model.seed",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolders:
    """The folders of a run to measure."""

    pretrained: Path  # with ``tokenizer/`` and ``transformer/``
    run: Path  # the pretrained folder itself if it belongs to no run
    data: Path
    references: Path  # features of real images, and a classifier, which all runs of the same data share

    @property
    def classifier(self) -> Path:
        """The folder of the data's own classifier."""
        return self.references / "small"


def data_name(data: Path) -> str:
    """Returns the name of a data folder for ledgers and pages, which is also that of a folder of results."""
    # The paths . and .. have a name only once they are resolved.
    return data.name if data.name not in ("", "..") else data.resolve().name


def find_run(run: Path | str, *, data: Path | None = None) -> RunFolders:
    """Finds the folders of a run.

    Args:
        run: Run folder, pretrained folder, or the name of a model in the package, whose results are written
            to ``runs/NAME``.
        data: Data folder; None for the data that the run was trained on.
    """
    return _folders(local_folder(run), data)


def find_tokenizer_folders(folder: Path | str, *, data: Path | None = None) -> RunFolders:
    """Finds the folders of a tokenizer, which needs no transformer beside it; see ``find_run``.

    ``folder`` may also be the folder of the tokenizer itself.
    """
    path = Path(folder)
    if str(folder) in bundled_models() and not path.is_dir():
        return find_run(folder, data=data)
    # RUN/tokenizer of a run holds the training; its config.yaml is no config.json.
    for pretrained in (path / "pretrained", path, path.parent if path.name == "tokenizer" else path):
        if (pretrained / "tokenizer" / "config.json").is_file():
            return _folders(pretrained, data)
    raise FileNotFoundError(
        f"tokenizer {path}: no tokenizer there; name a run whose stage 1 has ended, or a folder of `maskgit export` or "
        "of an importer"
    )


def _folders(pretrained: Path, data: Path | None) -> RunFolders:
    # The run of RUN/pretrained; any other pretrained folder stands for itself.
    home = pretrained.parent if pretrained.name == "pretrained" else pretrained
    if pretrained in bundled_models().values():
        home = Path("runs", pretrained.name)
    path = data or _find_data(pretrained, home)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such folder; choose another with --data")
    runs = home.absolute().parent
    runs = runs.parent if runs.name == FOLDER else runs
    references = runs / f"{path.absolute().name}-classifier"  # of all runs of the data, also those of ablations
    return RunFolders(pretrained, home, path, references)


def _find_data(pretrained: Path, home: Path) -> Path:
    """Returns the data folder that a run records, or ``data/shards/NAME`` for the name that an exported model has."""
    # Both stages record the data; a run may have only one of them.
    for stage in ("transformer", "tokenizer"):
        path = value_at(read_run_recipe(home / stage / "config.yaml"), "data.path")
        if isinstance(path, str):
            return Path(path)
    file, advice = pretrained / "config.json", "choose them with --data"
    node: Any = read_json(file, max_bytes=_MAX_CONFIG_BYTES) if file.is_file() else {}
    for key in ("run", "tokenizer", "settings", "data.path"):
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, str):
        path = Path("data/shards", Path(node).name)
        if path.is_dir():
            return path
        advice = f"it was {path.name}: {how_to_get(path.name, path)}, or {advice}"
    what = f"run {home}" if home.is_dir() else f"model {pretrained.name}"
    raise FileNotFoundError(f"{what} does not record the data folder that it was trained on; {advice}")


def read_run_recipe(file: Path) -> dict[str, Any]:
    """Reads the ``config.yaml`` of a run as plain values; a missing file gives an empty mapping."""
    return read_yaml(file) if file.is_file() else {}


def trained_recipe(folder: Path) -> dict[str, Any]:
    """Returns the recipe of a stage of a run, without the seed and what does not affect the trained weights.

    Args:
        folder: Folder of the stage, such as ``RUN/transformer``; one without a recipe gives an empty mapping.
    """
    return remove_untrained(read_run_recipe(folder / "config.yaml"))


def remove_untrained(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a complete recipe without the seed and what does not affect the trained weights."""
    return without_keys(tree, _UNTRAINED)


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
