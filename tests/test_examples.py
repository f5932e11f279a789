"""The example scripts of ``docs/`` run as a user would run them, and both stages resume with a plain Trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from PIL import Image

from maskgit_pl import MaskGIT
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from tests.short_runs import assert_equal, data, tiny_module

REPOSITORY = Path(__file__).parents[1]
FROM_PYTHON, PLAIN_LIGHTNING = (REPOSITORY / "docs" / name for name in ("from_python.py", "plain_lightning.py"))


def run_example(script: Path, argument: Path, *, folder: Path) -> str:
    """Runs a script in a folder and returns its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, script, argument]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Writes grey 28 px images of two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 32), ("val", 16)):
        for label, low in enumerate((0, 128)):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = torch.randint(low, low + 127, (1, 28, 28), dtype=torch.uint8, generator=generator)
                (folder / f"{number}.png").write_bytes(encode_png(image))
    make_shards(open_source(tmp_path / "images"), tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.slow  # 40 s
@pytest.mark.trainings
def test_one_short_script_checks_trains_evaluates_and_tunes(shards, tmp_path):
    assert len(FROM_PYTHON.read_text().splitlines()) <= 60
    assert "argparse" not in FROM_PYTHON.read_text()
    run_example(FROM_PYTHON, shards, folder=tmp_path)
    run = tmp_path / "runs" / "notebook"
    for stage in ("tokenizer", "transformer"):
        assert (run / "pretrained" / stage / "model.safetensors").is_file()
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (28, 28)
    measured = Ledger(run / "evaluation" / FILE_NAME).rows("samples")
    assert len([row for row in measured if row["model"] == "MaskGIT"]) >= 3  # evaluated, and each trial of the search


@pytest.mark.slow  # 15 s, on a busy machine 80
@pytest.mark.trainings
def test_the_example_is_short_trains_both_stages_and_draws_an_image(tmp_path):
    assert len(PLAIN_LIGHTNING.read_text().splitlines()) <= 42
    run_example(PLAIN_LIGHTNING, tmp_path, folder=tmp_path)
    pipe = MaskGIT.from_pretrained(tmp_path)
    assert pipe.class_names == ("horizontal", "vertical")
    with Image.open(tmp_path / "vertical.png") as image:
        assert image.size == (16, 16)
    assert len(list(tmp_path.glob("lightning_logs/version_*/checkpoints/*.ckpt"))) == 2  # Lightning's own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "transformer", "autoregressive"])
def test_lightnings_own_checkpoint_resumes_to_the_same_weights(kind, tiny_shards, tiny_pretrained, tmp_path):
    def trained(steps: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
        module = tiny_module(kind, tiny_pretrained / "tokenizer", dropout=0.1)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=1,
        )  # fmt: skip
        trainer.fit(module, datamodule=data(tiny_shards), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.state_dict()

    part, straight = trained(5), trained(8)
    resumed = trained(8, tmp_path / "5.ckpt")
    assert_equal(resumed, straight)
    assert not all(torch.equal(value, part[name]) for name, value in straight.items())
