"""Trains both stages with a plain ``lightning.Trainer`` on any map-style data set: python plain_lightning.py FOLDER."""

import sys
from pathlib import Path

import torch
from lightning import Trainer
from torch.utils.data import TensorDataset

import maskgit_pl as mg
from maskgit_pl.data import IndexedDataModule, IndexedDataset
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig

# 512 grey images of 16 x 16 pixels in 8 phases: horizontal stripes are class 0, vertical stripes class 1.
phases = torch.arange(512) % 8
waves = (128 + 100 * torch.sin((torch.arange(16) + phases.unsqueeze(1)) * torch.pi / 4)).to(torch.uint8)  # (512, 16)
vertical = waves.unsqueeze(1).expand(-1, 16, -1)  # (512, 16, 16)
labels = torch.arange(512) // 256
images = torch.where(labels.view(-1, 1, 1) == 1, vertical, vertical.mT)

folder, batch = Path(sys.argv[1]), 32
dataset = IndexedDataset(TensorDataset(images, labels), image_size=16, in_channels=1)
data = IndexedDataModule(dataset, dataset, global_batch=batch)
optimizer = mg.OptimizerConfig(mg.LearningRate(3e-3, warmup_steps=10), betas=(0.9, 0.96), weight_decay=0.01)

# Stage 1: images to 8 x 8 tokens. ``export`` writes FOLDER/tokenizer.
vqgan = VQGANConfig(
    1, base_channels=16, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=4, codebook_size=32, code_dim=8
)
tokenizer = mg.Tokenizer(mg.TokenizerConfig(vqgan, image_size=16, optimizer=optimizer, ema_decay=0.9))
Trainer(max_steps=60, default_root_dir=folder).fit(tokenizer, data)
tokenizer.export(folder)

# Stage 2: masked tokens to codes. ``export`` writes FOLDER/transformer.
network = TransformerConfig(32, 2, tokenizer.grid, embed_dim=32, depth=2, num_heads=2, mlp_dim=64)
config = mg.MaskedTokenConfig(network, optimizer, str(folder / "tokenizer"), global_batch=batch, ema_decay=0.9)
model = mg.MaskedTokenModel(config)
Trainer(max_steps=60, default_root_dir=folder).fit(model, data)
model.export(folder, class_names=("horizontal", "vertical"))
mg.MaskGIT.from_pretrained(folder).generate("vertical", seed=0)[0].save(folder / "vertical.png")
