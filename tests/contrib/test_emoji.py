"""Emoji: packages of fixed versions, 15 classes, split by emoji."""

import hashlib
import json
import tarfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.contrib import emoji
from maskgit_pl.contrib.emoji import DATASETS, EmojiImages, base_of
from tests.cli.conftest import call_command


def png(value, size=64):
    """A PNG of one colour; the upper half is transparent."""
    pixels = np.full((size, size, 4), value, np.uint8)
    pixels[: size // 2, :, 3], pixels[size // 2 :, :, 3] = 0, 255
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def entry(code_points, group, variants=()):
    skins = {str(i): {"unified": each, "image": f"{each}.png"} for i, each in enumerate(variants)}
    return {"unified": code_points, "subcategory": group, "image": f"{code_points}.png", "skin_variations": skins}


def emoji_images(table, artworks=None):
    """The images of a table, each picture of another colour."""
    files = [each["image"] for row in table for each in (row, *row["skin_variations"].values())]
    drawn = {name: png(i) for i, name in enumerate(files)}
    return EmojiImages(table, {"google": drawn} if artworks is None else artworks)


def write_packages(folder, monkeypatch, *, table, pictures, link=False):
    """Writes small packages with the checksums of their own, since the real ones are not in the repository."""
    packages = []
    for package in emoji.PACKAGES:
        path = folder / package.file
        with tarfile.open(path, "w:gz") as archive:
            for name, content in {
                "package/emoji.json": json.dumps(table).encode(),
                **{f"package/img/{package.artwork}/64/{name}": data for name, data in pictures.items()},
                "package/img/other/64/1f600.png": b"another artwork",
                "../outside.png": b"never written",
            }.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
            if link:
                member = tarfile.TarInfo(f"package/img/{package.artwork}/64/link.png")
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        packages.append(package._replace(size=path.stat().st_size, sha256=digest))
    monkeypatch.setattr(emoji, "PACKAGES", tuple(packages))


def test_emoji_packages_become_shards_and_nothing_is_unpacked(tmp_path, monkeypatch, caplog):
    (tmp_path / "packages").mkdir()
    table = [entry(f"1F6{i:02d}", "face-smiling") for i in range(30)] + [entry("1F600", "no such group")]
    pictures = {f"1F6{i:02d}.png": png(8 * i) for i in range(30)}
    write_packages(tmp_path / "packages", monkeypatch, table=table, pictures=pictures, link=True)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    assert call_command("data", "fetch", "emoji", "--source", "packages") == 0
    assert "made: 26 train, 4 val" in caplog.text  # both artworks are equal here
    assert {path.name for path in tmp_path.iterdir()} == {"packages", "data"}


def test_emoji_refuses_other_files(tmp_path, monkeypatch):
    google, _ = emoji.PACKAGES
    (tmp_path / google.file).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=f"{google.file} must be what `npm pack emoji-datasource-google@16.0.0` downl"):
        DATASETS[0].open(tmp_path)
    write_packages(tmp_path, monkeypatch, table=[], pictures={})
    changed = bytearray((tmp_path / google.file).read_bytes())
    changed[-1] ^= 1  # of the same length
    (tmp_path / google.file).write_bytes(changed)
    with pytest.raises(ValueError, match=f"{google.file} must be what"):
        DATASETS[0].open(tmp_path)


def test_emoji_splits_share_no_emoji_in_any_artwork_skin_tone_or_gender():
    people = [f"{who}-200D-{what}" for what in ("1F692", "1F33E", "1F3A4", "1F373", "1F680", "2695", "1F527")
              for who in ("1F468", "1F469", "1F9D1")]  # fmt: skip
    toned = [each.replace("-", "-1F3FD-", 1) for each in people]
    table = [entry(each, "person-role", [tone]) for each, tone in zip(people, toned, strict=True)]
    files = [*people, *toned]
    artworks = {
        name: {f"{each}.png": png(start + i) for i, each in enumerate(files)}
        for name, start in (("google", 0), ("twitter", 100))
    }
    images = emoji_images(table, artworks)
    assert images.counts == {"train": 72, "val": 12}  # one of seven emoji, 3 genders x 2 tones x 2 artworks
    owners = {split: {each.base for each in images.pictures if images.splits[each.name] == split}
              for split in ("train", "val")}  # fmt: skip
    assert not owners["train"] & owners["val"]
    assert {each.label for each in images.pictures} == {images.classes.index("person")}


@pytest.mark.parametrize(
    ("code_points", "base"),
    [
        ("1F600", "1F600"),
        ("1F469-1F3FD-200D-1F680", "1F680"),  # woman astronaut, medium skin tone
        ("1F471-200D-2642-FE0F", "1F471"),  # man: blond hair
        ("1F467", "1F9D2"),  # girl
        ("2764-FE0F-200D-1F525", "2764-1F525"),  # heart on fire
    ],
)
def test_the_base_of_an_emoji_has_no_skin_tone_and_no_gender(code_points, base):
    assert base_of(code_points) == base


def test_equal_emoji_are_kept_once_and_share_a_split_with_their_artworks():
    flags = [f"1F1E6-1F1{i:02X}" for i in range(20)]
    google = {f"{each}.png": png(i // 2) for i, each in enumerate(flags)}  # two and two are equal
    twitter = {f"{each}.png": png(100 + i) for i, each in enumerate(flags)}
    images = emoji_images([entry(each, "country-flag") for each in flags], {"google": google, "twitter": twitter})
    assert sum(images.counts.values()) == 10 + 20
    splits = [{images.splits[f"twitter/{each}.png"] for each in flags[i : i + 2]} for i in range(0, 20, 2)]
    assert all(len(pair) == 1 for pair in splits)
    assert {"train"} in splits
    assert {"val"} in splits
