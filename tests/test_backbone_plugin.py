"""The backbone of another package, as docs/plug-ins.md shows it, through the commands."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.installed_packages import install

ROOT = Path(__file__).parents[1]
TINY = (
    "--data.source=images", "--data.global_batch=4", "--data.max_batch_per_device=2", "--data.validation_batch=8",
    "--data.validation_samples=8", "--trainer.accelerator=cpu", "--trainer.max_steps=2",
    "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--model.decoding.num_steps=4",
)  # fmt: skip
SIZES = ("--model.network.embed_dim=16", "--model.network.backbone=conv", "--model.network.depth=2")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    page = (ROOT / "docs" / "plug-ins.md").read_text()
    (source,) = re.findall(r"```python\n(# conv_backbone\.py\n.*?)```", page, re.DOTALL)
    (points,) = re.findall(r'```toml\n\[project\.entry-points\."(maskgit_pl\.backbones)"\]\n(.*?)```', page, re.DOTALL)
    wrong = source.replace("config.codebook_size)", "config.codebook_size + 1)").replace('"conv"', '"wide"')
    install(
        folder / "site",
        name="conv-backbone",
        entry_points=f"[{points[0]}]\n{points[1].replace(chr(34), '')}wide = wide_backbone:ConvConfig\n",
        modules={"conv_backbone": source, "wide_backbone": wrong},
    )
    return folder


def maskgit(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs a command; the recipes are those of the repository."""
    paths = os.pathsep.join([str(folder / "site"), str(ROOT)])
    return forked.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths})


def train(folder: Path, shards: Path, pretrained: Path, run: str, *words: str) -> subprocess.CompletedProcess[str]:
    paths = ("--data", shards, "--tokenizer", pretrained / "tokenizer", "--runs-folder", folder / "runs", "--run", run)
    return maskgit(folder, "train", "transformer", *paths, *TINY, *words)


@pytest.mark.slow
def test_a_backbone_of_another_package_is_trained_exported_and_sampled(workplace, tiny_shards, tiny_pretrained):
    done = train(workplace, tiny_shards, tiny_pretrained, "conv", *SIZES)
    assert done.returncode == 0, done.stdout + done.stderr
    run = workplace / "runs" / "conv"
    network = json.loads((run / "pretrained" / "transformer" / "config.json").read_text())["network"]
    assert (network["backbone"], network["embed_dim"], network["depth"]) == ("conv", 16, 2)
    assert "backbone: conv" in (run / "transformer" / "config.yaml").read_text()
    image = workplace / "image.png"
    done = maskgit(workplace, "sample", run, "--classes", "0", "--num-steps", 2, "--out", image)
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.is_file()
    # The same recipe from its own record, and another grid from these weights.
    again = run / "transformer" / "config.yaml"
    done = maskgit(
        workplace, "train", "transformer", "--config", again, "--run", "again", "--runs-folder", workplace / "runs",
        "--pretrained", run / "pretrained",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_backbone_that_breaks_the_contract_is_refused_in_one_line(workplace, tiny_shards, tiny_pretrained):
    done = train(workplace, tiny_shards, tiny_pretrained, "wrong", "--model.network.backbone=wide")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "backbone 'wide': forward must return logits of shape (B, N, K)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (workplace / "runs" / "wrong").exists()
