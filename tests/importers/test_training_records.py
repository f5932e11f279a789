"""Records of training programs beside the weights are passed over, without their classes, and in bounded time."""

import argparse
import io
import sys
import zipfile
from collections import defaultdict
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict

from maskgit_pl.importers.layouts import read_checkpoint

WEIGHTS = {"layer.weight": torch.arange(3.0)}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "record",
    [
        # Halton-MaskGIT multiplies its learning rate by numpy's cosine in the last tenth of a training.
        {"param_groups": [{"lr": np.float64(1e-4) * (1 + np.cos(0.5))}]},
        {"seen": np.arange(3), "flag": np.bool_(True), "type": np.dtype("float32")},
        # Lightning's hyper-parameters: a dict with its own class.
        AttributeDict(base_learning_rate=1e-4, ddconfig=AttributeDict(ch=128)),
        argparse.Namespace(steps=3),
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
def test_a_configuration_of_omegaconf_is_passed_over(old, tmp_path, monkeypatch):
    """Its containers hold types: ``typing.Any``, built-in classes and a defaultdict."""
    module = ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})
    for name in ("omegaconf", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    config = module.DictConfig()
    config._metadata = {"ref_type": Any, "object_type": dict, "key_type": str, "cache": defaultdict(dict)}
    config._content = {"ch_mult": [1, 2], "parent": config}
    content = {"state_dict": WEIGHTS, "hyper_parameters": config}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    monkeypatch.delitem(sys.modules, module.__name__)
    tensors, ignored = read_checkpoint(tmp_path / "a.ckpt", entries=("state_dict",))
    assert torch.equal(tensors["layer.weight"], WEIGHTS["layer.weight"])
    assert ignored == ("hyper_parameters",)


@pytest.mark.parametrize("name", ["eval", "getattr", "exec"])
def test_other_built_in_functions_are_refused(name, tmp_path):
    rewrite_pickle(tmp_path / "a.pth", f"\x80\x02}}X\x01\0\0\0acbuiltins\n{name}\nX\x01\0\0\0x\x85Rs.".encode("latin"))
    with pytest.raises(ValueError, match=rf"must hold tensors only, got also {name}, a Python object"):
        read_checkpoint(tmp_path / "a.pth", entries=("model",))


def test_a_record_among_the_weights_is_no_tensor(tmp_path):
    torch.save({"model": {**WEIGHTS, "mean": np.zeros(3)}}, tmp_path / "a.pth")
    tensors, _ = read_checkpoint(tmp_path / "a.pth", entries=("model",))
    assert not isinstance(tensors["mean"], torch.Tensor | np.ndarray)  # the importers refuse it by its name


def rewrite_pickle(path, code):
    """Replaces the pickle in a file of torch.save."""
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, code if name.endswith("data.pkl") else value)


def test_a_file_with_very_many_classes_is_refused_soon(tmp_path):
    code = io.BytesIO()
    code.write(b"\x80\x02}(")
    for number in range(400):  # each one made the loader start again: the time grew with the third power
        code.write(b"K\x01clightning.x\nC%05d\n" % number)
    code.write(b"u.")
    rewrite_pickle(tmp_path / "a.pth", code.getvalue())
    # The message names the first class that got no stand-in.
    with pytest.raises(ValueError, match=r"a\.pth must hold tensors only, got also lightning\.x\.C00100, a Py"):
        read_checkpoint(tmp_path / "a.pth", entries=("model",))


class Other:
    pass


def test_the_way_out_names_the_entries_that_are_read(tmp_path):
    torch.save({"model": WEIGHTS, "other": Other()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"got also .*Other, a Python object") as refusal:
        read_checkpoint(tmp_path / "a.pth", entries=("model_state_dict", "model"))
    way_out = (
        'torch.save(checkpoint["..."], "weights.pt") with the name of its weights, such as model_state_dict or model'
    )
    assert way_out in str(refusal.value)
    torch.save(torch.load(tmp_path / "a.pth", weights_only=False)["model"], tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt", entries=("model",))[0].keys() == WEIGHTS.keys()
