"""``runs.preflight``: each check against the fault that it is for, really there. It prints and changes nothing."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from maskgit_pl import runs
from maskgit_pl.runs.plan import Machines
from tests.conftest import save_tiny_pretrained, tiny_flags


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def examine(tmp_path, tiny_shards, tiny_pretrained):
    """Checks a tiny run; flags that are given later count."""

    def call(*words: str, stage="transformer", cluster="ddp", machines=None, **folders):
        recipe = runs.Recipe.read(stage, cluster=cluster, overrides=[*tiny_flags(stage), *words])
        tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
        folders = {"run": tmp_path / "runs" / "one", "data": tiny_shards, "tokenizer": tokenizer, **folders}
        return runs.preflight(recipe, machines=machines or Machines(device_memory="1GB"), **folders)

    return call


def fails(found, name: str, *parts: object) -> None:
    (check,) = [check for check in found.errors if check.name == name]
    for part in parts:
        assert str(part) in check.text


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_run_that_can_start_is_described_and_nothing_is_written(examine, stage, tmp_path, capsys):
    def state():
        return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state().tolist()

    before = state()
    machines = Machines(nodes=2, devices=2, device_memory="1GB")
    found = examine("--cpu_threads=1", "--matmul_precision=high", stage=stage, machines=machines)
    assert found.ok, found
    names = ["data", "tokenizer", "ranks", "strategy", "recipe", "batch", "run", "steps", "model", "memory", "disk"]
    assert [check.name for check in found.checks] == [name for name in names if name != stage]
    assert found.memory.total > 16 * found.num_parameters
    assert found.step_flops > 0
    assert found.as_dict()["memory"]["states"] == found.memory.states
    text = str(found)
    assert text.startswith("ok")
    assert "4 = 4 ranks x 1 accumulation step x 1 sample" in text
    assert text.endswith("checks pass.")
    assert state() == before
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "options", "name", "parts"),
    [
        ([], {"machines": Machines(devices=3)}, "batch", ["multiple of the 3 ranks, got 4", "use 3 or 6"]),
        (
            [],
            {"machines": Machines(device_memory="10KB")},
            "memory",
            ["must fit into 9.2 kB", "not even one sample fits"],
        ),
        ([], {"cluster": "single", "machines": Machines(devices=2)}, "strategy", ["'auto'", "--cluster ddp"]),
        (["--trainer.strategy=fsdp"], {"stage": "tokenizer"}, "strategy", ["got 'fsdp'; use --cluster ddp"]),
        (["--model.network.codebook_size=8"], {}, "recipe", ["must be 16, that of the tokenizer, got 8"]),
        (["--data.source=tokens"], {}, "recipe", ["tokenize"]),
        ([], {"data": Path("nowhere")}, "data", ["data nowhere: no such folder", "maskgit data make"]),
        ([], {"tokenizer": Path("none")}, "tokenizer", ["tokenizer none: no config.json there"]),
        (
            ["--model.losses=[{name: perceptual, network: {name: timm, model: resnet18, weights: no-such-file}}]"],
            {"stage": "tokenizer"},
            "recipe",
            ["got no-such-file", "--model.losses.perceptual.network.weights FILE"],
        ),
        ([], {"run": Path("/proc/1/runs/one"), "cluster": "single"}, "disk", ["writable", "/proc/1"]),
    ],
)
def test_a_wrong_run_is_one_line(examine, words, options, name, parts):
    found = examine(*words, **options)
    fails(found, name, *parts)
    assert len(found.errors) == 1


def test_memory_that_is_too_small_is_answered_with_the_batch_that_fits(examine):
    batch = ("--data.global_batch=64", "--data.max_batch_per_device=64")
    found = examine(*batch, machines=Machines(device_memory="600KB"))
    fails(found, "memory", "got", "--data.max_batch_per_device=", "--model.activation_checkpointing=blocks saves")
    largest = found.errors[0].text.partition("max_batch_per_device=")[2].split()[0]
    assert examine(batch[0], f"--data.max_batch_per_device={largest}", machines=Machines(device_memory="600KB")).ok
    more = f"--data.max_batch_per_device={2 * int(largest)}"
    assert not examine(batch[0], more, machines=Machines(device_memory="600KB")).ok


def test_damaged_data_is_refused_by_name(examine, tiny_shards, tmp_path):
    data = shutil.copytree(tiny_shards, tmp_path / "cut")
    shard = next(data.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    fails(examine(data=data), "recipe", shard.name)
    (data / "val.json").unlink()
    fails(examine(data=data), "data", "val.json")
    shutil.copy(tiny_shards / "val.json", data)
    (data / "train.json").unlink()
    fails(examine("--max_passes=3", data=data), "data", "no manifest train.json", "maskgit data index")


def test_images_that_are_enlarged_are_a_warning(examine, tmp_path):
    larger = save_tiny_pretrained(tmp_path / "larger", image_size=16) / "tokenizer"
    found = examine("--model.network.grid=[8, 8]", tokenizer=larger)
    (said,) = [check for check in found.checks if check.name == "image size"]
    assert (said.verdict, "at most 8 x 8 pixels are enlarged to 16 x 16" in said.text) == ("warning", True)


def test_a_disk_without_room_for_the_checkpoints(examine, small_disk):
    (small_disk / "other").write_bytes(bytes(3 * 2**20 - 32_768))
    fails(examine(run=small_disk / "one"), "disk", small_disk, "free", "--runs-folder", "keep_last")


@pytest.mark.slow
def test_a_run_resumes_is_finished_or_is_refused_as_in_training(examine, tmp_path, tiny_shards):
    recipe = runs.Recipe.read("tokenizer", overrides=tiny_flags("tokenizer"))
    runs.fit(recipe, run=tmp_path / "runs" / "one", data=tiny_shards)
    for steps, text in ((2, "resumes from step-00000001"), (1, "nothing to do")):
        found = examine(f"--trainer.max_steps={steps}", stage="tokenizer", cluster="single")
        assert [text in check.text for check in found.checks if check.name == "run"] == [True], found
    fails(examine("--data.seed=7", stage="tokenizer", cluster="single"), "recipe", "cannot resume", "data.seed: 0 -> 7")
