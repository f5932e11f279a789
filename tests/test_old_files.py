"""Files of version 0.1.0 give today what they gave then: pretrained folder, checkpoints, recipes and flags.

``tests/old/0.1.0/README.md`` describes the files.
"""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.pretrained import load_tokenizer, load_transformer
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO

OLD = Path(__file__).parent / "old" / "0.1.0"
RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = ("tokenizer", "transformer")


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return load_file(OLD / "expected" / "outputs.safetensors")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working directory with the old run, stopped after step 2 of 4, its data, and its recipes among today's."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "shards"):
        shutil.copytree(OLD / name, name)
    shutil.copytree(OLD / "pretrained", "runs/old/pretrained")
    shutil.copytree(RECIPES, "recipes")
    for stage in STAGES:
        shutil.copy(OLD / "recipe" / f"{stage}.yaml", f"recipes/{stage}/old.yaml")
    return tmp_path


def test_a_pretrained_folder_gives_the_logits_of_version_0_1_0(outputs):
    network = load_transformer(OLD / "pretrained" / "transformer").network
    logits = network(outputs["input"], torch.tensor([0, 2]))
    torch.testing.assert_close(logits, outputs["logits"], rtol=0, atol=1e-5)
    assert load_tokenizer(OLD / "pretrained" / "tokenizer").grid == (4, 4)


def test_a_pretrained_folder_gives_the_tokens_and_images_of_version_0_1_0(outputs):
    steps = []
    images = MaskGIT.from_pretrained(OLD / "pretrained").generate(
        [0, 2], seed=0, output_type="pt", callback=steps.append
    )
    assert torch.equal(steps[-1].tokens, outputs["tokens"])
    assert torch.equal(images, outputs["samples"])
