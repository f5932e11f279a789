"""Both stages train with a Trainer as Lightning makes it, without callbacks, loggers, plugins or strategies of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from PIL import Image

from maskgit_pl import MaskGIT
from tests.short_runs import data, tiny_module

EXAMPLE = Path(__file__).parents[1] / "docs" / "plain_lightning.py"


@pytest.mark.slow  # 15 s, on a busy machine 80
@pytest.mark.trainings
def test_the_example_is_short_trains_both_stages_and_draws_an_image(tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 42
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert not all(torch.equal(value, part[name]) for name, value in straight.items())
