import io
import re

import pytest
from PIL import Image

from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.manifest import load_manifests
from maskgit_pl.data.verify import verify_shards

SECOND = 4 * 512  # where the second sample begins: image and label take two blocks each


@pytest.fixture
def folder(tars, tmp_path):
    """A data folder of three train shards and one val shard, of 4 samples each."""
    for number in range(3):
        tars.write(tmp_path / f"train-{number}.tar", tars.samples(4, start=10 * number))
    tars.write(tmp_path / "val-0.tar", tars.samples(4, start=30))
    index_shards(tmp_path, {split: find_shards(tmp_path, f"{split}-*.tar") for split in ("train", "val")})
    return tmp_path


def cut(at):
    return lambda data: data[:at]


def flipped(at, by=1):
    return lambda data: data[:at] + bytes((data[at] ^ by,)) + data[at + 1 :]


def zeroed(at):
    return lambda data: data[:at] + bytes(512) + data[at + 512 :]


# name: (what is done to the bytes, what the start-up check says or None, two parts of what verify says)
FAULTS = {
    "cut in a payload": (cut(SECOND + 520), "10240 bytes expected, 2568", "10240 bytes", "got 2568"),
    "flipped header": (flipped(SECOND + 3), None, "sha256", "expected, got"),
    "flipped last image's header": (flipped(3 * SECOND + 3), "expected at byte 6144, none", "sha256", "expected, got"),
    "header of zeros": (zeroed(SECOND), None, "sha256", "expected, got"),
    "zero bytes": (cut(0), "10240 bytes expected, 0 found", "10240 bytes", "got 0"),
    "longer": (lambda data: data + bytes(512), "10240 bytes expected, 10752", "10752", ""),
    "changed payload, same length": (flipped(SECOND + 600), None, "sha256", " expected, got "),
    "missing": (None, "10240 bytes expected, No such file or directory", "", "No such file"),
}  # fmt: skip


def inject(folder, name, fault):
    if fault is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(fault((folder / name).read_bytes()))


@pytest.mark.parametrize("case", FAULTS)
def test_a_bad_shard_is_named_before_the_first_step_and_by_verify(folder, case):
    fault, at_start, actual, reason = FAULTS[case]
    inject(folder, "train-1.tar", fault)
    if at_start is None:
        load_manifests(folder)
    else:
        with pytest.raises(ValueError, match="1 of 4 shards differ from") as caught:
            load_manifests(folder)
        line = str(caught.value).splitlines()[1]
        assert line.startswith("  train-1.tar: ")
        assert at_start in line
    (bad,) = verify_shards(folder).faults
    assert bad.startswith("train-1.tar: ")
    assert actual in bad
    assert reason in bad


def noise_with_damage() -> bytes:
    """A JPEG of which nothing is missing, with zeros in the compressed pixels, after the header."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "JPEG")
    return buffer.getvalue()[:-300] + bytes(100) + buffer.getvalue()[-200:]


@pytest.mark.parametrize("spoil", [lambda png: png[:70], lambda png: png[:60] + b"\xff" + png[61:], None])
def test_decode_names_images_that_were_damaged_before_they_were_indexed(folder, tars, tmp_path, spoil):
    image = spoil(tars.png(1, size=64)) if spoil else noise_with_damage()
    tars.write(tmp_path / "train-0.tar", [*tars.samples(2), ("x.jpg", image), ("x.cls", b"0")])
    index_shards(folder, {split: find_shards(folder, f"{split}-*.tar") for split in ("train", "val")})
    assert not verify_shards(folder).faults
    (bad,) = verify_shards(folder, decode=True).faults
    assert re.match(r"train-0\.tar: 1 unreadable image: image train-0\.tar:x\.jpg (is|cannot be decoded: )", bad)
