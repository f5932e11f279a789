"""Two processes on one machine, through the command that a user types, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl.cli import main
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO, newest_complete
from tests.conftest import flags

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent / "tiny"
STEPS = 6
EXACT = "--trainer.precision=32-true"
CLUSTERS = {"cpu": [], "ddp": ["--trainer.devices=2"], "fsdp": ["--trainer.devices=2", EXACT]}


def words(stage: str, cluster: str, shards: Path, runs: Path, *more: str, tokenizer: Path | None = None) -> list[str]:
    """The words of a command that trains a few steps."""
    tiny = yaml.safe_load((TINY / f"{stage}.yaml").read_text())
    tiny["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS}
    if "--recipe=autoregressive" in more:
        del tiny["model"]["decoding"]  # steps that it has no use for
    named = ["--tokenizer", str(tokenizer)] if tokenizer else []
    return [
        "train", stage, "--cluster", cluster, "--data", str(shards), "--runs", str(runs), "--run", cluster, *named,
        *flags(tiny), *CLUSTERS[cluster], *more,
    ]  # fmt: skip


def train(stage: str, cluster: str, shards: Path, runs: Path, *more: str, tokenizer: Path | None = None) -> dict:
    """Trains a few steps and returns the last checkpoint."""
    command = [sys.executable, "-m", "maskgit_pl", *words(stage, cluster, shards, runs, *more, tokenizer=tokenizer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return last_checkpoint(runs / cluster / stage)


def last_checkpoint(folder: Path) -> dict:
    return FolderCheckpointIO().load_checkpoint(newest_complete(folder / "checkpoints"))


def assert_close(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_two_ranks_train_the_tokenizer_of_one(tiny_shards, tmp_path):
    one = train("tokenizer", "cpu", tiny_shards, tmp_path)
    two = train("tokenizer", "ddp", tiny_shards, tmp_path)
    assert one["global_step"] == two["global_step"] == STEPS
    assert_close(one["state_dict"], two["state_dict"])


def test_ddp_and_fsdp_train_the_transformer_of_one_process(tiny_shards, tiny_pretrained, tmp_path):
    tokenizer = tiny_pretrained / "tokenizer"
    one = train("transformer", "cpu", tiny_shards, tmp_path, tokenizer=tokenizer)
    for cluster in ("ddp", "fsdp"):
        other = train("transformer", cluster, tiny_shards, tmp_path, tokenizer=tokenizer)
        assert_close(one["state_dict"], other["state_dict"])
        assert one["optimizer_states"][0]["param_groups"] == other["optimizer_states"][0]["param_groups"]
        assert (tmp_path / cluster / "transformer" / "samples.png").is_file()
        assert (tmp_path / cluster / "pretrained" / "transformer" / "model.safetensors").is_file()


def test_fsdp_trains_and_samples_the_sequential_baseline_of_one_process(tiny_shards, tiny_pretrained, tmp_path):
    given = (tiny_shards, tmp_path, "--recipe=autoregressive")
    assert main(words("transformer", "cpu", *given, tokenizer=tiny_pretrained / "tokenizer")) == 0
    one = last_checkpoint(tmp_path / "cpu" / "transformer")
    other = train("transformer", "fsdp", *given, tokenizer=tiny_pretrained / "tokenizer")
    assert_close(one["state_dict"], other["state_dict"])
    pictures = [(tmp_path / cluster / "transformer" / "samples.png").read_bytes() for cluster in ("cpu", "fsdp")]
    assert pictures[0] == pictures[1]
    assert (tmp_path / "fsdp" / "pretrained" / "transformer" / "model.safetensors").is_file()


def test_a_checkpoint_of_ddp_goes_on_under_fsdp(tiny_shards, tiny_pretrained, tmp_path):
    more = (f"--trainer.max_steps={2 * STEPS}",)
    options = {"tokenizer": tiny_pretrained / "tokenizer"}
    straight = train("transformer", "cpu", tiny_shards, tmp_path, *more, **options)
    train("transformer", "ddp", tiny_shards, tmp_path, *more, "--checkpoint_every=4", **options)
    folder = tmp_path / "ddp" / "transformer" / "checkpoints"
    FolderCheckpointIO().remove_checkpoint(newest_complete(folder))
    (tmp_path / "ddp").rename(tmp_path / "fsdp")
    resumed = train("transformer", "fsdp", tiny_shards, tmp_path, *more, **options)
    assert resumed["global_step"] == 2 * STEPS
    assert_close(straight["state_dict"], resumed["state_dict"])


def test_fsdp_is_refused_for_the_tokenizer_by_name(tiny_shards, tmp_path):
    with pytest.raises(AssertionError, match=r"trainer\.strategy"):
        train("tokenizer", "fsdp", tiny_shards, tmp_path)
