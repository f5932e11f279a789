"""``maskgit push``: uploads a pretrained folder with its model card to the Hugging Face Hub.

Everything on this machine is checked before the Hub is asked, and everything on the Hub before a file is sent. All
files are sent in one commit, which also deletes those of an older model that the new one does not have.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import shorten
from maskgit_pl.errors import BAD_INPUT, RunError, python_string
from maskgit_pl.files import open_regular, parse_yaml, set_key, sha256_of
from maskgit_pl.pipeline.card import check_run_facts, describe_folder, model_card
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.pipeline.sharing import (
    DIFFUSERS_FILES,
    FILES,
    check_diffusers_files,
    check_hub_id,
    check_token,
    local_folder,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Push", "PushError", "PushedFile", "plan_push", "push"]

_CARD = "README.md"
_LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
_OURS = frozenset({*FILES, *DIFFUSERS_FILES, _CARD, *_LICENSES})
_NOT_SENT = ("decoding.json.old", "inspect.html")  # what `maskgit tune` and `maskgit inspect` leave
_LARGEST_TEXT = 1_000_000  # bytes of a card or a license
_HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_UNKNOWN_LICENSE = re.compile(r"^# license: unknown;.*\n", re.MULTILINE)  # of a card that this package wrote
_EXAMPLE = re.compile(
    r'(?:(?<=MaskGIT\.from_pretrained\()|(?<=DiffusionPipeline\.from_pretrained\())"(?:[^"\\\n]|\\.)*"(?=[,)])'
)
_LICENSE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_UNAUTHORIZED, _FORBIDDEN = 401, 403


class PushError(RunError):
    """An upload that the Hub refuses, or a Hub that cannot be reached."""

    exit_code = BAD_INPUT


@dataclass(frozen=True)
class PushedFile:
    """A file of an upload.

    Args:
        path: Path in the repository.
        num_bytes: Size.
        sha256: SHA-256 in hex.
        source: File on this machine; None for the card, which is made for the repository.
    """

    path: str
    num_bytes: int
    sha256: str
    source: Path | None


@dataclass(frozen=True)
class Push:
    """An upload whose files have been checked.

    Args:
        hub_id: Repository, ``owner/name``.
        folder: Pretrained folder.
        card: Text of ``README.md`` in the repository.
        files: Files to send, sorted by path.
    """

    hub_id: str
    folder: Path
    card: str
    files: tuple[PushedFile, ...]


def plan_push(model: str | Path, hub_id: str, *, license: str | None = None) -> Push:  # noqa: A002  # the Hub's word
    """Checks a pretrained folder and composes its card. Asks no network.

    1. Check the name of the repository.
    2. Find the folder, and refuse files that are not part of a pretrained folder, other code, links and access tokens.
    3. Load the model, which checks every value and every weight.
    4. Take its ``README.md``, or make one, with the name of the repository in the example.

    Args:
        model: Run, pretrained folder, or name of a model in the package.
        hub_id: Repository, ``owner/name``.
        license: License of the weights as the Hub spells it; None keeps that of the card.

    Raises:
        FileNotFoundError: if there is no such folder, or a part of it is missing.
        ValueError: if a name is wrong, a file does not belong to the folder, is damaged or holds a token, or the
            license is unknown.
    """
    # 1.
    _check_name(hub_id)
    if license is not None and _LICENSE_NAME.fullmatch(license) is None:
        raise ValueError(f"--license must be a name of the Hub, such as apache-2.0 or other, got {shorten(license)}")
    # 2.
    folder = local_folder(model)
    found = dict(_list_files(folder))
    check_diffusers_files(folder)
    # 3.
    content = _load(folder)
    # 4.
    card = _read_card(found.pop(_CARD)) if _CARD in found else _write_card(folder, content)
    card = _with_license(_EXAMPLE.sub(lambda _: python_string(hub_id), card), license, folder)
    text = card.encode()
    files = [PushedFile(path, file.stat().st_size, sha256_of(file), file) for path, file in found.items()]
    files.append(PushedFile(_CARD, len(text), hashlib.sha256(text).hexdigest(), None))
    return Push(hub_id, folder, card, tuple(sorted(files, key=lambda each: each.path)))


def push(plan: Push, *, private: bool = False) -> str:
    """Uploads a checked folder.

    1. Find the token of ``hf auth login`` or of ``HF_TOKEN``, and the account that it belongs to.
    2. Check that the owner is this account or one of its organizations, and that the repository does not exist, is
       empty, or holds a model of this package.
    3. Create the repository if it does not exist.
    4. Send all files in one commit, and delete files of an older model that are not among them. Other files stay.

    Args:
        plan: Result of ``plan_push``.
        private: True creates a private repository; an existing one keeps its visibility.

    Returns:
        URL of the repository.

    Raises:
        PushError: if nobody is logged in, the Hub cannot be reached, or the Hub refuses the upload.
        ValueError: if the access token cannot be one.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    # 1.
    if get_token() is None:
        raise PushError(f"hub {plan.hub_id}: no access token found; log in with `hf auth login`, or set HF_TOKEN")
    check_token(plan.hub_id)
    api = HfApi()
    with _told_in_one_line(plan.hub_id):
        _check_owner(plan.hub_id, api.whoami())
    # 2.
    with _told_in_one_line(plan.hub_id):
        there = _check_repository(api, plan.hub_id)
    # 3.
    with _told_in_one_line(plan.hub_id):
        address = api.create_repo(plan.hub_id, private=private, exist_ok=True)
    # 4.
    with _told_in_one_line(plan.hub_id):
        added = [CommitOperationAdd(each.path, each.source or plan.card.encode()) for each in plan.files]
        # A decoding.json or a negative model of an older version would change the images of the new one.
        old = sorted((there & _OURS) - {each.path for each in plan.files})
        deleted = [CommitOperationDelete(path, is_folder=False) for path in old]
        api.create_commit(plan.hub_id, [*added, *deleted], commit_message="Upload a model of maskgit_pl")
    return str(address)


def _check_name(hub_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # named in its documentation

    check_hub_id(hub_id)
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ValueError(f"hub_id must be a name that the Hub accepts: {error}") from error


def _list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the path in the repository and the file of everything in a folder.

    Raises:
        ValueError: if something in it is not a file of a pretrained folder.
    """
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_symlink():
            raise ValueError(f"{folder} must hold no links, got {shorten(path)}; put the file in its place")
        if file.is_dir() or path in _NOT_SENT:
            continue
        if path not in _OURS:
            raise ValueError(
                f"{folder} must hold only the files of a pretrained folder, got {shorten(path)}; move it elsewhere, or "
                "write a new folder with MaskGIT.save_pretrained"
            )
        if not path.endswith(".safetensors"):
            _check_text(file)
        yield path, file


def _check_text(file: Path) -> None:
    """Checks that a file can be read as text and holds no access token.

    Raises:
        ValueError: if not.
    """
    descriptor = open_regular(file)
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read()
    if _SECRET.search(content):
        raise ValueError(
            f"{file} must hold no access token of the Hub, and one is in it; delete it there and on the Hub"
        )
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text: {error.reason} at byte {error.start}") from error


def _load(folder: Path) -> dict[str, Any]:
    """Loads the model, and returns the content of its ``config.json``, or of a new one if there is none."""
    pipe = MaskGIT.from_pretrained(folder, pack_weights=False)
    negative = pipe.negative_model
    if negative is not None and negative.folder != folder / "negative":
        raise ValueError(
            f"decoding {folder / 'decoding.json'}: negative_model must be in the folder that is shared, got "
            f"{negative.folder}; MaskGIT.save_pretrained writes a folder with a copy of it"
        )
    written = read_config(folder, "pipeline") if (folder / "config.json").is_file() else {}
    run = check_run_facts(written.get("run"))
    return {**describe_folder(folder), "license": written.get("license"), "run": run}


def _write_card(folder: Path, content: dict[str, Any]) -> str:
    return model_card(folder, content)


def _read_card(file: Path) -> str:
    """Returns the text of a card.

    Raises:
        ValueError: if it is too large, or has no YAML header.
    """
    if file.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"{file} must have at most {_LARGEST_TEXT} bytes, got {file.stat().st_size}")
    text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    if _HEADER.match(text) is None:
        raise ValueError(
            f"{file} must begin with the YAML metadata of the Hub between two lines ---; delete it to get a new card"
        )
    return text


def _with_license(card: str, name: str | None, folder: Path) -> str:
    """Returns a card with the license in its header.

    Raises:
        ValueError: if the header is not plain YAML, or there is no license.
    """
    found = _HEADER.match(card)
    assert found is not None
    header = found[1] + "\n"
    try:
        if name is not None:
            header = set_key(_UNKNOWN_LICENSE.sub("", header), "license", name)
        content = parse_yaml(header)
    except ValueError as error:
        raise ValueError(f"{folder / _CARD}: the YAML metadata is wrong: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("license"), str):
        raise ValueError(
            f"{folder / _CARD} must name the license of the weights; add it with --license, such as --license mit"
        )
    return f"---\n{header}---\n{card[found.end() :]}"


def _check_owner(hub_id: str, account: dict[str, Any]) -> None:
    """Checks that the account of the token can own the repository.

    Raises:
        PushError: if not.
    """
    owner, own = hub_id.partition("/")[0], str(account.get("name"))
    names = [own, *(str(each.get("name")) for each in account.get("orgs") or () if isinstance(each, dict))]
    if owner not in names:
        raise PushError(
            f"hub {hub_id}: the owner must be the account of the token, {shorten(own)}, or one of its organizations, "
            f"got {owner}; name another owner, or log in as {owner}"
        )


def _check_repository(api: HfApi, hub_id: str) -> set[str]:
    """Checks that a repository does not exist, is empty, or holds a model of this package.

    Returns:
        Paths of its files, without the card.

    Raises:
        PushError: if it holds something else.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = set(api.list_repo_files(hub_id)) - {".gitattributes", _CARD}
    except RepositoryNotFoundError:
        return set()
    if there and "transformer/config.json" not in there:
        raise PushError(
            f"hub {hub_id}: the name is taken by a repository with other files, such as {shorten(min(there))}; choose "
            "another name"
        )
    return there


@contextmanager
def _told_in_one_line(hub_id: str) -> Iterator[None]:
    """Turns the errors of the Hub and of the network into one line with a way out, without the token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of httpx or requests
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PushError(f"hub {hub_id}: no access token found; log in with `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = {
            _UNAUTHORIZED: "the access token is not valid; log in again with `hf auth login`, or set another HF_TOKEN",
            _FORBIDDEN: "the access token may not write to this repository; use a token with write access to it, or "
            "another name",
        }.get(status, "the Hub refused the upload; try again later")
        text = " ".join(str(error).split()).replace(get_token() or "\0", "***")
        raise PushError(f"hub {hub_id}: {advice} ({shorten(text)})") from error
    except (HTTPError, OSError) as error:
        text = " ".join(str(error).split()).replace(get_token() or "\0", "***")
        raise PushError(
            f"hub {hub_id}: the Hub cannot be reached ({shorten(text or type(error).__name__)}); check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, or share the folder as it is"
        ) from error
