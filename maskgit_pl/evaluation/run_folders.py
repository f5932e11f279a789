"""Finds the folders of a run to measure, and reads what they record of the model and its data. Imports no torch.

``opening`` opens what the folders hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgit_pl.checks import shorten
from maskgit_pl.data.manifest import DataSummary
from maskgit_pl.data.writer import MAX_RECORD_BYTES, RECORD
from maskgit_pl.files import read_json, read_yaml
from maskgit_pl.pipeline.sharing import bundled_models, local_folder

__all__ = [
    "RunFolders",
    "data_name",
    "describe_held_out",
    "find_run",
    "find_tokenizer_folders",
    "read_run_recipe",
]

_MAX_CONFIG_BYTES = 8_000_000
_ADVICE = (
    "to judge on an official test set, put its images into test/ beside train/, or give a data folder whose val split "
    "it is with --data"
)
_SOURCES = {  # kind of source in the data folder's record -> origin of its val split
    "idx": "the official test set of the IDX files",
    "emoji": "pictures of the emoji that `maskgit data fetch` holds out",
    "blue marble": "tiles of the blocks that `maskgit data fetch` holds out",
    "image folder": f"those in val/ or test/ of the image folder if it has one, else about a tenth of all; {_ADVICE}",
    "parquet": "those of its validation or test files if it has them, else about a tenth of all",
}
_UNKNOWN = f"the val shards, which maskgit_pl did not choose; {_ADVICE}"


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
    def shares_classifier(self) -> bool:
        """Returns True if the classifier is the one that all runs of the data share; the user named no folder."""
        return self.classifier == self.references / "small"

    @property
    def evaluation(self) -> Path:
        """The folder of the ledger and of generated images."""
        return self.run / "evaluation"


def data_name(data: Path) -> str:
    """Returns the name of a data folder for ledgers and pages, which is also that of a folder of results."""
    # The paths . and .. have a name only once they are resolved.
    return data.name if data.name not in ("", "..") else data.resolve().name


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
    pretrained = local_folder(run)
    is_bundled = pretrained in bundled_models().values()
    home = Path("runs", pretrained.name) if is_bundled else _home(pretrained)
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
            return _folders(pretrained, _home(pretrained), data, classifier)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {path}: no such folder; name a run, or a folder that an importer wrote")
    raise FileNotFoundError(
        f"tokenizer {path}: no tokenizer there; `maskgit train tokenizer` writes RUN/pretrained/tokenizer at its end, "
        "and `maskgit export RUN --stage tokenizer --out DIR` from a checkpoint"
    )


def _home(pretrained: Path) -> Path:
    """Returns the run of RUN/pretrained; any other pretrained folder stands for itself."""
    return pretrained.parent if pretrained.name == "pretrained" else pretrained


def _folders(pretrained: Path, home: Path, data: Path | None, classifier: Path | None) -> RunFolders:
    path = data or _find_data(pretrained, home)
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such folder; choose another with --data")
    real = home.absolute().parent / f"{path.absolute().name}-classifier"  # shared by all runs of the data
    return RunFolders(pretrained, home, path, classifier or real / "small", real)


def _find_data(pretrained: Path, home: Path) -> Path:
    """Returns the data folder that a run records, or ``data/shards/NAME`` for the name that an exported model has.

    Raises:
        FileNotFoundError: if neither is recorded, or the folder of that name does not exist.
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
    advice = "choose them with --data"
    name = _recorded_name(pretrained / "config.json")
    if name is not None:
        path = Path("data/shards", name)
        if path.is_dir():
            return path
        advice = f"it was {name}: make {path} (`maskgit data fetch` has public data sets), or {advice}"
    raise FileNotFoundError(f"run {home} does not record the data folder that it was trained on; {advice}")


def _recorded_name(file: Path) -> str | None:
    """Returns the name of the data in the ``config.json`` of an exported model, or None."""
    node: Any = read_json(file, max_bytes=_MAX_CONFIG_BYTES) if file.is_file() else {}
    for key in ("run", "tokenizer", "settings", "data.path"):
        node = node.get(key) if isinstance(node, dict) else None
    return Path(node).name if isinstance(node, str) else None


def read_run_recipe(file: Path) -> dict[str, Any]:
    """Reads the ``config.yaml`` of a run as plain values; a missing file gives an empty mapping.

    Raises:
        ValueError: if the file is not a recipe. The message is one line.
    """
    try:
        return read_yaml(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error


def describe_held_out(folder: Path, summary: DataSummary) -> dict[str, Any]:
    """Describes the val split of a data folder in plain values.

    Args:
        folder: Data folder.
        summary: Its summary.

    Returns:
        ``split``, ``images``, ``fraction`` (of train and val together), ``source`` (``idx``, ``image folder``, ... or
        ``unknown``), and ``text``, a sentence.
    """
    record = read_json(folder / RECORD, max_bytes=MAX_RECORD_BYTES) if (folder / RECORD).is_file() else {}
    made_from = record.get("source") if isinstance(record, dict) else None
    kind = made_from.get("kind") if isinstance(made_from, dict) else None
    source = kind if kind in _SOURCES else "unknown"
    images = summary.samples["val"]
    fraction = images / sum(summary.samples.values())
    text = (
        f"Held out: {images:,} images of the val split ({fraction:.0%} of the data), {_SOURCES.get(source, _UNKNOWN)}."
    )
    return {"split": "val", "images": images, "fraction": fraction, "source": source, "text": text}
