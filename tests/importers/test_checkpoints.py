"""Files of strangers: no code runs, records of training programs are passed over, and one line names what is wrong."""

import argparse
import json
import os
import pickle
import struct
import sys
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from safetensors.torch import save_file

from maskgit_pl.importers.checkpoints import read_checkpoint, read_flax
from tests.networks.test_weights import rewrite_archive

WEIGHTS = {"layer.weight": torch.arange(3.0)}


FOREIGN = {
    "got zip that begins with b'PK": lambda path: torch.save(WEIGHTS, path),
    "got pickle that begins with": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "got safetensors that begins with": lambda path: save_file(WEIGHTS, path),
    "begins with b'version https://git-lfs": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "got another format that begins with b''": lambda path: path.write_bytes(b""),
    "got a folder; name the file itself": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_is_refused_with_its_kind(name, tmp_path):
    FOREIGN[name](tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=name) as refusal:
        read_flax(tmp_path / "checkpoint")
    assert str(refusal.value).startswith(f"checkpoint {tmp_path / 'checkpoint'} must be a msgpack file of flax")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", ["torch", "before torch 1.6", "safetensors"])
def test_a_file_cut_anywhere_is_refused(form, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    content = {"a": torch.rand(40), "b": torch.rand(3)}
    if form == "safetensors":
        save_file(content, whole)
    else:
        torch.save(content, whole, _use_new_zipfile_serialization=form == "torch")
    for length in range(1, whole.stat().st_size, 23):
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"checkpoint .*cut\b") as refusal:
            read_checkpoint(cut)
        assert "\n" not in str(refusal.value)


def tensor_header(*, dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> bytes:
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


HEADERS = {  # content of a file, and the message
    "shape of a flag": (tensor_header(shape=[True]), "invalid type: boolean"),
    "huge sizes": (tensor_header(shape=[2**62, 4]), "overflow"),
    "huge and empty": (tensor_header(shape=[2**40, 0], offsets=[0, 0]), "not fully covered"),
    "negative offset": (tensor_header(offsets=[-4, 0]), "invalid value: integer"),
    "no JSON": (struct.pack("<Q", 5) + b"{nope", "invalid JSON"),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(120), r"got another format that begins with b'.x93NUMPY"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_in_one_line(name, tmp_path):
    content, message = HEADERS[name]
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_checkpoint(file)
    assert str(refusal.value).startswith(f"checkpoint {file}")
    assert "\n" not in str(refusal.value)


def test_records_of_training_programs_are_passed_over(tmp_path):
    records = {
        # Halton-MaskGIT multiplies its learning rate by numpy's cosine in the last tenth of a training.
        "optimizer": {"param_groups": [{"lr": np.float64(1e-4) * (1 + np.cos(0.5))}]},
        "arrays": {"seen": np.arange(3), "flag": np.bool_(True), "type": np.dtype("float32")},
        # Lightning's hyper-parameters: a dict with its own class.
        "hyper_parameters": AttributeDict(base_learning_rate=1e-4, ddconfig=AttributeDict(ch=128)),
        "args": argparse.Namespace(steps=3, inner=argparse.Namespace()),
    }
    torch.save({"model_state_dict": WEIGHTS, **records}, tmp_path / "a.pth")
    tensors = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(tensors["layer.weight"], WEIGHTS["layer.weight"])


@pytest.mark.parametrize("module_name", ["omegaconf.dictconfig", "pytorch_lightning.callbacks.model_checkpoint"])
def test_objects_of_a_library_are_passed_over_without_it(module_name, tmp_path, monkeypatch):
    """Callbacks' states of old Lightning are keyed by the class; omegaconf's containers hold types."""
    module = ModuleType(module_name)
    module.Thing = type("Thing", (), {"__module__": module_name})
    for name in (module_name.partition(".")[0], module_name):
        monkeypatch.setitem(sys.modules, name, module)
    config = module.Thing()
    config._metadata = {"ref_type": Any, "object_type": dict, "key_type": str, "cache": defaultdict(dict)}
    config._content = {"ch_mult": [1, 2], "parent": config}
    content = {"state_dict": WEIGHTS, "config": config, "callbacks": {module.Thing: {"score": torch.tensor(0.5)}}}
    torch.save(content, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, module_name)  # not there when it is read
    tensors = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(tensors["layer.weight"], WEIGHTS["layer.weight"])
    assert module_name not in sys.modules


@pytest.mark.parametrize("function", ["eval", "getattr"])
def test_functions_are_refused(function, tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.pth")
    code = b"\x80\x02}X\x01\0\0\0acbuiltins\n" + function.encode() + b"\nX\x01\0\0\0x\x85Rs."
    rewrite_archive(tmp_path / "a.pth", replaced={"data.pkl": code})
    message = rf"a\.pth must hold tensors only, got also builtins\.{function}, a Python object"
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("old", [False, True])
def test_a_hostile_file_runs_nothing(old, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    content = {"model": WEIGHTS, "args": argparse.Namespace(x=Hostile())}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"posix\.mkdir, a Python object; .* or model$|or holds a Python object"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold a state dict, got list"),
        ({0: torch.zeros(2), 1: torch.zeros(2)}, "tensors must have names, got 0, which is no text"),
        ({"model": {b"loss": torch.zeros(2)}}, "got b'loss'"),
    ],
    ids=str,
)
def test_an_odd_state_dict_is_refused_in_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message) as refusal:
        read_checkpoint(tmp_path / "odd.pt")
    assert str(refusal.value).startswith(f"checkpoint {tmp_path / 'odd.pt'}")
    assert "\n" not in str(refusal.value)


GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "transformer_n16_checkpoint.msgpack"


def array(shape, dtype: str, content: bytes, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content), use_bin_type=True))


def plain(values) -> msgpack.ExtType:
    values = np.asarray(values)
    return array(values.shape, values.dtype.name, values.tobytes())


def read_bytes(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    file = tmp_path / "checkpoint"
    file.write_bytes(content)
    return read_flax(file)


def flax_refusal(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(ValueError, match="checkpoint") as refusal:
        read_bytes(tmp_path, content)
    text = str(refusal.value)
    assert ": cut off, or not a tree of arrays" in text
    assert text.isprintable()
    assert len(text) < 600 + len(str(tmp_path))
    return text


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.msgpack")), ids=lambda file: file.stem)
def test_recorded_arrays_have_the_shapes_and_types_of_flax(file):
    tree = json.loads((GOLDEN / "manifest.json").read_text())["files"][file.name]["tree"]
    assert {name: [list(array.shape), array.dtype.name] for name, array in read_flax(file).items()} == tree


DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def test_arrays_of_plain_types_are_read_exactly(tmp_path):
    shapes = [(), (3,), (1, 2, 3, 4), (4, 0)]
    cases = [(dtype, shape) for dtype in (*DTYPES, "bool") for shape in shapes]
    arrays = {
        f"{dtype}{shape}": np.arange(100, 100 + np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        for dtype, shape in cases
    }
    tree = msgpack.packb({"params": {name: plain(values) for name, values in arrays.items()}})
    for name, values in read_bytes(tmp_path, tree).items():
        np.testing.assert_array_equal(values, arrays[name.removeprefix("params/")], strict=True)


def test_a_pickle_inside_is_never_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    content = pickle.dumps(Touch())
    for tree in ({"a": msgpack.ExtType(1, content)}, {"a": array((len(content),), "object", content)}):
        flax_refusal(tmp_path, msgpack.packb(tree))
    assert not (tmp_path / "ran").exists()


def test_a_flax_file_cut_anywhere_is_refused(tmp_path):
    whole = CHECKPOINT.read_bytes()
    for length in [*range(1, 200, 7), *range(200, len(whole), 29_970), len(whole) - 1]:
        flax_refusal(tmp_path, whole[:length])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": array((3,), "float32", bytes(8))}, "float32 (3,) must have 12 bytes, got 8"),
        ({"a": array((-1, -3), "float32", bytes(12))}, "an array must hold its shape of integers >= 0"),
        ({"a": array((1,), "object", bytes(8))}, "got 'object'"),
        ({"a": array((2**39,) * 31, "float32", b"")}, "not a tree of arrays"),
        ({"a": array((1,) * 40, "int8", bytes(1))}, "exceeds max_array_len"),
        ({"a": msgpack.ExtType(2, msgpack.packb([1.0, 2.0]))}, "must be 1 or 3 (real numbers), got 2"),
        ({"a": msgpack.Timestamp(1, 1)}, "a must be an array or a number, got Timestamp"),
        ({"a": [1, 2]}, "exceeds max_array_len"),
        ({"\x1b[31m": 1}, r"printable and without '/', got '\x1b[31m'"),
        ({1: 1}, "int is not allowed for map key"),
        ({"a" * 600: 1}, "not a tree of arrays"),
    ],
)  # fmt: skip
def test_a_tree_that_flax_does_not_write_is_refused(tree, message, tmp_path):
    text = flax_refusal(tmp_path, msgpack.packb(tree))
    assert text.endswith("; download it again")
    assert message in text


def claims(code: bytes, length: int = 2**32 - 1) -> bytes:
    return code + length.to_bytes(4, "big")


EMPTY = msgpack.packb(plain(np.empty(0, np.int8)))
HOSTILE = {
    "a map of 2^32": claims(b"\xdf"),
    "a list of 2^32": b"\x81\xa1a" + claims(b"\xdd"),
    "a text of 2^32 bytes": b"\x81\xa1a" + claims(b"\xdb"),
    "bytes of 2^32": b"\x81\xa1a" + claims(b"\xc6"),
    "an array of 2^32 bytes": b"\x81\xa1a" + claims(b"\xc9") + b"\x01",
    "maps in maps": b"\x81\xa1a" * 100_000,
    "maps in maps that claim more": (b"\xde\xff\xff\xa1a") * 20_000,  # 500 kB of place for each, before it is seen
    "arrays in maps in maps": (b"\xde\x01\x00" + (b"\xa1a" + EMPTY) * 255 + b"\xa1b") * 1000,
    "a wide tree": msgpack.packb({str(row): {str(column): {} for column in range(256)} for row in range(256)}),
    "lists in a list": b"\x81\xa1a" + claims(b"\xdd", 1 << 20) + b"\x90" * (1 << 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_claims_more_than_it_holds_costs_little(name, tmp_path):
    start = time.process_time()
    tracemalloc.start()
    try:
        flax_refusal(tmp_path, HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(HOSTILE[name]) + 48 * 2**20
    assert time.process_time() - start < 5
