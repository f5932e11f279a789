"""Finds the folders of a run to measure, and what it records of its data. Imports no torch.

``opening`` opens what the folders hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import shorten

if TYPE_CHECKING:
    from maskgit_pl.pipeline.outline import Outline

__all__ = ["RunFolders", "data_name", "find_run", "find_tokenizer_folders", "read_outline", "read_run_recipe"]


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


def read_run_recipe(file: Path) -> dict[str, Any]:
    """Reads the ``config.yaml`` of a run as plain values; a missing file gives an empty mapping.

    Raises:
        ValueError: if the file is not a recipe. The message is one line.
    """
    from maskgit_pl.safe_yaml import read_yaml

    try:
        return read_yaml(file) if file.is_file() else {}
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
