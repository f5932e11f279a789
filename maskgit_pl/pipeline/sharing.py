"""Finds a pretrained folder: in a run, by itself, or on the Hugging Face Hub, from where it is fetched.

``ModelHubMixin`` does not fit: it reads the arguments of ``__init__`` and writes them into a ``config.json`` of its
own, and the arguments of a pipeline are networks. ``snapshot_download`` and ``upload_folder`` are all that is needed.
What is fetched is read as data and never executed.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

__all__ = ["check_hub_id", "find_folder", "local_folder", "upload"]

_READ = tuple(
    f"{stage}/{file}" for stage in ("tokenizer", "transformer") for file in ("config.json", "model.safetensors")
)
_FILES = (*_READ, "config.json", "decoding.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OUR_FOLDERS = ("runs", "pretrained")  # what begins with one of them is a path, whether it is there or not


def find_folder(
    path_or_hub_id: Path | str,
    *,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Finds a pretrained folder on this machine; what is not there and reads ``owner/name`` is fetched from the Hub.

    Args:
        path_or_hub_id: A run folder, a pretrained folder, or an id of the Hub.
        revision: Branch, tag or commit on the Hub; its main branch by default.
        cache_dir: Folder of fetched files; the Hub's own cache by default.
        local_files_only: True looks only in the cache.
        token: For repositories that are not public; True is the one that was logged in with.

    Returns:
        The folder with ``tokenizer/`` and ``transformer/``.

    Raises:
        FileNotFoundError: if there is no such folder and no such repository, or none that can be reached.
        ValueError: if a repository holds something else.
    """
    if not Path(path_or_hub_id).is_dir() and _is_hub_id(str(path_or_hub_id)):
        return _fetch(
            str(path_or_hub_id),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    return local_folder(path_or_hub_id)


def local_folder(path: Path | str) -> Path:
    """Finds the pretrained folder of a run, or takes the folder itself.

    Args:
        path: A run folder (``runs/RUN``) or a pretrained folder.

    Returns:
        The folder with ``tokenizer/`` and ``transformer/``.

    Raises:
        FileNotFoundError: if there is no such folder (the message names the nearest one), or a stage is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        hint = _nearest_folder(folder)
        way_out = f"did you mean {hint}?" if hint else "train one with `make demo`, or name another"
        raise FileNotFoundError(f"run {folder}: no such folder; {way_out}")
    found = folder / "pretrained" if (folder / "pretrained").is_dir() else folder
    for part in ("tokenizer", "transformer"):
        if not (found / part / "config.json").is_file():
            raise FileNotFoundError(
                f"run {folder}: no {part} in {found}; `maskgit train {part}` makes it when it has finished"
            )
    return found


def _nearest_folder(folder: Path) -> Path | None:
    """Returns the existing folder that is most like a missing one: a neighbour of its first part that is missing."""
    missing = next(part for part in (*reversed(folder.parents), folder) if not part.is_dir())
    try:
        neighbours = [entry.name for entry in os.scandir(missing.parent) if entry.is_dir()]
    except OSError:  # a folder that may not be read
        return None
    close = get_close_matches(missing.name, neighbours, n=1, cutoff=0.5)
    return missing.with_name(close[0]) if close else None


def _is_hub_id(text: str) -> bool:
    """Returns whether a text reads ``owner/name``; with a folder ``owner`` here, or one of ours, it is a path."""
    owner = Path(text).parent
    return _HUB_ID.fullmatch(text) is not None and str(owner) not in _OUR_FOLDERS and not owner.is_dir()


def _fetch(
    hub_id: str,
    *,
    revision: str | None,
    cache_dir: Path | str | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    way_out = "or name a folder, such as runs/RUN/pretrained"
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=list(_FILES),
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"hub {hub_id}: no such folder here, not in the cache, and the Hub is not asked or cannot be reached; "
            f"fetch it once with a connection, {way_out}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"hub {hub_id}: no revision {revision!r} there; leave it out, {way_out}") from error
    except RepositoryNotFoundError as error:  # private and gated ones too
        raise FileNotFoundError(
            f"hub {hub_id}: no such folder here, and no such repository that may be read; check the name, give "
            f"token= for one that is not public, {way_out}"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(f"hub {hub_id}: {' '.join(str(error).split())}; try again, {way_out}") from error
    missing = [file for file in _READ if not (Path(folder) / file).is_file()]
    if missing:
        raise ValueError(
            f"hub {hub_id}: no {missing[0]} there; a repository that push_to_hub wrote is needed, {way_out}"
        )
    return Path(folder)


def check_hub_id(text: str) -> None:
    """Checks an id of the Hub, before weights are written.

    Raises:
        ValueError: if it is not ``owner/name``.
    """
    if _HUB_ID.fullmatch(text) is None:
        raise ValueError(f"hub {text}: owner/name is needed, such as someone/maskgit-flowers")


def upload(folder: Path, hub_id: str, *, private: bool | None, token: str | bool | None) -> str:
    """Uploads a folder to a repository, which is made if it does not exist.

    Returns:
        The repository's address.

    Raises:
        ConnectionError: if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        address = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder)
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"hub {hub_id}: nothing was put there ({' '.join(str(error).split())}); log in with `hf auth login` or "
            "give token=, or share the folder that save_pretrained writes"
        ) from error
    return str(address)
