"""Files made to exhaust memory or time cost little of either; each is opened in a process of its own."""

import gzip
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest

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
    said = str(index_shards(path.parent, {"train": [path]}, lenient="lenient" in sys.argv))
except ValueError as error:
    said = str(error)
print(json.dumps([said, peak() - before, time.process_time() - start]))
"""


def measure(path, *options):
    """Returns the error of indexing a file, MiB of memory on top of the imports, and CPU seconds."""
    command = [sys.executable, "-c", MEASURE, str(path), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def header(name, size, *, kind=tarfile.REGTYPE, pax=None):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.pax_headers = size, kind, pax or {}
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def hollow(path, data, length):
    """Makes a file of any length that occupies a few blocks on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(length)
    return path


def sparse_file_of_one_image(path):
    return hollow(path, header("a.png", 3 * 2**29), 512 + 3 * 2**29 + 1024)


def gnu_sparse_member(path):
    return hollow(path, header("a.png", 1024, kind=tarfile.GNUTYPE_SPARSE), 10240)


def pax_sparse_member(path):
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(3 * 2**29)}
    return hollow(path, header("a.png", 1024, pax=pax), 10240)


def gzip_of_zeros(path):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(2**20))
    return path


def eight_exbibytes(path):
    return hollow(path, header("a.png", 2**63), 10240)


def eight_exbibytes_by_pax(path):
    return hollow(path, header("a.png", 0, pax={"size": str(2**63)}), 10240)


def long_name_of_a_gibibyte(path):
    return hollow(path, header("././@LongLink", 2**30, kind=tarfile.GNUTYPE_LONGNAME), 2**30 + 10240)


CASES = {
    sparse_file_of_one_image: "size must be 1 to 268435456 bytes, got 1610612736",
    gnu_sparse_member: "sparse member a.png at byte 0",
    pax_sparse_member: "with a link, a device or a sparse file",
    gzip_of_zeros: "compressed (gzip), decompress it",
    eight_exbibytes: "9223372036854775808 bytes declared, the file ends after",
    eight_exbibytes_by_pax: "9223372036854775808 bytes declared, the file ends after",
    long_name_of_a_gibibyte: "extended header at byte 0 must have at most 1048576 bytes, got 1073741824",
}


@pytest.mark.slow  # 7 s in all
@pytest.mark.parametrize("attack", CASES, ids=lambda attack: attack.__name__)
def test_small_files_that_declare_much_cost_little(attack, tmp_path):
    said, megabytes, seconds = measure(attack(tmp_path / "x.tar"))
    assert CASES[attack] in said
    assert megabytes < 200
    assert seconds < 2, f"{seconds:.1f} s, {megabytes:.0f} MiB"


@pytest.mark.slow  # 15 s in all
@pytest.mark.parametrize("name", ["a{:07d}.jpg", "a{:07d}.dat"])
def test_a_million_empty_members(tmp_path, name):
    path = tmp_path / "x.tar"
    blocks = np.tile(np.frombuffer(header(name.format(0), 0), np.uint8), (10**6, 1))
    powers = 10 ** np.arange(7)[::-1]
    blocks[:, 1:8] = ord("0") + np.arange(10**6)[:, None] // powers % 10
    blocks[:, 148:156] = ord(" ")
    checksums = blocks.sum(axis=1, dtype=np.int64)
    blocks[:, 148:154] = ord("0") + checksums[:, None] // 8 ** np.arange(6)[::-1] % 8
    with open(path, "wb") as file:
        file.write(blocks.data)
        file.write(bytes(1024))
    said, megabytes, seconds = measure(path)
    assert "more than 100000" in said
    assert megabytes < 200
    assert seconds < 2, f"{seconds:.1f} s, {megabytes:.0f} MiB"
    if name.endswith("jpg"):
        path.write_bytes(blocks[:200_000].tobytes() + bytes(1024))
        said, megabytes, seconds = measure(path, "lenient")  # walks to the end
        assert "at least 1 complete sample" in said
        assert megabytes < 50
        assert seconds < 8, f"{seconds:.1f} s, {megabytes:.0f} MiB"  # 1.2 to 3 measured
