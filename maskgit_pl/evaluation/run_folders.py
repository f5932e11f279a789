"""A run as it is measured: its folders, its model, its data, and the feature networks of the data.

Everything that can be refused without torch is refused before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import shorten
from maskgit_pl.progress import Bars, no_bars

if TYPE_CHECKING:
    from maskgit_pl.data import ShardData
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
    from maskgit_pl.evaluation.ledger import Ledger
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.outline import Outline

__all__ = [
    "MeasurementOptions",
    "RunFolders",
    "check_data",
    "check_model_decoding",
    "create_evaluated_model",
    "default_steps",
    "find_run",
    "open_data",
    "open_evaluator",
    "open_images",
    "open_model",
    "read_outline",
    "read_run_recipe",
    "round_to_classes",
]

_VALIDATION_BATCH = 200


@dataclass(frozen=True)
class MeasurementOptions:
    """The options of every measurement of a run.

    Args:
        seed: Of the first image; image i has seed + i.
        batch_size: Images at a time; changes the time alone.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; None for a GPU if there is one.
        num_workers: Processes that read real images.
        classifier: Folder of the classifier of the data, which is trained where there is none; None for
            ``runs/DATA-classifier/small``.
    """

    seed: int = 0
    batch_size: int = 100
    device: str | None = None
    num_workers: int = 0
    classifier: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: at least 1 is needed, got {self.batch_size}")


@dataclass(frozen=True)
class RunFolders:
    """The folders of a run that is measured.

    Args:
        pretrained: The folder with ``tokenizer/`` and ``transformer/``.
        run: The run's folder; the pretrained folder itself where it stands alone.
        data: The data folder.
        classifier: The folder of the data's classifier.
        references: The folder of features of real images, for all runs of the same data.
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
        run: Run folder or pretrained folder.
        data: Data folder; None for what the run was trained on.
        classifier: Folder of the data's classifier; None for the one that all runs of the data share.

    Raises:
        FileNotFoundError: if there is no such run or data, or the run does not say what it was trained on.
    """
    from maskgit_pl.pipeline.sharing import local_folder

    pretrained = local_folder(run)
    home = pretrained.parent if pretrained.name == "pretrained" else pretrained
    path = data or _find_data(home)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such folder; name one with --data")
    real = home.absolute().parent / f"{path.absolute().name}-classifier"  # one classifier for all runs of the data
    return RunFolders(pretrained, home, path, classifier or real / "small", real)


def read_outline(folders: RunFolders) -> Outline:
    """Reads what requests to the model are checked by, without torch.

    Raises:
        ValueError: if a file of the model is not as it must be.
    """
    from maskgit_pl.pipeline.outline import Outline

    outline = Outline.read(folders.pretrained)
    if outline is None:  # loading the model says what is wrong with it
        from maskgit_pl.pipeline import MaskGIT

        return MaskGIT.from_pretrained(folders.pretrained).outline
    return outline


def default_steps(num_tokens: int, usual: Sequence[int]) -> tuple[int, ...]:
    """Returns the usual T that an image has tokens for; its number of tokens where it has fewer than all of them."""
    return tuple(number for number in usual if number <= num_tokens) or (num_tokens,)


def round_to_classes(num_images: int, num_classes: int, *, name: str = "num_images") -> int:
    """Returns the largest number of images, at most ``num_images``, that all classes have equally many of.

    Raises:
        ValueError: if that is fewer than 2 images a class.
    """
    if num_images < 2 * num_classes:
        raise ValueError(f"{name}: at least 2 for each of the {num_classes} classes are needed, got {num_images}")
    return num_images - num_images % num_classes


def open_model(folders: RunFolders, device: str | None = None) -> MaskGIT:
    """Reads the model of a run.

    Args:
        folders: The run's folders.
        device: Device of the model; None for a GPU if there is one.

    Raises:
        ValueError: if there is no such device, or a file of the model is not as it must be.
    """
    from maskgit_pl.devices import check_device, default_device
    from maskgit_pl.pipeline import MaskGIT

    place = default_device() if device is None else str(check_device(device))
    return MaskGIT.from_pretrained(folders.pretrained).to(place)


def open_data(folders: RunFolders, pipe: MaskGIT, *, num_workers: int = 0) -> ShardData:
    """Opens the images that a model is measured on.

    Args:
        folders: The run's folders.
        pipe: The model.
        num_workers: Processes that read the images.

    Raises:
        ValueError: if their classes are not the model's.
    """
    channels = pipe.tokenizer.network.config.in_channels
    data = open_images(folders.data, pipe.tokenizer.image_size, channels, num_workers=num_workers)
    check_data(pipe, data)
    return data


def open_images(folder: Path, image_size: int, in_channels: int, *, num_workers: int = 0) -> ShardData:
    """Opens a data folder as square images of a size in pixels."""
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
    """Refuses data whose classes are not the model's.

    Raises:
        ValueError: with both.
    """
    if data.class_names != pipe.class_names:
        raise ValueError(
            f"data {data.config.path}: the classes must be the model's {list(pipe.class_names[:10])}, "
            f"got {list(data.class_names[:10])}; name the data it was trained on with --data"
        )


def check_model_decoding(pipe: MaskGIT, decoding: DecodingConfig) -> None:
    """Refuses, before time is spent, a way of decoding that the model cannot follow.

    Raises:
        TypeError: if a part does not take its arguments.
        ValueError: if a name is unknown, a number is out of range, there are more steps than tokens, or guidance has no
            null class.
    """
    pipe.check_decoding(decoding)
    if any(decoding.scales()) and pipe.transformer.network.config.null_label is None:
        raise ValueError(
            f"guidance {decoding.guidance}: this model has no null class (it was trained with class_dropout 0); "
            "take scale 0, or train with model.network.class_dropout 0.1"
        )


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
    """Opens the evaluator of the runs of some data, and trains the classifier of the data where it is not kept yet.

    Args:
        folders: Folders of the first run: where the classifier and features of real images are kept.
        pipe: Its model, whose device the feature networks are on.
        data: The real images.
        ledger: Holds the measurements.
        features: Feature networks: names or mappings; ``classifier`` is the classifier of ``folders.classifier``.
        reference: ADM's file of a data set in place of the val split; None for the split.
        options: Batch size.
        bars: Shows the progress.

    Raises:
        TypeError: if a network does not take its arguments.
        ValueError: if a network is unknown, or its weights are missing or others.
    """
    from maskgit_pl.evaluation import classifier_training
    from maskgit_pl.evaluation.classifier_config import SMALL_TRAINING
    from maskgit_pl.evaluation.evaluator import Evaluator
    from maskgit_pl.evaluation.feature_metrics import CLASSIFIER, FeatureMetrics
    from maskgit_pl.evaluation.features import Extractor
    from maskgit_pl.evaluation.reference import obtain_references, read_real_labels, read_references
    from maskgit_pl.networks.features import ClassifierSpec, parse_feature_network

    judge = ClassifierSpec(str(folders.classifier))
    specs = [judge if spec == CLASSIFIER else parse_feature_network(spec) for spec in features]
    if CLASSIFIER in features:
        train = bars("classifier: training", SMALL_TRAINING.max_steps)
        classifier_training.obtain_classifier(folders.classifier, data, on_step=lambda: train(1))
    extractors = [Extractor.create(spec, device=pipe.device) for spec in specs]
    on_images = bars(f"real images: {', '.join(each.label for each in extractors)}", data.summary.samples["val"])
    if reference is None:
        references = obtain_references(folders.references, data, extractors, on_images=on_images)
        labels = read_real_labels(data)
    else:
        references, labels = (
            read_references(reference, extractors, folder=folders.references, on_images=on_images),
            None,
        )
    return Evaluator(
        data,
        dataset=folders.data.name,
        networks={each.label: FeatureMetrics(each, references[each.label], labels) for each in extractors},
        ledger=ledger,
        bars=bars,
        batch_size=options.batch_size,
        device=pipe.device,
    )


def create_evaluated_model(folders: RunFolders, pipe: MaskGIT, folder: Path | None = None) -> EvaluatedModel:
    """Returns a run's model as the evaluator takes it, with its images in ``folder``, or in ``RUN/evaluation``."""
    from maskgit_pl.evaluation.evaluator import EvaluatedModel

    return EvaluatedModel(folders.run.name, pipe, folders.pretrained, folder or folders.evaluation)


def read_run_recipe(file: Path) -> dict[str, Any]:
    """Returns what a run's ``config.yaml`` says, in plain values; nothing where it is not there.

    Raises:
        ValueError: if it is no recipe. The message is one line.
    """
    from maskgit_pl.old_names import rename_tree
    from maskgit_pl.runs.safe_yaml import read_yaml

    if not file.is_file():
        return {}
    try:
        return rename_tree(read_yaml(file), f"recipe {file}")
    except RecursionError as error:
        raise ValueError(f"recipe {file} is nested too deep") from error
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _find_data(home: Path) -> Path:
    """Returns the data folder that stands in the run's own configuration.

    Raises:
        FileNotFoundError: if there is none.
    """
    for stage in ("transformer", "tokenizer"):
        file = home / stage / "config.yaml"
        data = read_run_recipe(file).get("data") or {}
        path = data.get("path") if isinstance(data, dict) else data
        if path is not None and not isinstance(path, str):
            raise ValueError(f"{file}: data.path must be a string, got {shorten(path)}")
        if path:
            return Path(path)
    raise FileNotFoundError(f"run {home}: it does not say what data it was trained on; name them with --data")
