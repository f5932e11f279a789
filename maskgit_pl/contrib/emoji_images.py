"""Images of emoji: chooses the emoji of 15 classes, splits them and draws them over white, for the shard writer.

All pictures of an emoji (each artwork, skin tone and gender) are in the same split, and so are emoji that have the same
picture. Each picture is drawn on a canvas that leaves a margin, so that small shifts by random crops cut nothing off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from maskgit_pl.shards.image_bytes import UnreadableImageError
from maskgit_pl.shards.images import decode_image, encode_png, parse_image_header
from maskgit_pl.shards.manifest import Split
from maskgit_pl.shards.samples import Sample

__all__ = ["CLASSES", "Artwork", "EmojiClass", "EmojiImages", "base_of"]

Artwork: TypeAlias = Mapping[str, bytes]
"""PNG files by name, such as ``1f600.png``."""

PICTURE_SIZE = 64  # pixels
VAL_FRACTION = 0.15


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
        size: Side of an image in pixels: the picture with a margin of white.
        sha256: Hashes of the files that hold them, in hex, which identify the samples.

    Raises:
        UnreadableImageError: if a picture is damaged, or is not of 64 x 64 pixels.
    """

    classes = tuple(each.name for each in CLASSES)
    left_out: tuple[str, ...] = ()

    def __init__(
        self,
        table: Iterable[Mapping[str, Any]],
        artworks: Mapping[str, Artwork],
        size: int,
        *,
        sha256: Sequence[str] = (),
    ) -> None:
        self.size, self.sha256 = size, tuple(sha256)
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
            "kind": "emoji", "classes": list(self.classes), "size": self.size, "files": list(self.sha256),
            "pictures": chosen,
        }  # fmt: skip

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Yields images of a split as PNG."""
        pictures = [picture for picture in self.pictures if self.splits[picture.name] == split]
        margin = (self.size - PICTURE_SIZE) // 2
        for picture in pictures[places.start : places.stop]:
            canvas = torch.full((3, self.size, self.size), 255, dtype=torch.uint8)
            canvas[:, margin : margin + PICTURE_SIZE, margin : margin + PICTURE_SIZE] = picture.pixels
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
    for emoji in table:
        label = next((i for i, each in enumerate(CLASSES) if each.contains(emoji)), None)
        if label is None:
            continue
        base = base_of(emoji["unified"])
        for variant in (emoji, *emoji.get("skin_variations", {}).values()):
            for artwork, files in artworks.items():
                if (data := files.get(variant["image"])) is not None:
                    name = f"{artwork}/{variant['image']}"
                    yield Picture(name, label, base, _decode(data, name))


def _decode(data: bytes, name: str) -> Tensor:
    """Decodes a picture over white, (3, 64, 64) uint8."""
    header = parse_image_header(data, name=name)
    if (header.height, header.width) != (PICTURE_SIZE, PICTURE_SIZE):
        raise UnreadableImageError(f"image {name} must have 64 x 64 pixels, got {header.width} x {header.height}")
    return decode_image(data, channels=3, name=name)


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
    val = {base for bases in emoji.values() for base in sorted(bases, key=_digest)[: round(VAL_FRACTION * len(bases))]}
    return {picture.name: "val" if owner[picture.base] in val else "train" for picture in pictures}


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"emoji {name}".encode()).digest()
