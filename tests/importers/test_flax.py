import gzip
import itertools
import json
import pickle
import random
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskgit_pl.importers.flax import read_flax

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "transformer_n16_checkpoint.msgpack"


def array(shape, dtype: str, content: bytes, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content), use_bin_type=True))


def plain(values, code: int = 1) -> msgpack.ExtType:
    values = np.asarray(values)
    return array(values.shape, values.dtype.name, values.tobytes(), code)


def read(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    file = tmp_path / "checkpoint"
    file.write_bytes(content)
    return read_flax(file)


def refusal(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # each test looks at the text
        read(tmp_path, content)
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 600 + len(str(tmp_path))
    return text


# What flax writes.


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.msgpack")), ids=lambda file: file.stem)
def test_every_array_of_a_recorded_checkpoint_has_the_shape_and_type_that_flax_gave_it(file):
    tree = json.loads((GOLDEN / "manifest.json").read_text())["files"][file.name]["tree"]
    arrays = read_flax(file)
    assert {name: [list(found.shape), found.dtype.name] for name, found in arrays.items()} == tree
    assert not any(found.flags.writeable for found in arrays.values())


DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3, 4), (0,), (4, 0)])
def test_arrays_of_plain_types_come_out_as_they_went_in(dtype, shape, tmp_path):
    values = np.arange(100, 100 + np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    found = read(tmp_path, msgpack.packb({"params": {"a": plain(values)}}))["params/a"]
    assert found.dtype == dtype
    assert found.shape == shape
    assert (found == values).all()
    assert not found.flags.writeable


def test_bfloat16_becomes_float32(tmp_path):
    values = torch.tensor([[0.0, -1.5, 3.140625], [1e30, -1e-30, float("inf")]], dtype=torch.bfloat16)
    content = values.view(torch.int16).numpy().tobytes()
    found = read(tmp_path, msgpack.packb({"a": array((2, 3), "bfloat16", content)}))["a"]
    assert found.dtype == np.float32
    assert (found == values.float().numpy()).all()
    assert not found.flags.writeable


def test_an_array_in_chunks_is_put_together(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    pieces = {str(number): plain(values.reshape(-1)[start : start + 1]) for number, start in enumerate(range(12))}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": pieces}
    found = read(tmp_path, msgpack.packb({"params": {"big": chunked, "small": plain(values)}}))
    assert list(found) == ["params/big", "params/small"]
    assert (found["params/big"] == values).all()
    assert not found["params/big"].flags.writeable


@pytest.mark.parametrize(
    "change",
    [
        {"shape": {"0": 3, "1": 5}},
        {"shape": {"0": 3, "2": 4}},
        {"shape": {"0": -3, "1": -4}},
        {"shape": {"0": 12.0}},
        {"shape": 12},
        {"shape": {}},
        {"chunks": {}},
        {"chunks": {"0": 1}},
        {"chunks": {"0": plain(np.ones((3, 4)))}},
        {"chunks": {"1": plain(np.ones(12))}},
        {"chunks": {"0": plain(np.ones(11))}},
    ],
    ids=str,
)
def test_chunks_that_do_not_make_the_array_are_refused(change, tmp_path):
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": {"0": plain(np.ones(12))}}
    assert read(tmp_path, msgpack.packb({"a": chunked}))["a"].shape == (3, 4)
    assert "chunk" in refusal(tmp_path, msgpack.packb({"a": chunked | change})) or "shape" in change


def test_numbers_and_texts_are_arrays_without_dimensions_and_empty_things_hold_nothing(tmp_path):
    tree = {"step": 7, "rate": 0.5, "on": True, "name": "a b", "scalar": plain(2.5, code=3), "none": None, "empty": {}}
    found = read(tmp_path, msgpack.packb(tree | {"large": 2**64 - 1}))
    assert {name: value.item() for name, value in found.items()} == {
        "step": 7, "rate": 0.5, "on": True, "name": "a b", "scalar": 2.5, "large": 2**64 - 1,
    }  # fmt: skip
    assert all(value.shape == () and not value.flags.writeable for value in found.values())


# Files of other kinds, written by what writes them.


def save_torch(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path)


def save_old_torch(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)


def save_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(CHECKPOINT, "checkpoint")


def save_npz(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, a=np.ones(3))


def save_npy(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.ones(3))


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)
FOREIGN = {
    "zip archive": save_torch,
    "a Python pickle": save_old_torch,
    "got a Python pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=4)),
    "zip archive, as torch.save and numpy.savez": save_npz,
    "numpy file": save_npy,
    "gzip archive; unpack": lambda path: path.write_bytes(gzip.compress(CHECKPOINT.read_bytes())),
    "tar archive; unpack": save_tar,
    "safetensors file": lambda path: save_file({"a": torch.ones(3)}, path),
    "HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)),
    "web page; the download": lambda path: path.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>"),
    "web page": lambda path: path.write_text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "git lfs pull": lambda path: path.write_text(POINTER),
    "JSON text": lambda path: path.write_text(json.dumps({"params": {}})),
    "empty file; download": lambda path: path.write_bytes(b""),
    "got a folder; name the file itself": lambda path: path.mkdir(),
    "one that begins with b'# a text'": lambda path: path.write_text("# a text"),
    "one that begins with b": lambda path: path.write_bytes(bytes(4096)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_is_named(name, tmp_path):
    file = tmp_path / "checkpoint"
    FOREIGN[name](file)
    with pytest.raises(ValueError, match=name) as caught:
        read_flax(file)
    assert str(caught.value).startswith(f"checkpoint {file}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file; download it"):
        read_flax(tmp_path / "nowhere")


def test_a_pickle_inside_is_never_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    content = pickle.dumps(Touch())
    for tree in ({"a": msgpack.ExtType(1, content)}, {"a": array((len(content),), "object", content)}):
        refusal(tmp_path, msgpack.packb(tree))
    assert not (tmp_path / "ran").exists()


# Damaged files.


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = CHECKPOINT.read_bytes()
    places = [*range(1, 200), *range(200, len(whole), 997), *range(len(whole) - 50, len(whole))]
    for place in places:
        assert f"the file of {place:,} bytes is cut off; download it again" in refusal(tmp_path, whole[:place])


def test_what_follows_the_tree_is_refused(tmp_path):
    assert "got 3 more bytes" in refusal(tmp_path, CHECKPOINT.read_bytes() + b"abc")


def tiny() -> bytes:
    chunks = {"0": plain(np.ones(3, np.float32)), "1": plain(np.ones(1, np.float32))}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 2}, "chunks": chunks}
    params = {"a": {"kernel": plain(np.ones((3, 2), np.float32)), "bias": plain(np.arange(4))}, "c": chunked}
    return msgpack.packb({"params": params, "step": 3})


HEADERS = bytes([0x80, 0x8F, 0x90, 0xC0, 0xC1, 0xC6, 0xC9, 0xD4, 0xD6, 0xD7, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF])


def mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(changed))
        kind = chance.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[place] = chance.choice(HEADERS)
        elif kind == 2:
            changed[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif len(changed) > 9:
            del changed[place : place + chance.randrange(1, 9)]
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_bytes_are_only_a_value_error_comes_out_and_soon(seed, tmp_path):
    chance = random.Random(seed)
    start = time.process_time()
    outcomes = {"read": 0, "refused": 0}
    for number in range(500):
        content = mutated(tiny(), chance)
        if number % 2:
            content = bytes([chance.choice(HEADERS)]) + chance.randbytes(chance.randrange(200))
        try:
            read(tmp_path, content)
        except ValueError as error:
            text = str(error)
        else:
            text = ""
        assert "\n" not in text
        outcomes["refused" if text else "read"] += 1
    assert outcomes["read"] > 5  # a bit of a weight is no matter of the format
    assert outcomes["refused"] > 300
    assert time.process_time() - start < 30


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": array((3,), "float32", bytes(8))}, r"float32 \(3,\) must have 12 bytes, got 8"),
        ({"a": array((3,), "float32", bytes(16))}, "must have 12 bytes"),
        ({"a": array((-1, -3), "float32", bytes(12))}, "must be integers >= 0, got \\[-1, -3\\]"),
        ({"a": array((True,), "int8", bytes(1))}, "a shape must be integers"),
        ({"a": array((2.0,), "int8", bytes(2))}, "a shape must be integers"),
        ({"a": array(3, "int8", bytes(3))}, "shape, dtype and bytes, got something else"),
        ({"a": array((1,), "object", bytes(8))}, r"dtypes must be one of float16, .*, got 'object'"),
        ({"a": array((1,), "complex64", bytes(8))}, "got 'complex64'"),
        ({"a": array((1,), ">f4", bytes(4))}, "got '>f4'"),
        ({"a": array((2**39,) * 31, "float32", b"")}, "not a tree of arrays"),
        ({"a": array((2**39,) * 31 + (0,), "float32", b"")}, "not a tree of arrays"),
        ({"a": array((1,) * 40, "int8", bytes(1))}, "exceeds max_array_len"),
        ({"a": array((1,), "int8", "a")}, "shape, dtype and bytes"),
        ({"a": msgpack.ExtType(1, b"")}, "got less"),
        ({"a": msgpack.ExtType(1, msgpack.packb([1, 2]))}, "got less|something else"),
        ({"a": msgpack.ExtType(2, msgpack.packb([1.0, 2.0]))}, "must be real, got complex"),
        ({"a": msgpack.ExtType(42, b"abc")}, "extension types must be 1 or 3, got 42"),
        ({"a": msgpack.Timestamp(1, 1)}, "a must be an array, a number or a text, got Timestamp"),
        ({"a": [1, 2]}, "exceeds max_array_len"),
        ({"a": b"bytes"}, "exceeds max_bin_len"),
        ({"a/b": 1}, "and without '/', got 'a/b'"),
        ({"": 1}, "must be printable"),
        ({"a\nb": 1}, r"must be printable and without '/', got 'a\\nb'"),
        ({"\x1b[31m": 1}, "must be printable"),
        ({1: 1}, "int is not allowed for map key"),
        ({"a" * 600: 1}, "not a tree of arrays"),
    ],
    ids=itertools.count(),
)
def test_what_flax_does_not_write_is_refused(tree, message, tmp_path):
    text = refusal(tmp_path, msgpack.packb(tree))
    assert text.endswith("; download it again")
    with pytest.raises(ValueError, match=message):
        read(tmp_path, msgpack.packb(tree))


def test_a_name_that_stands_twice_is_refused(tmp_path):
    assert "names must be unique, got 'a' twice" in refusal(tmp_path, b"\x82\xa1a\x01\xa1a\x02")


# Files that claim more than they hold.


def claims(code: bytes, length: int = 2**32 - 1) -> bytes:
    return code + length.to_bytes(4, "big")


EMPTY = msgpack.packb(plain(np.empty(0, np.int8)))
HOSTILE = {
    "a map of 2^32": claims(b"\xdf"),
    "a list of 2^32": b"\x81\xa1a" + claims(b"\xdd"),
    "an array of 2^32 bytes": b"\x81\xa1a" + claims(b"\xc9") + b"\x01",
    "a text of 2^32 bytes": b"\x81\xa1a" + claims(b"\xdb"),
    "a name of 2^32 bytes": b"\x81" + claims(b"\xdb"),
    "bytes of 2^32": b"\x81\xa1a" + claims(b"\xc6"),
    "maps in maps": b"\x81\xa1a" * 100_000,
    "maps 20 deep": b"\x81\xa1a" * 20 + b"\x01",
    "maps in maps that claim the most": b"\xde\x01\x00\xa1a" * 1000,
    "maps in maps that claim more": (b"\xde\xff\xff\xa1a") * 20_000,  # 500 kB of place for each, before it is seen
    "numbers in maps in maps": (b"\xde\x01\x00" + b"\xa1a\x01" * 255 + b"\xa1b") * 1000,
    "texts in maps in maps": (b"\xde\x01\x00" + b"\xa3abc\xa2ab" * 255 + b"\xa1b") * 1000,
    "arrays in maps in maps": (b"\xde\x01\x00" + (b"\xa1a" + EMPTY) * 255 + b"\xa1b") * 1000,
    "a wide tree": msgpack.packb({str(number): {str(other): {} for other in range(256)} for number in range(256)}),
    "lists in a list": b"\x81\xa1a" + claims(b"\xdd", 1 << 20) + b"\x90" * (1 << 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_claims_more_than_it_holds_costs_neither_memory_nor_time(name, tmp_path):
    start = time.process_time()
    tracemalloc.start()
    try:
        text = refusal(tmp_path, HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert any(word in text for word in ("cut off", "exceeds max_", "16 deep", "at most 50,000"))
    assert peak < 8 * len(HOSTILE[name]) + 48 * 2**20
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_a_large_file_is_held_once(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(msgpack.packb({str(number): plain(np.ones(1 << 20, np.float32)) for number in range(24)}))
    code = (
        "import resource, sys; from pathlib import Path; from maskgit_pl.importers.flax import read_flax\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "arrays = read_flax(Path(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    grown, with_torch = done.stdout.split()
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 1.4 * file.stat().st_size
    assert with_torch == "False"


def test_without_msgpack_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ValueError, match=r'requires msgpack; run pip install "maskgit_pl\[import-jax\]"'):
        read_flax(CHECKPOINT)
