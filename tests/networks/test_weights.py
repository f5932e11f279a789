"""Weights from files: finite floating point numbers that the file holds, refused by name before they are expanded."""

import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from maskgit_pl.files import write_tensors
from maskgit_pl.networks.weights import (
    check_held,
    check_tensor,
    load_network,
    load_weights,
    read_tensors,
    read_weights,
    skeletons,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # the norm counts its batches in int64


def rewrite_archive(
    file: Path, compression: int = zipfile.ZIP_STORED, *, replaced: Mapping[str, bytes] | None = None
) -> None:
    """Rewrites the archive of ``torch.save``, as an attacker can; ``replaced`` has contents by the end of a name."""
    with zipfile.ZipFile(file) as old:
        entries = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in entries:
            new.writestr(name, (replaced or {}).get(name.rpartition("/")[2], content))


@pytest.mark.parametrize(("ending", "bad"), [("safetensors", math.nan), ("pth", math.inf), ("pth", -math.inf)])
def test_a_non_finite_number_is_refused_by_file_and_tensor(tmp_path, ending, bad):
    state, file = network().state_dict(), tmp_path / f"model.{ending}"
    state["1.running_var"][2] = bad
    if ending == "safetensors":
        write_tensors(file, state)
    else:
        torch.save(state, file)
    with pytest.raises(ValueError, match=rf"weights judge .*model\.{ending}: tensor '1\.running_var' must hold finite"):
        load_network(network, read_weights(file, thing="judge"), f"judge {file}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_kinds_of_numbers_are_refused_by_tensor(dtype):
    state = network().state_dict()
    with pytest.raises(ValueError, match=rf"weights FILE: tensor '0\.weight' must be floating point .*, got {dtype}"):
        load_weights(network(), state | {"0.weight": torch.ones(4, 3).to(dtype)}, "FILE")
    with pytest.raises(ValueError, match=r"tensor '1\.num_batches_tracked' must be integers, got torch\.float32"):
        load_weights(network(), state | {"1.num_batches_tracked": torch.tensor(1.0)}, "FILE")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_four_floating_point_types_are_accepted(dtype):
    module = network()
    state = {name: w.to(dtype) if w.is_floating_point() else w for name, w in module.state_dict().items()}
    load_weights(module, state, "")
    check_tensor("empty", torch.empty(0, dtype=dtype))
    check_tensor("largest", torch.tensor(torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("read", [read_tensors, lambda file: read_weights(file, thing="judge")])
def test_a_large_header_is_refused_before_it_is_parsed(tmp_path, read, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 9_000_000) + b"{}".ljust(9_000_000))
    monkeypatch.setattr("maskgit_pl.networks.weights.safe_open", None)
    with pytest.raises(ValueError, match=r"model\.safetensors.*header must have at most 8 MB"):
        read(file)


def test_tensors_that_a_file_does_not_hold_are_refused():
    tensor = torch.ones(4, 4)
    for tensors, fault in (
        ({"a": torch.ones(1).expand(1000, 1000)}, "'a' must be stored in full, got 4 MB made of 4 bytes that repeat"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' must be a dense CPU tensor"),
        ({"a": torch.ones(2, 2, device="meta")}, "'a' must be a dense CPU tensor"),
        ({str(number): tensor for number in range(10)}, "got 640 bytes of them in a file of 100 bytes; several share"),
    ):
        with pytest.raises(ValueError, match=fault):
            check_held(tensors, 100)
    check_held({"a": tensor, "b": tensor.t()}, 128)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_small_file_that_describes_large_tensors_is_refused(tmp_path, legacy):
    file = tmp_path / "model.pth"
    state = {"0.weight": torch.ones(1).expand(40_000, 30_000)}  # 4.8 GB in 1 kB
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    assert file.stat().st_size < 2000
    with pytest.raises(ValueError, match=r"model\.pth: tensor '0\.weight' must be stored in full, got 4.8 GB"):
        read_weights(file, thing="judge")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    file = tmp_path / "model.pth"
    torch.save({"a": torch.zeros(1_000_000)}, file)
    rewrite_archive(file)
    assert read_weights(file, thing="judge")["a"].shape == (1_000_000,)
    rewrite_archive(file, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"model\.pth .*must not be compressed, got 'model/data.pkl'"):
        read_weights(file, thing="judge")


def test_an_archive_whose_entries_share_their_bytes_is_refused(tmp_path):
    file = tmp_path / "model.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data/0", b"\0" * 10_000)
        archive.filelist *= 3  # the directory names it three times
        archive._didModify = True
    with pytest.raises(ValueError, match=r"entries of the archive must fit its 10\.\d kB, got 30 kB"):
        read_weights(file, thing="judge")


def test_a_skeleton_has_the_shapes_of_the_network_and_no_memory():
    with skeletons():
        skeleton = network()
    for name, tensor in network().state_dict().items():
        assert skeleton.state_dict()[name].is_meta
        assert skeleton.state_dict()[name].shape == tensor.shape
