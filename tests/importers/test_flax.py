import json
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

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
    with pytest.raises(ValueError, match="checkpoint") as caught:
        read(tmp_path, content)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600 + len(str(tmp_path))
    return text


# What flax writes.


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.msgpack")), ids=lambda file: file.stem)
def test_every_array_of_a_recorded_checkpoint_has_the_shape_and_type_that_flax_gave_it(file):
    tree = json.loads((GOLDEN / "manifest.json").read_text())["files"][file.name]["tree"]
    assert {name: [list(found.shape), found.dtype.name] for name, found in read_flax(file).items()} == tree


DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4), (4, 0)])
def test_arrays_of_plain_types_come_out_as_they_went_in(dtype, shape, tmp_path):
    values = np.arange(100, 100 + np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    found = read(tmp_path, msgpack.packb({"params": {"a": plain(values)}}))["params/a"]
    assert (found.dtype, found.shape) == (dtype, shape)
    assert (found == values).all()


def test_bfloat16_becomes_float32(tmp_path):
    values = torch.tensor([[0.0, -1.5, 3.140625], [1e30, -1e-30, float("inf")]], dtype=torch.bfloat16)
    content = values.view(torch.int16).numpy().tobytes()
    found = read(tmp_path, msgpack.packb({"a": array((2, 3), "bfloat16", content)}))["a"]
    assert found.dtype == np.float32
    assert (found == values.float().numpy()).all()


def chunked(**changes) -> dict:
    """An array of 3 x 4 numbers in 12 pieces."""
    pieces = {str(number): plain(np.full(1, number, np.float32)) for number in range(12)}
    return {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": pieces, **changes}


def test_an_array_in_chunks_is_put_together(tmp_path):
    found = read(tmp_path, msgpack.packb({"params": {"big": chunked(), "small": plain(np.ones(2))}}))
    assert list(found) == ["params/big", "params/small"]
    assert (found["params/big"] == np.arange(12).reshape(3, 4)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": {"0": 3, "1": 5}},
        {"shape": {"0": 3, "2": 4}},
        {"shape": {"0": -3, "1": -4}},
        {"chunks": {"0": 1}},
        {"chunks": {"1": plain(np.ones(12))}},
        {"chunks": {"0": plain(np.ones(11))}},
    ],
    ids=str,
)
def test_chunks_that_do_not_make_the_array_are_refused(change, tmp_path):
    assert "an array in chunks must hold its shape" in refusal(tmp_path, msgpack.packb({"a": chunked(**change)}))


def test_numbers_and_texts_are_arrays_without_dimensions_and_empty_things_hold_nothing(tmp_path):
    tree = {"step": 7, "rate": 0.5, "on": True, "name": "a b", "scalar": plain(2.5, code=3), "none": None, "empty": {}}
    found = read(tmp_path, msgpack.packb(tree | {"large": 2**64 - 1}))
    assert {name: value.item() for name, value in found.items()} == {
        "step": 7, "rate": 0.5, "on": True, "name": "a b", "scalar": 2.5, "large": 2**64 - 1,
    }  # fmt: skip


# Damaged and hostile files.


def test_a_pickle_inside_is_never_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    content = pickle.dumps(Touch())
    for tree in ({"a": msgpack.ExtType(1, content)}, {"a": array((len(content),), "object", content)}):
        refusal(tmp_path, msgpack.packb(tree))
    assert not (tmp_path / "ran").exists()


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = CHECKPOINT.read_bytes()
    for place in [*range(1, 200), *range(200, len(whole), 2997), *range(len(whole) - 50, len(whole))]:
        assert f"the file of {place:,} bytes is cut off; download it again" in refusal(tmp_path, whole[:place])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": array((3,), "float32", bytes(8))}, "float32 (3,) must have 12 bytes, got 8"),
        ({"a": array((-1, -3), "float32", bytes(12))}, "an array must hold its shape of integers >= 0"),
        ({"a": array((True,), "int8", bytes(1))}, "an array must hold"),
        ({"a": array((1,), "object", bytes(8))}, "got 'object'"),
        ({"a": array((2**39,) * 31, "float32", b"")}, "not a tree of arrays"),
        ({"a": array((1,) * 40, "int8", bytes(1))}, "exceeds max_array_len"),
        ({"a": msgpack.ExtType(1, b"")}, "incomplete input"),
        ({"a": msgpack.ExtType(2, msgpack.packb([1.0, 2.0]))}, "must be 1 or 3 (real numbers), got 2"),
        ({"a": msgpack.Timestamp(1, 1)}, "a must be an array, a number or a text, got Timestamp"),
        ({"a": [1, 2]}, "exceeds max_array_len"),
        ({"a": b"bytes"}, "exceeds max_bin_len"),
        ({"": 1}, "printable"),
        ({"\x1b[31m": 1}, r"printable and without '/', got '\x1b[31m'"),
        ({1: 1}, "int is not allowed for map key"),
        ({"a" * 600: 1}, "not a tree of arrays"),
    ],
)  # fmt: skip
def test_what_flax_does_not_write_is_refused(tree, message, tmp_path):
    text = refusal(tmp_path, msgpack.packb(tree))
    assert text.endswith("; download it again")
    assert message in text


def test_a_name_that_stands_twice_and_what_follows_the_tree_are_refused(tmp_path):
    assert "names must be unique, printable and without '/', got 'a'" in refusal(tmp_path, b"\x82\xa1a\x01\xa1a\x02")
    assert "got 3 more bytes" in refusal(tmp_path, CHECKPOINT.read_bytes() + b"abc")


HEADERS = bytes([0x80, 0x8F, 0x90, 0xC0, 0xC1, 0xC6, 0xC9, 0xD4, 0xD6, 0xD7, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF])


def mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(changed) - 9)
        kind = chance.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[place] = chance.choice(HEADERS)
        elif kind == 2:
            changed[place:place] = chance.randbytes(chance.randrange(1, 9))
        else:
            del changed[place : place + chance.randrange(1, 9)]
    return bytes(changed)


@pytest.mark.slow
def test_whatever_the_bytes_are_only_a_value_error_comes_out(tmp_path):
    params = {"a": {"kernel": plain(np.ones((3, 2), np.float32)), "bias": plain(np.arange(4))}, "c": chunked()}
    chance, tiny = random.Random(0), msgpack.packb({"params": params, "step": 3})
    outcomes = []
    for number in range(1500):
        content = bytes([chance.choice(HEADERS)]) + chance.randbytes(chance.randrange(200))
        try:
            read(tmp_path, content if number % 2 else mutated(tiny, chance))
        except ValueError as error:
            outcomes.append(str(error))
        else:
            outcomes.append("")
    assert not any("\n" in text for text in outcomes)
    assert outcomes.count("") > 15  # a bit of a weight is no matter of the format
    assert len(outcomes) - outcomes.count("") > 900


def claims(code: bytes, length: int = 2**32 - 1) -> bytes:
    return code + length.to_bytes(4, "big")


EMPTY = msgpack.packb(plain(np.empty(0, np.int8)))
HOSTILE = {
    "a map of 2^32": claims(b"\xdf"),
    "a list of 2^32": b"\x81\xa1a" + claims(b"\xdd"),
    "an array of 2^32 bytes": b"\x81\xa1a" + claims(b"\xc9") + b"\x01",
    "a text of 2^32 bytes": b"\x81\xa1a" + claims(b"\xdb"),
    "bytes of 2^32": b"\x81\xa1a" + claims(b"\xc6"),
    "maps in maps": b"\x81\xa1a" * 100_000,
    "maps 20 deep": b"\x81\xa1a" * 20 + b"\x01",
    "maps in maps that claim the most": b"\xde\x01\x00\xa1a" * 1000,
    "maps in maps that claim more": (b"\xde\xff\xff\xa1a") * 20_000,  # 500 kB of place for each, before it is seen
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
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    words = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 1.4 * file.stat().st_size


def test_without_msgpack_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ValueError, match=r'requires msgpack; run pip install "maskgit_pl\[import-jax\]"'):
        read_flax(CHECKPOINT)
