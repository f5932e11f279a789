"""Names of devices, with and without an accelerator."""

import pytest
import torch

from maskgit_pl import devices
from maskgit_pl.devices import (
    check_device,
    cpu_name,
    default_device,
    device_names,
    find_device,
    has_amx,
    has_bfloat16,
    multiplies_by_onednn,
    parse_dtype,
)


def accelerators(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 0) -> None:
    """Lets torch find ``count`` accelerators of a kind."""
    device = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("kind", "count", "names"),
    [
        (None, 0, ["cpu"]),
        ("cuda", 0, ["cpu"]),  # torch is built for it, and finds none
        ("mps", 1, ["cpu", "mps", "mps:0"]),
        ("cuda", 2, ["cpu", "cuda", "cuda:0", "cuda:1"]),
    ],
)
def test_the_names_are_those_of_the_available_devices(monkeypatch, kind, count, names):
    accelerators(monkeypatch, kind, count)
    assert device_names() == names
    for name in names:
        assert check_device(name) == torch.device(name)
        assert check_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda:2", "mps", "cdua", "", "cuda:x", "meta"])
def test_an_unavailable_device_is_answered_with_the_available_ones(monkeypatch, name):
    accelerators(monkeypatch, "cuda", 2)
    with pytest.raises(ValueError, match=r"--device must be one of cpu, cuda, cuda:0, cuda:1, got") as caught:
        check_device(name, name="--device")
    assert "finds no GPU" not in str(caught.value)
    accelerators(monkeypatch, None)
    with pytest.raises(ValueError, match=r"device must be one of cpu, got 'cuda'.*\(torch .* finds no GPU here\)"):
        check_device("cuda")


def test_each_process_of_a_machine_gets_its_own_gpu(monkeypatch):
    accelerators(monkeypatch, None)
    assert default_device() == default_device(local_rank=3) == "cpu"
    accelerators(monkeypatch, "cuda", 2)
    assert default_device() == "cuda"
    assert [default_device(local_rank=rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert (find_device(None), find_device("cuda:1")) == ("cuda", "cuda:1")
    accelerators(monkeypatch, "mps", 1)
    assert default_device() == find_device(None) == "mps"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"avx512_f": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        (None, False),  # a version of torch that does not tell
    ],
)
def test_bfloat16_is_chosen_where_the_cpu_has_instructions_for_it(monkeypatch, known, expected):
    if known is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_amx() == bool(known and known.get("amx_bf16"))
    expected = expected and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert has_bfloat16("cpu") == expected
    assert parse_dtype("auto", "cpu") == (torch.bfloat16 if expected else torch.float32)
    assert (parse_dtype("bfloat16", "cpu"), parse_dtype(None, "cpu")) == (torch.bfloat16, None)


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "is_faster"),
    [
        ("AuthenticAMD", 26, "avx2 avx512f avx512_bf16", True),  # Zen 5
        ("AuthenticAMD", 26, "avx2", False),  # the same without AVX-512, as virtual machines may be
        ("AuthenticAMD", 25, "avx2 avx512f avx512_bf16", False),  # Zen 4
        ("AuthenticAMD", 25, "avx2", False),  # Zen 3
        ("GenuineIntel", 6, "avx2 avx512f avx512_bf16 amx_bf16", False),
        (None, None, "", False),  # no such lines, as on ARM
    ],
)
def test_float32_is_multiplied_by_onednn_on_amd_from_zen_5_on(monkeypatch, tmp_path, vendor, family, flags, is_faster):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "_CPUINFO", path)
    assert not multiplies_by_onednn()  # no such file, as on macOS
    lines = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\nflags\t\t: fpu {flags}\n\n"
    path.write_text(2 * f"processor\t: 0\n{lines if vendor else ''}")
    assert multiplies_by_onednn() == is_faster
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_by_onednn()


def test_the_name_of_a_cpu_has_its_family_and_its_instructions(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "_CPUINFO", path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    path.write_text(2 * "model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\n\n")
    assert cpu_name() == "AMD EPYC (family 26, model 2, AVX512, AVX512_BF16)"
