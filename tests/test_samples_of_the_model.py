"""Both modules refuse samples that are not those they were built for, with a plain Trainer and data of a user."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from maskgit_pl.data import IndexedDataModule, IndexedDataset
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from tests.modules import autoregressive_model, masked_model, tokenizer_model

NETWORK = VQGANConfig(
    1, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4
)


def data(*, label: int = 0, size: int | tuple[int, int] = 8, channels: int = 1) -> IndexedDataModule:
    """Eight grey images of 8 px; the last one has the given label."""
    images = torch.arange(8 * 64, dtype=torch.int64).remainder(256).to(torch.uint8).view(8, 1, 8, 8)
    pairs = TensorDataset(images, torch.tensor([0] * 7 + [label]))
    dataset = IndexedDataset(pairs, image_size=size, in_channels=channels)
    return IndexedDataModule(dataset, dataset, global_batch=8)


def trainer() -> Trainer:
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, **dict.fromkeys(parts, False))


TRANSFORMER = TransformerConfig(16, 3, (4, 4), 16, 1, 2, 32)


def masked(tiny_pretrained):
    return masked_model(TRANSFORMER, tiny_pretrained / "tokenizer")


def autoregressive(tiny_pretrained):
    return autoregressive_model(replace(TRANSFORMER, attention="causal"), tiny_pretrained / "tokenizer")


def tokenizer(tiny_pretrained):
    return tokenizer_model(NETWORK, image_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("build", [masked, autoregressive])
def test_a_label_that_is_no_class_of_the_model_is_refused(tiny_pretrained, build):
    module: LightningModule = build(tiny_pretrained)
    with pytest.raises(ValueError, match=r"labels of the data must be in \[0, 3\), the classes .* got 3"):
        trainer().fit(module, data(label=3))  # the row of the null class
    with pytest.raises(ValueError, match=r"labels of the data must be in \[0, 3\)"):
        Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(module, data(label=3))
    trainer().fit(module, data(label=2))


@pytest.mark.parametrize("build", [tokenizer, masked])
@pytest.mark.parametrize(
    ("other", "got"),
    # 4 x 16 pixels have as many tokens as 8 x 8
    [({"size": (4, 16)}, r"\(1, 4, 16\)"), ({"size": 16}, r"\(1, 16, 16\)"), ({"channels": 3}, r"\(3, 8, 8\)")],
)
def test_images_of_another_shape_are_refused(tiny_pretrained, build, other, got):
    with pytest.raises(ValueError, match=rf"samples of the data must have the shape \(1, 8, 8\) .* got {got}"):
        trainer().fit(build(tiny_pretrained), data(**other))


def test_tokens_of_another_grid_are_refused(tiny_pretrained):
    batch = data().train.__getitems__(range(8))._replace(content=torch.zeros(8, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must have the shape \(16,\) \(tokens,\) of the model, got \(9,\)"):
        masked(tiny_pretrained).eval().draw_on_host(batch)


@pytest.mark.parametrize("build", [tokenizer, masked])
def test_batches_of_a_plain_loader_are_refused(tiny_pretrained, build):
    pairs = TensorDataset(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    loader = DataLoader(pairs, batch_size=4)
    with pytest.raises(TypeError, match=r"batches of the type list; use IndexedDataModule\(IndexedDataset"):
        trainer().fit(build(tiny_pretrained), loader, loader)


@pytest.mark.parametrize("names", [["a"], "abc", ["a", "b", 3]])
def test_an_export_without_a_name_for_each_class_writes_nothing(tiny_pretrained, tmp_path, names):
    with pytest.raises(ValueError, match="class_names must be a list of 3 strings, one for each class"):
        masked(tiny_pretrained).export(tmp_path / "out", class_names=names)
    assert not (tmp_path / "out").exists()
