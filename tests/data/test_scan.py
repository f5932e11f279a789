"""Samples with a fault, and tars made to exhaust memory or time, each opened in a process of its own."""

import gzip
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data.samples import Labels
from maskgit_pl.data.scan import scan_shard
from tests.hostile_images import save


@pytest.mark.parametrize("extension", ["jpg", "JPG", "jpeg", "png", "PNG", "webp"])
def test_images_have_any_extension_in_any_case(tars, tmp_path, extension):
    data = save(Image.new("RGB", (8, 6)), "JPEG" if "jp" in extension.lower() else extension)
    scan = scan_shard(tars.write(tmp_path / "x.tar", [(f"a.{extension}", data), ("a.CLS", b"2\n")]), Labels())
    assert (scan.rows["label"].tolist(), scan.images.height, scan.images.width) == ([2], (6, 6), (8, 8))


FAULTS = {  # the members of bad samples, None for an image, and the fault with the first of them
    "no label": ([("x.png", None)], "1 without a label (x.tar:x.png)"),
    "two images": (
        [("x.png", None), ("x.jpg", None), ("x.cls", b"0")],
        "1 with two images, labels or vectors (x.tar:x.jpg)",
    ),
    "repeated key": (
        [("x.png", None), ("x.cls", b"0"), ("y.png", None), ("y.cls", b"2"), ("x.png", None), ("x.cls", b"2")],
        "1 of a key that comes twice, or whose members do not lie side by side (x.tar:x.png)",
    ),
    "interleaved": (
        [("x.png", None), ("y.png", None), ("x.cls", b"0"), ("y.cls", b"0")],
        "2 of a key that comes twice, or whose members do not lie side by side (x.tar:x.png)",
    ),
    "empty image": ([("x.png", b""), ("x.cls", b"0")], "1 with an image that cannot be read (x.tar:x.png: size"),
    "label too high": ([("x.png", None), ("x.cls", b"999999")], "1 with a label that is no class (label x.tar:x.cls"),
    "path out": ([("../x.png", None), ("../x.cls", b"0")], "1 with an unsafe member name (x.tar:../x.png)"),
    "control character": ([("x\x1b[2J.png", None)], r"1 with an unsafe member name (x.tar:x\x1b[2J.png)"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_samples_with_a_fault_are_counted_and_get_no_row(tars, tmp_path, case):
    members, message = FAULTS[case]
    bad = [(name, tars.png() if data is None else data) for name, data in members]
    path = tars.write(tmp_path / "x.tar", [*tars.samples(2), *bad, *tars.samples(2, start=10)])
    scan = scan_shard(path, Labels())
    ((fault, samples),) = scan.faults.items()
    assert f"{samples.samples} {fault} ({samples.first})".startswith(message)
    between = [2] if case == "repeated key" else []  # y is whole
    assert scan.rows["label"].tolist() == [0, 1, *between, 1, 2]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_faults_as_images_and_ignored_elsewhere(tars, tmp_path, kind):
    for name, faults in (("x.png", ["with a link or a device"]), ("x.dat", [])):
        path = tars.write(tmp_path / "x.tar", tars.samples(1))
        with tarfile.open(path, "a") as archive:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        scan = scan_shard(path, Labels())
        assert (list(scan.faults), len(scan.rows)) == (faults, 1)


def test_members_without_a_key_do_not_divide_a_sample(tars, tmp_path):
    # macOS adds ._NAME before each file that has extended attributes; webdataset passes over both kinds.
    members = []
    for number in range(3):
        for name, data in ((f"a/{number}.cls", b"0"), (f"a/{number}.png", tars.png(number))):
            members += [(name.replace("a/", "a/._"), b"\0\5\x16\7"), (name, data), ("README", b"")]
    scan = scan_shard(tars.write(tmp_path / "x.tar", members), Labels())
    assert len(scan.rows) == 3


MEASURE = r"""
import json, re, sys, time
from pathlib import Path
from maskgit_pl.data.index import index_shards
from maskgit_pl.data.images import parse_image_header
import PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin
def peak():  # of this process only; getrusage's is inherited from the parent process
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
path = Path(sys.argv[1])
before, start = peak(), time.process_time()
try:
    said = str(index_shards(path.parent, {"train": [path]}))
except ValueError as error:
    said = str(error)
print(json.dumps([said, peak() - before, time.process_time() - start]))
"""


def measure(path):
    """Returns the error of indexing a file, MiB of memory on top of the imports, and CPU seconds."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def header(name, size, *, kind=tarfile.REGTYPE, pax=None):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.pax_headers = size, kind, pax or {}
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(3 * 2**29)}
HOSTILE = {  # the first bytes of a file, its length, most of which is not on disk, and the message
    "an image of a gigabyte": (header("a.png", 3 * 2**29), 3 * 2**29 + 10240, "1 to 268435456 bytes, got 1610612736"),
    "a sparse member": (header("a.png", 1024, kind=tarfile.GNUTYPE_SPARSE), 10240, "with a link or a device"),
    "a sparse member by pax": (header("a.png", 1024, pax=SPARSE), 10240, "with an image that cannot be read"),
    "gzip": (gzip.compress(bytes(2**24)), 2**24, "not an uncompressed tar, or its first header is damaged"),
    "8 EiB": (header("a.png", 2**63), 10240, "9223372036854775808 bytes declared, the file ends after"),
}  # fmt: skip


@pytest.mark.slow  # 7 s in all
@pytest.mark.parametrize("case", HOSTILE)
def test_small_files_that_declare_much_cost_little(case, tmp_path):
    data, length, message = HOSTILE[case]
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(data)
        file.truncate(length)
    error, megabytes, seconds = measure(tmp_path / "x.tar")
    assert message in error
    assert megabytes < 200
    assert seconds < 2 + length / 2e8, f"{seconds:.1f} s, {megabytes:.0f} MiB"  # the whole file is hashed


@pytest.mark.slow  # 15 s in all
@pytest.mark.parametrize(
    ("name", "message", "limit"),
    [("a{:07d}.jpg", "more than 100000", 2), ("a{:07d}.dat", "no image samples", 15)],
)
def test_a_million_empty_members_cost_little(tmp_path, name, message, limit):
    path = tmp_path / "x.tar"
    powers = 10 ** np.arange(7)[::-1]
    with open(path, "wb") as file:
        for begin in range(0, 10**6, 10**5):
            blocks = np.tile(np.frombuffer(header(name.format(0), 0), np.uint8), (10**5, 1))
            blocks[:, 1:8] = ord("0") + np.arange(begin, begin + 10**5)[:, None] // powers % 10
            blocks[:, 148:156] = ord(" ")
            checksums = blocks.sum(axis=1, dtype=np.int64)
            blocks[:, 148:154] = ord("0") + checksums[:, None] // 8 ** np.arange(6)[::-1] % 8
            file.write(blocks.data)
        file.write(bytes(1024))
    error, megabytes, seconds = measure(path)
    assert message in error
    assert megabytes < 200
    assert seconds < limit, f"{seconds:.1f} s, {megabytes:.0f} MiB"
