"""``maskgit push``: uploads a pretrained folder with its model card to the Hugging Face Hub.

Everything on this machine is checked before the Hub is asked. The files of the model are sent in one commit, which also
deletes those of an older model that the new one does not have. Other files of the folder are not sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of httpx or requests
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not listed in its __all__

from maskgit_pl import pipeline
from maskgit_pl.errors import BAD_INPUT, RunError
from maskgit_pl.pipeline.sharing import FILES, local_folder
from maskgit_pl.text import python_string, shorten

_CARD = "README.md"
_OURS = frozenset({*FILES, "LICENSE", "LICENSE.md", "LICENSE.txt", _CARD})


class PushError(RunError):
    """An upload that the Hub refuses, or a Hub that cannot be reached."""

    exit_code = BAD_INPUT


@dataclass(frozen=True)
class Push:
    """An upload whose files have been checked.

    Args:
        hub_id: Repository, ``owner/name``.
        card: Text of ``README.md`` in the repository.
        files: The other files, by their paths in the repository.
    """

    hub_id: str
    card: str
    files: dict[str, Path]


def plan_push(model: str | Path, hub_id: str, *, license: str | None = None) -> Push:  # noqa: A002  # the Hub's word
    """Checks a pretrained folder and composes its card. Asks no network.

    1. Find the files that belong to a model, and refuse links among them.
    2. Load the model, which checks every value and every weight.
    3. Take its ``README.md``, or make one, with the name of the repository in the example.

    Args:
        model: Run, pretrained folder, or name of a model in the package.
        hub_id: Repository, ``owner/name``.
        license: License of the weights as the Hub spells it, which the Hub checks; None keeps that of the card.
    """
    if "/" not in hub_id:
        raise ValueError(f"hub_id must be owner/name, such as alice/maskgit-flowers, got {shorten(hub_id)}")
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ValueError(f"hub_id must be accepted by the Hub, such as alice/maskgit-flowers: {error}") from error
    # 1.
    folder = local_folder(model)
    from maskgit_pl.pipeline.card import PLACEHOLDER, describe_folder, model_card  # torch takes a second to import
    from maskgit_pl.pretrained.networks import read_config

    files = dict(_find_files(folder))
    # 2.
    pipeline.MaskGIT.from_pretrained(folder, pack_weights=False)
    # 3.
    if _CARD in files:
        text = files.pop(_CARD).read_text(encoding="utf-8")
    else:
        config = read_config(folder, "pipeline") if "config.json" in files else {}
        text = model_card(folder, {**describe_folder(folder), "license": None, "run": None, **config})
    try:
        card = ModelCard(text.replace(python_string(PLACEHOLDER), python_string(hub_id)))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / _CARD}: the YAML metadata is wrong: {' '.join(str(error).split())}") from error
    if license is not None:
        card.data["license"] = license
    if not isinstance(card.data.get("license"), str):
        raise ValueError(
            f"{folder / _CARD} must name the license of the weights; add it with --license, such as --license mit"
        )
    return Push(hub_id, str(card), files)


def _find_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the path in the repository and the file of everything in a folder that belongs to a model."""
    for path in sorted(_OURS):
        file = folder / path
        if file.is_symlink() or (file.parent.is_symlink() and file.parent != folder):
            raise ValueError(f"{folder} must hold no links, got {path}; put the file in its place")
        if file.exists():
            yield path, file


def push(plan: Push, *, private: bool = False) -> str:
    """Uploads a folder that ``plan_push`` has checked, and returns the URL of the repository.

    1. Check that the repository does not exist, is empty, or holds a model of this package, and create it; an existing
       one stays private or public.
    2. Send all files in one commit, and delete files of an older model that are not among them. Other files stay.
    """
    if get_token() is None:
        raise PushError(f"hub {plan.hub_id}: no access token found; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        # 1.
        try:
            there = set(api.list_repo_files(plan.hub_id)) - {".gitattributes", _CARD}
        except RepositoryNotFoundError:
            there = set()
        if there and "transformer/config.json" not in there:
            raise PushError(
                f"hub {plan.hub_id}: the name is taken by a repository with other files, such as "
                f"{shorten(min(there))}; choose another name"
            )
        address = api.create_repo(plan.hub_id, private=private, exist_ok=True)
        # 2. A decoding.json or a negative model of an older version would change the images of the new one.
        added = [CommitOperationAdd(_CARD, plan.card.encode())]
        added += [CommitOperationAdd(path, file) for path, file in plan.files.items()]
        deleted = [CommitOperationDelete(path, is_folder=False) for path in sorted((there & _OURS) - {*plan.files})]
        api.create_commit(plan.hub_id, [*added, *deleted], commit_message="Upload a model of maskgit_pl")
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        reason = shorten(" ".join(str(error).split()) or type(error).__name__)
        raise PushError(
            f"hub {plan.hub_id}: the Hub refused the upload, or cannot be reached ({reason}); check the access token "
            "and its rights (`hf auth login`), the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    return str(address)
