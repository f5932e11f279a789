"""The table of GPUs, and the machines of a planned run."""

import pytest

from maskgit_pl.training.gpus import GPUS, Machines, find_gpu


@pytest.mark.parametrize(("name", "key"), [
    ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100 80GB PCIe", "a100-80"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA L40S", "l40s"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("NVIDIA L40", None),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
])  # fmt: skip
def test_a_card_is_found_by_its_name_unless_its_rates_differ(name, key):
    assert find_gpu(name) is GPUS.get(key)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"devices": True}, {"device_memory": "much"}, {"device": "h1000"}])
def test_wrong_machines_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Machines(**wrong)
