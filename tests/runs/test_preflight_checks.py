"""``runs.preflight`` from Python prints and changes nothing. tests/cli/test_doctor.py tests each check."""

import os
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl import runs
from maskgit_pl.runs.preflight_report import Machines, Shares
from tests.conftest import flags, save_tiny_pretrained

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "NCCL_", "GLOO_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def examine(tmp_path, tiny_shards, tiny_pretrained):
    """Runs the checks of a tiny run of stage 2."""
    tiny = flags(yaml.safe_load((TINY / "transformer.yaml").read_text()))

    def call(*overrides: str, data=tiny_shards, **more):
        recipe = runs.Recipe.read("transformer", cluster="ddp", overrides=[*tiny, *overrides])
        more = {"tokenizer": tiny_pretrained / "tokenizer", **more}
        return runs.preflight(recipe, run=tmp_path / "runs" / "one", data=data, **more)

    return call


def test_a_run_that_can_start(examine, tmp_path, capsys):
    made = []
    found = examine(machines=Machines(nodes=2, devices=2, memory=1e9), on_check=made.append)
    assert found.ok
    assert found.errors == ()
    assert found.checks == tuple(made)
    assert [check.name for check in made] == [
        "slurm", "network", "data", "tokenizer", "strategy", "recipe", "batch", "run", "memory", "disk",
    ]  # fmt: skip
    assert found.shares == Shares(nodes=2, devices=2, per_device=1, micro_batches=1)
    assert found.shares.global_batch == 4
    assert found.costs.memory.total > found.costs.memory.weights == 4 * found.costs.num_parameters
    assert found.costs.step_flops > 0
    text = str(found)
    assert text.startswith("ok       slurm")
    assert "not rescaled by the number of devices" in text
    assert text.endswith("All 10 checks pass. Memory is calculated, not measured.")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "runs").exists()


def test_a_list_of_devices_counts_its_entries(examine):
    found = examine("--trainer.devices=[0, 2]")
    assert (found.shares.nodes, found.shares.devices) == (1, 2)


def test_a_run_on_a_cpu_has_one_device_on_a_machine_with_gpus(examine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    # 8 ranks cannot share a batch of 4.
    assert examine("--trainer.devices=auto", "--trainer.accelerator=auto").shares is None
    assert examine("--trainer.devices=auto", "--trainer.accelerator=cpu").shares.devices == 1


@pytest.mark.slow
@pytest.mark.parametrize(("side", "effect"), [(4, "reduced"), (16, "enlarged"), (8, None)])
def test_images_of_another_size_than_the_recipe_are_a_warning(tmp_path, tiny_shards, side, effect):
    tiny = flags(yaml.safe_load((TINY / "tokenizer.yaml").read_text()))
    recipe = runs.Recipe.read("tokenizer", overrides=[*tiny, f"--data.image_size={side}"])
    found = runs.preflight(recipe, run=tmp_path / "runs" / "one", data=tiny_shards)
    assert found.ok
    said = [check for check in found.checks if check.name == "image size"]
    assert [check.verdict for check in said] == ["warning"] * (effect is not None)
    assert all(f"images of 8 x 8 pixels are {effect} to {side} x {side}" in check.text for check in said)


def test_the_image_size_of_stage_2_is_that_of_its_tokenizer(examine, tmp_path, tiny_shards):
    def said(**more):
        return [check.text for check in examine(**more).checks if check.name == "image size"]

    assert said() == []
    larger = save_tiny_pretrained(tmp_path / "larger", image_size=16) / "tokenizer"
    (text,) = said(tokenizer=larger)
    assert text.startswith("images of 8 x 8 pixels are enlarged to 16 x 16")
    assert said(tokenizer=tmp_path / "nowhere") == []  # unknown


def test_a_run_that_cannot_start_is_examined_to_its_end(examine, tmp_path):
    found = examine(data=tmp_path / "nowhere", machines=Machines(devices=3, memory=1e3))
    assert not found.ok
    assert [check.name for check in found.errors] == ["data", "batch", "memory"]
    assert found.shares is None
    assert str(found).endswith("3 of 10 checks fail.")


def test_a_recipe_that_training_would_refuse_has_no_costs(examine):
    found = examine("--model.mask_schedule={name: pow, exponent: -1}")
    assert [check.name for check in found.errors] == ["recipe"]
    assert found.costs is None


def test_the_strategy_is_checked_with_the_sizes_of_data_and_tokenizer(tmp_path, tiny_shards, tiny_pretrained):
    tiny = [word for word in flags(yaml.safe_load((TINY / "transformer.yaml").read_text())) if ".grid=" not in word]
    counts = ["--model.decoding.num_steps=2", "--model.decoding.tokens_per_step=[8, 8]"]  # of the tokenizer's 4 x 4
    recipe = runs.Recipe.read("transformer", overrides=[*tiny, *counts])
    found = runs.preflight(recipe, run=tmp_path / "one", data=tiny_shards, tokenizer=tiny_pretrained / "tokenizer")
    assert found.ok, str(found)
    assert "strategy" in [check.name for check in found.checks]


def test_torch_and_its_random_numbers_are_left_as_they_were(examine):
    def state():
        return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state().tolist()

    before = state()
    assert examine("--cpu_threads=1", "--matmul_precision=high").ok
    assert state() == before


def test_the_samples_of_each_rank_are_the_global_batch():
    shares = Shares(nodes=2, devices=3, per_device=2, micro_batches=4)
    samples = [
        sample for micro_batch in range(4) for rank in range(6)
        for sample in shares.samples_of(rank, micro_batch=micro_batch)
    ]  # fmt: skip
    assert samples == [*range(shares.global_batch)]
    assert shares.samples_of(3, count=3, micro_batch=1) == range(18, 24)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"devices": True}, {"memory": 0}, {"gpu": "h1000"}, {"port": 65536}])
def test_machines_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Machines(**wrong)
