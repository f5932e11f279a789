"""Finds a pretrained folder on this machine, in the package or on the Hugging Face Hub. Imports no torch.

Downloaded files are read as data and never executed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict, Unpack

from maskgit_pl.files import read_json
from maskgit_pl.text import did_you_mean

_FOLDER = Path(__file__).parents[1] / "models"
# Files that a pipeline needs. Other files of a repository may be large and are not downloaded.
STAGES = ("tokenizer", "transformer")
_FILES = ("config.json", "model.safetensors")
NETWORK_FILES = tuple(f"{stage}/{file}" for stage in STAGES for file in _FILES)
FILES = (*NETWORK_FILES, "config.json", "decoding.json", "negative/config.json", "negative/model.safetensors")
"""The files of a pretrained folder, without card and license."""
_MAX_BYTES = 8_000_000  # of a config.json
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OUR_FOLDERS = ("runs", "pretrained")  # a name in one of these folders is a path, even if it does not exist


class HubOptions(TypedDict, total=False):
    """Options of a download from the Hub.

    Args:
        revision: Branch, tag or commit of a repository; its main branch by default.
        cache_dir: Folder of downloaded files; the cache of the Hub by default.
        local_files_only: True reads only from the cache.
        token: Access token for repositories that are not public; True is the token of ``hf auth login``.
    """

    revision: str | None
    cache_dir: Path | str | None
    local_files_only: bool
    token: str | bool | None


def find_folder(path_or_hub_id: Path | str, **hub: Unpack[HubOptions]) -> Path:
    """Finds a pretrained folder on this machine or in the package, or downloads it if the text is ``owner/name``.

    Args:
        path_or_hub_id: Run folder, pretrained folder, name of a model in the package (``bundled_models``), or
            ``owner/name`` on the Hub.
        hub: Options of a download.

    Returns:
        The folder with ``tokenizer/`` and ``transformer/``.
    """
    hub_id = str(path_or_hub_id)
    if Path(path_or_hub_id).is_dir() or not _is_hub_id(hub_id):
        if hub.get("revision") is not None:
            raise ValueError(f"revision must be left out for the folder {hub_id}; only the Hub has revisions")
        return local_folder(path_or_hub_id)
    from huggingface_hub import errors, snapshot_download

    try:
        downloaded = snapshot_download(hub_id, allow_patterns=list(FILES), **hub)
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"hub {hub_id}: no such folder, and not found on the Hub: {reason}") from error
    folder = Path(downloaded)
    # A repository of another kind downloads without an error.
    missing = [
        f"{stage}/{file}" for stage in stages_of(folder) for file in _FILES if not (folder / stage / file).is_file()
    ]
    if missing:
        raise ValueError(
            f"hub {hub_id} must be a repository that `maskgit push` wrote, but {missing[0]} is missing; name a folder"
        )
    return folder


def local_folder(path: Path | str) -> Path:
    """Returns the pretrained folder of a run or of a model in the package, or the folder itself.

    Args:
        path: Run folder (``runs/RUN``), pretrained folder, or name in ``bundled_models``. A folder comes before a name.

    Returns:
        The folder with ``tokenizer/`` and ``transformer/``.
    """
    folder, bundled = Path(path), bundled_models()
    if not folder.exists() and str(path) in bundled:
        return bundled[str(path)]
    if not folder.is_dir():
        # The parent is no part of the comparison: it would make all names alike.
        others = [str(other) for other in folder.parent.glob("*/") if did_you_mean(folder.name, [other.name])]
        hint = did_you_mean(str(path), [*bundled, *others] if len(folder.parts) == 1 else others)
        advice = hint or "train one with `maskgit demo`, or name another folder."
        raise FileNotFoundError(f"run {folder}: no such folder; {advice} Models of the package: {', '.join(bundled)}")
    # A run has the folder pretrained/; a pretrained folder has the stages itself.
    pretrained = folder / "pretrained" if (folder / "pretrained").is_dir() else folder
    for stage in stages_of(pretrained):
        if not (pretrained / stage / "config.json").is_file():
            raise FileNotFoundError(
                f"run {folder}: no {stage} in {pretrained}; `maskgit train {stage}` writes it at its end"
            )
    return pretrained


def stages_of(folder: Path) -> tuple[str, ...]:
    """Returns the stages of a pretrained folder: a transformer of tokens of another tokenizer has none beside it."""
    config = folder / "transformer" / "config.json"
    is_alone = config.is_file() and read_json(config, max_bytes=_MAX_BYTES).get("tokenizer_fingerprint", "") is None
    return ("transformer",) if is_alone else STAGES


def find_transformer(path_or_hub_id: Path | str) -> Path:
    """Returns the transformer folder of a run, of a pretrained folder, or of a repository of the Hub.

    A negative model needs no tokenizer, so that ``maskgit export --stage transformer`` is enough.
    """
    path = Path(path_or_hub_id)
    for folder in (path / "pretrained" / "transformer", path / "transformer", path):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    try:
        return find_folder(path_or_hub_id) / "transformer"
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"negative_model {path_or_hub_id} must be a run or a pretrained folder with a transformer: {error}; "
            "`maskgit export RUN --stage transformer --step N --out DIR` writes one from an early checkpoint"
        ) from error


def bundled_models() -> dict[str, Path]:
    """Returns the pretrained folder of each model in the package by name, sorted by name."""
    return {config.parents[1].name: config.parents[1] for config in sorted(_FOLDER.glob("*/transformer/config.json"))}


def _is_hub_id(text: str) -> bool:
    """Returns True for ``owner/name``, unless a folder ``owner`` exists or is one of ours: then it is a path."""
    owner = Path(text).parent
    return _HUB_ID.fullmatch(text) is not None and str(owner) not in _OUR_FOLDERS and not owner.is_dir()
