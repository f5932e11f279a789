"""Writes the files of this folder. Needs the code of version 0.1.0 (commit f42fcf7) and its recipes:

    git worktree add ../v010 f42fcf7
    PYTHONPATH=../v010 .venv/bin/python tests/old/0.1.0/make.py ../v010

Everything is tiny: 8 px images, 4 x 4 tokens of 16 codes, 3 classes, one block.
"""

import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import torch
import without_jsonargparse
from safetensors.torch import save_file

from maskgit_pl.cli import main
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained import load_transformer
from maskgit_pl.shards.images import encode_png
from maskgit_pl.shards.index import find_shards, index_shards
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO

HERE = Path(__file__).parent
RECIPE = """\
# Laid over base.yaml of version 0.1.0, with its names.
data:
  image_size: 8
  in_channels: 1
  global_batch: 4
  max_batch_per_device: 2
  validation_batch: 8
  validation_samples: 8
  num_workers: 0
"""
TOKENIZER = """\
model:
  network:
    channels: 4
    multipliers: [1, 2]
    blocks_per_level: 1
    middle_blocks: 1
    groups: 2
    num_codes: 16
    code_width: 4
    patch_size: 1
  learning_rate: {peak: 2.0e-3, warmup_steps: 1, decay: cosine}
  betas: [0.8, 0.95]
  adversarial: {discriminator: {channel_multiplier: 0.015625}, start_step: 0, r1_cost: 5.0, r1_every: 2}
"""
TRANSFORMER = """\
model:
  network: {width: 16, depth: 2, num_heads: 2, mlp_width: 32, dropout: 0.1}
  learning_rate: {peak: 2.0e-3, warmup_steps: 1, decay: cosine}
  betas: [0.8, 0.95]
  decoding: {num_steps: 4}
"""
TRAINER = """\
trainer: {accelerator: cpu, max_steps: 4, val_check_interval: 4, limit_val_batches: 1, log_every_n_steps: 1}
checkpoint_every: 2
keep_last: 5
"""


def make_shards(folder: Path) -> None:
    """Writes 12 images to train with and 8 to validate with."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 8)):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as shard:
            for key in range(count):
                low = 90 * (key % 3)
                image = torch.randint(low, low + 70, (1, 8, 8), dtype=torch.uint8, generator=generator)
                for extension, content in (("png", encode_png(image)), ("cls", str(key % 3).encode())):
                    member = tarfile.TarInfo(f"{key:05d}.{extension}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    index_shards(folder, {split: find_shards(folder, f"{split}-*.tar") for split in ("train", "val")})


def train(stage: str, *words: str) -> None:
    """Trains a stage for 4 steps; what it has after step 4 goes to ``expected``, the rest stays as after step 2."""
    code = main(["train", stage, "--recipe=old", "--data=shards", "--run=old", *words])
    assert code == 0, code
    checkpoints = Path("runs/old") / stage / "checkpoints"
    state = FolderCheckpointIO().load_checkpoint(checkpoints / "step-00000004")["state_dict"]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, f"expected/{stage}-step-4.safetensors")
    shutil.rmtree(checkpoints / "step-00000004")
    for each in Path("runs/old", stage).iterdir():
        if each.name not in ("checkpoints", "config.yaml"):
            shutil.rmtree(each) if each.is_dir() else each.unlink()


def make_expected() -> None:
    """Writes what 0.1.0 makes of the pretrained folder."""
    pipe = MaskGIT.from_pretrained("pretrained")
    network = load_transformer("pretrained/transformer").network
    tokens = torch.arange(32).view(2, 16) % 16
    tokens[:, ::3] = network.config.mask_token_id
    logits = network(tokens, torch.tensor([0, 2]))
    steps = []
    samples = pipe.generate([0, 2], seed=0, output_type="pt", callback=steps.append)
    arrays = {"logits": logits, "input": tokens, "samples": samples, "tokens": steps[-1].tokens}
    save_file({name: array.contiguous() for name, array in arrays.items()}, "expected/outputs.safetensors")


def make_npz() -> None:
    """Writes two images into one file."""
    words = ["--num-images", "2", "--classes", "0,2", "--seed", "0", "--device", "cpu", "--out", "expected/two.npz"]
    assert main(["sample", "pretrained", *words]) == 0


def make(v010: Path) -> None:
    """Fills the working directory."""
    make_shards(Path("shards"))
    shutil.copytree(v010 / "recipes", "recipes")
    (Path("recipes/tokenizer") / "old.yaml").write_text(RECIPE + TOKENIZER + TRAINER)
    (Path("recipes/transformer") / "old.yaml").write_text(RECIPE + TRANSFORMER + TRAINER)
    Path("expected").mkdir()
    train("tokenizer")
    assert main(["tokenize", "--data=shards", "--run=old"]) == 0
    train("transformer")
    shutil.move("runs/old/pretrained", "pretrained")
    make_expected()
    make_npz()
    for stage in ("tokenizer", "transformer"):
        Path("recipe").mkdir(exist_ok=True)
        shutil.move(f"recipes/{stage}/old.yaml", f"recipe/{stage}.yaml")
    shutil.rmtree("recipes")


if __name__ == "__main__":
    without_jsonargparse.install()
    source = Path(sys.argv[1]).resolve()
    work = Path(sys.argv[2]).resolve()
    work.mkdir()
    os.chdir(work)
    torch.set_num_threads(1)
    make(source)
