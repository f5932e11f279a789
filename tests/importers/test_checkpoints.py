"""Files of strangers: no code runs, records of training programs are passed over, and one line names what is wrong."""

import argparse
import gzip
import io
import os
import pickle
import sys
import tarfile
import warnings
import zipfile
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from safetensors.torch import save_file

from maskgit_pl.importers.checkpoints import (
    check_format,
    check_weights,
    read_checkpoint,
    remove_wrappers,
    select_tensors,
)

WEIGHTS = {"layer.weight": torch.arange(3.0)}


def save_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
FOREIGN = {
    "a zip archive, as torch.save": lambda path: torch.save(WEIGHTS, path),
    "got a Python pickle": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "a Python pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=4)),
    "gzip archive; unpack": lambda path: path.write_bytes(gzip.compress(b"weights")),
    "tar archive; unpack": save_tar,
    "safetensors file": lambda path: save_file(WEIGHTS, path),
    "web page; the download": lambda path: path.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>"),
    "web page": lambda path: path.write_text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "git lfs pull": lambda path: path.write_text(LFS),
    "empty file; download": lambda path: path.write_bytes(b""),
    "got a folder; name the file itself": lambda path: path.mkdir(),
    "one that begins with b'# a text'": lambda path: path.write_text("# a text"),
    "one that begins with b'.x89PNG": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)),
    "one that begins with b": lambda path: path.write_bytes(bytes(4096)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_is_named(name, tmp_path):
    FOREIGN[name](tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=name) as caught:
        check_format(tmp_path / "checkpoint", "an archive", "hdf5")
    assert str(caught.value).startswith(f"checkpoint {tmp_path / 'checkpoint'} must be an archive, got ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file; download it"):
        check_format(tmp_path / "nowhere", "an archive", "hdf5")


@pytest.mark.parametrize("form", ["torch", "before torch 1.6", "safetensors"])
def test_any_cut_is_refused(form, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if form == "safetensors":
        save_file({"a": torch.rand(40), "b": torch.rand(3)}, whole)
    else:
        content = {"a": torch.rand(40), "b": torch.rand(3)}
        torch.save(content, whole, _use_new_zipfile_serialization=form == "torch")
    for length in range(1, whole.stat().st_size, 23):
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"checkpoint .*cut\b") as caught:
            read_checkpoint(cut, entries=("model",))
        assert "\n" not in str(caught.value)


# Records of training programs.


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "record",
    [
        # Halton-MaskGIT multiplies its learning rate by numpy's cosine in the last tenth of a training.
        {"param_groups": [{"lr": np.float64(1e-4) * (1 + np.cos(0.5))}]},
        {"seen": np.arange(3), "flag": np.bool_(True), "type": np.dtype("float32")},
        # Lightning's hyper-parameters: a dict with its own class.
        AttributeDict(base_learning_rate=1e-4, ddconfig=AttributeDict(ch=128)),
        argparse.Namespace(steps=3, inner=argparse.Namespace()),
    ],
    ids=["numpy number", "numpy array", "hyper-parameters", "arguments"],
)
def test_a_record_is_passed_over(record, old, tmp_path):
    content = {"model_state_dict": WEIGHTS, "record": record}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    tensors, ignored = read_checkpoint(tmp_path / "a.pth", entries=("model_state_dict",))
    assert torch.equal(tensors["layer.weight"], WEIGHTS["layer.weight"])
    assert ignored == ("record",)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("module_name", ["omegaconf.dictconfig", "pytorch_lightning.callbacks.model_checkpoint"])
def test_objects_of_a_library_are_passed_over_without_it(module_name, old, tmp_path, monkeypatch):
    """Callbacks' states of old Lightning are keyed by the class; omegaconf's containers hold types."""
    module = ModuleType(module_name)
    module.Thing = type("Thing", (), {"__module__": module_name})
    for name in (module_name.partition(".")[0], module_name):
        monkeypatch.setitem(sys.modules, name, module)
    config = module.Thing()
    config._metadata = {"ref_type": Any, "object_type": dict, "key_type": str, "cache": defaultdict(dict)}
    config._content = {"ch_mult": [1, 2], "parent": config}
    content = {"state_dict": WEIGHTS, "config": config, "callbacks": {module.Thing: {"score": torch.tensor(0.5)}}}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    monkeypatch.delitem(sys.modules, module_name)  # not there when it is read
    tensors, ignored = read_checkpoint(tmp_path / "a.ckpt", entries=("state_dict",))
    assert torch.equal(tensors["layer.weight"], WEIGHTS["layer.weight"])
    assert ignored == ("config", "callbacks")
    assert module_name not in sys.modules


def rewrite_pickle(path, code):
    """Replaces the pickle in a file of torch.save."""
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, code if name.endswith("data.pkl") else value)


def many_classes(count):
    """A pickle that names many classes of a training program: for each one the loader starts again."""
    code = io.BytesIO()
    code.write(b"\x80\x02}(")
    for number in range(count):
        code.write(b"K\x01clightning.x\nC%05d\n" % number)
    code.write(b"u.")
    return code.getvalue()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"\x80\x02}X\x01\0\0\0acbuiltins\neval\nX\x01\0\0\0x\x85Rs.", "eval"),
        (b"\x80\x02}X\x01\0\0\0acbuiltins\ngetattr\nX\x01\0\0\0x\x85Rs.", "getattr"),
        (many_classes(400), r"lightning\.x\.C00100"),  # the first class that got no stand-in
    ],
    ids=["eval", "getattr", "400 classes"],
)
def test_functions_and_very_many_classes_are_refused(code, name, tmp_path):
    rewrite_pickle(tmp_path / "a.pth", code)
    with pytest.raises(ValueError, match=rf"a\.pth must hold tensors only, got also {name}, a Python object"):
        read_checkpoint(tmp_path / "a.pth", entries=("model",))


@pytest.mark.parametrize("old", [False, True])
def test_a_hostile_file_runs_nothing(old, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    content = {"model": WEIGHTS, "args": argparse.Namespace(x=Hostile())}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"got also posix\.mkdir, a Python object"):
        read_checkpoint(tmp_path / "a.ckpt", entries=("model",))
    assert not (tmp_path / "canary").exists()


def test_the_way_out_names_the_entries_that_are_read(tmp_path):
    torch.save({"model": WEIGHTS, "other": SimpleNamespace(b=3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"got also types\.SimpleNamespace, a Python object") as refusal:
        read_checkpoint(tmp_path / "a.pth", entries=("model_state_dict", "model"))
    way_out = (
        'torch.save(checkpoint["..."], "weights.pt") with the name of its weights, such as model_state_dict or model'
    )
    assert way_out in str(refusal.value)
    torch.save(torch.load(tmp_path / "a.pth", weights_only=False)["model"], tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt", entries=("model",))[0].keys() == WEIGHTS.keys()


# State dicts.


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its API is a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold a state dict, got list"),
        ({0: torch.zeros(2), 1: torch.zeros(2)}, "tensors must have names, got the name 0, which is no text"),
        ({"model": {b"loss": torch.zeros(2)}}, "got the name b'loss'"),
        ({"a": torch.eye(4).to_sparse()}, r"tensor 'a' must be a dense CPU tensor, got torch\.sparse_coo"),
        ({"a": nested()}, "tensor 'a' must be a dense CPU tensor, got a nested tensor"),
        ({"a.b": WEIGHTS, "module.a.b": WEIGHTS}, r"tensor a\.b must be there once, got it twice"),
    ],
    ids=str,
)
def test_an_odd_state_dict_is_refused_in_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path / "odd.pt", entries=("model",))
    assert str(caught.value).startswith(f"checkpoint {tmp_path / 'odd.pt'}")
    assert "\n" not in str(caught.value)


def test_names_of_wrappers_are_removed_and_others_stay():
    names = ["module.a", "_orig_mod.module.b", "c._orig_mod.d._fsdp_wrapped_module.e"]
    assert list(remove_wrappers(dict.fromkeys(names))) == ["a", "b", "c.d.e"]
    names = ["encoder.module.weight", "modules.0.weight", "module", "loss.module.weight"]
    assert list(remove_wrappers(dict.fromkeys(names))) == names


def test_only_known_entries_are_left_out():
    zeros = torch.zeros(1)
    contents = {"loss.a": zeros, "loss.b": 1.0, "used": zeros, "usedup": zeros, "a": zeros}
    tensors, ignored = select_tensors(contents, ("loss.", "used"))
    assert list(tensors) == ["usedup", "a"]
    assert ignored == ("loss.* (2 tensors)", "used")
    with pytest.raises(ValueError, match=r"entry loss\.b must be a tensor, got float"):
        select_tensors(contents)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(1).expand(1 << 22, 256), r"'a' must be stored in full, got 4\.29 GB made of 4 bytes that repeat"),
        (torch.full((3,), torch.nan), "'a' must hold finite numbers, got nan"),
        (torch.zeros(3, dtype=torch.int64), r"'a' must be floating point .*, got torch\.int64"),
    ],
    ids=["repeats one number", "not finite", "integers"],
)
def test_tensors_that_are_no_weights_are_refused(tensor, message):
    with pytest.raises(ValueError, match=message):
        check_weights({"a": tensor}, 1000)
