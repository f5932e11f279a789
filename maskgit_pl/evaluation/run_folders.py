"""The parts of a run that a measurement needs: folders, model, data, and the feature networks of the data.

``evaluate``, ``compare``, ``tune`` and the reports use it. All checks that do not need torch come before the import of
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import shorten
from maskgit_pl.image_format import ImageSize
from maskgit_pl.progress import Bars, no_bars

if TYPE_CHECKING:
    import torch

    from maskgit_pl.data import ShardData
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
    from maskgit_pl.evaluation.feature_metrics import FeatureMetrics
    from maskgit_pl.evaluation.ledger import Ledger
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.outline import Outline

__all__ = [
    "MeasurementOptions",
    "RunFolders",
    "can_guide",
    "check_data",
    "check_model_decoding",
    "create_evaluated_model",
    "default_steps",
    "find_run",
    "find_tokenizer_folders",
    "give_val_vectors",
    "open_data",
    "open_evaluator",
    "open_images",
    "open_model",
    "open_networks",
    "read_outline",
    "read_run_recipe",
    "round_to_classes",
]

_VALIDATION_BATCH = 200  # images


@dataclass(frozen=True)
class MeasurementOptions:
    """The options of every measurement of a run.

    Args:
        seed: Seed of the first image; image i has ``seed + i``.
        batch_size: Images per batch; it does not change results.
        device: Device such as ``cpu``, ``cuda`` or ``cuda:1``; None for a GPU if there is one.
        dtype: Arithmetic of the transformer, as ``devices.parse_dtype`` reads it; only of a single run.
        num_workers: Number of processes that read real images.
        classifier: Folder of the classifier of the data, which is trained if it is missing; None for
            ``runs/DATA-classifier/small``.
        negative_model: Weaker model of guidance (see ``pipeline.GenerateOptions``), only of a single run; None for that
            of the model's ``decoding.json``, if it names one.

    Raises:
        ValueError: if ``batch_size`` is less than 1.
    """

    seed: int = 0
    batch_size: int = 100
    device: str | None = None
    dtype: str | None = None
    num_workers: int = 0
    classifier: Path | None = None
    negative_model: Path | str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


@dataclass(frozen=True)
class RunFolders:
    """The folders of a run to measure.

    Args:
        pretrained: Folder with ``tokenizer/`` and ``transformer/``.
        run: Run folder; the pretrained folder itself if it belongs to no run.
        data: Data folder.
        classifier: Folder of the data's classifier.
        references: Folder of features of real images, which all runs of the same data share.
    """

    pretrained: Path
    run: Path
    data: Path
    classifier: Path
    references: Path

    @property
    def evaluation(self) -> Path:
        """The folder of the ledger and of generated images."""
        return self.run / "evaluation"


def find_run(run: Path | str, *, data: Path | None = None, classifier: Path | None = None) -> RunFolders:
    """Finds the folders of a run.

    Args:
        run: Run folder, pretrained folder, or the name of a model in the package, whose results are written to
            ``runs/NAME``.
        data: Data folder; None for the data that the run was trained on.
        classifier: Folder of the data's classifier; None for the one that all runs of the data share.

    Raises:
        FileNotFoundError: if the run or the data do not exist, or the run does not record its data.
    """
    from maskgit_pl.pipeline.bundled import bundled_models
    from maskgit_pl.pipeline.sharing import local_folder

    pretrained = local_folder(run)
    if pretrained in bundled_models().values():
        return _folders(pretrained, Path("runs", pretrained.name), data, classifier)
    # RUN/pretrained belongs to the run; any other pretrained folder stands for itself.
    home = pretrained.parent if pretrained.name == "pretrained" else pretrained
    return _folders(pretrained, home, data, classifier)


def find_tokenizer_folders(
    folder: Path | str, *, data: Path | None = None, classifier: Path | None = None
) -> RunFolders:
    """Finds the folders of a tokenizer, which needs no transformer beside it.

    Args:
        folder: Run folder, pretrained folder, or the folder of the tokenizer itself.
        data: See ``find_run``.
        classifier: See ``find_run``.

    Returns:
        The folders; ``pretrained / "tokenizer"`` is the tokenizer.

    Raises:
        FileNotFoundError: if there is no tokenizer, or for a reason of ``find_run``.
    """
    path = Path(folder)
    # RUN/tokenizer of a run holds the training; its config.yaml is no config.json.
    for pretrained in (path / "pretrained", path, path.parent if path.name == "tokenizer" else path):
        if (pretrained / "tokenizer" / "config.json").is_file():
            home = pretrained.parent if pretrained.name == "pretrained" else pretrained
            return _folders(pretrained, home, data, classifier)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {path}: no such folder; name a run, or a folder that an importer wrote")
    raise FileNotFoundError(
        f"tokenizer {path}: no tokenizer there; `maskgit train tokenizer` writes RUN/pretrained/tokenizer at its end, "
        "and `maskgit export RUN --stage tokenizer --out DIR` from a checkpoint"
    )


def _folders(pretrained: Path, home: Path, data: Path | None, classifier: Path | None) -> RunFolders:
    path = data or _find_data(home)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such folder; choose another with --data")
    real = home.absolute().parent / f"{path.absolute().name}-classifier"  # shared by all runs of the data
    return RunFolders(pretrained, home, path, classifier or real / "small", real)


def read_outline(folders: RunFolders) -> Outline:
    """Reads the outline of the model, which checks requests without torch.

    Raises:
        ValueError: if a file of the model is invalid.
    """
    from maskgit_pl.pipeline.outline import Outline

    outline = Outline.read(folders.pretrained)
    if outline is None:  # loading the model raises the error that explains it
        from maskgit_pl.pipeline import MaskGIT

        return MaskGIT.from_pretrained(folders.pretrained).outline
    return outline


def default_steps(num_tokens: int, usual: Sequence[int]) -> tuple[int, ...]:
    """Returns the usual numbers of steps that do not exceed the number of tokens.

    Args:
        num_tokens: N.
        usual: Numbers of steps; if all of them exceed N, N is returned.
    """
    return tuple(number for number in usual if number <= num_tokens) or (num_tokens,)


def round_to_classes(num_images: int, num_classes: int, *, name: str = "num_images") -> int:
    """Returns ``num_images``, rounded down to a multiple of the number of classes.

    Args:
        num_images: Number of images.
        num_classes: Number of classes.
        name: Name of the number in errors.

    Raises:
        ValueError: if there are fewer than 2 images per class.
    """
    if num_images < 2 * num_classes:
        raise ValueError(f"{name} must be >= {2 * num_classes} (2 per class), got {num_images}")
    return num_images - num_images % num_classes


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
        device: See ``MeasurementOptions``, as for the other arguments.
        dtype: Arithmetic of the transformer.
        negative_model: Weaker model.

    Raises:
        FileNotFoundError: if the negative model does not exist.
        ValueError: if the device does not exist, a file is invalid, or the negative model predicts other tokens.
    """
    from maskgit_pl.pipeline.sharing import find_transformer

    if negative_model is not None:
        find_transformer(negative_model)  # before torch is imported
    from maskgit_pl.devices import find_device, parse_dtype
    from maskgit_pl.pipeline import MaskGIT

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
        in_channels: Channels of the images, 1 to 4.
        num_workers: Number of processes that read the images.
    """
    from maskgit_pl.data import ShardData, ShardDataConfig

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
    features: Sequence[str | dict[str, Any]] = ("classifier",),
    reference: Path | None = None,
    options: MeasurementOptions = MeasurementOptions(),  # frozen
    bars: Bars = no_bars,
) -> Evaluator:
    """Opens the evaluator of the runs of a data set, and trains the classifier of the data if it is missing.

    Args:
        folders: Folders of the first run; they hold the classifier and the features of real images.
        pipe: Model of the first run; the feature networks use its device.
        data: The real images.
        ledger: Ledger of the measurements.
        features: Feature networks: names or mappings; ``classifier`` is the classifier of ``folders.classifier``.
        reference: File in the layout of ADM to compare with; None for the val split.
        options: Options, of which the batch size is used.
        bars: Progress bars.

    Raises:
        TypeError: if a network does not accept its arguments.
        ValueError: if a network is unknown, its weights are missing, or their SHA-256 does not match.
    """
    from maskgit_pl.evaluation.evaluator import Evaluator

    return Evaluator(
        data,
        dataset=folders.data.name,
        networks=open_networks(folders, data, features=features, reference=reference, device=pipe.device, bars=bars),
        ledger=ledger,
        bars=bars,
        batch_size=options.batch_size,
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
    from maskgit_pl.evaluation.extractors import open_extractors
    from maskgit_pl.evaluation.feature_metrics import FeatureMetrics
    from maskgit_pl.evaluation.reference import obtain_references, read_real_labels, read_references

    extractors = open_extractors(folders.classifier, data, features=features, device=device, bars=bars)
    on_images = bars(f"real images: {', '.join(each.label for each in extractors)}", data.summary.samples["val"])
    if reference is not None:  # the classes of its images are unknown
        references, labels = (
            read_references(reference, extractors, folder=folders.references, on_images=on_images),
            None,
        )
    else:
        references = obtain_references(folders.references, data, extractors, on_images=on_images)
        labels = read_real_labels(data)
    return {each.label: FeatureMetrics(each, references[each.label], labels) for each in extractors}


def create_evaluated_model(folders: RunFolders, pipe: MaskGIT, folder: Path | None = None) -> EvaluatedModel:
    """Returns the model of a run for the evaluator; ``folder`` is for its images, by default ``RUN/evaluation``."""
    from maskgit_pl.evaluation.evaluator import EvaluatedModel

    return EvaluatedModel(folders.run.name, pipe, folders.pretrained, folder or folders.evaluation)


def read_run_recipe(file: Path) -> dict[str, Any]:
    """Reads the ``config.yaml`` of a run as plain values; a missing file gives an empty mapping.

    Raises:
        ValueError: if the file is not a recipe. The message is one line.
    """
    from maskgit_pl.old_names import rename_tree
    from maskgit_pl.safe_yaml import read_yaml

    try:
        return rename_tree(read_yaml(file), f"recipe {file}") if file.is_file() else {}
    except RecursionError as error:
        raise ValueError(f"recipe {file} is nested too deep") from error
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _find_data(home: Path) -> Path:
    """Returns the data folder in the run's ``config.yaml``.

    Raises:
        FileNotFoundError: if no stage records one.
    """
    # Both stages record the data; a run may have only one of them.
    for stage in ("transformer", "tokenizer"):
        file = home / stage / "config.yaml"
        data = read_run_recipe(file).get("data") or {}
        path = data.get("path") if isinstance(data, dict) else data
        if path is not None and not isinstance(path, str):
            raise ValueError(f"{file}: data.path must be a string, got {shorten(path)}")
        if path:
            return Path(path)
    raise FileNotFoundError(f"run {home} does not record the data that it was trained on; choose them with --data")
